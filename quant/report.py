"""What a run has to say: one row per layer, totals, and progress while it lasts."""

from __future__ import annotations

import dataclasses
import json
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
    what the recipe made of it. damping: None where no Hessian was factored. smoothing: what was
    chosen for its site, empty where nothing was to be. seconds: this linear's share of its site's
    time; not in a checkpoint's report file, so equal runs write equal bytes.
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
    smoothing: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class SkippedLayers:
    """Linears that share an input and could not be quantized, by full name, and why."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class RunReport:
    """A finished quantization. Sizes in bytes; bits_per_weight over the quantized linears.

    ignored: linears that stay as they were, those of `skipped` among them. rotation: what decided
    about it, where the recipe had left it to the model. resumed_blocks: those that an earlier run
    had finished. peak_device_bytes: of a GPU; None without one.
    start_memory_bytes: resident when the run began, with the interpreter and its libraries.
    block_bytes: one block's weights in FP32. activation_bytes: what waits between two steps, at
    activation_place ("device", "cpu" or "disk").
    """

    output: str
    recipe: dict[str, Any]
    layers: tuple[LayerReport, ...]
    ignored: tuple[str, ...]
    skipped: tuple[SkippedLayers, ...]
    rotation: str
    resumed_blocks: int
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int | None
    start_memory_bytes: int
    block_bytes: int
    activation_bytes: int
    activation_place: str
    size_bytes: int
    source_size_bytes: int
    bits_per_weight: float

    @property
    def memory_limit_bytes(self) -> int:
        """What a streaming run should stay under: 1.5 x one block and the activations in memory,
        beside what was there when it began."""
        held = self.activation_bytes if self.activation_place == "cpu" else 0
        return int(1.5 * (self.block_bytes + held)) + self.start_memory_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "memory_limit_bytes": self.memory_limit_bytes}


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
    """A report file: one row a line, without the times."""
    plain = (dataclasses.asdict(row) for row in rows)
    return "".join(
        json.dumps({k: v for k, v in row.items() if k != "seconds"}) + "\n" for row in plain
    )


def read_jsonl(path: Path) -> list[LayerReport]:
    """The rows of a report file, or none where there is no file."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path} is not a report of fourbyeight: {error!r}") from error
