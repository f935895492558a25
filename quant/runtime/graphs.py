"""Decode steps as CUDA graphs: one launch instead of some ten for every layer.

A graph has fixed shapes and addresses, so there is one for each bucket of batch sizes, 1, 2, 4, 8,
and then every multiple of 8. A batch is copied into the bucket's own tensors and padded: a padded
sequence has length 0, which attends to nothing, and slot -1, which stores nothing. Graphs are
recorded when their bucket first occurs, and share one memory pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.runtime.batch import Batch, padding, pages_needed
from quant.runtime.model import Cache, Model

WARM_UP = 2  # runs before recording: kernels are compiled, tuned and loaded in them


def bucket_of(size: int) -> int:
    """The batch size that a batch of `size` sequences is padded to."""
    return next((bucket for bucket in (1, 2, 4) if bucket >= size), -(-size // 8) * 8)


@dataclass(frozen=True)
class _Recorded:
    """A bucket's graph: replay computes `logits` [bucket, V] from what lies in `batch`."""

    batch: Batch
    logits: Tensor
    replay: Callable[[], object]


class DecodeGraphs:
    """The graphs of a model over one cache, for sequences of up to max_model_len tokens."""

    def __init__(self, model: Model, cache: Cache, max_model_len: int) -> None:
        self.model, self.cache = model, cache
        self._width = pages_needed(max_model_len)
        self._recorded: dict[int, _Recorded] = {}
        self._pool: Any = None  # of memory

    def takes(self, batch: Batch) -> bool:
        """Whether the batch can be replayed: decode steps can."""
        return batch.is_decode_step

    def next_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """As `Model.next_logits` gives them, [B, V]; valid until the next call."""
        assert cache is self.cache
        size = len(batch.lengths)
        bucket = bucket_of(size)
        recorded = self._recorded.get(bucket) or self._record(bucket)
        static, width = recorded.batch, batch.block_table.shape[1]
        # What lies beyond the batch must be padding again, whatever the last one was.
        static.slots[size:] = -1
        static.kv_lens[size:] = 0
        static.positions[size:] = 0
        for name in ("tokens", "positions", "slots", "kv_lens"):
            getattr(static, name)[:size].copy_(getattr(batch, name))
        static.block_table[:size, :width].copy_(batch.block_table)
        recorded.replay()
        return recorded.logits[:size]

    def _record(self, bucket: int) -> _Recorded:
        batch = padding(bucket, self._width, self.model.device)
        logits, replay = self._capture(lambda: self.model.next_logits(batch, self.cache))
        self._recorded[bucket] = _Recorded(batch, logits, replay)
        return self._recorded[bucket]

    def _capture(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """What `compute` returned while it was recorded, and what computes it again in place."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = compute()
        self._pool = graph.pool()
        return logits, graph.replay
