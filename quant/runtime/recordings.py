"""Decode steps on a CPU as recorded calls: one call of the library instead of nine for every layer.

What a step calls depends on its batch size alone: lengths, slots and pages lie in tensors. So the
first step of a size is recorded while it runs, with tensors of its own, and later ones copy their
batch into these and have the calls made again (`quant_kernels.cpu_calls`). No size is padded, since
on a CPU padding would be computed. A model with layers that torch computes is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant.runtime.batch import Batch, padding, pages_needed
from quant.runtime.buffers import Buffers
from quant.runtime.graphs import DecodeGraphs
from quant.runtime.model import Cache, Model
from quant_kernels import cpu_calls

MOST_BYTES = 2**26  # of recordings' tensors; beyond, all are forgotten and made anew


@dataclass(frozen=True)
class _Recorded:
    """A step of one size: replay makes `hidden`, the embedded tokens, the last block's output."""

    batch: Batch
    hidden: Tensor
    buffers: Buffers
    replay: Callable[[], None]


class DecodeRecordings:
    """The recordings of a model over one cache, for sequences of up to max_model_len tokens."""

    def __init__(self, model: Model, cache: Cache, max_model_len: int) -> None:
        self.model, self.cache = model, cache
        self._width = pages_needed(max_model_len)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._bytes = 0
        self._possible = True

    def takes(self, batch: Batch) -> bool:
        """Whether the batch is a decode step, of a model that can be recorded."""
        return batch.is_decode_step and self._possible

    def next_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """As `Model.next_logits` gives them, [B, V]."""
        assert cache is self.cache
        key = len(batch.lengths), torch.get_num_threads()
        recorded = self._recorded.get(key)
        with torch.inference_mode():
            if recorded is None:
                hidden = self._record(key, batch)
            else:
                _copy(batch, recorded.batch)
                hidden = recorded.hidden
                torch.index_select(self.model.embedding, 0, batch.tokens, out=hidden)
                recorded.replay()
        return self.model.logits(hidden)

    def _record(self, key: tuple[int, int], batch: Batch) -> Tensor:
        """The step's last hidden states; it is recorded where it can be."""
        static = padding(key[0], self._width, self.model.device)
        _copy(batch, static)
        hidden = F.embedding(batch.tokens, self.model.embedding)
        buffers, seen = Buffers(self.model.device), _Computing()
        with cpu_calls.record() as calls, seen:
            self.model.run_layers(hidden, static, self.cache, buffers)
        self._possible = not seen.ops
        if self._possible:
            if self._bytes > MOST_BYTES:
                self._recorded.clear()
                self._bytes = 0
            self._bytes += buffers.nbytes + static.block_table.nbytes
            self._recorded[key] = _Recorded(static, hidden, buffers, cpu_calls.Replay(calls))
        return hidden


def recorded_steps(
    model: Model, cache: Cache, max_model_len: int
) -> DecodeGraphs | DecodeRecordings:
    """What records the decode steps of a model on its device."""
    kind = DecodeGraphs if model.device.type == "cuda" else DecodeRecordings
    return kind(model, cache, max_model_len)


def _copy(batch: Batch, to: Batch) -> None:
    to.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
    for name in ("positions", "slots", "kv_lens"):
        getattr(to, name).copy_(getattr(batch, name))


class _Computing(TorchDispatchMode):
    """The ops of torch that were called and do more than to allocate or look at memory."""

    LOOKING = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.LOOKING:
            self.ops.add(name)
        return func(*args, **(kwargs or {}))
