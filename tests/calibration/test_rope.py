"""RoPE-aware key scales leave the model as it is, and make the rounding of keys cost less."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quant.architectures import DecoderConfig
from quant.calibration.quantize import quantize
from quant.calibration.rope import (
    channel_scale,
    check_rotary_layout,
    fold_pair_scale,
    pair_scale,
    shared_pairs,
    without_scaled_pairs,
)
from quant.checkpoint.loading import load_decoder
from quant.decoder import (
    Block,
    Decoder,
    KeyTransform,
    Linear,
    causal_attention,
    check_head_dim,
)
from quant.errors import RequestError
from quant_kernels import reference
from quant_kernels.kv4 import KVFormat, dequantize_kv, quantize_kv

TOLERANCE = 1e-3
NOTICEABLE = 10 * TOLERANCE


def random_tokens(length: int = 40) -> Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))


def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return decoder.logits(decoder.hidden_states(tokens, positions))


def random_scale(*shape: int, seed: int = 0) -> Tensor:
    """From 1/4 to 4, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).mul(4).sub(2).exp2()


def random_transform(cfg: DecoderConfig, seed: int) -> KeyTransform:
    shape = cfg.num_kv_heads, cfg.head_dim
    sign = torch.where(random_scale(*shape, seed=seed + 50) > 1, 1.0, -1.0)
    shift = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return KeyTransform(sign * random_scale(*shape, seed=seed), shift)


def with_folded_pairs(decoder: Decoder, scales: list[Tensor]) -> Decoder:
    blocks = []
    for block, n in zip(decoder.blocks, scales, strict=True):
        tensors = dict(block.norms)
        for name, linear in block.linears.items():
            assert isinstance(linear.weight, Tensor)
            tensors[f"{name}.weight"] = linear.weight
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias
        folded = fold_pair_scale(tensors, decoder.config, n)
        tensors |= folded
        linears = {
            name: Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
            for name in block.linears
        }
        blocks.append(Block({name: tensors[name] for name in block.norms}, linears, block.keys))
    return dataclasses.replace(decoder, blocks=tuple(blocks))


def with_keys(decoder: Decoder, keys: list[KeyTransform], kv: KVFormat | None = None) -> Decoder:
    blocks = tuple(
        dataclasses.replace(block, keys=one)
        for block, one in zip(decoder.blocks, keys, strict=True)
    )
    return dataclasses.replace(decoder, blocks=blocks, kv=kv)


def with_ratio(decoder: Decoder, ratio: int, seed: int = 5) -> Decoder:
    """The decoder with 2 KV heads and ratio query heads to each, of random weights."""
    cfg = dataclasses.replace(decoder.config, num_kv_heads=2, num_heads=2 * ratio)
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for block in decoder.blocks:
        linears = dict(block.linears)
        for name in linears:
            if name.startswith("self_attn"):
                shape = cfg.linear_shape(name)
                weight = 0.15 * torch.randn(shape, generator=generator)
                bias = None
                if cfg.has_bias(name):
                    bias = 0.3 * torch.randn(shape[0], generator=generator)
                linears[name] = Linear(weight, bias)
        blocks.append(Block(block.norms, linears))
    return dataclasses.replace(decoder, config=cfg, blocks=tuple(blocks))


def pair_scales(cfg: DecoderConfig) -> list[Tensor]:
    heads = 1 if cfg.qk_norm else cfg.num_kv_heads
    return [random_scale(heads, cfg.head_dim // 2, seed=i) for i in range(cfg.num_layers)]


def transforms(cfg: DecoderConfig) -> list[KeyTransform]:
    return [random_transform(cfg, 10 + i) for i in range(cfg.num_layers)]


def check_equivalence(decoder: Decoder) -> None:
    tokens = random_tokens()
    expected = logits_of(decoder, tokens)
    folded = with_folded_pairs(decoder, pair_scales(decoder.config))
    both = with_keys(folded, transforms(decoder.config))
    for changed in (folded, with_keys(decoder, transforms(decoder.config)), both):
        assert float((logits_of(changed, tokens) - expected).abs().max()) < TOLERANCE


def test_every_architecture_computes_the_same(kind, tiny_checkpoint):
    check_equivalence(load_decoder(tiny_checkpoint(kind), dtype=torch.float32))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_every_gqa_ratio_computes_the_same(kind, ratio, tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    check_equivalence(with_ratio(decoder, ratio))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_folded_tensor_counts(kind, tiny_checkpoint):
    # Equivalence by doing nothing would pass above: with one tensor left as it was, it must not.
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    tokens = random_tokens()
    expected = logits_of(decoder, tokens)
    n = pair_scales(decoder.config)[0]
    block = decoder.blocks[0]
    tensors = {**block.norms}
    for name, linear in block.linears.items():
        tensors[f"{name}.weight"] = linear.weight
        tensors[f"{name}.bias"] = linear.bias
    folded = fold_pair_scale(tensors, decoder.config, n)
    part = "norm" if decoder.config.qk_norm else "proj"
    wanted = {f"self_attn.{x}_{part}.weight" for x in "qk"}
    wanted |= {f"self_attn.{x}_proj.bias" for x in "qk"} if kind == "qwen2" else set()
    assert set(folded) == wanted
    for name in wanted:
        mixed = {**tensors, **folded, name: tensors[name]}
        linears = {
            linear: Linear(mixed[f"{linear}.weight"], mixed[f"{linear}.bias"])
            for linear in block.linears
        }
        changed = Block({norm: mixed[norm] for norm in block.norms}, linears)
        blocks = (changed, *decoder.blocks[1:])
        moved = logits_of(dataclasses.replace(decoder, blocks=blocks), tokens) - expected
        assert float(moved.abs().max()) > NOTICEABLE, name


def test_a_scale_that_differs_inside_a_pair_does_not_commute(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("llama"), dtype=torch.float32)
    block, cfg = decoder.blocks[0], decoder.config
    uneven = random_scale(cfg.num_kv_heads * cfg.head_dim, 1)
    ratio = cfg.num_heads // cfg.num_kv_heads
    for_q = uneven.view(cfg.num_kv_heads, -1).repeat_interleave(ratio, 0).view(-1, 1)
    linears = dict(block.linears)
    linears["self_attn.k_proj"] = Linear(linears["self_attn.k_proj"].weight * uneven, None)
    linears["self_attn.q_proj"] = Linear(linears["self_attn.q_proj"].weight / for_q, None)
    blocks = (Block(block.norms, linears), *decoder.blocks[1:])
    tokens = random_tokens()
    moved = logits_of(dataclasses.replace(decoder, blocks=blocks), tokens)
    assert float((moved - logits_of(decoder, tokens)).abs().max()) > NOTICEABLE


def test_fold_refuses_scales_of_other_heads(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("qwen3"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[3, 16\]; expected \[1, 16\]"):
        fold_pair_scale({}, decoder.config, torch.ones(3, 16))


def test_keys_and_queries_are_transformed_together():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(3, 5, heads, 16, generator=generator) for heads in (6, 2))
    keys = KeyTransform(random_scale(2, 16), torch.randn(2, 16, generator=generator))
    found_q, found_k = keys.apply(q, k)
    for h in range(6):
        assert torch.equal(found_q[:, :, h], q[:, :, h] / keys.scale[h // 3])
    for h in range(2):
        assert torch.equal(found_k[:, :, h], (k[:, :, h] - keys.shift[h]) * keys.scale[h])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_attention_sees_rounded_rows_and_transformed_keys(symmetric, window):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 70, heads, 32, generator=generator) for heads in (6, 2, 2))
    keys = KeyTransform(random_scale(2, 32), torch.randn(2, 32, generator=generator))
    fmt = KVFormat(symmetric=symmetric)
    found = causal_attention(window, fmt, keys)(q, k, v)
    q_seen, k_seen = keys.apply(q, k)
    codes, scale = reference.quantize_activation(q_seen, "fp8")
    rows = [dequantize_kv(quantize_kv(x, fmt)) for x in (k_seen, v)]
    wanted = causal_attention(window)(reference.dequantize_activation(codes, scale), *rows)
    # P has four significant bits: up to 1/16 of it, at random, and early tokens see few values.
    assert float((found - wanted).square().mean().sqrt()) < 0.025
    exact = causal_attention(window)(q, k, v)
    assert float((exact - wanted).square().mean().sqrt()) > 0.05


def test_dtype_of_the_model_goes_on(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("llama"))
    decoder = with_keys(decoder, transforms(decoder.config), KVFormat())
    assert logits_of(decoder, random_tokens()).dtype == torch.bfloat16


def test_pair_scale_is_a_power_with_geometric_mean_one():
    largest = random_scale(3, 16) * 10
    n = pair_scale(largest, 0.5)
    torch.testing.assert_close(n.log().mean(-1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(n[1] / n[1, 0], (largest[1, 0] / largest[1]).sqrt())
    assert torch.equal(pair_scale(largest, 0.0), torch.ones(3, 16))


def test_channels_that_never_occur_do_not_break_a_scale():
    largest = random_scale(2, 16)
    largest[0, 3] = 0
    largest[1] = 0
    assert bool(torch.isfinite(pair_scale(largest)).all())
    assert bool((pair_scale(largest) > 0).all())
    assert torch.equal(pair_scale(largest)[1], torch.ones(16))


def test_channel_scale_takes_the_worst_channels_and_their_partners():
    largest = random_scale(2, 16)
    largest[0, 2], largest[0, 13], largest[1, 7] = 50, 40, 60
    largest[1, 15] = 55
    s = channel_scale(largest, 0.5, top_k=2)
    chosen = [{2, 10, 13, 5}, {7, 15}]
    for h in (0, 1):
        assert set((s[h] != 1).nonzero().flatten().tolist()) == chosen[h]
        rest = [c for c in range(16) if c not in chosen[h]]
        level = largest[h, rest].log().mean().exp()
        for c in chosen[h]:  # each its own value, so that it comes to the level of the others
            assert float(s[h, c]) == pytest.approx(float((level / largest[h, c]).sqrt()), rel=1e-5)
    everywhere = channel_scale(largest, 0.5)
    assert torch.equal(everywhere, channel_scale(largest, 0.5, top_k=16))
    torch.testing.assert_close(everywhere.log().mean(-1), torch.zeros(2), rtol=0, atol=1e-6)
    assert bool((everywhere != 1).all())


def test_pairs_that_are_scaled_after_rope_are_not_before():
    s = torch.ones(2, 8)
    s[0, 1], s[1, 6] = 0.5, 3
    n = random_scale(2, 4)
    found = without_scaled_pairs(n, s)
    wanted = n.clone()
    wanted[0, 1] = wanted[1, 2] = 1
    assert torch.equal(found, wanted)
    shared = without_scaled_pairs(n[:1], s)  # with QK-norm, all heads share n
    assert (shared == 1).tolist() == [[False, True, True, False]]


def test_shared_pairs_do_not_depend_on_the_level_of_a_head():
    largest = random_scale(3, 8)
    found = shared_pairs(largest)
    assert found.shape == (1, 8)
    torch.testing.assert_close(shared_pairs(largest * torch.tensor([[1.0], [7.0], [0.1]])), found)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_interleave": True}, "rope_interleave"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rotary_pct": 0.25}, "rotary_pct"),
        ({"rope_scaling": {"rope_interleaved": True}}, "rope_interleaved"),
    ],
)
def test_other_rotary_layouts_are_refused_by_name(config, named):
    with pytest.raises(RequestError, match=named):
        check_rotary_layout(config)


def test_our_architectures_have_the_rotary_layout(kind, tiny_checkpoint):
    import json

    check_rotary_layout(json.loads((tiny_checkpoint(kind) / "config.json").read_text()))
    check_rotary_layout({"rope_scaling": None, "partial_rotary_factor": 1.0})


def test_causal_attention_is_blind_to_a_shift_of_all_keys():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 30, heads, 16, generator=generator) for heads in (6, 2, 2))
    shift = KeyTransform(torch.ones(2, 16), 2 * torch.randn(2, 16, generator=generator))
    for window in (None, 7):
        attend = causal_attention(window)
        found = causal_attention(window, None, shift)(q, k, v)
        torch.testing.assert_close(found, attend(q, k, v), rtol=0, atol=1e-5)


def test_heads_that_no_kernel_takes_are_refused_before_any_work(tiny_checkpoint, tmp_path):
    config = dataclasses.replace(load_decoder(tiny_checkpoint("llama")).config, head_dim=80)
    with pytest.raises(RequestError, match=r"kv4 takes heads of dimension 32, .* have 80"):
        check_head_dim(config)
    source, output = tmp_path / "source", tmp_path / "out"
    shape = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=80, **shape
        )
    )
    model.save_pretrained(source)
    with pytest.raises(RequestError, match="have 80: use kv_cache none"):
        quantize(str(source), output, "rtn", group_size=32, kv_cache="kv4", device="cpu")
    assert not output.exists()
