"""Attention of one new token a sequence over the paged INT4 cache, its pages split evenly.

The definition is `prefill_attention`'s with one query. What bounds it is reading the cache, so the
work is the flat list of tiles (sequence, KV head, page), cut into equal contiguous ranges: program
p of P takes tiles [p L / P, (p + 1) L / P) of the L tiles there are, however long the sequences.

    tiles      | seq 0, head 0     | seq 0, head 1     | seq 1, head 0 | seq 1, head 1 |  ...
    programs   |      0      |      1      |      2      |      3      |      4      |   ...

The tiles of one sequence and KV head are a segment s; a program touches one or several, and leaves
of each piece M, l and sum_t P_t q_t + p_t o_t, unnormalized, in slot p + s of the workspace. From
one piece to the next p or s grows, or both, so no two share a slot. A second kernel puts together
the slots of a segment, in ascending order and by powers of two: bits do not depend on timing. The
schedule follows from kv_lens on the device, so the same launch serves every step of a CUDA graph.

All query heads of a KV head are rows of one FP16 MMA, padded to 16: bytes of the cache are read
once for them, and at 16 rows there is no better instruction. Codes, queries and P on E4M3's grid
are exact in FP16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import dispatch
from quant_kernels.packing import KV_PAGE
from quant_kernels.reference_attention import LOG2_E
from quant_kernels.registration import OpError
from quant_kernels.triton.numbers import e4m3_to_fp16, round_to
from quant_kernels.triton.prefill_attention import (
    LOWEST,
    P_SCALE,
    PAGE,
    block_half,
    fp16_codes,
    load_bytes,
    power_of_two_above,
    reciprocal_of_power_of_two,
    round_p,
)

# What fits on a multiprocessor at once, as equal shares need: four warps of at most 255 registers a
# thread take half of its registers.
PROGRAMS_PER_SM = 2
PROGRAMS_INTERPRETED = 7
MAX_BATCH = 1024  # lengths that every program adds up for itself
SLOTS_AT_ONCE = 16
ROW_EXTRAS = 2  # M and l of a row, behind its D sums


@triton.jit
def first_key(length, window):
    """The first key that the query of a sequence of this length sees."""
    return tl.where(window > 0, tl.maximum(length - window, 0), 0)


@triton.jit
def tiles_of(kv_lens, batch, window, BATCH: tl.constexpr):
    """Pages of every sequence, [BATCH], but those wholly before the window; 0 past the last one."""
    i = tl.arange(0, BATCH)
    length = tl.load(kv_lens + i, mask=i < batch, other=0)
    return tl.cdiv(length, PAGE) - first_key(length, window) // PAGE


@triton.jit
def tile_range(program, programs, total):
    """Tiles [begin, end) of a program; none of min(programs, total) programs goes without."""
    active = tl.maximum(tl.minimum(programs, total), 1)
    tiles = total.to(tl.int64)
    begin = tl.where(program < active, program * tiles // active, 0)
    end = tl.where(program < active, (program + 1) * tiles // active, 0)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def program_of(tile, programs, total):
    """The program whose `tile_range` holds a tile."""
    active = tl.minimum(programs, total).to(tl.int64)
    return (((tile + 1) * active - 1) // total).to(tl.int32)


@triton.jit
def segment_of(tile, count, KV_HEADS: tl.constexpr, BATCH: tl.constexpr):
    """(sequence, KV head, tile of that segment) of a tile; count: `tiles_of`."""
    ends = tl.cumsum(count, 0) * KV_HEADS
    sequence = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = tl.arange(0, BATCH) == sequence
    pages = tl.maximum(tl.sum(tl.where(mine, count, 0), 0), 1)  # 0 for a program without tiles
    inside = tile - tl.sum(tl.where(mine, ends - count * KV_HEADS, 0), 0)
    return sequence, inside // pages, inside % pages


@triton.jit
def _load_scales(kv_scales, row, stored):
    """Scale and offset of the page at `row`, FP32, in one load of both; 0 where not stored."""
    pairs = kv_scales.to(tl.pointer_type(tl.uint32)) + row + tl.arange(0, PAGE)
    if stored is None:
        pair = tl.load(pairs)
    else:
        pair = tl.load(pairs, mask=stored, other=0)
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    offset = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), offset.to(tl.float32)


@triton.jit
def _page(
    state,
    queries,
    kv,
    kv_scales,
    row,
    value_rows,
    key,
    seen,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One page for the rows of a KV head: state is (acc low, acc high, sum p o, l, M)."""
    acc_low, acc_high, offsets, total, top = state
    q_low, q_high, q_sum, unit = queries
    place = tl.arange(0, PAGE)
    k_scale, k_offset = _load_scales(kv_scales, row, seen)
    v_scale, v_offset = _load_scales(kv_scales, row + value_rows, seen)

    k_low, k_high = fp16_codes(load_bytes(kv + row * HALF, place, HALF, BLOCK_HALF))
    score = tl.dot(q_low, tl.trans(k_low))  # [ROWS, PAGE]
    score = tl.dot(q_high, tl.trans(k_high), score)
    score = score * k_scale[None, :] + q_sum[:, None] * k_offset[None, :]
    score = tl.where(seen[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.ceil(tl.max(score, 1) * unit))
    p = tl.exp2(score * unit[:, None] - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    offsets = offsets * fade + tl.sum(p * v_offset[None, :], 1)

    z = power_of_two_above(tl.max(tl.abs(v_scale), 0))
    weight = v_scale * (reciprocal_of_power_of_two(z) * P_SCALE)
    operand = round_p(p * weight[None, :])
    back = z / P_SCALE
    value_bytes = load_bytes(kv + (row + value_rows) * HALF, place, HALF, BLOCK_HALF)
    v_low, v_high = fp16_codes(value_bytes)
    acc_low = acc_low * fade[:, None] + tl.dot(operand, v_low) * back
    acc_high = acc_high * fade[:, None] + tl.dot(operand, v_high) * back
    return acc_low, acc_high, offsets, total, new_top


@triton.jit
def _decode(
    q,
    q_scale,
    kv,
    kv_scales,
    block_table,
    kv_lens,
    workspace,
    scale,
    window,
    batch,
    value_rows,
    q_token,
    q_head,
    q_scale_token,
    table_row,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
):
    partial = workspace.to(tl.pointer_type(tl.float32))
    program = tl.program_id(0)
    count = tiles_of(kv_lens, batch, window, BATCH)
    begin, end = tile_range(program, tl.num_programs(0), tl.sum(count, 0) * KV_HEADS)
    sequence, kv_head, tile = segment_of(begin, count, KV_HEADS, BATCH)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_HALF)
    held = (row < RATIO)[:, None] & (channel < HALF)[None, :]
    while begin < end:
        kv_len = tl.load(kv_lens + sequence)
        oldest = first_key(kv_len, window)
        first_page = oldest // PAGE
        stop = tl.minimum(tile + end - begin, tl.cdiv(kv_len, PAGE) - first_page)
        pages = block_table + sequence.to(tl.int64) * table_row + first_page

        head = kv_head * RATIO + row
        token = sequence.to(tl.int64)
        places = q + token * q_token + head[:, None] * q_head + channel[None, :]
        low = e4m3_to_fp16(tl.load(places, mask=held, other=0))
        high = e4m3_to_fp16(tl.load(places + HALF, mask=held, other=0))
        q_sum = tl.sum(low.to(tl.float32) + high.to(tl.float32), 1)
        unit = tl.load(q_scale + token * q_scale_token + head, mask=row < RATIO, other=1.0) * scale
        queries = (low, high, q_sum, unit)

        zeros = tl.zeros((ROWS, BLOCK_HALF), tl.float32)
        none = tl.zeros((ROWS,), tl.float32)
        state = (zeros, zeros, none, none, none + LOWEST)
        for i in range(tile, stop):
            key = (first_page + i) * PAGE + tl.arange(0, PAGE)
            page = tl.load(pages + i).to(tl.int64)
            state = _page(
                state, queries, kv, kv_scales, (page * KV_HEADS + kv_head) * PAGE, value_rows, key,
                (key < kv_len) & (key >= oldest), HALF, BLOCK_HALF,
            )  # fmt: skip

        acc_low, acc_high, offsets, total, top = state
        slot = (program + sequence * KV_HEADS + kv_head).to(tl.int64)
        sums = partial + (slot * RATIO + row) * (2 * HALF + 2)
        places = sums[:, None] + channel[None, :]
        tl.store(places, acc_low + offsets[:, None], mask=held)
        tl.store(places + HALF, acc_high + offsets[:, None], mask=held)
        tl.store(sums + 2 * HALF, top, mask=row < RATIO)
        tl.store(sums + 2 * HALF + 1, total, mask=row < RATIO)
        # On to the next segment, which has no tiles where the sequence has no tokens.
        begin += stop - tile
        tile = stop * 0
        last = kv_head == KV_HEADS - 1
        sequence = tl.where(last, sequence + 1, sequence)
        kv_head = tl.where(last, 0, kv_head + 1)


@triton.jit
def _combine(
    workspace,
    kv_lens,
    out,
    programs,
    window,
    batch,
    out_token,
    out_head,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    BATCH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    partial = workspace.to(tl.pointer_type(tl.float32))
    head, sequence = tl.program_id(0), tl.program_id(1)
    count = tiles_of(kv_lens, batch, window, BATCH)
    all_tiles = tl.sum(count, 0) * KV_HEADS
    i = tl.arange(0, BATCH)
    tiles = tl.sum(tl.where(i == sequence, count, 0), 0)
    begin = tl.sum(tl.where(i < sequence, count, 0), 0) * KV_HEADS + head // RATIO * tiles
    channel = tl.arange(0, BLOCK_DIM)

    acc = tl.zeros((BLOCK_DIM,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    top = total + LOWEST
    if tiles > 0:
        first = program_of(begin, programs, all_tiles)
        last = program_of(begin + tiles - 1, programs, all_tiles)
        segment = sequence * KV_HEADS + head // RATIO
        for start in range(first, last + 1, SLOTS):
            program = start + tl.arange(0, SLOTS)
            there = program <= last
            slot = (program + segment).to(tl.int64)
            sums = partial + (slot * RATIO + head % RATIO) * (DIM + 2)
            tops = tl.where(there, tl.load(sums + DIM, mask=there, other=0.0), LOWEST)
            totals = tl.load(sums + DIM + 1, mask=there, other=0.0)
            parts = tl.load(
                sums[:, None] + channel[None, :],
                mask=there[:, None] & (channel < DIM)[None, :],
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(tops, 0))
            share = tl.exp2(tops - new_top)
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(totals * share, 0)
            acc = acc * fade + tl.sum(parts * share[:, None], 0)
            top = new_top
    y = acc / tl.where(total == 0, 1.0, total)
    places = out + sequence.to(tl.int64) * out_token + head * out_head + channel
    tl.store(places, round_to(y, out), mask=channel < DIM)


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
    """`ops.decode_attention`; sm_scale must be positive, as a query's scale is."""
    batch, heads, dim = q_codes.shape
    pages, kv_heads = kv_codes.shape[1:3]
    if batch == 0:
        return
    _check(q_codes, kv_heads, workspace)
    programs = program_count(q_codes.device)
    ratio, padded = heads // kv_heads, triton.next_power_of_2(batch)
    _decode[(programs,)](
        q_codes.view(torch.uint8), q_scale, kv_codes, kv_scales, block_table, kv_lens, workspace,
        sm_scale * LOG2_E, window, batch, pages * kv_heads * KV_PAGE,
        q_codes.stride(0), q_codes.stride(1), q_scale.stride(0), block_table.stride(0),
        HALF=dim // 2, BLOCK_HALF=block_half(dim), KV_HEADS=kv_heads, RATIO=ratio,
        ROWS=block_rows(ratio), BATCH=padded, num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(heads, batch)](
        workspace, kv_lens, out, programs, window, batch, out.stride(0), out.stride(1),
        DIM=dim, BLOCK_DIM=triton.next_power_of_2(dim), KV_HEADS=kv_heads, RATIO=ratio,
        BATCH=padded, SLOTS=SLOTS_AT_ONCE, num_warps=4,
    )  # fmt: skip


def _check(q_codes: Tensor, kv_heads: int, workspace: Tensor | None) -> None:
    """Raise ops.OpError where the batch is too large, or the workspace missing or too small."""
    shape = (len(q_codes), q_codes.shape[1], kv_heads, q_codes.shape[2])
    if len(q_codes) > MAX_BATCH:
        raise OpError(f"decode_attention: {len(q_codes)} sequences; a call takes {MAX_BATCH}")
    needed = decode_workspace_bytes(q_codes.device, *shape)
    found = 0 if workspace is None else workspace.numel() * workspace.element_size()
    if found < needed:
        raise OpError(
            f"decode_attention needs a workspace of {needed} bytes, got {found}; allocate "
            f"ops.workspace_bytes(device, attention={shape}) of them"
        )


def decode_workspace_bytes(
    device: torch.device, batch: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Bytes for the partial sums of all slots: one for each program and segment, less one."""
    slots = program_count(device) + batch * kv_heads - 1
    return slots * (heads // kv_heads) * (head_dim + ROW_EXTRAS) * 4


def block_rows(ratio: int) -> int:
    """Rows of an MMA that hold the query heads of a KV head."""
    return max(16, triton.next_power_of_2(ratio))


@functools.cache
def program_count(device: torch.device) -> int:
    """P, fixed for a device, so that a captured launch fits every step."""
    if dispatch.interpreted():
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], bool]]:
    """(name, kernel, signature, constexprs, options, needs_fp8) of every way it is launched."""
    shared = dict(kv_lens="*i32", workspace="*u8", window="i32", batch="i32")
    decode = dict(
        **shared, q="*u8", q_scale="*fp32", kv="*u8", kv_scales="*fp16", block_table="*i32",
        scale="fp32", value_rows="i32", q_token="i32", q_head="i32", q_scale_token="i32",
        table_row="i32",
    )  # fmt: skip
    combine = dict(**shared, out="*bf16", programs="i32", out_token="i32", out_head="i32")
    unaligned = ("window", "batch", "q_scale_token", "table_row", "programs")
    cases = []
    for dim, ratio, batch in ((64, 8, 1), (96, 1, 16), (128, 4, 64), (128, 8, 1024), (256, 3, 16)):
        name = f"d{dim}_gqa{ratio}_batch{batch}"
        heads = dict(KV_HEADS=8, RATIO=ratio, BATCH=batch)
        rows = dict(
            HALF=dim // 2, BLOCK_HALF=block_half(dim), ROWS=block_rows(ratio), **heads
        )  # fmt: skip
        options = dict(num_warps=4, num_stages=3, unaligned=unaligned)
        cases.append((name, _decode, decode, rows, options, False))
        rest = dict(DIM=dim, BLOCK_DIM=triton.next_power_of_2(dim), SLOTS=SLOTS_AT_ONCE, **heads)
        options = dict(num_warps=4, unaligned=unaligned)
        cases.append((f"{name}_combine", _combine, combine, rest, options, False))
    return cases
