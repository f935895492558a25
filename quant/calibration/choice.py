"""Whether a model is to be rotated, by measurement (`rotate: {when: better}`).

The first blocks are quantized with and without the rotation, from some of the calibration windows,
and other windows go through them. What counts is the residual stream's error there, relative to the
unquantized model's: it is what all later blocks see, errors of single layers add up to it in ways
they do not tell, and an orthogonal rotation does not change it.

A rotation must earn its cost: a head that is tied to the embedding becomes a tensor of its own. On
SmolLM2-135M, after two blocks, the error with it is 0.97 of that without for `w4a8` in groups of
64, 0.88 where the cache is `kv4` too, 0.81 per channel, and 1.09 for `w4afp8`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.architectures import SITES
from quant.calibration.pipeline import BlockPipeline
from quant.calibration.plan import RunPlan, open_store
from quant.calibration.site import SiteFailed
from quant.checkpoint.reader import CheckpointReader
from quant.errors import WorkFailed
from quant.recipe import Recipe
from quant.report import OnProgress, Progress

STAGE = "choose rotation"
BLOCKS = 2
# Of every three windows one is held out.
WINDOWS = 24
# With the rotation, at most so much of the error without.
WORTH_IT = 0.9


@dataclass(frozen=True)
class RotationChoice:
    """Relative errors |h - h^|^2 / |h|^2 of the residual stream after the first blocks."""

    plain: float
    rotated: float

    @property
    def rotates(self) -> bool:
        return math.isfinite(self.rotated) and self.rotated <= WORTH_IT * self.plain

    def __str__(self) -> str:
        plain, rotated = (
            f"{x:.3%}" if math.isfinite(x) else "all" for x in (self.plain, self.rotated)
        )
        verdict = "rotated" if self.rotates else "not rotated"
        return f"{verdict}: the first blocks lose {rotated} of the stream with it, {plain} without"


def choose_rotation(
    reader: CheckpointReader,
    planned: RunPlan,
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    directory: Path,
    on_progress: OnProgress,
) -> RotationChoice:
    """Measure planned's recipe, which is undecided, both ways; windows [n, S] are the run's.

    directory: for activations, where the plan keeps them on disk; it is left as it was found.
    """
    count = min(len(windows), WINDOWS)
    some = windows[[i * len(windows) // count for i in range(count)]]
    held_out = some[::3]
    seen = some[[i for i in range(count) if i % 3]] if count > 1 else some
    steps = min(BLOCKS, reader.config.num_layers) * len(SITES)
    errors = []
    for i, rotated in enumerate((False, True)):

        def announce(done: int, before: int = i * steps) -> None:
            on_progress(Progress(STAGE, before + done, 2 * steps))

        with tempfile.TemporaryDirectory(dir=directory, prefix="choice-") as work:
            errors.append(
                _stream_error(
                    reader,
                    planned,
                    planned.recipe.decided(rotated),
                    (seen, held_out),
                    device,
                    dtype,
                    Path(work),
                    announce,
                )
            )
    on_progress(Progress(STAGE, 2 * steps, 2 * steps))
    return RotationChoice(*errors)


def _stream_error(
    reader: CheckpointReader,
    planned: RunPlan,
    recipe: Recipe,
    windows: tuple[Tensor, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    work: Path,
    announce: Callable[[int], None],
) -> float:
    """The relative error of the stream after the first blocks, quantized from the first windows, on
    the second ones. Infinite where a block cannot be rotated or quantized."""
    last = len(SITES) - 1  # when a block is done, its held-out windows have yet to go through it
    seen, held_out = (
        BlockPipeline(
            reader,
            {row.name: row for row in planned.layers},
            recipe,
            part,
            open_store(planned, device, work / name),
            device,
            dtype=dtype,
            max_error=math.inf,
            observed=True,
            on_progress=listen,
        )
        for name, part, listen in (
            ("seen", windows[0], lambda p: announce(p.done)),
            ("held-out", windows[1], lambda p: announce(p.done - p.done % len(SITES) + last)),
        )
    )
    try:
        seen.embed()
        held_out.embed()
        blocks = min(BLOCKS, reader.config.num_layers)
        for layer in range(blocks):
            finished = seen.quantize(layer)
            seen.leave(layer)
            held_out.forward(layer, finished)
        return held_out.stream_error(blocks)
    except (SiteFailed, WorkFailed):
        return math.inf
    finally:
        seen.store.close()
        held_out.store.close()
