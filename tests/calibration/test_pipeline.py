"""The pipeline end to end on tiny checkpoints: what it reports is what it stored, and what it saw
while calibrating is what the stored checkpoint computes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quant.calibration.pipeline as pipeline
import quant.decoder as decoder_module
from quant.architectures import LINEARS, SITES, block_prefix
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.hessian import InputHessian, NotPositiveDefinite
from quant.calibration.quantize import plan, quantize
from quant.calibration.scales import choose_scales
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.decoder import Linear, rms_norm
from quant.errors import RequestError, WorkFailed
from quant.recipe import DEFAULT_PRESET, Recipe, load_recipe
from quant.report import read_jsonl
from quant.schemes import plan_layers
from quant_kernels import reference
from quant_kernels.formats import WeightFormat, effective_weight, nearest_codes
from quant_kernels.packing import PackedWeight, unpack_int4


def windows_of(source: Path, calibration: dict) -> Tensor:
    """The calibration tokens [n, S] of a run on the local text."""
    tokens = load_tokens(calibration["dataset"], load_tokenizer(source), 258)
    return calibration_windows(
        tokens, calibration["num_calibration_samples"], calibration["max_seq_length"], seed=0
    )


def positions_of(windows: Tensor) -> Tensor:
    return torch.arange(windows.shape[1]).unsqueeze(0)


def with_tensor(source: Path, target: Path, name: str, edit) -> Path:
    """A copy of a one-file checkpoint in which `edit` has changed one tensor in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def share_lost(x: Tensor, weight: Tensor, effective: Tensor) -> float:
    """|X (W - W^)^T|^2 / |X W^T|^2 in float64, by its definition."""
    x, weight, effective = x.double(), weight.double(), effective.double()
    return float((x @ (weight - effective).T).square().sum() / (x @ weight.T).square().sum())


def test_report_has_a_row_for_every_quantized_linear_in_order(quantized):
    config = CheckpointReader(quantized.source).config
    every = [block_prefix(i) + name for i in range(config.num_layers) for name in LINEARS]
    rows, ignored = quantized.report.layers, quantized.report.ignored
    assert [row.name for row in rows] == [name for name in every if name not in ignored]
    assert bool(ignored) == ("ignore" in quantized.overrides)
    assert read_jsonl(quantized.output / "report.jsonl") == [
        dataclasses.replace(row, seconds=None) for row in rows
    ]


def test_report_agrees_with_the_stored_tensors(quantized):
    stored, source = CheckpointReader(quantized.output), CheckpointReader(quantized.source)
    wanted = quantized.overrides
    bits = weights = 0
    for row in quantized.report.layers:
        shape = source.shape(f"{row.name}.weight")
        assert row.shape == shape
        assert row.scheme == wanted.get("scheme", "w4afp8")
        assert row.group_size == wanted["group_size"]
        assert row.numerics == wanted.get("numerics", "int8" if row.scheme == "w4a8" else "lut")
        kept = [stored.read(f"{row.name}.{suffix}") for suffix in ("weight_packed", "weight_scale")]
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        assert row.bits_per_weight == pytest.approx(8 * size / (shape[0] * shape[1]))
        bits, weights = bits + 8 * size, weights + shape[0] * shape[1]
        assert row.damping is not None
        assert row.damping >= 0.01
    assert quantized.report.bits_per_weight == pytest.approx(bits / weights)
    assert quantized.report.source_size_bytes == sum(
        path.stat().st_size for path in quantized.source.glob("*.safetensors")
    )
    assert quantized.report.size_bytes == sum(
        path.stat().st_size for path in quantized.output.glob("*.safetensors")
    )


def test_reported_errors_are_those_of_the_running_checkpoint(quantized, monkeypatch):
    # Run the stored checkpoint on the calibration tokens, look at what enters every linear, and
    # measure there what the report says: so the numbers are right, and calibration of a layer saw
    # what the layers before it really give.
    windows = windows_of(quantized.source, quantized.overrides)
    decoder = load_decoder(quantized.output, dtype=torch.float32)
    source = CheckpointReader(quantized.source)
    places = {
        id(linear): block_prefix(i) + name
        for i, block in enumerate(decoder.blocks)
        for name, linear in block.linears.items()
    }
    seen: dict[str, tuple[Linear, Tensor]] = {}

    def spy(linears, x):
        seen.update({places[id(linear)]: (linear, x.flatten(0, 1)) for linear in linears})
        return original(linears, x)

    original = decoder_module.site_outputs
    monkeypatch.setattr(decoder_module, "site_outputs", spy)
    decoder.hidden_states(windows, positions_of(windows))
    for row in quantized.report.layers:
        linear, x = seen[row.name]
        assert isinstance(linear.weight, PackedWeight)
        fmt = linear.weight.fmt
        x = reference.dequantize_activation(*reference.quantize_activation(x, fmt.activation))
        weight = source.read(f"{row.name}.weight", torch.float32)
        scales = choose_scales(weight, fmt, "absmax")
        before = effective_weight(nearest_codes(weight, scales, fmt), scales, fmt)
        after = effective_weight(unpack_int4(linear.weight.words), linear.weight.scales, fmt)
        # The Hessian is summed from inputs rounded to BF16 where the hardware does that: 2^-8 of
        # each, at random.
        assert row.error_before == pytest.approx(share_lost(x, weight, before), rel=0.01), row.name
        assert row.error_after == pytest.approx(share_lost(x, weight, after), rel=0.01), row.name
        assert row.error_after < row.error_before


def test_calibration_ends_with_the_hidden_states_of_the_stored_checkpoint(
    kind, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    source = tiny_checkpoint(kind)
    last: list[Tensor] = []

    def spy(cfg, norms, site, *rest):
        hidden, x = original(cfg, norms, site, *rest)
        if site == "down":
            last[:] = [hidden]
        return hidden, x

    original = pipeline.advance
    monkeypatch.setattr(pipeline, "advance", spy)
    quantize(str(source), tmp_path / "out", "gptq", device="cpu", group_size=64, **calibration)
    windows = windows_of(source, calibration)
    decoder = load_decoder(tmp_path / "out", dtype=torch.float32)
    expected = rms_norm(last[0], decoder.norm, decoder.config.rms_norm_eps)
    found = decoder.hidden_states(windows, positions_of(windows))
    assert found.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


def test_windows_pass_through_in_batches_and_all_of_them_count(
    tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    source = str(tiny_checkpoint("llama"))
    whole = quantize(source, tmp_path / "whole", "gptq", device="cpu", **calibration)
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 2 * calibration["max_seq_length"])
    parts = quantize(source, tmp_path / "parts", "gptq", device="cpu", **calibration)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert b.error_before == pytest.approx(a.error_before, rel=1e-3)
        assert b.error_after == pytest.approx(a.error_after, rel=0.05)
    first = quantize(
        source, tmp_path / "first", device="cpu", **{**calibration, "num_calibration_samples": 2}
    )
    assert first.layers[0].error_before != pytest.approx(whole.layers[0].error_before, rel=1e-3)


def test_two_runs_write_the_same_bytes(quantized, tmp_path):
    again = tmp_path / "again"
    quantize(str(quantized.source), again, "gptq", device="cpu", **quantized.overrides)
    names = sorted(path.name for path in quantized.output.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (quantized.output / name).read_bytes(), name


@pytest.mark.parametrize("scales", ["absmax", "mse", "hessian"])
def test_round_pass_rounds_to_nearest_without_a_hessian_inverse(
    scales, tiny_checkpoint, calibration, tmp_path
):
    source = tiny_checkpoint("llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"passes:\n  - round: {{scales: {scales}}}\n")
    report = quantize(str(source), tmp_path / "out", str(recipe), device="cpu", **calibration)
    stored = CheckpointReader(tmp_path / "out")
    fmt = WeightFormat("w4afp8", 128, "lut")
    for row in report.layers:
        assert row.damping is None
        weight = CheckpointReader(source).read(f"{row.name}.weight", torch.float32)
        kept = stored.read(f"{row.name}.weight_scale")
        codes = unpack_int4(stored.read(f"{row.name}.weight_packed"))
        assert torch.equal(codes, nearest_codes(weight, kept, fmt))
        if scales == "absmax":
            assert row.error_after == pytest.approx(row.error_before, rel=1e-6)
        if scales != "hessian":
            assert torch.equal(kept, choose_scales(weight, fmt, scales))


@pytest.mark.parametrize("scheme", ["w4afp8", "w4a8"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
# No layer comes after this down_proj and would see what comes out of it.
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.k_proj"])
def test_weight_that_is_not_finite_fails_with_the_layers_name(
    scheme, poison, name, tiny_checkpoint, calibration, tmp_path
):
    def edit(weight: Tensor) -> None:
        weight[3, 5] = poison

    tensor = f"model.layers.1.{name}.weight"
    source = with_tensor(tiny_checkpoint("llama"), tmp_path / "model", tensor, edit)
    with pytest.raises(RequestError, match=rf"model\.layers\.1\.{name}"):
        quantize(str(source), tmp_path / "out", "gptq", device="cpu", scheme=scheme, **calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", ["w4afp8", "w4a8"])
@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_are_not_finite_fail_with_the_layers_name(
    scheme, layer, tiny_checkpoint, calibration, tmp_path
):
    def edit(weight: Tensor) -> None:
        weight[5] = 3e38  # finite, but what comes out of this norm is not

    norm = f"model.layers.{layer}.post_attention_layernorm.weight"
    broken = with_tensor(tiny_checkpoint("llama"), tmp_path / "model", norm, edit)
    message = rf"layers\.{layer}\.mlp\.gate_proj .*NaN or Inf in \d+ of 288 .*skip-to-bf16"
    with pytest.raises(WorkFailed, match=message):
        quantize(str(broken), tmp_path / "out", "gptq", device="cpu", scheme=scheme, **calibration)
    # Of the failure in block 1, block 0 is kept for --resume.
    assert {path.name for path in tmp_path.iterdir()} == {"model"} | (
        {".out.partial"} if layer else set()
    )


def test_hessian_that_cannot_be_inverted_fails_with_the_layers_name_and_advice(
    tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise NotPositiveDefinite("not positive definite with damping 1")

    monkeypatch.setattr(InputHessian, "factorize", refuse)
    with pytest.raises(WorkFailed, match=r"model\.layers\.0\.self_attn\.q_proj") as caught:
        quantize(
            str(tiny_checkpoint("llama")), tmp_path / "out", "gptq", device="cpu", **calibration
        )
    assert "damping 1" in str(caught.value)
    assert "more calibration samples" in str(caught.value)


def test_progress_counts_every_site_once_and_ends(tiny_checkpoint, calibration, tmp_path):
    events = []
    quantize(
        str(tiny_checkpoint("llama")),
        tmp_path / "out",
        device="cpu",
        on_progress=events.append,
        **calibration,
    )
    steps = [e for e in events if e.stage == "quantize"]
    counts = [e.done for e in steps]
    assert counts == sorted(counts)
    assert set(counts) == set(range(2 * len(SITES) + 1))
    assert {e.total for e in steps} == {2 * len(SITES)}
    for stage in {e.stage for e in events}:
        final = [e for e in events if e.stage == stage][-1]
        assert final.done == final.total


def test_plan_foretells_the_run_and_writes_nothing(quantized, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in quantized.source.iterdir()}
    # The run has decided whether to rotate; the default recipe leaves that to it.
    rotated = any("rotate" in step for step in quantized.report.recipe["passes"])
    recipe = load_recipe(DEFAULT_PRESET).decided(rotated)
    planned = plan(str(quantized.source), tmp_path / "out", recipe, **quantized.overrides)
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in quantized.source.iterdir()} == before
    rows = {row.name: row for row in planned.layers}
    assert {n for n, row in rows.items() if row.fmt is None} == set(quantized.report.ignored)
    for row in quantized.report.layers:
        fmt = rows[row.name].fmt
        assert (fmt.scheme, fmt.group_size, fmt.numerics) == (
            row.scheme,
            row.group_size,
            row.numerics,
        )
        assert rows[row.name].shape == row.shape
    assert planned.source_size_bytes == quantized.report.source_size_bytes
    # Files also hold headers: some hundred bytes a tensor, which shows in a model this small.
    assert planned.size_bytes == pytest.approx(quantized.report.size_bytes, rel=0.05)


def test_layers_that_do_not_fit_the_format_are_refused_by_name(tiny_checkpoint):
    config = CheckpointReader(tiny_checkpoint("llama")).config
    ragged = dataclasses.replace(config, intermediate_size=192)
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.down_proj \[128, 192\].*64 or 32"):
        plan_layers(ragged, Recipe(group_size=128))
    assert plan_layers(ragged, Recipe(group_size=64))
    ignoring = plan_layers(ragged, Recipe(group_size=128, ignore=(r"re:.*down_proj",)))
    assert {name for name, row in ignoring.items() if row.fmt is None} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (("model.layers.7.mlp.up_proj",), "matches no layer"),
        (("up_proj",), "matches no layer"),
        ((r"re:up_proj",), "matches no layer"),  # a regex matches from the beginning of the name
        ((r"re:model\.layers.*",), "leaves no layer"),
    ],
)
def test_ignore_lists_that_cannot_be_meant_are_refused(ignore, message, tiny_checkpoint, tmp_path):
    with pytest.raises(RequestError, match=message):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "out", ignore=ignore)
    assert not list(tmp_path.iterdir())


def test_quantized_model_is_not_quantized_again(quantized_case, tmp_path):
    source = quantized_case("lut-128").output
    with pytest.raises(RequestError, match=r"already quantized \(compressed-tensors\)"):
        quantize(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "known: auto, bfloat16, float16, float32"),
        ({"device": "tpu:0"}, "use auto, cpu, cuda"),
        ({"device": "meta"}, "use auto, cpu, cuda"),
        ({"recipe": "gptqq"}, "did you mean 'gptq'"),
        ({"scheme": "w4a16"}, "w4afp8, w4a8"),
        ({"num_calibration_samples": 0}, "must be positive"),
        ({"num_sample": 8}, "num_sample"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    options, message, tiny_checkpoint, tmp_path
):
    with pytest.raises(RequestError, match=message):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_side_file_says_what_was_done(quantized):
    side = json.loads((quantized.output / "fourbyeight.json").read_text())
    row = quantized.report.layers[0]
    assert (side["scheme"], side["group_size"], side["numerics"]) == (
        row.scheme,
        row.group_size,
        row.numerics,
    )
    assert side["source"] == str(quantized.source)
    assert side["recipe"]["calibration"]["dataset"] == quantized.overrides["dataset"]
    assert side["recipe"]["ignore"] == list(quantized.overrides.get("ignore", ()))
