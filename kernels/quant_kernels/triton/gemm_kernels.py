"""Y^T = W X^T of INT4 weights in the split layout and 8-bit activations, on tensor cores.

    Y[m, n] = a[m] c[n] sum_k P(q, t)[n, k] xq[m, k]  (+ bias[n])  (+ residual[m, n])

A program owns BLOCK_N rows of W and BLOCK_M tokens, and one of SPLIT_K parts of K. It walks the
spans of its part (`packing.py`): bytes [BLOCK_N, S / 2] become the operands of the low and of the
high nibbles in registers (`convert.py`), which side by side, without moving, are [BLOCK_N, S] in
the order of X's columns, and are multiplied with X's tile [S, BLOCK_M]. Weights are the first
operand because a warp group's MMA takes it from registers, and because the second may be as narrow
as 8 tokens: with tokens first, 64 would be the least.

What is summed where:

  int8          INT32 over all of K; per channel the operand is 16 q and the sum is shifted by 4.
  lut, channel  FP32. Hopper's FP8 MMAs keep about 14 bits of a running sum, so a span (at most 128
                products) starts at zero and is then added in FP32. `max_num_imprecise_acc` of
                `tl.dot` is that addition too, but Triton heeds it on sm_90 only.
  exact         the same, times t[n, G] before it is added; by half spans where they differ in t.

Then the factors and addends of the first line, in its order, each rounded to FP32: for int8 that
gives the reference's bits, so there no multiplication and addition are fused. silu_mul: rows n and
F + n of a [2 F, K] weight share a program and its tiles of X; it writes silu(gate) * up.

SPLIT_K > 1 (few tokens, where the tiles alone leave most of the GPU idle): the sums of each part
go to the workspace [SPLIT_K, N, M] and a second kernel adds them in order, so that results do not
depend on which program came first. Tokens of a last tile beyond M, and rows beyond N, repeat the
last one and are not stored, which spares masks in the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.triton import convert, numbers
from quant_kernels.triton.numbers import INTERPRETED

# Spans. Scales are too narrow for the asynchronous copies that bring codes and X, so they are asked
# for early: the cache then has them when their span comes.
AHEAD = tl.constexpr(8)


@triton.jit
def _operands(packed, t_low, t_high, KIND: tl.constexpr, FP8: tl.constexpr):
    """bytes [BLOCK_N, S / 2] -> what the tensor core multiplies, of the low and high nibbles."""
    if KIND == "int8":
        return convert.int8_operands(packed, t_low[:, None], t_high[:, None])
    elif KIND == "int8-channel":
        return convert.int8_operands_times_16(packed)
    else:
        if KIND == "lut":
            low, high = convert.lut_operands(packed, t_low[:, None], t_high[:, None], FP8)
        else:
            low, high = convert.code_operands(packed, FP8)
        if FP8:
            return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
        else:
            return low, high


@triton.jit
def _side_by_side(low, high):
    """[R, B] and [R, B] -> [R, 2 B]; a thread holds columns j and B + j alike, so nothing moves."""
    both = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(both, (low.shape[0], 2 * low.shape[1]))


@triton.jit
def _activations(pointers, FP8: tl.constexpr):
    """Codes as an operand: INT8 and E4M3 as they are, E4M3 codes in uint8 as FP16."""
    codes = tl.load(pointers)
    if codes.dtype == tl.uint8:
        return numbers.e4m3_to_fp16(codes)
    else:
        return codes


@triton.jit
def _add_span(
    acc,
    packed,
    t_low,
    t_high,
    x,
    x_high,
    KIND: tl.constexpr,
    SHARED_T: tl.constexpr,
    FP8: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] plus the products of one span, whose bytes are packed.

    x [S, BLOCK_M]; where each half has a scale for its sum, x and x_high [S / 2, BLOCK_M].
    """
    low, high = _operands(packed, t_low, t_high, KIND, FP8)
    if KIND == "exact" and not SHARED_T:
        acc += tl.dot(low, x) * t_low[:, None]
        return acc + tl.dot(high, x_high) * t_high[:, None]
    else:
        w = _side_by_side(low, high)
        if KIND == "exact":
            return acc + tl.dot(w, x) * t_low[:, None]
        elif KIND == "int8" or KIND == "int8-channel":
            return tl.dot(w, x, acc, out_dtype=tl.int32)
        elif FP8:
            return acc + tl.dot(w, x)
        else:
            return tl.dot(w, x, acc)


@triton.jit
def _scale_pointers(t, row, ROWS, span, SHARED_T: tl.constexpr):
    """Where t [G, ROWS] of the low and of the high half of a span begins, for rows row."""
    if SHARED_T:
        both = t + tl.cast(span, tl.int64) * ROWS + row
        return both, both
    else:
        low = t + tl.cast(2 * span, tl.int64) * ROWS + row
        return low, low + ROWS


@triton.jit
def _group_scales(t, row, ROWS, span, last, KIND: tl.constexpr, SHARED_T: tl.constexpr):
    """t of the two halves of a span, [BLOCK_N] each; asks for those of a later one."""
    if KIND == "int8-channel" or KIND == "fp8-channel":
        return 0, 0
    else:
        later = tl.minimum(span + AHEAD, last - 1)
        _prefetch(t, row, ROWS, later, SHARED_T)
        low, high = _scale_pointers(t, row, ROWS, span, SHARED_T)
        t_low = tl.load(low)
        t_high = t_low if SHARED_T else tl.load(high)
        if KIND == "int8":
            return t_low.to(tl.int32), t_high.to(tl.int32)
        else:
            return t_low, t_high


@triton.jit
def _prefetch(t, row, ROWS, span, SHARED_T: tl.constexpr):
    if not INTERPRETED:
        low, high = _scale_pointers(t, row, ROWS, span, SHARED_T)
        _prefetch_lines(low)
        if not SHARED_T:
            _prefetch_lines(high)


@triton.jit
def _prefetch_lines(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _scaled(acc, x_scale, c, bias, rows, valid, KIND: tl.constexpr, FP8: tl.constexpr):
    """Sums [BLOCK_N, BLOCK_M] -> Y^T without residual, FP32; x_scale [1, BLOCK_M]."""
    if KIND == "int8-channel":
        acc = acc >> 4
    y = acc.to(tl.float32)
    if KIND == "fp8-channel" or KIND == "exact":
        y = y * (1.0 / convert.code_unit(FP8))
    y = y * x_scale
    y = y * tl.load(c + rows, mask=valid, other=0.0)[:, None]
    if bias is not None:
        y = y + tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _finish(
    acc,
    acc_up,
    x_scale,
    c,
    bias,
    residual,
    out,
    M,
    N,
    stride_scale,
    stride_residual,
    stride_out,
    rows,
    tokens,
    KIND: tl.constexpr,
    PAIR: tl.constexpr,
    FP8: tl.constexpr,
):
    """From sums to out: the epilogue of the GEMM and of the reduction."""
    valid, seen = rows < N, tokens < M
    a = tl.load(x_scale + tokens * stride_scale, mask=seen, other=0.0)[None, :]
    y = _scaled(acc, a, c, bias, rows, valid, KIND, FP8)
    if PAIR:
        up = _scaled(acc_up, a, c, bias, N + rows, valid, KIND, FP8)
        y = y / (1.0 + tl.exp(-y)) * up
    both = valid[:, None] & seen[None, :]
    tokens = tokens.to(tl.int64)
    if residual is not None:
        before = tl.load(residual + (tokens * stride_residual)[None, :] + rows[:, None], mask=both)
        y = y + before.to(tl.float32)
    target = out + (tokens * stride_out)[None, :] + rows[:, None]
    tl.store(target, numbers.round_to(y, out), mask=both)


# M and spans alone would compile the kernel anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M", "spans"])
def gemm_kernel(
    x,
    x_scale,
    codes,
    t,
    c,
    bias,
    residual,
    out,
    partial,
    M,
    N,
    spans,
    stride_x,
    stride_scale,
    stride_residual,
    stride_out,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    SHARED_T: tl.constexpr,
    PAIR: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FP8: tl.constexpr,
):
    """N: rows of out, half of the weight's with PAIR; spans: K / SPAN; partial: the workspace."""
    HALF: tl.constexpr = SPAN // 2
    HALVES: tl.constexpr = KIND == "exact" and not SHARED_T
    ROWS = 2 * N if PAIR else N
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    length = tl.cdiv(spans, SPLIT_K)
    first = part * length
    last = tl.minimum(first + length, spans)

    row, token = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    codes += tl.cast(first, tl.int64) * ROWS * HALF
    codes += row.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    x += tl.cast(first, tl.int64) * SPAN + token.to(tl.int64)[None, :] * stride_x
    x += tl.arange(0, HALF if HALVES else SPAN)[:, None]
    to_up, to_next = tl.cast(N, tl.int64) * HALF, tl.cast(ROWS, tl.int64) * HALF
    SUM: tl.constexpr = tl.int32 if KIND == "int8" or KIND == "int8-channel" else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
    acc_up = acc
    if KIND != "int8-channel" and KIND != "fp8-channel":
        for i in tl.static_range(AHEAD):
            later = tl.minimum(first + i, spans - 1)
            _prefetch(t, row, ROWS, later, SHARED_T)
            if PAIR:
                _prefetch(t, N + row, ROWS, later, SHARED_T)
    for span in range(first, last):
        x_span = _activations(x, FP8)
        x_high = _activations(x + HALF, FP8) if HALVES else x_span
        low, high = _group_scales(t, row, ROWS, span, last, KIND, SHARED_T)
        acc = _add_span(acc, tl.load(codes), low, high, x_span, x_high, KIND, SHARED_T, FP8)
        if PAIR:
            low, high = _group_scales(t, N + row, ROWS, span, last, KIND, SHARED_T)
            up = tl.load(codes + to_up)
            acc_up = _add_span(acc_up, up, low, high, x_span, x_high, KIND, SHARED_T, FP8)
        codes += to_next
        x += SPAN

    if SPLIT_K == 1:
        _finish(
            acc, acc_up, x_scale, c, bias, residual, out, M, N, stride_scale, stride_residual,
            stride_out, rows, tokens, KIND, PAIR, FP8,
        )  # fmt: skip
    else:
        both = (rows < N)[:, None] & (tokens < M)[None, :]
        target = partial + ((part * ROWS + rows).to(tl.int64) * M)[:, None] + tokens[None, :]
        tl.store(target, acc, mask=both)
        if PAIR:
            tl.store(target + tl.cast(N, tl.int64) * M, acc_up, mask=both)


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial,
    x_scale,
    c,
    bias,
    residual,
    out,
    M,
    N,
    stride_scale,
    stride_residual,
    stride_out,
    KIND: tl.constexpr,
    PAIR: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FP8: tl.constexpr,
):
    """The sums of SPLIT_K parts, [SPLIT_K, rows of W, M], added in order; then the epilogue."""
    ROWS = 2 * N if PAIR else N
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    both = (rows < N)[:, None] & (tokens < M)[None, :]
    partial += (rows.to(tl.int64) * M)[:, None] + tokens[None, :]
    up = tl.cast(N, tl.int64) * M
    acc = tl.load(partial, mask=both, other=0)
    acc_up = tl.load(partial + up, mask=both, other=0) if PAIR else acc
    for _ in tl.static_range(1, SPLIT_K):
        partial += tl.cast(ROWS, tl.int64) * M
        acc += tl.load(partial, mask=both, other=0)
        if PAIR:
            acc_up += tl.load(partial + up, mask=both, other=0)
    _finish(
        acc, acc_up, x_scale, c, bias, residual, out, M, N, stride_scale, stride_residual,
        stride_out, rows, tokens, KIND, PAIR, FP8,
    )  # fmt: skip
