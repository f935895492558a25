"""The definition of RoPE into the INT4 cache, and of attention over it, in plain torch.

A query Q [D] is FP8 E4M3 codes Qc with one scale a per token and head; a key k_t is s_t q_t + o_t,
a value v_t likewise with scale and offset of its own (`kv4.py`). Scores over keys t, in base 2:

    S_t = (s_t (Qc . q_t) + o_t sum(Qc)) a log2(e) / sqrt(D)
    M   = ceil(max_t S_t),   p_t = 2^(S_t - M),   l = sum_t p_t

The code product is exact in FP32, and s_t and o_t meet a column of the scores and the row sum of Q.
M is an integer, so that a kernel which sees the keys tile by tile rescales by powers of two: what
it rounds does not depend on its tiles. With values,

    P_t = E4M3(256 p_t s_t / z),   z = 2^ceil(log2 max_t |s_t|)
    O   = (z / 256 sum_t P_t q_t + sum_t p_t o_t 1) / l

P is rounded for FP8 tensor cores after the value's scale has joined it; l and the sum of offsets
take p as it is. A kernel may take another power of two for z, as long as no P_t exceeds 448: only
what E4M3 holds as subnormal numbers, less than 2^-14 of the largest, then differs.

With a soft cap c, scores s = S_t ln(2) become c tanh(s / c) before masks, M and all that follows
(Gemma 2, arXiv:2408.00118, section 2).

Shapes: T query tokens of B sequences one after the other, Hq / Hk query / KV heads, D head_dim,
pages of `packing.KV_PAGE` tokens. Query head h reads KV head h // (Hq / Hk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels.formats import round_e4m3
from quant_kernels.kv4 import KVCodes, KVFormat, quantize_kv
from quant_kernels.packing import KV_PAGE, pack_kv, unpack_kv
from quant_kernels.reference import quantize_activation, rms_norm

LOG2_E = math.log2(math.e)
P_RANGE = 256.0  # what the largest p times the largest value scale becomes: E4M3 ends at 448


@dataclass(frozen=True)
class QKVRows:
    """Queries, keys and values of T tokens as they leave RoPE.

    q_codes [T, Hq, D] float8_e4m3fn, q_scale [T, Hq] FP32; keys, values: codes [T, Hk, D].
    """

    q_codes: Tensor
    q_scale: Tensor
    keys: KVCodes
    values: KVCodes


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., S, heads, D]; cos, sin [..., S, D] -> x rotated pair by pair, in x's dtype."""
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (y * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


def rope_quantize(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    fmt: KVFormat,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    key_transform: tuple[Tensor, Tensor] | None = None,
) -> QKVRows:
    """From the output of the fused q, k, v projection to what attention reads.

    qkv [T, (Hq + 2 Hk) D]: all query heads, then keys, then values. positions [T] int; cos, sin
    [positions, D / 2] FP32. heads: (Hq, Hk). norms: weights [D] of the RMSNorm per head of q and of
    k, before RoPE (QK-norm models). key_transform: scale and shift [Hk, D] FP32 of keys after RoPE,
    k' = scale (k - shift), q' = q / scale.
    """
    query_heads, kv_heads = heads
    rows = qkv.unflatten(-1, (query_heads + 2 * kv_heads, -1))
    q, k, v = rows.split((query_heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    turn = tuple(torch.cat((table, table), dim=-1)[positions.long()] for table in (cos, sin))
    q, k = apply_rope(q, *turn), apply_rope(k, *turn)
    if key_transform is not None:
        scale, shift = key_transform
        k = (k.float() - shift) * scale
        q = q.float() / scale.repeat_interleave(query_heads // kv_heads, dim=0)
    codes, a = quantize_activation(q, "fp8")
    return QKVRows(codes, a.squeeze(-1), quantize_kv(k, fmt), quantize_kv(v, fmt))


def append_kv(
    keys: KVCodes, values: KVCodes, slots: Tensor, kv_codes: Tensor, kv_scales: Tensor
) -> None:
    """Write rows [T, Hk, D] into the paged cache; slots [T]: page * KV_PAGE + place, < 0: nowhere.

    kv_codes [2, pages, Hk, KV_PAGE, D / 2] uint8 and kv_scales [2, pages, Hk, KV_PAGE, 2] FP16 are
    changed in place.
    """
    kept = slots >= 0
    page, place = slots[kept].long() // KV_PAGE, slots[kept].long() % KV_PAGE
    for i, rows in enumerate((keys, values)):
        packed, scales = pack_kv(rows)
        kv_codes[i, page, :, place] = packed[kept]
        kv_scales[i, page, :, place] = scales[kept]


def read_kv(
    kv_codes: Tensor, kv_scales: Tensor, pages: Tensor, length: int
) -> tuple[KVCodes, KVCodes]:
    """The first `length` keys and values of a sequence, [length, Hk, D], from its pages [P] int."""
    needed = pages[: math.ceil(length / KV_PAGE)].long()
    packed = kv_codes[:, needed].transpose(2, 3).flatten(1, 2)[:, :length]
    scales = kv_scales[:, needed].transpose(2, 3).flatten(1, 2)[:, :length]
    return unpack_kv(packed[0], scales[0]), unpack_kv(packed[1], scales[1])


def attention(
    q_codes: Tensor,
    q_scale: Tensor,
    keys: KVCodes,
    values: KVCodes,
    *,
    sm_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    round_p: bool = True,
) -> Tensor:
    """Causal attention of one sequence's last S tokens over its T keys (module docstring).

    q_codes [S, Hq, D], q_scale [S, Hq]; keys, values: codes [T, Hk, D]. Query i stands at position
    T - S + i and sees keys up to it; window w > 0: the last w of them only. sm_scale: 1 / sqrt(D)
    as a rule. soft_cap 0: none. round_p False: P stays in FP32. Returns [S, Hq, D] FP32; a query
    that sees no key gives zeros.
    """
    length, total = len(q_codes), len(keys.codes)
    if total == 0:
        return torch.zeros(q_codes.shape, device=q_codes.device)
    ratio = q_codes.shape[1] // keys.codes.shape[1]
    q = q_codes.float().transpose(0, 1)  # [Hq, S, D]
    k, k_scale, k_offset = _by_query_head(keys, ratio)
    v, v_scale, v_offset = _by_query_head(values, ratio)
    score = (q @ k.mT) * k_scale.mT + q.sum(-1, keepdim=True) * k_offset.mT  # [Hq, S, T]
    score = score * (q_scale.T.unsqueeze(-1) * (sm_scale * LOG2_E))
    if soft_cap > 0:
        cap = soft_cap * LOG2_E
        score = cap * torch.tanh(score / cap)
    position = torch.arange(total - length, total, device=q.device)
    distance = position[:, None] - torch.arange(total, device=q.device)
    seen = (distance >= 0) & ((distance < window) if window > 0 else True)
    score = score.masked_fill(~seen, -math.inf)
    top = score.amax(-1, keepdim=True).ceil()
    p = torch.exp2(score - torch.where(top.isneginf(), torch.zeros_like(top), top))
    weighted = p * v_scale.mT
    if round_p:
        largest = v_scale.abs().amax(dim=1, keepdim=True)
        z = torch.exp2(torch.log2(torch.where(largest == 0, 1.0, largest)).ceil())
        weighted = round_e4m3(weighted * (P_RANGE / z)) * (z / P_RANGE)
    out = weighted @ v + p @ v_offset  # [Hq, S, D] + [Hq, S, 1]
    total_p = p.sum(-1, keepdim=True)
    return (out / torch.where(total_p == 0, torch.ones_like(total_p), total_p)).transpose(0, 1)


def prefill_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attention of packed prompts, or chunks of them, over the paged cache.

    q_codes [T, Hq, D], q_scale [T, Hq]: the queries of sequence b are rows cu_seqlens[b] ..
    cu_seqlens[b + 1] - 1, its last ones; cu_seqlens [B + 1] int32. kv_lens [B] int32: tokens of it
    in the cache, these included. block_table [B, P] int32: its pages. Returns [T, Hq, D] FP32.
    """
    out = torch.zeros(q_codes.shape, dtype=torch.float32, device=q_codes.device)
    bounds = cu_seqlens.tolist()
    for b, length in enumerate(kv_lens.tolist()):
        part = slice(bounds[b], bounds[b + 1])
        keys, values = read_kv(kv_codes, kv_scales, block_table[b], length)
        out[part] = attention(
            q_codes[part], q_scale[part], keys, values,
            sm_scale=sm_scale, window=window, soft_cap=soft_cap,
        )  # fmt: skip
    return out


def decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """`prefill_attention` with one query a sequence: q_codes [B, Hq, D] -> [B, Hq, D] FP32.

    A sequence of length 0 (a padded place in a batch) gives zeros.
    """
    cu_seqlens = torch.arange(len(q_codes) + 1)
    return prefill_attention(
        q_codes, q_scale, kv_codes, kv_scales, block_table, cu_seqlens, kv_lens,
        sm_scale=sm_scale, window=window, soft_cap=soft_cap,
    )  # fmt: skip


def _by_query_head(rows: KVCodes, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset [T, Hk, ...] -> FP32 [Hq, T, ...]."""
    q, s, o = (
        part.float().transpose(0, 1).repeat_interleave(ratio, dim=0)
        for part in (rows.codes, rows.scale, rows.offset)
    )
    return q, s, o
