"""Block after block, from the source to the output shards, with a journal in between.

While a block is computed, the one before it is written and the one after it is read ahead. A block
counts as finished when its tensors, what enters the next block (where activations are on disk), and
then its line in the journal are durable. So whatever ends the process, the next one goes on after
the last finished block: with the activations kept on disk, or by letting the calibration tokens
through the finished blocks again, which computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, SITES, block_prefix
from quant.calibration.activations import DiskStore
from quant.calibration.pipeline import BlockPipeline, QuantizedBlock
from quant.calibration.plan import RunPlan
from quant.calibration.site import SiteFailed
from quant.checkpoint.compressed_tensors import linear_tensors
from quant.checkpoint.journal import Journal, Part
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.shards import Entry
from quant.checkpoint.writer import CheckpointWriter, finite
from quant.decoder import KeyTransform
from quant.errors import RequestError, WorkFailed
from quant.memory import release_free_memory
from quant.report import LayerReport, OnProgress, Progress, SkippedLayers
from quant_kernels.packing import PackedWeight

EMBEDDING_PART = "embedding"
ON_FAILURE = ("stop", "skip-to-bf16")


@dataclass
class Run:
    """What the parts of a run share. dtype: of what stays unquantized; None: as stored."""

    plan: RunPlan
    reader: CheckpointReader
    pipeline: BlockPipeline
    writer: CheckpointWriter
    journal: Journal
    dtype: torch.dtype | None
    on_failure: str
    on_progress: OnProgress


def check_on_failure(policy: str) -> None:
    if policy not in ON_FAILURE:
        raise RequestError(f"on-failure {policy!r} is unknown; known: {', '.join(ON_FAILURE)}")


def quantize_blocks(run: Run) -> tuple[list[LayerReport], list[SkippedLayers]]:
    """Quantize what the journal does not have yet; the report's rows, and what was left alone.

    Raises WorkFailed, naming the layers, where a site fails and the policy is to stop.
    """
    journal, pipeline = run.journal, run.pipeline
    rows = [_layer_report(row) for part in journal.parts for row in part.report]
    skipped = [_skipped(item) for part in journal.parts for item in part.skipped]
    for item in skipped:
        pipeline.leave_alone(item.names)
    if not journal.parts:
        entry = _copy(run, EMBEDDING, EMBEDDING)
        run.writer.shards.sync()
        journal.append(Part(EMBEDDING_PART, (entry,)))
    first = journal.blocks
    _take_up(run, first)
    layers = run.reader.config.num_layers
    # A thread writes; leaving the block waits for it, so that what it has begun is recorded.
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as thread:
        pending: Future[None] | None = None
        for layer in range(first, layers):
            block, left = _quantize(run, layer)
            tensors = _tensors(run, layer, block)
            if pending is not None:
                pending.result()
            store = pipeline.store
            on_disk = isinstance(store, DiskStore)
            following = pipeline.streams(layer + 1)
            seal = store.seal(following) if isinstance(store, DiskStore) else None
            part = Part(
                name=str(layer),
                entries=(),
                report=tuple(asdict(row) for row in block.rows),
                skipped=tuple(asdict(item) for item in left),
                activations=on_disk,
                keys=None if block.keys is None else block.keys.to_lists(),
            )
            pending = thread.submit(_record, run, part, tensors, seal)
            if not on_disk:
                pipeline.leave(layer)
            elif layer > first:
                pipeline.leave(layer - 1)  # the journal has what came out of it
            rows += block.rows
            skipped += left
            del block, tensors
            release_free_memory()
        if pending is not None:
            pending.result()
    steps = layers * len(SITES)
    run.on_progress(Progress("quantize", steps, steps))
    return rows, skipped


def write_outer(run: Run) -> None:
    """The tensors after the blocks: the final norm, and a head of its own."""
    _copy(run, FINAL_NORM, FINAL_NORM)
    if f"{LM_HEAD}.weight" in run.plan.tensors:
        tied = run.reader.config.tie_word_embeddings
        _copy(run, LM_HEAD, EMBEDDING if tied else LM_HEAD)


def _quantize(run: Run, layer: int) -> tuple[QuantizedBlock, list[SkippedLayers]]:
    left: list[SkippedLayers] = []
    while True:
        try:
            return run.pipeline.quantize(layer), left
        except SiteFailed as failure:
            if run.on_failure == "stop":
                raise WorkFailed(
                    f"{failure}. Use more calibration samples, ignore these layers, or keep what "
                    "fails in 16 bits with --on-failure skip-to-bf16"
                ) from failure
            # The block begins again, because what it has computed so far rests on this site.
            run.pipeline.leave_alone(failure.names)
            left.append(SkippedLayers(failure.names, failure.reason))


def _take_up(run: Run, first: int) -> None:
    """Bring the calibration tokens to where block `first` begins."""
    pipeline, journal = run.pipeline, run.journal
    if first == run.reader.config.num_layers:
        return
    store = pipeline.store
    if first and isinstance(store, DiskStore) and journal.parts[-1].activations:
        store.adopt(pipeline.streams(first), pipeline.stream_shapes())
        return
    pipeline.embed()
    for layer in range(first):
        pipeline.forward(layer, _finished(run, layer))


def _finished(run: Run, layer: int) -> QuantizedBlock:
    """What became of a block that the journal has; without its report."""
    pipeline, prefix = run.pipeline, block_prefix(layer)
    entries = {entry.name: entry for entry in run.journal.entries}

    def read(name: str) -> Tensor:
        return run.writer.shards.read(entries[prefix + name]).to(pipeline.device)

    packed = {}
    for name in LINEARS:
        fmt = pipeline.plan[prefix + name].fmt
        if fmt is not None:
            words, scales = read(f"{name}.weight_packed"), read(f"{name}.weight_scale")
            packed[name] = PackedWeight(words, scales, fmt)
    shapes = run.reader.config.block_shapes()
    kept = {name: read(name) for name in shapes if name.removesuffix(".weight") not in packed}
    keys = keys_of(run.journal, layer)
    return QuantizedBlock(packed, kept, keys.to(pipeline.device) if keys else None)


def keys_of(journal: Journal, layer: int) -> KeyTransform | None:
    """What is done to the keys of a finished block."""
    part = next(part for part in journal.parts if part.name == str(layer))
    if part.keys is None:
        return None
    scale, shift = (torch.tensor(rows, dtype=torch.float32) for rows in part.keys)
    return KeyTransform(scale, shift)


def _record(
    run: Run, part: Part, tensors: dict[str, Tensor], seal: Callable[[], None] | None
) -> None:
    entries = tuple(run.writer.shards.add(name, tensor) for name, tensor in tensors.items())
    run.writer.shards.sync()
    if seal is not None:
        seal()
    run.journal.append(replace(part, entries=entries))
    run.writer.keep()


def _tensors(run: Run, layer: int, block: QuantizedBlock) -> dict[str, Tensor]:
    """A block's output by full name, on the host."""
    prefix = block_prefix(layer)
    found = {prefix + name: finite(prefix + name, t.cpu()) for name, t in block.kept.items()}
    for name, weight in block.packed.items():
        for suffix, tensor in linear_tensors(weight).items():
            full = f"{prefix}{name}.{suffix}"
            found[full] = finite(full, tensor)
    return found


def _copy(run: Run, module: str, source: str) -> Entry:
    """Copy a module's weight from that of `source`, piece by piece, rotated."""
    name, reader, rotation = f"{module}.weight", run.reader, run.pipeline.rotation
    kind, shape = run.plan.tensors[name]
    norm = reader.read(f"{FINAL_NORM}.weight").to(run.pipeline.device)

    def chunks() -> Iterator[Tensor]:
        for chunk in reader.chunks(f"{source}.weight"):
            turned = rotation.outer(module, chunk.to(run.pipeline.device), norm)
            yield finite(name, turned.to(run.dtype or chunk.dtype).cpu())

    return run.writer.shards.add_chunks(name, kind, shape, chunks())


def _layer_report(row: dict[str, Any]) -> LayerReport:
    return LayerReport(**{**row, "shape": tuple(row["shape"])})


def _skipped(item: dict[str, Any]) -> SkippedLayers:
    return SkippedLayers(tuple(item["names"]), item["reason"])
