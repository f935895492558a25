"""RoPE into a paged cache, and attention over it, on the CPU (csrc/cpu/attention_kernels.cpp).

The same query over the same keys gives the same bits in prefill and in decode, in chunks of any
size, alone and in a batch, on any number of threads. Of a dense cache that is true of decode; its
prefill is torch's, which has BF16 products, and all of it where head_dim is no multiple of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from quant_kernels import reference_dense
from quant_kernels.cpu_activation import TYPES
from quant_kernels.cpu_calls import invoke
from quant_kernels.reference_attention import LOG2_E

_ROPE = Struct("@PqqPqPqPqPqqPqqPqPPqPqPqPqPqdqqqqqqq").pack  # QuantCpuRope
_ATTENTION = Struct("@PqqPqPPqPqqPPPqqqqqqqqqdqq").pack  # QuantCpuAttention
_INT4 = 3  # QuantCpuType of the cache


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    symmetric: bool,
) -> None:
    """`ops.rope_append`."""
    _append(
        qkv, positions, cos, sin, slots, q_codes, kv_codes,
        (q_scale.data_ptr(), q_scale.stride(0)), (kv_scales.data_ptr(), _INT4),
        q_norm, k_norm, eps, key_scale, key_shift, symmetric,
    )  # fmt: skip


def dense_rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    kv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """`ops.dense_rope_append`."""
    if not _has_dense(kv):
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        reference_dense.rope_append(qkv, positions, cos, sin, slots, q, kv, norms, eps)
        return
    _append(
        qkv, positions, cos, sin, slots, q, kv, (0, 0), (0, TYPES[kv.dtype]),
        q_norm, k_norm, eps, None, None, False,
    )  # fmt: skip


def _has_dense(kv: Tensor) -> bool:
    return kv.shape[-1] % 32 == 0 and kv.shape[-1] <= 256


def _append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    kv: Tensor,
    q_scale: tuple[int, int],
    kv_scales: tuple[int, int],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    symmetric: bool,
) -> None:
    """q_scale: address and row stride; kv_scales: address, and the type of the cache."""
    tokens, heads, dim = q.shape
    pages, kv_heads = kv.shape[1:3]
    call = _ROPE(
        qkv.data_ptr(), qkv.stride(0), TYPES[qkv.dtype],
        positions.data_ptr(), positions.dtype == torch.int64,
        slots.data_ptr(), slots.dtype == torch.int64,
        cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), len(cos),
        q.data_ptr(), q.stride(0), q.stride(1), *q_scale, kv.data_ptr(), *kv_scales,
        *_optional(q_norm, by_type=True), *_optional(k_norm, by_type=True),
        *_optional(key_scale), *_optional(key_shift),
        eps, symmetric, tokens, pages, heads, kv_heads, dim, torch.get_num_threads(),
    )  # fmt: skip
    invoke("rope_append", call)


def prefill_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    """`ops.prefill_attention`."""
    _attend(
        "prefill_attention",
        q_codes, (q_scale.data_ptr(), q_scale.stride(0)), kv_codes, (kv_scales.data_ptr(), _INT4),
        block_table, cu_seqlens.data_ptr(), kv_lens, out, sm_scale, window,
    )  # fmt: skip


def decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    workspace: Tensor | None,
) -> None:
    """`ops.decode_attention`."""
    _attend(
        "decode_attention",
        q_codes, (q_scale.data_ptr(), q_scale.stride(0)), kv_codes, (kv_scales.data_ptr(), _INT4),
        block_table, 0, kv_lens, out, sm_scale, window,
    )  # fmt: skip


def dense_prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    """`ops.dense_prefill_attention`."""
    found = reference_dense.prefill_attention(
        q, kv, block_table, query_lens, kv_lens, sm_scale, window
    )
    out.copy_(found)


def dense_decode_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    """`ops.dense_decode_attention`."""
    if not _has_dense(kv):
        found = reference_dense.decode_attention(q, kv, block_table, kv_lens, sm_scale, window)
        out.copy_(found)
        return
    _attend(
        "dense_decode_attention",
        q, (0, 0), kv, (0, TYPES[kv.dtype]), block_table, 0, kv_lens, out, sm_scale, window,
    )  # fmt: skip


def _attend(
    op: str,
    q: Tensor,
    q_scale: tuple[int, int],
    kv: Tensor,
    kv_scales: tuple[int, int],
    block_table: Tensor,
    cu_seqlens: int,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    """q_scale, kv_scales: as for `_append`. cu_seqlens: the address of the queries' bounds, 0 for
    one query a sequence."""
    tokens, heads, dim = q.shape
    pages, kv_heads = kv.shape[1:3]
    call = _ATTENTION(
        q.data_ptr(), q.stride(0), q.stride(1), *q_scale, kv.data_ptr(), *kv_scales,
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1],
        cu_seqlens, kv_lens.data_ptr(),
        out.data_ptr(), out.stride(0), out.stride(1), TYPES[out.dtype],
        len(kv_lens), tokens, pages, heads, kv_heads, dim,
        sm_scale * LOG2_E, max(window, 0), torch.get_num_threads(),
    )  # fmt: skip
    invoke("attention", call, lambda: op)


def _optional(x: Tensor | None, by_type: bool = False) -> tuple[int, int]:
    """Address, and type or row stride, of an argument that may be missing."""
    if x is None:
        return 0, 0
    return x.data_ptr(), TYPES[x.dtype] if by_type else x.stride(0)
