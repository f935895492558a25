"""Keys and values of running sequences, preallocated in pages of KV_PAGE tokens.

Pages, because sequences of any length then share one memory, and one that ends gives all of its
room back at once. They cost little code: a list of free pages, and a table that the attention
kernels read anyway. A sequence gets the pages for its prompt and all that it may generate when it
is admitted, so that nothing that runs ever has to be stopped for want of room.

Two caches of one interface, `attend`: it takes what a layer's q, k and v projections gave for a
batch's new tokens, stores keys and values, and lets the queries see their sequences,

    O_i = sum_t P_it v_t,   P_i = softmax_t(q_i . k_t / sqrt(D)),   max(0, i - window + 1) <= t <= i

`Int4Cache` stores 4-bit codes that the kernels read as they are (`kv4.py`). `DenseCache` stores the
model's dtype, for models whose checkpoint has no format for keys.

Shapes: L layers, T tokens, Hq / Hk query / KV heads, D head_dim, P pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.decoder import KeyTransform, rotary_table
from quant.errors import RequestError
from quant.runtime.batch import Batch, pages_needed
from quant.runtime.buffers import Buffers
from quant_kernels import ops
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import KV_PAGE


@dataclass(frozen=True)
class HeadOptions:
    """What a layer does to heads besides RoPE: norm weights [D] of q and k, a key transform."""

    norms: tuple[Tensor, Tensor] | None = None
    keys: KeyTransform | None = None


class PagePool:
    """Pages 0 .. count - 1, each of them free or owned by one sequence."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.unused = list(reversed(range(count)))
        self._owned = np.zeros(count, dtype=bool)

    def allocate(self, count: int) -> list[int] | None:
        """That many pages, or None where fewer are free."""
        if count > len(self.unused):
            return None
        pages = [self.unused.pop() for _ in range(count)]
        self._owned[pages] = True
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back; ValueError where one is not owned, and then none is."""
        if len(set(pages)) != len(pages) or not bool(self._owned[pages].all()):
            raise ValueError(f"pages {pages} are not all owned: freed twice?")
        self._owned[pages] = False
        self.unused.extend(reversed(pages))


class Int4Cache:
    """codes [L, 2, P, Hk, KV_PAGE, D / 2] uint8 and scales [L, 2, P, Hk, KV_PAGE, 2] FP16.

    Raises RequestError where the memory is not there.
    """

    def __init__(
        self,
        config: DecoderConfig,
        pages: int,
        kv: KVFormat,
        *,
        max_len: int,
        device: torch.device,
    ) -> None:
        self.config, self.kv = config, kv
        shape = (config.num_layers, 2, pages, config.num_kv_heads, KV_PAGE)
        size = pages * KV_PAGE * self.bytes_per_token(config)
        self.codes = _zeros((*shape, config.head_dim // 2), torch.uint8, device, size)
        self.scales = _zeros((*shape, 2), torch.float16, device, size)
        self.pool = PagePool(pages)
        self.rope = _half_tables(config, max_len, device)

    @staticmethod
    def bytes_per_token(config: DecoderConfig) -> int:
        """Bytes of one token of one sequence over all layers: codes, scale and offset."""
        return config.num_layers * 2 * config.num_kv_heads * (config.head_dim // 2 + 4)

    def attend(
        self, layer: int, qkv: Tensor, batch: Batch, options: HeadOptions, out: Tensor,
        workspace: Tensor | None, buffers: Buffers,
    ) -> None:  # fmt: skip
        """qkv [T, (Hq + 2 Hk) D], out [T, Hq, D]; BF16, FP16 or FP32."""
        cfg, cache = self.config, (self.codes[layer], self.scales[layer])
        q_codes = buffers.empty("q", tuple(out.shape), torch.float8_e4m3fn)
        q_scale = buffers.empty("scale of q", tuple(out.shape[:2]), torch.float32)
        keys = options.keys
        ops.rope_append(
            qkv, batch.positions, *self.rope, batch.slots, q_codes, q_scale, *cache,
            norms=options.norms, eps=cfg.rms_norm_eps,
            key_transform=None if keys is None else (keys.scale, keys.shift),
            symmetric=self.kv.symmetric,
        )  # fmt: skip
        scale, window = 1 / math.sqrt(cfg.head_dim), cfg.sliding_windows[layer] or 0
        n = batch.singles
        if n:
            ops.decode_attention(
                q_codes[:n], q_scale[:n], *cache, batch.block_table[:n], batch.kv_lens[:n], out[:n],
                sm_scale=scale, window=window, workspace=workspace,
            )  # fmt: skip
        if n < len(batch.lengths):
            pages = pages_needed(max(batch.lengths[n:]))  # some workspaces have room for all
            ops.prefill_attention(
                q_codes[n:], q_scale[n:], *cache, batch.block_table[n:, :pages], batch.starts,
                batch.kv_lens[n:], max(batch.chunk_lengths[n:]), out[n:],
                sm_scale=scale, window=window,
            )  # fmt: skip


class DenseCache:
    """kv [L, 2, P, Hk, KV_PAGE, D]: keys after RoPE, and values, in the model's dtype.

    Raises RequestError where the memory is not there.
    """

    def __init__(
        self,
        config: DecoderConfig,
        pages: int,
        dtype: torch.dtype,
        *,
        max_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        # One page more, which no sequence is given: padded tokens, in slot -1, go there.
        heads = (config.num_kv_heads, KV_PAGE, config.head_dim)
        size = pages * KV_PAGE * self.bytes_per_token(config, dtype)
        self.kv = _zeros((config.num_layers, 2, pages + 1, *heads), dtype, device, size)
        self.pool = PagePool(pages)
        self.rope = _half_tables(config, max_len, device)

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Bytes of one token of one sequence over all layers."""
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    def attend(
        self, layer: int, qkv: Tensor, batch: Batch, options: HeadOptions, out: Tensor,
        workspace: Tensor | None, buffers: Buffers,
    ) -> None:  # fmt: skip
        """qkv [T, (Hq + 2 Hk) D], out [T, Hq, D]; in the cache's dtype."""
        cfg, kv = self.config, self.kv[layer]
        q = buffers.empty("q", tuple(out.shape), out.dtype)
        ops.dense_rope_append(
            qkv, batch.positions, *self.rope, batch.slots, q, kv,
            norms=options.norms, eps=cfg.rms_norm_eps,
        )  # fmt: skip
        scale, window = 1 / math.sqrt(cfg.head_dim), cfg.sliding_windows[layer] or 0
        n = batch.singles
        if n:
            ops.dense_decode_attention(
                q[:n], kv, batch.block_table[:n], batch.kv_lens[:n], out[:n],
                sm_scale=scale, window=window,
            )  # fmt: skip
        if n < len(batch.lengths):
            ops.dense_prefill_attention(
                q[n:], kv, batch.block_table[n:], batch.chunk_lengths[n:], batch.lengths[n:],
                out[n:], sm_scale=scale, window=window,
            )  # fmt: skip


def _half_tables(
    config: DecoderConfig, max_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_len, D / 2] FP32: channel i turns with i + D / 2."""
    tables = rotary_table(config, torch.arange(max_len, device=device))
    cos, sin = (table[:, : config.head_dim // 2].contiguous() for table in tables)
    return cos, sin


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """Zeros, because a masked position still multiplies what memory holds by 0, and 0 NaN = NaN.

    On a CPU from calloc: torch.zeros would write every page, also those that are never used.
    size: bytes of the whole cache, for the error where they are not there.
    """
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        flat = np.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(flat).view(dtype).view(shape)
    except (RuntimeError, MemoryError, ValueError) as error:  # torch's and numpy's words for it
        raise RequestError(
            f"a KV cache of {size / 1e9:,.1f} GB does not fit on {device}; lower max_num_seqs, "
            "max_model_len or kv_cache_memory_bytes"
        ) from error
