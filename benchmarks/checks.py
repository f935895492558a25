"""Every GPU kernel against the reference backend, on the device that will run it.

A trial is one call of an op on random arguments (`trials.py`). Its outputs start out poisoned (NaN,
bytes 0xAA), so that an element nobody wrote shows. Then

    1. the kernel's outputs agree with the reference's, within the trial's bound,
    2. a second run gives the same bits, or many that are launched one behind the other,
    3. on a GPU, the call captured in a CUDA graph gives the same bits in every replay.

The error metric is 1 - 2 <x, y> / (|x|^2 + |y|^2) = |x - y|^2 / (|x|^2 + |y|^2), about half the
square of the relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Figures = dict[str, float]
REPLAYS, AT_ONCE = 2, 20
BACKENDS = ("triton", "cutlass")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Half a unit in the last place, relative to the number.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


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

    backends: whose kernels take it. captured: whether a graph of it is checked, too.
    """

    op: str
    label: str
    make: Callable[[torch.device], Call]
    backends: tuple[str, ...] = BACKENDS
    captured: bool = True

    @property
    def key(self) -> str:
        return f"{self.op}: {self.label}"


def run(trial: Trial, device: torch.device, backend: str = "triton", launches: int = 1) -> Figures:
    """The trial's three properties; Wrong names the first that does not hold.

    launches: how many run behind the first, into outputs of their own, before one is looked at.
    """
    call = trial.make(device)
    wanted, found = call.fresh(), call.fresh()
    call.run("reference", wanted)
    call.run(backend, found)
    figures = call.judge(wanted, found)
    others = [call.fresh() for _ in range(launches)]
    for out in others:
        call.run(backend, out)
    for i, out in enumerate(others, start=2):
        same_bits(f"run {i} of {launches + 1}", found, out)
    if device.type == "cuda" and trial.captured:
        _replay(call, backend, found)
    return figures


def at_once(device: torch.device, runs: Sequence[Callable[[], object]], backend: str) -> None:
    """Start each of `runs` AT_ONCE times, in a stream of its own; the reference's once."""
    if device.type != "cuda" or backend == "reference":
        for run in runs:
            run()
        return
    streams = [torch.cuda.Stream(device) for _ in runs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(AT_ONCE):
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                run()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)


def same_bits(what: str, wanted: Outputs, found: Outputs) -> None:
    """Raise Wrong unless all outputs are equal bit by bit, NaN included."""
    for name, x in wanted.items():
        y = found[name]
        if torch.equal(_bits(x), _bits(y)):
            continue
        different = (_bits(x) != _bits(y)).view(*x.shape, -1).any(-1)
        where = tuple(different.nonzero()[0].tolist())
        raise Wrong(
            f"{what} gives other bits: {name}, {_extent(different)}; the first, {list(where)}: "
            f"{float(y[where]):.6g}, {float(x[where]):.6g} before"
        )


def close(name: str, wanted: Tensor, found: Tensor, bound: Tensor | float) -> float:
    """Raise Wrong where |wanted - found| is beyond the bound or not finite; the largest share."""
    error = (wanted.double() - found.double()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64, device=error.device)
    beyond = ~(error <= limit)  # NaN is beyond
    if bool(beyond.any()):
        first = tuple(beyond.nonzero()[0].tolist())
        finite = error.nan_to_num(nan=-1.0, posinf=-1.0)
        worst = torch.unravel_index(finite.argmax(), error.shape)
        raise Wrong(
            f"{name}: {_extent(beyond)}, {int((~found.isfinite()).sum())} not finite; the largest "
            f"finite error {float(finite.max()):.3g} at {[int(i) for i in worst]}; the first, "
            f"{list(first)}: {float(found[first]):.6g}, wanted {float(wanted[first]):.6g} +- "
            f"{float(limit.expand_as(error)[first]):.2g}"
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


def normal(generator: torch.Generator, shape: Sequence[int], deviation: float) -> Tensor:
    """Normal numbers, where their generator is."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device) * deviation


def name_of(dtype: torch.dtype) -> str:
    """For a label."""
    return str(dtype).removeprefix("torch.")


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


def _extent(wrong: Tensor) -> str:
    """How many elements are wrong, and the smallest box that holds them all."""
    spots = wrong.nonzero()
    corners = zip(spots.amin(0).tolist(), spots.amax(0).tolist(), strict=True)
    box = ", ".join(f"{first}..{last}" for first, last in corners)
    return f"{len(spots)} of {wrong.numel()} elements of {list(wrong.shape)} are off, in [{box}]"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _ordinal(codes: Tensor) -> Tensor:
    """Position of a code in the order of the numbers; both zeros stand at 0."""
    if codes.dtype == torch.int8:
        return codes.int()
    code = codes.view(torch.uint8).int()
    return torch.where(code >= 128, -(code & 127), code)
