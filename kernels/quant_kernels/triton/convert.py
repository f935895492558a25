"""From packed INT4 codes to the operand that a tensor core multiplies, in registers.

A byte of the split layout holds the codes q of two columns, two's complement; u = q + 8 is the
nibble with its top bit turned. Each function turns bytes [rows, B] into the operands of the low and
of the high nibbles, both [rows, B], with group scales t [rows, 1]:

| operand | numerics | how |
|---|---|---|
| q t, INT8 | int8 | (u t + 128 - 8 t) XOR 128: every byte stays in 0..255, so one multiply-add
              makes four products without a carry between them (LiquidGEMM's, arXiv 2509.01229) |
| 16 q, INT8 | int8, per channel | the nibble, moved to the top of its byte; the sum is
              divided by 16 |
| E4M3(q t) | lut | in FP16 (1024 + u) t - 1032 t: 1024 + u is a constant byte and u, 1032 t has at
              most eleven bits, and so the multiply-add is exact; then one rounding |
| q, times `code_unit` | exact; any, per channel | |q| as E4M3 code is |q| 2^-9: nibbles are negated
              eight at a time, signs moved to the top |

The PTX below works on four bytes of one row in a 32-bit register: the layouts that Triton gives the
first operand of 8-bit MMAs, those of Hopper and those before, keep four consecutive columns in one.
So only the first of four t is looked at. Plain Triton says the same one element at a time, for the
interpreter, which runs no PTX, and for FP16 operands (FP8 False: before sm_89 there is no E4M3).

Instructions per eight weights, counted in the SASS that Triton 3.9.0 and 3.6.0 make for sm_90a:
q t 7, 16 q 3, E4M3(q t) 15 (4 of them conversions), q 9. From plain Triton 3.9.0 makes 67, 16, 101
and 79, its addresses counted in: it takes every byte out of its register and puts it back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.triton import numbers
from quant_kernels.triton.numbers import INTERPRETED

# Every function below has two outputs, $0 and $1, for the low and high nibbles of $2; then come
# tensors of 32-bit numbers, four equal registers each. Outputs are written last: they may share a
# register with an input.
CODES_ONLY = tl.constexpr("=r,=r,r")
WITH_SCALES = tl.constexpr("=r,=r,r" + ",r" * 16)

# $3 and $11: t of the low and of the high nibbles; $7 and $15: 128 - 8 t in every byte.
INT8_PTX = tl.constexpr("""{
    .reg .b32 l, h;
    lop3.b32 l, $2, 0x0F0F0F0F, 0x08080808, 0x6A;
    shr.u32 h, $2, 4;
    lop3.b32 h, h, 0x0F0F0F0F, 0x08080808, 0x6A;
    mad.lo.u32 l, l, $3, $7;
    mad.lo.u32 h, h, $11, $15;
    xor.b32 $0, l, 0x80808080;
    xor.b32 $1, h, 0x80808080;
}""")

INT8_TIMES_16_PTX = tl.constexpr("""{
    .reg .b32 l, h;
    shl.b32 l, $2, 4;
    and.b32 l, l, 0xF0F0F0F0;
    and.b32 h, $2, 0xF0F0F0F0;
    mov.b32 $0, l;
    mov.b32 $1, h;
}""")

# s: signs in place, n: 1 in negative nibbles, m: 7 in them; z = (|q| of eight nibbles).
CODE_PTX = tl.constexpr("""{
    .reg .b32 s, n, m, z, l, h;
    and.b32 s, $2, 0x88888888;
    shr.u32 n, s, 3;
    sub.u32 m, s, n;
    lop3.b32 z, $2, 0x77777777, m, 0x6A;
    add.u32 z, z, n;
    shl.b32 l, s, 4;
    lop3.b32 l, 0xF0F0F0F0, l, z, 0xCA;
    shr.u32 h, z, 4;
    lop3.b32 h, 0xF0F0F0F0, s, h, 0xCA;
    mov.b32 $0, l;
    mov.b32 $1, h;
}""")

# $3 and $11: t twice, as FP16; $7 and $15: -1032 t.
LUT_PTX = tl.constexpr("""{
    .reg .b32 l, h, a, b, c, d;
    .reg .b16 e, f, g, i;
    lop3.b32 l, $2, 0x0F0F0F0F, 0x08080808, 0x6A;
    shr.u32 h, $2, 4;
    lop3.b32 h, h, 0x0F0F0F0F, 0x08080808, 0x6A;
    prmt.b32 a, l, 0x64646464, 0x4140;
    prmt.b32 b, l, 0x64646464, 0x4342;
    prmt.b32 c, h, 0x64646464, 0x4140;
    prmt.b32 d, h, 0x64646464, 0x4342;
    fma.rn.f16x2 a, a, $3, $7;
    fma.rn.f16x2 b, b, $3, $7;
    fma.rn.f16x2 c, c, $11, $15;
    fma.rn.f16x2 d, d, $11, $15;
    cvt.rn.satfinite.e4m3x2.f16x2 e, a;
    cvt.rn.satfinite.e4m3x2.f16x2 f, b;
    cvt.rn.satfinite.e4m3x2.f16x2 g, c;
    cvt.rn.satfinite.e4m3x2.f16x2 i, d;
    mov.b32 $0, {e, f};
    mov.b32 $1, {g, i};
}""")


@triton.jit
def int8_operands(packed, t_low, t_high):
    """bytes [R, B] uint8, t [R, 1] int32 in 0..16 -> q t of the low and the high nibbles, int8."""
    if INTERPRETED:
        low = numbers.low_code(packed).to(tl.int32) * t_low
        high = numbers.high_code(packed).to(tl.int32) * t_high
        return low.to(tl.int8), high.to(tl.int8)
    else:
        ones: tl.constexpr = 0x01010101
        return tl.inline_asm_elementwise(
            INT8_PTX,
            WITH_SCALES,
            [packed, t_low, (128 - 8 * t_low) * ones, t_high, (128 - 8 * t_high) * ones],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def int8_operands_times_16(packed):
    """bytes [R, B] uint8 -> 16 q of the low and the high nibbles, int8."""
    if INTERPRETED:
        low = (packed << 4).to(tl.int8, bitcast=True)
        return low, (packed & 0xF0).to(tl.int8, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            INT8_TIMES_16_PTX,
            CODES_ONLY,
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def code_operands(packed, FP8: tl.constexpr):
    """bytes [R, B] uint8 -> q * code_unit(FP8) as E4M3 codes in uint8, or q as FP16."""
    if not FP8:
        return numbers.low_code(packed).to(tl.float16), numbers.high_code(packed).to(tl.float16)
    elif INTERPRETED:
        return _sign_magnitude(numbers.low_code(packed)), _sign_magnitude(numbers.high_code(packed))
    else:
        return tl.inline_asm_elementwise(
            CODE_PTX, CODES_ONLY, [packed], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )


@triton.jit
def lut_operands(packed, t_low, t_high, FP8: tl.constexpr):
    """bytes [R, B] uint8, t [R, 1] FP16, of E4M3 numbers up to 56 -> E4M3(q t), low and high.

    As E4M3 codes in uint8, or as FP16.
    """
    if INTERPRETED or not FP8:
        low = _round_fp16_to_e4m3(numbers.low_code(packed).to(tl.float16) * t_low)
        high = _round_fp16_to_e4m3(numbers.high_code(packed).to(tl.float16) * t_high)
        if FP8:
            return (
                numbers.e4m3_byte(low.to(tl.float32), FP8),
                numbers.e4m3_byte(high.to(tl.float32), FP8),
            )
        else:
            return low, high
    else:
        return tl.inline_asm_elementwise(
            LUT_PTX,
            WITH_SCALES,
            [packed, _twice(t_low), _twice(t_low * -1032), _twice(t_high), _twice(t_high * -1032)],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def code_unit(FP8: tl.constexpr):
    """What `code_operands` multiplies q by: the E4M3 number of code 1, or 1."""
    return 0.001953125 if FP8 else 1.0


@triton.jit
def _sign_magnitude(q):
    return (q & -128 | tl.abs(q)).to(tl.uint8, bitcast=True)


@triton.jit
def _twice(x):
    """FP16 -> two of it in a 32-bit register."""
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def _round_fp16_to_e4m3(x):
    """FP16 up to 448 -> the nearest E4M3 number, ties to even, in FP16."""
    power = (x.to(tl.uint16, bitcast=True) & 0x7C00).to(tl.float16, bitcast=True)
    # 1.5 2^7 times x's power of two, whose last bit is E4M3's last bit there, or where E4M3 ends.
    shift = tl.maximum(power * 192.0, tl.full(x.shape, 3.0, tl.float16))
    return (x + shift) - shift
