"""Causal attention of packed prompts, or chunks of them, over the paged INT4 cache.

With query codes Qc (E4M3, one scale a) and keys and values k_t = s_t q_t + o_t of centred codes,

    S_t = (s_t (Qc . q_t) + o_t sum(Qc)) a sm_scale log2(e),    M = ceil(max_t S_t)
    p_t = 2^(S_t - M),   l = sum_t p_t,   P_t = E4M3(256 p_t s_t / z)
    O   = (sum over tiles of z / 256 sum_t P_t q_t, plus sum_t p_t o_t) / l

(`reference_attention.py`). One program takes BLOCK_Q queries of one head and goes over the pages
they see, one page a step. M is a running maximum of integers, so what was summed before is rescaled
by powers of two, exactly; z is a power of two for each page. Both products, Q K^T and P V, are FP8
MMAs where the GPU has them (`FP8`) and FP16 ones where not: all operands are exact in both.

A byte of the cache holds channels j and j + D/2, so Q, and the output, are two tiles of D/2
channels and a tile of bytes becomes two operands without moving anything between lanes. Scales and
offsets touch scores and P, never codes: no value is dequantized. P V starts from zero on every page
and is added in FP32, because the accumulators of FP8 tensor cores are short.

Pages that all queries of the tile see whole need no mask and have a loop of their own. The last
queries of a sequence see most keys, and their programs start first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import dispatch
from quant_kernels.packing import KV_PAGE
from quant_kernels.reference_attention import LOG2_E, P_RANGE
from quant_kernels.triton.convert import code_operands, code_unit
from quant_kernels.triton.numbers import (
    INTERPRETED,
    e4m3_byte,
    e4m3_to_fp16,
    round_e4m3,
    round_to,
)

PAGE = tl.constexpr(KV_PAGE)
P_SCALE = tl.constexpr(P_RANGE)
# Below every score, but finite: the difference of two of them is 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def fp16_codes(packed):
    """Bytes of the cache -> low and high codes, FP16: 0x6400 + n is 1024 + n."""
    wide = packed.to(tl.uint16)
    low = (((wide & 15) ^ 8) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    high = (((wide >> 4) ^ 8) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def power_of_two_above(x):
    """x >= 0, FP32 -> the least power of two that is not below it (1 for 0), from its exponent."""
    bits = (x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.where(x == 0, 1.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def reciprocal_of_power_of_two(z):
    """1 / z for z a power of two, exactly, which a GPU's division does not promise."""
    return (0x7F000000 - z.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def round_p(x):
    """FP32 -> the nearest E4M3 value as FP16, which holds it; NaN stays."""
    return tl.where(x == x, round_e4m3(x), x).to(tl.float16)


@triton.jit
def load_bytes(base, row, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Rows of HALF bytes, zeros up to BLOCK_HALF of them."""
    channel = tl.arange(0, BLOCK_HALF)
    places = base + row[:, None] * HALF + channel[None, :]
    if BLOCK_HALF == HALF:
        return tl.load(places)
    else:
        return tl.load(places, mask=channel[None, :] < HALF, other=0)


@triton.jit
def _load_scales(kv_scales, row, value_row, stored):
    """Scale and offset of a page's keys, then of its values, FP32, [PAGE] each.

    One tile of all four keeps a layout of its own. Loaded apart, Triton 3.6 gives them the layout
    of the scores, sixteen addresses a thread for each, and the registers do not suffice.
    """
    place = tl.arange(0, PAGE)[:, None, None]
    kind = tl.arange(0, 2)[None, :, None]
    part = tl.arange(0, 2)[None, None, :]
    places = kv_scales + row * 2 + (place * 2 + part + kind * ((value_row - row) * 2))
    if stored is None:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=stored[:, None, None], other=0)
    scale, offset = tl.split(tile.to(tl.float32))
    k_scale, v_scale = tl.split(scale)
    k_offset, v_offset = tl.split(offset)
    return k_scale, k_offset, v_scale, v_offset


@triton.jit
def _load_value_bytes(base, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """A page of values, as `load_bytes`, four neighbours in the registers of one thread."""
    rows = 4 * tl.arange(0, PAGE // 4)
    even = tl.join(
        load_bytes(base, rows, HALF, BLOCK_HALF), load_bytes(base, rows + 2, HALF, BLOCK_HALF)
    )
    odd = tl.join(
        load_bytes(base, rows + 1, HALF, BLOCK_HALF), load_bytes(base, rows + 3, HALF, BLOCK_HALF)
    )
    four = tl.permute(tl.join(even, odd), (0, 2, 3, 1))  # [PAGE / 4, 2, 2, BLOCK_HALF]
    return tl.reshape(four, (PAGE, BLOCK_HALF))


@triton.jit
def _query_operand(code, FP8: tl.constexpr):
    if FP8:
        return code.to(tl.float8e4nv, bitcast=True)
    else:
        return e4m3_to_fp16(code)


@triton.jit
def _code_operands(packed, FP8: tl.constexpr):
    if FP8:
        low, high = code_operands(packed, FP8)
        return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
    else:
        return fp16_codes(packed)


@triton.jit
def _p_operand(x, FP8: tl.constexpr):
    if FP8:
        if INTERPRETED:
            return e4m3_byte(x, FP8).to(tl.float8e4nv, bitcast=True)
        else:
            return x.to(tl.float8e4nv)  # at most 256, or NaN, which stays
    else:
        return round_p(x)


@triton.jit
def _page_step(
    state,
    queries,
    cache,
    page_start,
    position,
    kv_len,
    window,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    KV_HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
):
    """One page for all queries of the tile: state is (acc low, acc high, sum p o, l, M)."""
    acc_low, acc_high, offsets, total, top = state
    q_low, q_high, q_sum, unit = queries
    kv, kv_scales, pages, kv_head, value_rows = cache
    from_codes = 1.0 / code_unit(FP8)  # from the product of an operand to that of its codes

    place = tl.arange(0, PAGE)
    key = page_start + place
    page = tl.load(pages + page_start // PAGE).to(tl.int64)
    first_row = (page * KV_HEADS + kv_head) * PAGE
    value_row = first_row + value_rows
    # What lies behind the last key may be anything, and 0 times NaN is NaN.
    stored = key < kv_len if MASKED else None
    k_scale, k_offset, v_scale, v_offset = _load_scales(kv_scales, first_row, value_row, stored)

    k_low, k_high = _code_operands(load_bytes(kv + first_row * HALF, place, HALF, BLOCK_HALF), FP8)
    score = tl.dot(q_low, tl.trans(k_low))  # [BLOCK_Q, PAGE]
    score = tl.dot(q_high, tl.trans(k_high), score)
    score = score * (k_scale * from_codes)[None, :]
    score += q_sum[:, None] * k_offset[None, :]
    if MASKED:
        distance = position[:, None] - key[None, :]
        seen = (distance >= 0) & (key < kv_len)[None, :]
        if WINDOW:
            seen &= distance < window
        score = tl.where(seen, score, float("-inf"))

    new_top = tl.maximum(top, tl.ceil(tl.max(score, 1) * unit))
    p = tl.exp2(score * unit[:, None] - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    offsets = offsets * fade + tl.sum(p * v_offset[None, :], 1)

    z = power_of_two_above(tl.max(tl.abs(v_scale), 0))
    weight = v_scale * (reciprocal_of_power_of_two(z) * P_SCALE)
    operand = _p_operand(p * weight[None, :], FP8)
    back = z * (from_codes / P_SCALE)
    v_low, v_high = _code_operands(_load_value_bytes(kv + value_row * HALF, HALF, BLOCK_HALF), FP8)
    acc_low = acc_low * fade[:, None] + tl.dot(operand, v_low) * back
    acc_high = acc_high * fade[:, None] + tl.dot(operand, v_high) * back
    return acc_low, acc_high, offsets, total, new_top


@triton.jit
def _prefill(
    q,
    q_scale,
    kv,
    kv_scales,
    block_table,
    cu_seqlens,
    kv_lens,
    out,
    scale,
    window,
    value_rows,
    q_token,
    q_head,
    q_scale_token,
    table_row,
    out_token,
    out_head,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
):
    head, sequence = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    kv_len = tl.load(kv_lens + sequence)
    first = (tl.cdiv(length, BLOCK_Q) - 1 - tl.program_id(2)) * BLOCK_Q
    if first < 0:
        return

    row = first + tl.arange(0, BLOCK_Q)
    live = row < length
    position = kv_len - length + row
    token = (start + row).to(tl.int64)
    channel = tl.arange(0, BLOCK_HALF)
    held = live[:, None] & (channel < HALF)[None, :]
    places = q + token[:, None] * q_token + head * q_head + channel[None, :]
    low = tl.load(places, mask=held, other=0)
    high = tl.load(places + HALF, mask=held, other=0)
    q_sum = tl.sum(e4m3_to_fp16(low).to(tl.float32) + e4m3_to_fp16(high).to(tl.float32), 1)
    unit = tl.load(q_scale + token * q_scale_token + head, mask=live, other=1.0) * scale
    queries = (_query_operand(low, FP8), _query_operand(high, FP8), q_sum, unit)
    cache = (kv, kv_scales, block_table + sequence * table_row, head // RATIO, value_rows)

    # Pages [begin, end) are seen at all, pages [whole, whole_end) by every query of the tile.
    first_position = kv_len - length + first
    last_position = kv_len - length + tl.minimum(first + BLOCK_Q, length) - 1
    end = tl.cdiv(tl.maximum(last_position + 1, 0), PAGE)
    begin, whole = 0, 0
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // PAGE
        whole = tl.cdiv(tl.maximum(last_position - window + 1, 0), PAGE)
    whole_end = tl.maximum(tl.maximum(first_position + 1, 0) // PAGE, whole)

    zeros = tl.zeros((BLOCK_Q, BLOCK_HALF), tl.float32)
    none = tl.zeros((BLOCK_Q,), tl.float32)
    state = (zeros, zeros, none, none, none + LOWEST)
    for page in range(whole, whole_end):
        state = _page_step(
            state, queries, cache, page * PAGE, position, kv_len, window,
            HALF, BLOCK_HALF, KV_HEADS, False, WINDOW, FP8,
        )  # fmt: skip
    for i in range(begin, end - (whole_end - whole)):
        page = tl.where(i < whole, i, i + whole_end - whole)
        state = _page_step(
            state, queries, cache, page * PAGE, position, kv_len, window,
            HALF, BLOCK_HALF, KV_HEADS, True, WINDOW, FP8,
        )  # fmt: skip

    acc_low, acc_high, offsets, total, _ = state
    share = 1.0 / tl.where(total == 0, 1.0, total)
    places = out + token[:, None] * out_token + head * out_head + channel[None, :]
    low = (acc_low + offsets[:, None]) * share[:, None]
    high = (acc_high + offsets[:, None]) * share[:, None]
    tl.store(places, round_to(low, out), mask=held)
    tl.store(places + HALF, round_to(high, out), mask=held)


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
    """`ops.prefill_attention`; sm_scale must be positive, as a query's scale is."""
    heads, dim = q_codes.shape[1:]
    pages, kv_heads = kv_codes.shape[1:3]
    fp8 = multiplies_fp8(q_codes.device)
    tile, warps, stages = launch_shape(dim, max_query_len, fp8)
    grid = (heads, len(kv_lens), triton.cdiv(max_query_len, tile))
    if 0 in grid:
        return
    _prefill[grid](
        q_codes.view(torch.uint8), q_scale, kv_codes, kv_scales, block_table, cu_seqlens, kv_lens,
        out, sm_scale * LOG2_E, window, pages * kv_heads * KV_PAGE,
        q_codes.stride(0), q_codes.stride(1), q_scale.stride(0), block_table.stride(0),
        out.stride(0), out.stride(1),
        HALF=dim // 2, BLOCK_HALF=block_half(dim), KV_HEADS=kv_heads, RATIO=heads // kv_heads,
        BLOCK_Q=tile, WINDOW=window > 0, FP8=fp8, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def multiplies_fp8(device: torch.device) -> bool:
    """Whether MMAs of E4M3 numbers run there; the interpreter's are exact."""
    return dispatch.interpreted() or dispatch.capability(device) >= dispatch.FP8_CAPABILITY


def block_half(dim: int) -> int:
    """Channels of a tile that holds D / 2 of them: a power of two, and at least an FP8 MMA's K."""
    return max(32, triton.next_power_of_2(dim // 2))


def launch_shape(dim: int, max_query_len: int, fp8: bool) -> tuple[int, int, int]:
    """(BLOCK_Q, num_warps, num_stages): tiles whose accumulators stay in registers."""
    if not fp8:
        return (128, 8, 2) if dim <= 64 else (32, 8, 2)
    if dim > 128:
        return 64, 8, 3
    return (128, 8, 3) if max_query_len > 64 else (64, 4, 3)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], bool]]:
    """(name, kernel, signature, constexprs, options, needs_fp8) of every way it is launched."""
    pointers = dict(
        q="*u8", q_scale="*fp32", kv="*u8", kv_scales="*fp16", block_table="*i32",
        cu_seqlens="*i32", kv_lens="*i32", out="*bf16", scale="fp32",
    )  # fmt: skip
    integers = (
        "window", "value_rows", "q_token", "q_head", "q_scale_token", "table_row", "out_token",
        "out_head",
    )  # fmt: skip
    unaligned = ("window", "q_scale_token", "table_row")
    cases = []
    variants = [(dim, fp8, False) for dim in (64, 96, 128, 256) for fp8 in (True, False)]
    for dim, fp8, window in (*variants, (128, True, True), (128, False, True)):
        for tile, warps, stages in sorted({launch_shape(dim, n, fp8) for n in (64, 128)}):
            kind = f"{'_window' * window}_{'fp8' if fp8 else 'fp16'}"
            shape = dict(
                HALF=dim // 2, BLOCK_HALF=block_half(dim), KV_HEADS=8, RATIO=4, BLOCK_Q=tile,
                WINDOW=window, FP8=fp8,
            )  # fmt: skip
            options = dict(num_warps=warps, num_stages=stages, unaligned=unaligned)
            signature = {**pointers, **dict.fromkeys(integers, "i32")}
            cases.append((f"d{dim}_tile{tile}{kind}", _prefill, signature, shape, options, fp8))
    return cases
