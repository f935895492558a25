"""Humming is handed the weights that ours multiply, and is timed only where its product is right.

Without a GPU a stand-in takes its place, which reads words and scales as Humming's documentation
and its packing kernel define them; with the package, the arguments are held to its own signatures.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import humming_peer
from benchmarks.checks import Wrong
from benchmarks.gemm import random_weight
from benchmarks.timing import measure
from quant_kernels.formats import WeightFormat
from quant_kernels.packing import PackedWeight, join_weight
from quant_kernels.reference import quantize_activation

CPU, GPU = torch.device("cpu"), torch.device("cuda")
N, K = 48, 512
FORMATS = (
    WeightFormat("w4afp8", 128, "lut"),
    WeightFormat("w4a8", 128, "int8"),
    WeightFormat("w4afp8", 128, "exact"),
    WeightFormat("w4a8", -1, "int8"),
)
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
Unpack = Callable[[Tensor, Tensor], Tensor]


def dequantized(words: Tensor, scales: Tensor) -> Tensor:
    """Bits 4 i to 4 i + 3 of a word are q + 8 of its i-th code; in FP64."""
    rows, groups = scales.shape
    nibbles = torch.stack([words.long() >> 4 * i & 15 for i in range(8)], dim=-1)
    q = nibbles.view(rows, groups, -1) - 8
    return (q.double() * scales.double().unsqueeze(-1)).flatten(1)


class Layer(torch.nn.Module):
    """What `humming.layer.HummingLayer` does, as far as it is used."""

    made: ClassVar[list[Layer]] = []
    unpack: Unpack = staticmethod(dequantized)
    writes = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.humming_config, self.seen = arguments, None, []
        Layer.made.append(self)

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def transform(self) -> None:
        self.weight = type(self).unpack(self.tensors["weight"], self.tensors["weight_scale"])
        self.humming_config = self

    def forward(self, inputs: Tensor, **others: Any) -> None:
        self.seen.append((inputs, others))
        if Layer.writes:
            product = inputs.double() @ self.weight.T * others["input_scale"].double()
            others["outputs"].copy_(product)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in in the package's place; what its heuristics were asked."""
    asked: list[dict[str, Any]] = []

    def heuristics(config: Any, **others: Any) -> dict[str, Any]:
        asked.append({"config": config, **others})
        return {"block_shape": (64, 128, 128), "use_stream_k": True}

    monkeypatch.setattr(humming_peer, "_humming", lambda: (Layer, heuristics))
    monkeypatch.setattr(Layer, "made", [])
    return asked


def problem(m: int, fmt: WeightFormat, device: torch.device = CPU) -> tuple[Tensor, ...]:
    """Activations' codes and scales, and a poisoned output."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, K, generator=generator) * (1 + torch.arange(m).unsqueeze(1) / 8)
    codes, scale = quantize_activation(x.to(device), fmt.activation)
    out = torch.full((m, N), float("nan"), dtype=torch.bfloat16, device=device)
    return codes, scale, out


def made(fmt: WeightFormat, device: torch.device = CPU, seed: int = 0) -> PackedWeight:
    return join_weight(random_weight(N, K, fmt, device, seed))


@formats
@pytest.mark.parametrize("m", [1, 5, 40])
def test_a_call_a_copy_each_the_product_of_its_own_weight(
    tiles: list[dict[str, Any]], m: int, fmt: WeightFormat
):
    codes, scale, out = problem(m, fmt)
    sources = [made(fmt, seed=seed) for seed in range(3)]
    run = humming_peer.calls(codes, scale, [humming_peer.prepare(w) for w in sources], out)
    assert len(run) == 3
    for call, source in zip(run, sources, strict=True):
        out.fill_(float("nan"))
        call()
        wanted = codes.double() @ dequantized(source.words, source.scales).T * scale.double()
        assert torch.equal(out, wanted.to(torch.bfloat16))


@formats
def test_humming_is_asked_for_the_scheme_and_for_the_tile_of_these_tokens(
    tiles: list[dict[str, Any]], fmt: WeightFormat
):
    codes, scale, out = problem(5, fmt)
    weight = humming_peer.prepare(made(fmt))
    humming_peer.calls(codes, scale, [weight], out)
    assert Layer.made[0].arguments == {
        "shape_n": N,
        "shape_k": K,
        "weight_config": {"dtype": "int4", "group_size": 0 if fmt.per_channel else 128},
        "input_config": {"dtype": "float8e4m3" if fmt.scheme == "w4afp8" else "int8"},
        "torch_dtype": torch.bfloat16,
    }
    config = weight.layer.humming_config
    assert tiles == [{"config": config, "shape_m": 5, "device": CPU, "gemm_type": "dense"}]
    inputs, others = weight.layer.seen[0]
    assert inputs is codes  # already quantized, which Humming would do itself otherwise
    assert others["outputs"] is out
    assert others["input_scale"] is scale
    tile = json.loads(others["tuning_config"])
    assert tile == {"block_shape": [64, 128, 128], "use_stream_k": True}
    assert json.loads(others["compute_config"]) == {"gemm_type": "dense"}


MISTAKES: dict[str, Unpack] = {
    "nibbles from the top": lambda w, s: dequantized(w, s).unflatten(1, (-1, 8)).flip(2).flatten(1),
    "a group's scale late": lambda w, s: dequantized(w, s.roll(1, 1)),
    "another row's scales": lambda w, s: dequantized(w, s.roll(1, 0)),
    "codes of two's complement": lambda w, s: dequantized(w ^ -2004318072, s),  # 0x88888888
    "codes around -7": lambda w, s: dequantized(w, s) + s.double().repeat_interleave(K // 4, 1),
    "two rows exchanged": lambda w, s: dequantized(w, s)[[1, 0, *range(2, N)]],
    "half of a group missing": lambda w, s: dequantized(w, s) * (torch.arange(K) >= 64),
}


def test_the_mistakes_are_some():
    weight = made(FORMATS[0])
    right = dequantized(weight.words, weight.scales)
    for mistake, unpack in MISTAKES.items():
        wrong = unpack(weight.words, weight.scales)
        assert wrong.shape == right.shape, mistake
        assert not torch.equal(wrong, right), mistake


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=lambda fmt: fmt.label)
def test_a_product_of_another_weight_is_refused(
    tiles: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, fmt: WeightFormat, mistake: str
):
    monkeypatch.setattr(Layer, "unpack", staticmethod(MISTAKES[mistake]))
    codes, scale, out = problem(5, fmt)
    weight = humming_peer.prepare(made(fmt))
    with pytest.raises(Wrong, match="dequantized product: error metric"):
        humming_peer.calls(codes, scale, [weight], out)


def test_an_output_that_nobody_wrote_is_refused(
    tiles: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Layer, "writes", False)
    codes, scale, out = problem(5, FORMATS[0])
    weight = humming_peer.prepare(made(FORMATS[0]))
    out.zero_()
    with pytest.raises(Wrong, match="nan"):
        humming_peer.calls(codes, scale, [weight], out)


def test_the_first_and_the_last_of_many_tokens_are_checked():
    fmt, m = FORMATS[0], 1000
    codes, scale, out = problem(m, fmt)
    weight = made(fmt)
    out.copy_(codes.double() @ dequantized(weight.words, weight.scales).T * scale.double())
    humming_peer.check(codes, scale, weight, out)
    for token in (0, m - 1):
        wrong = out.clone()
        wrong[token].neg_()
        with pytest.raises(Wrong):
            humming_peer.check(codes, scale, weight, wrong)


def test_without_the_package_the_reason_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install humming-kernels" in (humming_peer.why_unavailable(GPU) or "")


def test_without_a_gpu_it_is_not_even_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(humming_peer, "_humming", lambda: pytest.fail("imported"))
    assert "cpu" in (humming_peer.why_unavailable(CPU) or "")


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleType(name))
    monkeypatch.setitem(sys.modules, "humming.layer", None)
    reason = humming_peer.why_unavailable(GPU) or ""
    assert reason.startswith("Humming cannot be imported: ")
    assert "humming" in reason.partition(": ")[2]


def test_a_package_that_can_be_imported_is_available(
    tiles: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleType(name))
    assert humming_peer.why_unavailable(GPU) is None


@pytest.fixture
def package() -> tuple[Any, Any]:
    """The real one."""
    if importlib.util.find_spec("humming") is None:
        pytest.skip("needs humming-kernels")
    try:
        return humming_peer._humming()
    except Exception as error:
        pytest.skip(f"humming-kernels cannot be imported: {error}")


def test_the_package_takes_these_arguments(package: tuple[Any, Any]):
    layer, heuristics = package
    wanted = {
        layer: "shape_n shape_k weight_config input_config torch_dtype",
        layer.load_from_tensors: "tensors",
        layer.transform: "self",
        layer.forward: "inputs outputs input_scale compute_config tuning_config",
        heuristics: "shape_m device",
    }
    for function, names in wanted.items():
        found = inspect.signature(function).parameters
        assert set(names.split()) <= found.keys(), (function, list(found))


@formats
def test_the_package_wants_words_and_scales_of_the_checkpoints_shapes_and_types(
    package: tuple[Any, Any], fmt: WeightFormat
):
    from humming.schema import BaseInputSchema, BaseWeightSchema

    group = 0 if fmt.per_channel else fmt.group_size
    weight = made(fmt)
    schema = BaseWeightSchema.from_config(
        {"quant_method": "humming", "dtype": "int4", "group_size": group}
    )
    wanted = schema.get_tensors_attrs(N, K, torch.bfloat16)
    assert wanted.keys() == {"weight", "weight_scale"}
    for name, tensor in (("weight", weight.words), ("weight_scale", weight.scales)):
        assert (wanted[name]["shape"], wanted[name]["dtype"]) == (tensor.shape, tensor.dtype)
    name = humming_peer.ACTIVATIONS[fmt.activation]
    kind = BaseInputSchema.from_config({"quant_method": "humming", "dtype": name}).a_dtype
    assert (kind.num_bits, kind.is_floating_point_type) == (8, fmt.activation == "fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_on_a_gpu_its_product_is_right_and_can_be_captured(
    package: tuple[Any, Any], m: int, fmt: WeightFormat
):
    codes, scale, _ = problem(m, fmt, GPU)
    weight = join_weight(random_weight(512, K, fmt, GPU))
    out = torch.empty(m, 512, dtype=torch.bfloat16, device=GPU)
    run = humming_peer.calls(codes, scale, [humming_peer.prepare(weight)], out)  # raises Wrong
    assert measure(run, GPU, seconds=0.01).how == "graph"
