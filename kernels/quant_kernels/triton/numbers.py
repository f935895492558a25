"""Roundings and conversions that the kernels share, exact on a GPU and in Triton's interpreter.

The interpreter (TRITON_INTERPRET=1) truncates casts to BF16, and loses the carry in casts to E4M3;
GPUs before sm_89 have no FP8 at all. So FP8 codes travel as bytes, roundings are done here where
the hardware's cannot be used, and what is cast is already representable. `FP8`, a constexpr of the
kernels, is whether the GPU casts to and multiplies E4M3 itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels import dispatch

INTERPRETED = tl.constexpr(dispatch.interpreted())
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def round_bf16(x):
    """FP32 -> BF16, to nearest even; NaN stays NaN, +-Inf stays."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, bits)
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def round_to(x, like):
    """FP32 -> the dtype that the pointer `like` points to."""
    if like.dtype.element_ty == tl.bfloat16:
        return round_bf16(x)
    else:
        return x.to(like.dtype.element_ty)


@triton.jit
def round_nearest(x):
    """FP32 of at most 2^22 -> the nearest integer, ties to even, as FP32."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def round_e4m3(x):
    """FP32 -> the nearest E4M3 value, ties to even, saturating, as FP32."""
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    half = tl.where(x < 0, -24576.0, 24576.0)  # 1.5 * 2^14, whose last bit is 2^-9
    return tl.where(tl.abs(x) < 0.015625, (x + half) - half, normal)


@triton.jit
def e4m3_byte(x, FP8: tl.constexpr):
    """FP32 -> E4M3 codes as uint8, to nearest even, saturating; NaN -> 0x7F."""
    if FP8 and not INTERPRETED:
        y = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
        code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        y = round_e4m3(x)
        bits = y.to(tl.uint32, bitcast=True)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80  # of -0 too, which rounding loses
        magnitude = tl.abs(y)
        normal = ((bits >> 20) & 0x7FF) - 960  # exponent bias 127 -> 7, three bits of mantissa
        subnormal = (magnitude * 512.0).to(tl.int32).to(tl.uint32)
        code = (sign | tl.where(magnitude < 0.015625, subnormal, normal)).to(tl.uint8)
    return tl.where(x == x, code, 0x7F)


@triton.jit
def e4m3_to_fp16(code):
    """E4M3 codes as uint8 -> FP16, which holds all of them exactly."""
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def low_code(packed):
    """uint8 -> the signed code in the low nibble, int8."""
    return (packed.to(tl.int8, bitcast=True) << 4) >> 4


@triton.jit
def high_code(packed):
    """uint8 -> the signed code in the high nibble, int8."""
    return packed.to(tl.int8, bitcast=True) >> 4
