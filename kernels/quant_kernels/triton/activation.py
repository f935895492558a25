"""Activations become codes: y [M, K] -> q [M, K] and one scale a[m] a token.

    a[m] = max_k |y[m, k]| / L,   q[m, k] = round(clamp(y[m, k] / a[m], -L, L))

L is 448 and q an E4M3 number, or 127 and an integer; a token of zeros has a = 1. y is x itself, or

    RMSNorm(x'):      y = D(x' / sqrt(mean(x'^2) + eps) * weight),   x' = D(x + residual), kept
    silu(gate) * up:  y = D(gate / (1 + exp(-gate)) * up)

D: to the input's dtype; everything else is FP32. As `reference.py` defines it, step by step.

A program has one token: both the norm and the scale need all of it, and it is read from memory
once. Up to WIDEST_BLOCK columns it stays in registers from the first load to the codes; a wider
token is cut into blocks and made again in every pass, from what is then in the cache. A thread has
eight columns as a rule, 16 bytes of BF16, because the rows of a decode step are too few to hide
the latency of one division after the other.

The divisions by a and by L are the correctly rounded ones, and products and sums stay unfused: a
code depends on the last bit of a quotient where it is near a tie.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import dispatch, formats
from quant_kernels.triton import numbers

INT8_MAX = tl.constexpr(formats.INT8_MAX)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
INFINITY = tl.constexpr(0x7F800000)  # its `magnitude`; a NaN's is larger

WIDEST_BLOCK = 16384  # 16 columns a thread in the largest block of threads
COLUMNS_A_WARP = 256
MAX_WARPS = 32


@triton.jit
def magnitude(y):
    """FP32 -> the bits of |y|, int32: ordered as |y|, NaN above Inf. tl.max drops a float NaN."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_scale(top, LIMIT: tl.constexpr):
    """The largest `magnitude` of a token -> its scale, FP32."""
    a = tl.div_rn(top.to(tl.float32, bitcast=True), LIMIT)
    return tl.where(a == 0.0, 1.0, a)


@triton.jit
def _scale_for(top, codes):
    """`token_scale` for the kind of codes that `codes` points to."""
    if codes.dtype.element_ty == tl.int8:
        return token_scale(top, INT8_MAX)
    else:
        return token_scale(top, E4M3_MAX)


@triton.jit
def _store_codes(y, a, codes, inside, FP8: tl.constexpr):
    """Codes of y, as the int8 or (E4M3) uint8 that `codes` points to."""
    q = tl.div_rn(y, a)
    if codes.dtype.element_ty == tl.int8:
        nearest = numbers.round_nearest(tl.minimum(tl.maximum(q, -INT8_MAX), INT8_MAX))
        # The scale carries a NaN; what the cast of one would give is not defined.
        tl.store(codes, tl.where(q == q, nearest, 0.0).to(tl.int8), mask=inside)
    else:
        tl.store(codes, numbers.e4m3_byte(q, FP8), mask=inside)


@triton.jit
def _load(source, inside):
    return tl.load(source, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _silu_mul(gate, up, inside, like):
    """silu(gate) * up at these places, rounded to the dtype of `like`, as FP32."""
    g = _load(gate, inside)
    # Not the rounded division: the exponential before it is approximate as it is.
    return numbers.round_to(g / (1.0 + tl.exp(-g)) * _load(up, inside), like).to(tl.float32)


@triton.jit
def _quantize_kernel(
    x,
    codes,
    scale,
    columns,
    x_row,
    codes_row,
    scale_row,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    codes += row * codes_row
    top = 0
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        y = _load(x + k, k < columns)
        top = tl.maximum(top, tl.max(magnitude(y), axis=0))
    a = _scale_for(top, codes)
    tl.store(scale + row * scale_row, a)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            y = _load(x + k, k < columns)
        _store_codes(y, a, codes + k, k < columns, FP8)


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    eps,
    residual,
    codes,
    scale,
    columns,
    x_row,
    residual_row,
    codes_row,
    scale_row,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    codes += row * codes_row
    source = x
    if residual is not None:
        source = residual + row * residual_row
    squares = 0.0
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        y = _load(x + k, k < columns)
        if residual is not None:
            rounded = numbers.round_to(y + _load(source + k, k < columns), residual)
            tl.store(source + k, rounded, mask=k < columns)
            y = rounded.to(tl.float32)
        # With several blocks, the barrier of this sum also orders the stores before the next loads.
        squares += tl.sum(y * y, axis=0)
    r = tl.rsqrt(tl.div_rn(squares, tl.cast(columns, tl.float32)) + eps)
    top = 0
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            y = _load(source + k, k < columns)
        y = numbers.round_to(y * r * _load(weight + k, k < columns), x).to(tl.float32)
        top = tl.maximum(top, tl.max(magnitude(y), axis=0))
    a = _scale_for(top, codes)
    tl.store(scale + row * scale_row, a)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            y = _load(source + k, k < columns)
            y = numbers.round_to(y * r * _load(weight + k, k < columns), x).to(tl.float32)
        _store_codes(y, a, codes + k, k < columns, FP8)


@triton.jit
def _silu_mul_kernel(
    gate_up,
    codes,
    scale,
    columns,
    gate_up_row,
    codes_row,
    scale_row,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate = gate_up + row * gate_up_row
    up = gate + columns
    codes += row * codes_row
    top = 0
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        y = _silu_mul(gate + k, up + k, k < columns, gate_up)
        top = tl.maximum(top, tl.max(magnitude(y), axis=0))
    a = _scale_for(top, codes)
    tl.store(scale + row * scale_row, a)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            y = _silu_mul(gate + k, up + k, k < columns, gate_up)
        _store_codes(y, a, codes + k, k < columns, FP8)


def quantize_activation(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.quantize_activation`."""
    tokens, columns = codes.shape
    if tokens:
        _quantize_kernel[(tokens,)](
            x, _storage(codes), scale, columns,
            x.stride(0), codes.stride(0), scale.stride(0), **_tiles(columns), **_target(x),
        )  # fmt: skip


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, codes: Tensor, scale: Tensor, residual: Tensor | None
) -> None:
    """`ops.rms_norm_quantize`."""
    tokens, columns = codes.shape
    residual_row = 0 if residual is None else residual.stride(0)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            x, weight, eps, residual, _storage(codes), scale, columns,
            x.stride(0), residual_row, codes.stride(0), scale.stride(0),
            **_tiles(columns), **_target(x),
        )  # fmt: skip


def silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.silu_mul_quantize`."""
    tokens, columns = codes.shape
    if tokens:
        _silu_mul_kernel[(tokens,)](
            gate_up, _storage(codes), scale, columns,
            gate_up.stride(0), codes.stride(0), scale.stride(0),
            **_tiles(columns), **_target(gate_up),
        )  # fmt: skip


def _storage(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


def _tiles(columns: int) -> dict[str, int]:
    """How a token of so many columns is cut, and the warps that share a block of it."""
    block = min(triton.next_power_of_2(columns), WIDEST_BLOCK)
    warps = min(max(block // COLUMNS_A_WARP, 1), MAX_WARPS)
    return {"BLOCK": block, "BLOCKS": triton.cdiv(columns, block), "num_warps": warps}


def _target(x: Tensor) -> dict[str, bool]:
    fp8 = dispatch.capability(x.device) >= dispatch.FP8_CAPABILITY
    return {"FP8": fp8, "enable_fp_fusion": False}


def compile_cases() -> list[tuple[Any, ...]]:
    """Variants to compile without a GPU: (name, kernel, signature, constexprs, options, fp8,
    arguments that are multiples of 16); fp8: for sm_89 and newer."""
    cases: list[tuple[Any, ...]] = []
    for columns in (4096, 14336, 25600):
        for kind in (("bf16", "u8", True), ("fp16", "u8", False), ("fp32", "i8", True)):
            cases += _variants(columns, *kind)
    return cases


def _variants(columns: int, dtype: str, kind: str, fp8: bool) -> list[tuple[Any, ...]]:
    tiles = _tiles(columns)
    options = {"num_warps": tiles.pop("num_warps"), "enable_fp_fusion": False}
    label = f"{dtype} {kind}{'' if fp8 else ' without FP8'} {columns}"
    types = dict.fromkeys(("x", "gate_up", "residual"), f"*{dtype}")
    types |= {"weight": "*bf16", "eps": "fp32", "codes": f"*{kind}", "scale": "*fp32"}
    aligned = ("columns", "x_row", "residual_row", "gate_up_row", "codes_row")
    cases: list[tuple[Any, ...]] = []
    for name, kernel, absent in (
        ("quantize", _quantize_kernel, ()),
        ("rms_norm", _rms_norm_kernel, ("residual",)),
        ("rms_norm residual", _rms_norm_kernel, ()),
        ("silu_mul", _silu_mul_kernel, ()),
    ):
        constants = {**tiles, "FP8": fp8, **dict.fromkeys(absent)}
        there = (arg for arg in kernel.arg_names if arg not in constants)
        signature = {arg: types.get(arg, "i32") for arg in there}
        needs = fp8 and kind == "u8"
        cases.append((f"{name} {label}", kernel, signature, constants, options, needs, aligned))
    return cases
