"""Keys and values of running sequences, preallocated: slot s holds one sequence, from position 0.

For a layer with a sliding window w (None: w = infinity), a query at position i sees

    O_i = sum_t P_it v_t,   P_i = softmax_t(q_i . k_t / sqrt(D)),   max(0, i - w + 1) <= t <= i

A decode step reads a padded span of every slot at once; what lies outside a sequence's own span is
masked, so P is exactly 0 there.

Shapes: L layers, B sequences, S tokens, Hq / Hk query / KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.decoder import Attention, causal_attention, scaled_dot_product
from quant.errors import RequestError
from quant.runtime.model import AttentionOf


class KVCache:
    """keys and values [L, slots, max_len, Hk, D], after RoPE, in the model's dtype.

    `prefill` and `decode` take the room that the step's tokens need and return (positions,
    attention_of), both for one call of `Decoder.hidden_states`. A cache in another format is a
    class with the same methods: only they know how keys and values are stored.
    """

    def __init__(
        self,
        config: DecoderConfig,
        slots: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        """Raises RequestError where the memory is not there."""
        self.config = config
        self.max_len = max_len
        self.lengths = [0] * slots  # tokens in each slot
        self._free = list(reversed(range(slots)))
        shape = (config.num_layers, slots, max_len, config.num_kv_heads, config.head_dim)
        self.device = device or torch.device("cpu")
        try:
            self.keys = _zeros(shape, dtype, self.device)
            self.values = _zeros(shape, dtype, self.device)
        except (RuntimeError, MemoryError) as error:  # torch's and numpy's words for it
            size = 2 * dtype.itemsize * torch.Size(shape).numel()
            raise RequestError(
                f"the KV cache of {slots} sequences x {max_len} tokens takes {size / 1e9:,.1f} GB, "
                f"which {self.device} does not have; lower max_num_seqs or max_model_len"
            ) from error

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes, over all layers."""
        config = self.config
        per_layer = 2 * config.num_kv_heads * config.head_dim * self.keys.dtype.itemsize
        return config.num_layers * per_layer

    def allocate(self) -> int | None:
        """An empty slot, the lowest there is; None where all are taken."""
        return self._free.pop() if self._free else None

    def free(self, slot: int) -> None:
        """Give a slot back; its tokens are forgotten."""
        if slot in self._free:
            raise ValueError(f"slot {slot} is already free")
        self.lengths[slot] = 0
        self._free = sorted([*self._free, slot], reverse=True)

    def prefill(self, slot: int, count: int) -> tuple[Tensor, AttentionOf]:
        """Room for a prompt of `count` tokens, from the beginning of a slot.

        Returns positions [1, count] and the attention of each layer, which stores k and v
        [1, count, Hk, D] and attends causally. Raises RequestError where the prompt does not fit.
        """
        if count > self.max_len:
            raise RequestError(
                f"the prompt has {count} tokens; the KV cache holds {self.max_len} per sequence"
            )
        self.lengths[slot] = count

        def attention_of(layer: int) -> Attention:
            causal = causal_attention(self.config.sliding_windows[layer])

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.keys[layer, slot, :count] = k[0]
                self.values[layer, slot, :count] = v[0]
                return causal(q, k, v)

            return attend

        return torch.arange(count, device=self.device).unsqueeze(0), attention_of

    def decode(self, slots: Sequence[int]) -> tuple[Tensor, AttentionOf]:
        """Room for one more token in each of B different slots, whatever their lengths.

        Returns positions [B, 1] and the attention of each layer, which stores k and v [B, 1, Hk, D]
        and lets the queries see what their own slots hold. Raises RequestError where a slot is
        full.
        """
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} repeat: a step adds one token to a sequence")
        if full := [slot for slot in slots if self.lengths[slot] >= self.max_len]:
            raise RequestError(f"slot {full[0]} of the KV cache is full ({self.max_len} tokens)")
        newest = [self.lengths[slot] for slot in slots]
        for slot in slots:
            self.lengths[slot] += 1
        row = torch.tensor(slots, device=self.device)
        position = torch.tensor(newest, device=self.device)
        # Layers differ by their window only, so a step needs one span and mask per window.
        spans = {w: _span(newest, position, w) for w in set(self.config.sliding_windows)}
        # Neighbouring slots, the usual case, are read in place; others are gathered into a copy.
        first = slots[0]
        together = list(slots) == list(range(first, first + len(slots)))
        rows = slice(first, first + len(slots)) if together else row

        def attention_of(layer: int) -> Attention:
            span, seen = spans[self.config.sliding_windows[layer]]
            keys, values = self.keys[layer], self.values[layer]

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys[row, position] = k[:, 0]
                values[row, position] = v[:, 0]
                return _attend_one(q, keys[rows, span], values[rows, span], seen)

            return attend

        return position.unsqueeze(1), attention_of


def _span(newest: list[int], position: Tensor, window: int | None) -> tuple[slice, Tensor]:
    """What sequences with newest positions [B] see: the span of T positions that any of them sees,
    and in it what each one does, [B, 1, 1, T] bool."""
    start = 0 if window is None else max(0, min(newest) - window + 1)
    span = slice(start, max(newest) + 1)
    t = torch.arange(span.start, span.stop, device=position.device)
    distance = position[:, None] - t
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return span, seen[:, None, None]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One query per sequence: q [B, 1, Hq, D]; k, v [B, T, Hk, D]; seen [B, 1, 1, T] -> as q.

    The query heads that share a KV head become rows of one product, so that k and v are read once
    per KV head and never repeated.
    """
    grouped = q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(1, 2)  # [B, Hq / Hk, Hk, D]
    out = scaled_dot_product(grouped, k, v, seen)
    return out.transpose(1, 2).flatten(1, 2).unsqueeze(1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked position still multiplies what memory holds by 0, and 0 NaN = NaN.

    On a CPU from calloc: torch.zeros would write every page, also those that are never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flat = np.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)
