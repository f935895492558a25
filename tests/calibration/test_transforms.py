"""Rotations and smoothing are equivalences: the model computes what it did, and calibration sees
what the stored checkpoint computes."""

import dataclasses
import itertools
import re

import pytest
import torch
from torch import Tensor

import quant.calibration.pipeline as pipeline
from quant.architectures import LINEARS, LM_HEAD, SITES
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.folding import PRODUCER, fold, fold_into_rows, shared_by
from quant.calibration.quantize import quantize
from quant.calibration.rope import fold_turn
from quant.calibration.rotation import NORM_OF, make_rotation, orthogonal
from quant.calibration.scales import choose_scales
from quant.checkpoint.inspection import inspect_checkpoint
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.decoder import Block, Decoder, Linear, rms_norm
from quant.passes import RotatePass
from quant_kernels.formats import effective_weight, every_format, nearest_codes
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import PackedWeight, pack_int4, unpack_int4

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(40).unsqueeze(0)


def logits(model: Decoder) -> Tensor:
    return model.logits(model.hidden_states(TOKENS, POSITIONS))


def tensors_of(block: Block) -> dict[str, Tensor]:
    """A dense block's tensors by their names inside the block."""
    found = dict(block.norms)
    for name, linear in block.linears.items():
        assert isinstance(linear.weight, Tensor)
        found[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            found[f"{name}.bias"] = linear.bias
    return found


def block_of(tensors: dict[str, Tensor], like: Block) -> Block:
    linears = {
        name: Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in LINEARS
    }
    return dataclasses.replace(
        like, norms={name: tensors[name] for name in like.norms}, linears=linears
    )


@pytest.mark.parametrize(("residual", "heads"), [(True, False), (False, True), (True, True)])
def test_a_rotated_model_has_the_same_logits(residual, heads, kind, tiny_checkpoint):
    model = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    expected = logits(model)
    rotation = make_rotation(RotatePass(residual, heads), model.config, torch.device("cpu"))
    blocks = []
    for block in model.blocks:
        tensors = tensors_of(block)
        rotation.block(model.config, tensors)
        blocks.append(block_of(tensors, block))
        # Each kind of weight that is to be turned is another one afterwards.
        turned = {"self_attn.q_proj": residual, "mlp.down_proj": residual}
        turned |= {"self_attn.v_proj": True, "self_attn.o_proj": True}
        for name, should in turned.items():
            before = block.linears[name].weight
            assert torch.equal(tensors[f"{name}.weight"], before) != should, name
    rotated = dataclasses.replace(
        model,
        blocks=tuple(blocks),
        embedding=rotation.outer("model.embed_tokens", model.embedding, model.norm),
        norm=rotation.outer("model.norm", model.norm, model.norm),
        lm_head=rotation.outer(LM_HEAD, model.lm_head, model.norm),
    )
    assert expected.std() > 0.1
    assert (logits(rotated) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1, 2, 64, 96, 576])
def test_rotations_are_orthogonal_and_spread_what_is_in_one_channel(size):
    q = orthogonal(size, seed=3)
    assert (q @ q.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    if size & (size - 1) == 0:
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))
    assert size == 1 or not torch.equal(q, orthogonal(size, seed=4))
    assert torch.equal(q, orthogonal(size, seed=3))


@pytest.mark.parametrize("site", SITES)
def test_a_smoothed_model_has_the_same_logits(site, kind, tiny_checkpoint):
    model = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    cfg, expected = model.config, logits(model)
    generator = torch.Generator().manual_seed(9)
    blocks = []
    for block in model.blocks:
        tensors = tensors_of(block)
        s = random_scales(tensors[f"{SITES[site][0]}.weight"].shape[1], generator)
        if site == "o":
            heads = s.view(-1, shared_by(cfg, site), cfg.head_dim)
            s = heads[:, :1].expand_as(heads).reshape(-1)
        real = fold(cfg, site, tensors, {}, s)
        # A norm takes any s, up to rounding; rows take the nearest power of two.
        power = torch.exp2(s.log2().round())
        assert torch.allclose(real, s if site in NORM_OF else power, rtol=1e-5)
        changed = NORM_OF.get(site) or f"{PRODUCER[site]}.weight"
        assert not torch.equal(tensors[changed], tensors_of(block)[changed])
        for name in SITES[site]:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * real
        blocks.append(block_of(tensors, block))
    smoothed = dataclasses.replace(model, blocks=tuple(blocks))
    assert (logits(smoothed) - expected).abs().max() < 1e-3


def test_a_model_with_turned_pairs_has_the_same_logits(kind, tiny_checkpoint):
    model = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    cfg, expected = model.config, logits(model)
    if cfg.qk_norm:
        # Weights come between q_proj and RoPE; the pass leaves such a model alone.
        with pytest.raises(ValueError, match="QK-norm"):
            fold_turn({}, cfg, torch.zeros(cfg.num_kv_heads, cfg.head_dim // 2))
        return
    blocks = []
    for block in model.blocks:
        tensors = tensors_of(block)
        angles = torch.rand(cfg.num_kv_heads, cfg.head_dim // 2) * 6
        folded = fold_turn(tensors, cfg, angles)
        names = {name for name in tensors if re.search("[qk]_proj", name)}
        assert set(folded) == names
        assert all(not torch.allclose(folded[name], tensors[name]) for name in names)
        blocks.append(block_of({**tensors, **folded}, block))
    turned = dataclasses.replace(model, blocks=tuple(blocks))
    assert (logits(turned) - expected).abs().max() < 1e-3


def random_scales(count: int, generator: torch.Generator) -> Tensor:
    """Between a third and three, log-uniform."""
    return 3 ** (2 * torch.rand(count, generator=generator) - 1)


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_quantized_rows_take_up_a_scale_exactly(fmt):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(24, 256, generator=generator) * random_scales(24, generator).unsqueeze(1)
    scales = choose_scales(w, fmt, "absmax")
    codes = nearest_codes(w, scales, fmt)
    before = effective_weight(codes, scales, fmt)
    s = torch.exp2(torch.randint(-5, 6, (24,), generator=generator).float())
    folded = fold_into_rows(PackedWeight(pack_int4(codes), scales, fmt), s)
    assert torch.equal(unpack_int4(folded.words), codes)
    after = effective_weight(codes, folded.scales, fmt)
    assert torch.equal(after * s.unsqueeze(1), before)


RECIPES = {
    "adaptive": "- smooth: {method: adaptive}\n  - compensate",
    "channel": "- smooth: {method: channel, strength: 0.5}\n  - compensate",
    "search": "- smooth: {method: search, sites: [o, down, gate_up]}\n  - compensate",
    "rotate": "- rotate\n  - compensate",
    "feedback": "- compensate: {feedback: 0.5}",
    "all": "- rotate: {seed: 7}\n  - smooth: {method: search}\n  - compensate: {feedback: 0.7}",
    "keys": "- rope\n  - compensate",
    "turned": "- smooth: {sites: [gate_up]}\n  - rope: {turn: true}\n  - compensate",
    "pairs": "- rope: {pre: 0.5, post: channels, top_k: 3}\n  - compensate: {feedback: 0.5}",
    "rounded": "- rotate: {heads: false}\n  - smooth: {method: channel}\n  - round",
}


def write_recipe(name: str, folder) -> str:
    path = folder / f"{name}.yaml"
    kv = "kv_cache: kv4\n" if "rope" in RECIPES[name] else ""
    path.write_text(f"{kv}passes:\n  {RECIPES[name]}\n")
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_calibration_ends_with_the_hidden_states_of_the_stored_checkpoint(
    recipe, kind, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    source = tiny_checkpoint(kind)
    last: list[Tensor] = []

    def spy(cfg, norms, site, *rest):
        hidden, x = original(cfg, norms, site, *rest)
        if site == "down":
            last[:] = [hidden]  # the last batch's
        return hidden, x

    original = pipeline.advance
    monkeypatch.setattr(pipeline, "advance", spy)
    # Several batches of windows, of which the last is collected above; it is shorter.
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 4 * calibration["max_seq_length"])
    # In BF16, as they wait otherwise, some percent of the codes would be others.
    monkeypatch.setattr(pipeline, "WAITING", torch.float32)
    # A layer that stays as it is has to be scaled and turned with the others.
    ignore = ["model.layers.1.mlp.up_proj", r"re:model\.layers\.0\.self_attn\.(k|v)_proj"]
    report = quantize(
        str(source),
        tmp_path / "out",
        write_recipe(recipe, tmp_path),
        device="cpu",
        dtype="float32",
        group_size=64,
        ignore=ignore,
        scheme="w4a8" if recipe == "adaptive" else "w4afp8",
        **calibration,
    )
    cfg = CheckpointReader(source).config
    tokens = load_tokens(calibration["dataset"], load_tokenizer(source), cfg.vocab_size)
    windows = calibration_windows(
        tokens, calibration["num_calibration_samples"], calibration["max_seq_length"], seed=0
    )
    stored = load_decoder(tmp_path / "out", dtype=torch.float32)
    positions = torch.arange(windows.shape[1]).unsqueeze(0)
    expected = rms_norm(last[0], stored.norm, cfg.rms_norm_eps)
    found = stored.hidden_states(windows, positions)[-len(expected) :]
    assert 0 < len(expected) < len(windows)
    assert found.std() > 0.5
    # Dividing by s here and by what took it up there rounds a few codes to their neighbours.
    assert (found - expected).abs().median() < 2e-3
    assert (found - expected).abs().mean() < 3e-2
    # And it is still the model: a transform that is wrong loses everything.
    dense = load_decoder(source, dtype=torch.float32)
    theirs, ours = logits(dense), logits(stored)
    assert float((ours - theirs).square().sum() / theirs.square().sum()) < 0.4
    assert {bool(row.smoothing) for row in report.layers} <= {True, False}
    seen = inspect_checkpoint(tmp_path / "out")
    assert seen.kv_cache == (KVFormat().label if "rope" in RECIPES[recipe] else None)
    assert any(row.smoothing for row in report.layers) == ("smooth" in RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["search", "feedback", "all", "pairs", "keys", "turned"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_resumed_run_writes_the_same_bytes(
    recipe, offload, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 4 * calibration["max_seq_length"])
    source = str(tiny_checkpoint("llama-biases"))
    options = {"device": "cpu", "group_size": 64, "dtype": "float16", **calibration}
    options |= {"activation_offload": offload}
    path = write_recipe(recipe, tmp_path)
    quantize(source, tmp_path / "whole", path, **options)

    class Stop(Exception):
        pass

    def stop_in_block_1(progress):
        if progress.stage == "quantize" and progress.done >= len(SITES) + 2:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", path, on_progress=stop_in_block_1, **options)
    report = quantize(source, tmp_path / "out", path, resume=True, **options)
    assert report.resumed_blocks == 1
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_passes_in_a_wrong_order_or_twice_are_refused_by_name(tmp_path):
    from quant.errors import RequestError
    from quant.recipe import parse_recipe

    for passes, message in (
        ("[smooth, rotate, round]", "must be in the order rotate, smooth, round"),
        ("[smooth, smooth, round]", "smooth is given 2 times"),
        ("[{smooth: {method: adaptiv}}, round]", "did you mean 'adaptive'"),
        ("[{smooth: {sites: [qvk]}}, round]", "did you mean 'qkv'"),
        ("[{smooth: {sites: qkv}}, round]", "passes.smooth.sites must be a list of strings"),
        ("[{rotate: {residual: 1}}, round]", "passes.rotate.residual must be bool"),
        ("[{rotate: {residual: false, heads: false}}, round]", "neither residual nor heads"),
    ):
        with pytest.raises(RequestError) as caught:
            parse_recipe(f"passes: {passes}", "r.yaml")
        assert message in str(caught.value), passes


def test_recipes_of_every_order_survive_their_own_text():
    import yaml

    from quant.recipe import parse_recipe

    for names in itertools.product(("", "rotate, "), ("", "smooth, "), ("round", "compensate")):
        recipe = parse_recipe(f"passes: [{''.join(names)}]", "r.yaml")
        assert parse_recipe(yaml.safe_dump(recipe.to_dict()), "again.yaml") == recipe.override(
            numerics=recipe.weight_format.numerics
        )
