"""Every GPU kernel against the reference backend, on the device that will run it.

A trial is one call of an op on random arguments (`trials.py`). Its outputs start out poisoned (NaN,
bytes 0xAA), so that an element nobody wrote shows. Then

    1. the kernel's outputs agree with the reference's, within the trial's bound,
    2. a second run gives the same bits,
    3. on a GPU, the call captured in a CUDA graph gives the same bits in every replay.

The error metric is 1 - 2 <x, y> / (|x|^2 + |y|^2) = |x - y|^2 / (|x|^2 + |y|^2), about half the
square of the relative error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Figures = dict[str, float]
REPLAYS = 2


class Wrong(AssertionError):
    """A kernel's output, and what it should have been."""


@dataclass(frozen=True)
class Call:
    """fresh: poisoned outputs (and, for what an op changes in place, its first value).

    run(backend, outputs) calls the op; judge(wanted, found) raises Wrong or gives figures.
    """

    fresh: Callable[[], Outputs]
    run: Callable[[str, Outputs], None]
    judge: Callable[[Outputs, Outputs], Figures]


@dataclass(frozen=True)
class Trial:
    """One call of an op, made only when its turn comes; label: the shapes.

    everywhere: whether every backend takes it, or Triton's alone.
    """

    op: str
    label: str
    make: Callable[[torch.device], Call]
    everywhere: bool = True

    @property
    def key(self) -> str:
        return f"{self.op}: {self.label}"


def run(trial: Trial, device: torch.device, backend: str = "triton") -> Figures:
    """The trial's three properties; Wrong names the first that does not hold."""
    call = trial.make(device)
    wanted, found, again = call.fresh(), call.fresh(), call.fresh()
    call.run("reference", wanted)
    call.run(backend, found)
    figures = call.judge(wanted, found)
    call.run(backend, again)
    same_bits("a second run", found, again)
    if device.type == "cuda":
        _replay(call, backend, found)
    return figures


def same_bits(what: str, wanted: Outputs, found: Outputs) -> None:
    """Raise Wrong unless all outputs are equal bit by bit, NaN included."""
    for name, x in wanted.items():
        different = _bits(x) != _bits(found[name])
        if bool(different.any()):
            count = int(different.sum())
            raise Wrong(f"{what} gives other bits: {name}, {count} of {different.numel()} bytes")


def close(name: str, wanted: Tensor, found: Tensor, bound: Tensor | float) -> float:
    """Raise Wrong where |wanted - found| is beyond the bound or not finite; the largest share."""
    error = (wanted.double() - found.double()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64, device=error.device)
    beyond = ~(error <= limit)  # NaN is beyond
    if bool(beyond.any()):
        where = tuple(beyond.nonzero()[0].tolist())
        raise Wrong(
            f"{name}: {int(beyond.sum())} of {beyond.numel()} elements are off; the first, "
            f"{list(where)} of {list(error.shape)}: {float(found[where]):.6g}, wanted "
            f"{float(wanted[where]):.6g} +- {float(limit.expand_as(error)[where]):.2g}"
        )
    share = error / limit.expand_as(error).clamp_min(1e-300)
    return float(share.max()) if share.numel() else 0.0


def metric(name: str, wanted: Tensor, found: Tensor, bound: float) -> float:
    """The error metric over all elements (module docstring); Wrong where it is beyond the bound."""
    x, y = wanted.double(), found.double()
    total = float((x * x).sum() + (y * y).sum())
    value = float((x - y).square().sum()) / total if total else 0.0
    if not value <= bound:
        raise Wrong(f"{name}: error metric {value:.3g}, at most {bound:.3g} expected")
    return value


def code_steps(name: str, wanted: Tensor, found: Tensor, most: float) -> float:
    """The share of codes that differ; Wrong beyond `most`, or where one is off by two steps.

    Codes: int8 values, or E4M3 codes, whose steps are those between neighbouring numbers.
    """
    steps = (_ordinal(wanted) - _ordinal(found)).abs()
    if int(steps.max()) > 1:
        worst = int(steps.max())
        raise Wrong(f"{name}: {int((steps > 1).sum())} codes are off by up to {worst} steps")
    share = float((steps > 0).double().mean())
    if share > most:
        raise Wrong(f"{name}: {share:.2%} of the codes are off by a step, {most:.2%} expected")
    return share


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, or bytes 0xAA in types without it."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, 0xAA, dtype=torch.uint8, device=device).view(dtype)


def _replay(call: Call, backend: str, wanted: Outputs) -> None:
    """Capture the call, then replay it over poisoned outputs."""
    outputs = call.fresh()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run(backend, outputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(backend, outputs)
    for _ in range(REPLAYS):
        for name, x in call.fresh().items():
            outputs[name].view(torch.uint8).copy_(x.view(torch.uint8))
        graph.replay()
        torch.cuda.synchronize()
        same_bits("a replayed graph", wanted, outputs)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _ordinal(codes: Tensor) -> Tensor:
    """Position of a code in the order of the numbers; both zeros stand at 0."""
    if codes.dtype == torch.int8:
        return codes.int()
    code = codes.view(torch.uint8).int()
    return torch.where(code >= 128, -(code & 127), code)
