"""The ops of a dense KV cache, as `registration.py` registers them: their schemas and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant_kernels.arguments import FLOATS, OpError, expect
from quant_kernels.backends import backend_for
from quant_kernels.packing import KV_PAGE


def _dense_rope_append(
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
    backend: str,
) -> None:
    op, tokens = "dense_rope_append", qkv.shape[0]
    query_heads, kv_heads, dim = _check_cache(op, q, kv)
    expect(op, "qkv", qkv, (tokens, (query_heads + 2 * kv_heads) * dim), (kv.dtype,))
    expect(op, "q", q, (tokens, query_heads, dim), (kv.dtype,))
    integers = (torch.int32, torch.int64)
    expect(op, "positions", positions, (tokens,), integers)
    expect(op, "slots", slots, (tokens,), integers)
    expect(op, "cos", cos, (cos.shape[0], dim // 2), (torch.float32,))
    expect(op, "sin", sin, tuple(cos.shape), (torch.float32,))
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            expect(op, name, norm, (dim,), FLOATS)
    if (q_norm is None) != (k_norm is None):
        raise OpError(f"{op}: q_norm and k_norm come together")
    backend_for(op, qkv.device, backend).dense_rope_append(
        qkv, positions, cos, sin, slots, q, kv, q_norm, k_norm, eps
    )


def _dense_prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    out: Tensor,
    sm_scale: float,
    window: int,
    backend: str,
) -> None:
    op = "dense_prefill_attention"
    _check_attention(op, q, kv, block_table, len(kv_lens), out, sm_scale)
    counts = list(zip(query_lens, kv_lens, strict=False))
    if len(query_lens) != len(kv_lens) or sum(query_lens) != len(q):
        raise OpError(
            f"{op}: query_lens {list(query_lens)} and kv_lens {list(kv_lens)} for {len(q)} tokens"
        )
    if any(not 0 < queries <= length for queries, length in counts):
        raise OpError(f"{op}: a sequence has 1 .. kv_len query tokens, got {counts}")
    backend_for(op, q.device, backend).dense_prefill_attention(
        q, kv, block_table, query_lens, kv_lens, out, sm_scale, window
    )


def _dense_decode_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    backend: str,
) -> None:
    op = "dense_decode_attention"
    _check_attention(op, q, kv, block_table, len(q), out, sm_scale)
    expect(op, "kv_lens", kv_lens, (len(q),), (torch.int32,))
    backend_for(op, q.device, backend).dense_decode_attention(
        q, kv, block_table, kv_lens, out, sm_scale, window
    )


def _check_cache(op: str, q: Tensor, kv: Tensor) -> tuple[int, int, int]:
    """(Hq, Hk, D) of queries and cache that belong together."""
    if q.dim() != 3 or kv.dim() != 5:
        raise OpError(
            f"{op}: q must be [T, Hq, D] and kv [2, pages, Hk, {KV_PAGE}, D], got "
            f"{list(q.shape)} and {list(kv.shape)}"
        )
    query_heads, dim = q.shape[1:]
    pages, kv_heads = kv.shape[1:3]
    if kv_heads == 0 or query_heads % kv_heads or dim % 2:
        raise OpError(
            f"{op}: {query_heads} query heads over {kv_heads} KV heads of dimension {dim}; heads "
            "must divide, and the dimension be even"
        )
    expect(op, "kv", kv, (2, pages, kv_heads, KV_PAGE, dim), FLOATS)
    if not kv.is_contiguous():
        raise OpError(f"{op}: kv must be contiguous")
    return query_heads, kv_heads, dim


def _check_attention(
    op: str, q: Tensor, kv: Tensor, block_table: Tensor, batch: int, out: Tensor, sm_scale: float
) -> None:
    if not sm_scale > 0:
        raise OpError(f"{op}: sm_scale must be positive, got {sm_scale}")
    _check_cache(op, q, kv)
    expect(op, "q", q, tuple(q.shape), (kv.dtype,))
    expect(op, "block_table", block_table, (batch, block_table.shape[1]), (torch.int32,))
    expect(op, "out", out, tuple(q.shape), FLOATS)


SCHEMAS: dict[str, tuple[str, Callable[..., None]]] = {
    "dense_rope_append": (
        "(Tensor qkv, Tensor positions, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) q, "
        "Tensor(b!) kv, Tensor? q_norm, Tensor? k_norm, float eps, str backend) -> ()",
        _dense_rope_append,
    ),
    "dense_prefill_attention": (
        "(Tensor q, Tensor kv, Tensor block_table, int[] query_lens, int[] kv_lens, "
        "Tensor(a!) out, float sm_scale, int window, str backend) -> ()",
        _dense_prefill_attention,
    ),
    "dense_decode_attention": (
        "(Tensor q, Tensor kv, Tensor block_table, Tensor kv_lens, Tensor(a!) out, "
        "float sm_scale, int window, str backend) -> ()",
        _dense_decode_attention,
    ),
}
