"""What one step computes: the next tokens of several sequences, side by side without padding.

Sequences with a single new token come first, which is decoding; then those with more, prompts or
chunks of them. All tokens go through norms and GEMMs together; attention meets the two kinds with
an op each.

    tokens       a b c d d d d e e e        5 sequences, of which 3 have one new token
                 |---| |-----------|
                 decode   prefill
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant_kernels.packing import KV_PAGE


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a sequence: they stand at positions `start` and on, and their keys and
    values go to the sequence's pages. wants_logits: of the last of them."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    wants_logits: bool = True


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences, the first `singles` of which have one token each. int32, on the
    model's device.

    tokens, positions, slots [T]: a slot is page * KV_PAGE + place in the cache, and a negative one
    stores nothing. block_table [B, P], kv_lens [B]: pages and length of each sequence, its new
    tokens included. starts [B - singles + 1]: where the sequences with more tokens begin, counted
    from the first of these. logit_rows [R]: the tokens whose logits are wanted.
    lengths, chunk_lengths: kv_lens, and the numbers of new tokens, known to the host.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    kv_lens: Tensor
    starts: Tensor
    logit_rows: Tensor
    singles: int
    lengths: tuple[int, ...]
    chunk_lengths: tuple[int, ...]

    @property
    def is_decode_step(self) -> bool:
        """One new token for each sequence, and its logits wanted."""
        return self.singles == len(self.lengths) == len(self.logit_rows)


def padding(size: int, width: int, device: torch.device) -> Batch:
    """A decode step of sequences without tokens, which attend to nothing and store nothing, with
    `width` columns of pages: a place to copy batches into."""
    row = torch.zeros(size, dtype=torch.int32, device=device)
    return Batch(
        tokens=row,
        positions=row.clone(),
        slots=row - 1,
        block_table=row.new_zeros(size, width),
        kv_lens=row.clone(),
        starts=row[:1].clone(),
        logit_rows=torch.arange(size, dtype=torch.int32, device=device),
        singles=size,
        lengths=(0,) * size,
        chunk_lengths=(1,) * size,
    )


def pages_needed(tokens: int) -> int:
    """How many pages hold that many tokens of one sequence."""
    return -(-tokens // KV_PAGE)


def in_order(chunks: Sequence[Chunk]) -> list[int]:
    """Indices of chunks as `make_batch` wants them: single tokens first."""
    return sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens) > 1)


def make_batch(chunks: Sequence[Chunk], device: torch.device) -> Batch:
    """chunks: as `in_order` orders them, none of them empty."""
    counts = [len(chunk.tokens) for chunk in chunks]
    singles = sum(count == 1 for count in counts)
    assert counts[:singles] == [1] * singles, "single tokens come first"
    lengths = [chunk.start + count for chunk, count in zip(chunks, counts, strict=True)]
    tables = [np.asarray(chunk.pages, dtype=np.int32) for chunk in chunks]
    width = max(map(pages_needed, lengths))
    table = np.zeros((len(chunks), width), dtype=np.int32)
    positions, slots = [], []
    for row, pages, chunk, length in zip(table, tables, chunks, lengths, strict=True):
        used = pages[: pages_needed(length)]
        row[: len(used)] = used
        position = np.arange(chunk.start, length, dtype=np.int32)
        positions.append(position)
        slots.append(used[position // KV_PAGE] * KV_PAGE + position % KV_PAGE)
    ends = np.cumsum(counts)
    wanted = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.wants_logits]
    parts = [
        np.fromiter(itertools.chain.from_iterable(c.tokens for c in chunks), np.int32, ends[-1]),
        np.concatenate(positions),
        np.concatenate(slots),
        table.ravel(),
        np.asarray(lengths, dtype=np.int32),
        np.concatenate(([0], np.cumsum(counts[singles:]))).astype(np.int32),
        np.asarray(wanted, dtype=np.int32),
    ]
    moved = _to_device(np.concatenate(parts), device)  # one copy for all
    tokens, position, slot, pages, kv_lens, starts, rows = moved.split([len(p) for p in parts])
    return Batch(
        tokens=tokens,
        positions=position,
        slots=slot,
        block_table=pages.view(table.shape),
        kv_lens=kv_lens,
        starts=starts,
        logit_rows=rows,
        singles=singles,
        lengths=tuple(lengths),
        chunk_lengths=tuple(counts),
    )


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """int32 [n] to the device; from pinned memory to a GPU, which is then not waited for."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
