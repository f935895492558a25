"""RoPE into the INT4 cache, and attention over it, on the CPU (csrc/cpu/attention_kernels.cpp).

The same query over the same keys gives the same bits in prefill and in decode, in chunks of any
size, alone and in a batch, on any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from quant_kernels import cpu
from quant_kernels.cpu_activation import TYPES
from quant_kernels.reference_attention import LOG2_E

_ROPE = Struct("@PqqPqPqPqPqqPqqPqPPPqPqPqPqdqqqqqqq").pack  # QuantCpuRope
_ATTENTION = Struct("@PqqPqPPPqqPPPqqqqqqqqqdqq").pack  # QuantCpuAttention


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
    tokens, heads, dim = q_codes.shape
    pages, kv_heads = kv_codes.shape[1:3]
    call = _ROPE(
        qkv.data_ptr(), qkv.stride(0), TYPES[qkv.dtype],
        positions.data_ptr(), positions.dtype == torch.int64,
        slots.data_ptr(), slots.dtype == torch.int64,
        cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), len(cos),
        q_codes.data_ptr(), q_codes.stride(0), q_codes.stride(1),
        q_scale.data_ptr(), q_scale.stride(0), kv_codes.data_ptr(), kv_scales.data_ptr(),
        *_optional(q_norm, by_type=True), *_optional(k_norm, by_type=True),
        *_optional(key_scale), *_optional(key_shift),
        eps, symmetric, tokens, pages, heads, kv_heads, dim, torch.get_num_threads(),
    )  # fmt: skip
    status = _function("rope_append")(call)
    if status:
        cpu.fail("rope_append", status)


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
    cache = (kv_codes, kv_scales, block_table)
    _attend("prefill_attention", q_codes, q_scale, *cache, cu_seqlens.data_ptr(), kv_lens, out,
            sm_scale, window)  # fmt: skip


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
    cache = (kv_codes, kv_scales, block_table)
    _attend("decode_attention", q_codes, q_scale, *cache, 0, kv_lens, out, sm_scale, window)


def _attend(
    op: str,
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: int,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    """cu_seqlens: the address of the queries' bounds, 0 for one query a sequence."""
    tokens, heads, dim = q_codes.shape
    pages, kv_heads = kv_codes.shape[1:3]
    call = _ATTENTION(
        q_codes.data_ptr(), q_codes.stride(0), q_codes.stride(1),
        q_scale.data_ptr(), q_scale.stride(0), kv_codes.data_ptr(), kv_scales.data_ptr(),
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1],
        cu_seqlens, kv_lens.data_ptr(),
        out.data_ptr(), out.stride(0), out.stride(1), TYPES[out.dtype],
        len(kv_lens), tokens, pages, heads, kv_heads, dim,
        sm_scale * LOG2_E, max(window, 0), torch.get_num_threads(),
    )  # fmt: skip
    status = _function("attention")(call)
    if status:
        cpu.fail(op, status)


def _optional(x: Tensor | None, by_type: bool = False) -> tuple[int, int]:
    """Address, and type or row stride, of an argument that may be missing."""
    if x is None:
        return 0, 0
    return x.data_ptr(), TYPES[x.dtype] if by_type else x.stride(0)


@functools.cache
def _function(op: str) -> Any:
    function = cpu.library()[f"quant_cpu_{op}"]
    function.argtypes = [ctypes.c_char_p]
    return function
