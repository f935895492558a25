"""Microseconds of a call on a GPU: the median of many, with cold weights.

    samples:  time(replay of a graph of n calls) / n,   each between two CUDA events
    median, and the spread (p90 - p10) / median

The calls of a sample are captured in one CUDA graph, so that neither Python nor the launch of each
kernel is counted, as in a decode step that is itself a graph. They differ in their buffers, which
together are larger than the L2 cache by so much that a buffer is evicted before its turn comes
again (`copies`); what a real step finds in the cache, its activations, may stay there. Calls that
cannot be captured are timed between events as they are, and the timing says so.

Clocks are read, never set.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

WARM_UPS = 2
# A sample lasts at least this long, so that what the events themselves cost does not count.
SAMPLE_US = 300.0
EVICTED = 2  # times the L2's size lie between two uses of a buffer
MOST_COPIES = 128
L2_WITHOUT_GPU = 2**10
TIMED = ("graph", "clock")  # how times are meant to be taken; any other way is worth a line


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, spread (p90 - p10) / median, samples, and "graph", "events: why
    not a graph" or "clock" (a CPU, in tests)."""

    us: float
    spread: float
    samples: int
    how: str


def summarize(samples: Sequence[float], how: str) -> Timing:
    """The median and the spread of samples in microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, median, high = (_quantile(ordered, q * last) for q in (0.1, 0.5, 0.9))
    return Timing(median, (high - low) / median if median else 0.0, len(ordered), how)


def copies(bytes_of_one: int, l2_bytes: int) -> int:
    """How many buffers to rotate through: the others exceed the L2 `EVICTED` times."""
    return min(MOST_COPIES, 1 + max(1, -(-EVICTED * l2_bytes // max(1, bytes_of_one))))


def l2_bytes(device: torch.device) -> int:
    """The L2 cache of a GPU; a small number where there is none."""
    if device.type != "cuda":
        return L2_WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def measure(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.06, least: int = 12
) -> Timing:
    """Time one call: `calls` do the same on different buffers, one after the other.

    seconds: of samples to take, and `least` their number whatever they take.
    """
    if device.type != "cuda":
        return _measure_on_clock(calls)
    for _ in range(WARM_UPS):  # compiles kernels and makes handles, none of which a graph may
        for call in calls[:2]:
            call()
    torch.cuda.synchronize(device)
    once = _between_events(lambda: _all(calls)) / len(calls)
    repeats = max(1, min(64, round(SAMPLE_US / max(once * len(calls), 1.0))))
    graph = _capture([*calls] * repeats)
    run, count, how = (
        (lambda: _all(calls), len(calls), f"events: {graph}")
        if isinstance(graph, str)
        else (graph.replay, len(calls) * repeats, "graph")
    )
    run()
    rough = _between_events(run)
    number = max(least, min(200, round(seconds * 1e6 / max(rough, 1.0))))
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(number)
    ]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    samples = [start.elapsed_time(end) * 1e3 / count for start, end in pairs]
    return summarize(samples, how)


def best_of(candidates: dict[str, Sequence[Call]], device: torch.device) -> tuple[str, Timing]:
    """The fastest of several ways to compute the same, by name; those that fail do not count.

    Raises RuntimeError with every reason where none works.
    """
    reasons, rough = [], {}
    for name, calls in candidates.items():
        try:
            for call in calls[:2]:
                call()
            rough[name] = measure(calls[:4], device, seconds=0.01, least=3).us
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            reasons.append(f"{name}: {first_line(error)}")
    if not rough:
        raise RuntimeError("; ".join(reasons))
    winner = min(rough, key=lambda name: rough[name])
    return winner, measure(candidates[winner], device)


def warm_up(device: torch.device) -> None:
    """Start the device and torch's libraries, so that the first call does not pay for them."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.ones(64, 64, dtype=dtype, device=device)
            torch.mm(x, x)
        torch.cuda.synchronize(device)


def synchronizer(device: torch.device) -> Call:
    """What waits for a device, and raises what its kernels did wrong."""
    if device.type != "cuda":
        return lambda: None
    return functools.partial(torch.cuda.synchronize, device)


def said(figures: dict[str, Any]) -> str:
    """A time in a few words, or why there is none."""
    if "us" not in figures:
        return str(figures.get("error") or figures.get("skipped"))
    how = figures["how"]
    return f"{figures['us']:.1f} us" + (f" ({how})" if how not in TIMED else "")


def first_line(error: BaseException) -> str:
    """The error's type and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi reads them; empty without it."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return {}
    fields = ("name", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    values = lines[min(device.index or 0, len(lines) - 1)].split(",") if lines else []
    return dict(zip(fields, (value.strip() for value in values), strict=False))


def _quantile(ordered: Sequence[float], position: float) -> float:
    """Between the two samples around a fractional position."""
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _between_events(run: Callable[[], object]) -> float:
    """Microseconds of one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | str:
    """The calls as one graph, or why one of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _all(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return first_line(error)
    return graph


def _measure_on_clock(calls: Sequence[Call]) -> Timing:
    calls[0]()
    samples = []
    for call in calls:
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e6)
    return summarize(samples, "clock")
