"""Sites that cannot be quantized: the run stops and keeps what is done, or leaves them alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quant.calibration.pipeline as pipeline
from quant.architectures import SITES
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.hessian import InputHessian, NotPositiveDefinite
from quant.calibration.quantize import plan, quantize
from quant.calibration.resume import finished_blocks
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.decoder import rms_norm
from quant.errors import WorkFailed
from quant_kernels.packing import PackedWeight

ORDER = [(layer, site) for layer in range(2) for site in SITES]


def linears_of(layer: int, site: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.{name}" for name in SITES[site])


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def source(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def begin(source: Path, calibration: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """A run to tmp_path / name, with changed options."""

    def run(name: str = "out", model: Path = source, **options: Any) -> Any:
        options = {"device": "cpu", "group_size": 64, **calibration, **options}
        return quantize(str(model), tmp_path / name, **{"recipe": "gptq", **options})

    return run


@pytest.fixture
def break_at(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The Hessians of some sites cannot be inverted: known by the linears that are quantized."""

    def install(*places: tuple[int, str]) -> None:
        def quantize_site(names: Any, *rest: Any, **options: Any) -> Any:
            nonlocal current
            current = tuple(names)
            return original_site(names, *rest, **options)

        def factorize(self: InputHessian, damping: float, act_order: bool) -> float:
            if current in broken:
                raise NotPositiveDefinite("not positive definite with damping 1")
            return original(self, damping, act_order)

        current: tuple[str, ...] = ()
        broken = {linears_of(*place) for place in places}
        original_site, original = pipeline.quantize_site, InputHessian.factorize
        monkeypatch.setattr(pipeline, "quantize_site", quantize_site)
        monkeypatch.setattr(InputHessian, "factorize", factorize)

    return install


@pytest.mark.parametrize(("layer", "site"), ORDER)
def test_stop_names_the_layers_and_keeps_the_blocks_before(
    layer: int, site: str, begin: Any, break_at: Any, tmp_path: Path
) -> None:
    break_at((layer, site))
    with pytest.raises(WorkFailed) as caught:
        begin()
    message = str(caught.value)
    names = linears_of(layer, site)
    assert names[0] in message
    assert (f"and {len(names) - 1} more" in message) == (len(names) > 1)
    assert "cannot be inverted" in message
    assert "damping 1" in message
    assert "--on-failure skip-to-bf16" in message
    assert ("--resume" in message) == (layer > 0)
    assert finished_blocks(tmp_path / "out") == layer
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists() == (layer > 0)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 1])
def test_skipped_site_is_the_sources_and_the_rest_is_quantized_on_top_of_it(
    layer: int, site: str, begin: Any, break_at: Any, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def spy(cfg: Any, norms: Any, at: str, *rest: Any) -> Any:
        hidden, x = original(cfg, norms, at, *rest)
        if at == "down":
            last[:] = [hidden]
        return hidden, x

    last: list[Tensor] = []
    original = pipeline.advance
    monkeypatch.setattr(pipeline, "advance", spy)
    break_at((layer, site))
    report = begin(on_failure="skip-to-bf16")
    output, names = tmp_path / "out", linears_of(layer, site)

    (skipped,) = report.skipped
    assert skipped.names == names
    assert "damping 1" in skipped.reason
    assert report.ignored == names
    every = {f"model.layers.{i}.{name}" for i in range(2) for of in SITES.values() for name in of}
    assert {row.name for row in report.layers} == every - set(names)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", *names]

    before, after = CheckpointReader(source), CheckpointReader(output)
    for name in every:
        dense = f"{name}.weight" in after.names
        assert dense == (name in names)
        assert (f"{name}.weight_packed" in after.names) != dense
        if dense:
            one, other = before.read(f"{name}.weight"), after.read(f"{name}.weight")
            assert torch.equal(one.view(torch.int16), other.view(torch.int16))

    decoder = load_decoder(output, dtype=torch.float32)
    for i, block in enumerate(decoder.blocks):
        for name, linear in block.linears.items():
            packed = isinstance(linear.weight, PackedWeight)
            assert packed == (f"model.layers.{i}.{name}" not in names)
    dataset = str(report.recipe["calibration"]["dataset"])
    tokens = load_tokens(dataset, load_tokenizer(source), 258)
    windows = calibration_windows(tokens, 6, 48, seed=0)
    found = decoder.hidden_states(windows, torch.arange(48).unsqueeze(0))
    expected = rms_norm(last[0], decoder.norm, decoder.config.rms_norm_eps)
    assert found.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scheme", ["w4afp8", "w4a8"])
def test_skip_gives_the_same_bytes_from_the_start_after_a_stop_and_wherever_activations_wait(
    scheme: str, begin: Any, break_at: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 2 * 48)
    break_at((0, "o"), (1, "qkv"), (1, "down"))
    expected = begin("cpu", on_failure="skip-to-bf16", activation_offload="cpu", scheme=scheme)
    assert [item.names for item in expected.skipped] == [
        linears_of(0, "o"),
        linears_of(1, "qkv"),
        linears_of(1, "down"),
    ]
    for place in ("none", "disk"):
        begin(place, on_failure="skip-to-bf16", activation_offload=place, scheme=scheme)
        assert files_of(tmp_path / place) == files_of(tmp_path / "cpu")
    # Block 0 has a skipped site, block 1 stops; then in the other direction.
    for first, second in (("disk", "disk"), ("disk", "cpu"), ("cpu", "disk"), ("cpu", "cpu")):
        name = f"{first}-{second}"

        def stop(event: Any) -> None:
            if event.stage == "quantize" and event.done == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            begin(
                name,
                on_failure="skip-to-bf16",
                activation_offload=first,
                scheme=scheme,
                on_progress=stop,
            )
        assert finished_blocks(tmp_path / name) == 1
        with pytest.raises(WorkFailed, match="1 blocks are done and kept"):
            begin(name, resume=True, activation_offload=second, scheme=scheme)
        report = begin(
            name, resume=True, on_failure="skip-to-bf16", activation_offload=first, scheme=scheme
        )
        assert files_of(tmp_path / name) == files_of(tmp_path / "cpu")
        assert report.skipped == expected.skipped
        assert report.ignored == expected.ignored
        assert report.resumed_blocks == 1


def test_stopped_for_a_failure_and_resumed_with_skip(
    begin: Any, break_at: Any, tmp_path: Path
) -> None:
    break_at((1, "gate_up"))
    begin("skipping", on_failure="skip-to-bf16")
    with pytest.raises(WorkFailed, match=r"layers\.1\.mlp\.gate_proj.*and 1 more"):
        begin()
    report = begin(on_failure="skip-to-bf16", resume=True)
    assert report.resumed_blocks == 1
    assert [item.names for item in report.skipped] == [linears_of(1, "gate_up")]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "skipping")


def test_site_that_loses_too_much_gets_more_damping_and_then_fails(
    begin: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def factorize(self: InputHessian, damping: float, act_order: bool) -> float:
        asked.append(damping)
        return original(self, damping, act_order)

    asked: list[float] = []
    original = InputHessian.factorize
    monkeypatch.setattr(InputHessian, "factorize", factorize)
    with pytest.raises(WorkFailed) as caught:
        begin(max_error=1e-5)
    assert asked == pytest.approx([0.01, 0.1, 1.0])
    message = " ".join(str(caught.value).split())
    for part in ("model.layers.0.self_attn.q_proj (and 2 more)", "damping up to 1", "is 0.0%"):
        assert part in message
    with pytest.raises(WorkFailed, match="no layer could be quantized") as caught:
        begin(max_error=1e-5, on_failure="skip-to-bf16", ignore=(r"re:.*layers\.1\..*",))
    assert "--resume" not in str(caught.value)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("scheme", ["w4afp8", "w4a8"])
@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_are_not_finite_leave_what_they_reach_in_16_bits(
    scheme: str, layer: int, source: Path, begin: Any, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][5] = 3e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    report = begin("cpu", broken, scheme=scheme, on_failure="skip-to-bf16")
    reached = ORDER[ORDER.index((layer, "gate_up")) :]
    assert [item.names for item in report.skipped] == [linears_of(*place) for place in reached]
    counts = [re.search(r"NaN or Inf in (\d+) of 288", item.reason) for item in report.skipped]
    broken_tokens = [int(count[1]) for count in counts if count]
    assert len(broken_tokens) == len(reached)
    assert 0 < broken_tokens[0] < 288  # the norm overflows only where the channel is large
    assert broken_tokens == sorted(broken_tokens)  # and attention spreads it
    begin("disk", broken, scheme=scheme, on_failure="skip-to-bf16", activation_offload="disk")
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "disk")
    load_decoder(tmp_path / "cpu")


def test_dry_run_of_what_would_stop_fails_and_of_what_would_skip_has_no_estimate(
    source: Path, calibration: dict[str, Any], break_at: Any, tmp_path: Path
) -> None:
    def measure(**options: Any) -> Any:
        return plan(str(source), tmp_path / "out", "gptq", measure=True, **calibration, **options)

    assert measure().seconds > 0
    break_at((0, "down"))
    with pytest.raises(WorkFailed, match=r"layers\.0\.mlp\.down_proj.*the run would stop"):
        measure()
    assert measure(on_failure="skip-to-bf16").seconds is None
    assert not list(tmp_path.iterdir())
