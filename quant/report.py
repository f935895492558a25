"""What a run has to say: one row per layer, totals, and progress while it lasts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quant.errors import RequestError


@dataclass(frozen=True)
class LayerReport:
    """What one linear lost.

    error_before / error_after: tr((W - W^) H (W - W^)^T) / tr(W H W^T), the share of the output's
    energy that rounding loses on the calibration tokens: round-to-nearest with absmax scales, and
    what the recipe made of it. damping: None where no Hessian was inverted. seconds: this linear's
    share, by rows, of its site's time.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    group_size: int
    numerics: str
    bits_per_weight: float
    error_before: float
    error_after: float
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class RunReport:
    """A finished quantization. Sizes in bytes; bits_per_weight over the quantized linears."""

    output: str
    recipe: dict[str, Any]
    layers: tuple[LayerReport, ...]
    ignored: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    size_bytes: int
    source_size_bytes: int
    bits_per_weight: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a run is: step `done` of `total` of a stage, working on `what`."""

    stage: str
    done: int
    total: int
    what: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The default listener."""


class HasBits(Protocol):
    """Anything that says a linear's shape (N, K) and its bits per weight."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bits_per_weight(self) -> float: ...


def mean_bits_per_weight(layers: Sequence[HasBits]) -> float:
    """Stored bits per weight over linears, weighted by their sizes; 0 for none."""
    weights = sum(row.shape[0] * row.shape[1] for row in layers)
    bits = sum(row.shape[0] * row.shape[1] * row.bits_per_weight for row in layers)
    return bits / weights if weights else 0.0


def to_jsonl(rows: Iterable[LayerReport]) -> str:
    return "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[LayerReport]:
    """The rows of a report file, or none where there is no file."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path} is not a report of fourbyeight: {error!r}") from error


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, or since `reset_peak_memory`."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start a new measurement of the peak, so that stages of one process can be told apart."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it; the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")
