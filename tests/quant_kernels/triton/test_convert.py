"""Codes to operands: plain Triton in the interpreter, and its PTX in an emulator, on all inputs.

Nothing here runs on a GPU, so the PTX that a GPU runs is read as text, instruction by instruction,
and executed with numpy on every byte in every place of a register and with every group scale.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quant_kernels.formats import round_e4m3
from quant_kernels.triton import convert, numbers

SIGNED = np.array([i if i < 8 else i - 16 for i in range(16)])
E4M3_SCALES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
LUT_SCALES = E4M3_SCALES[E4M3_SCALES <= 56]  # all of E4M3 from 0, subnormal numbers among them
INT8_SCALES = torch.arange(17)


def words() -> np.ndarray:
    """32-bit registers of four packed bytes: every byte in every place, amid different others."""
    byte = np.arange(256, dtype=np.uint32)
    generator = np.random.default_rng(0)
    found = []
    for place in range(4):
        for fill in (0x00000000, 0xFFFFFFFF, 0x88888888, 0x77777777, 0x80000008):
            rest = np.uint32(fill & ~(0xFF << 8 * place) & 0xFFFFFFFF)
            found.append(rest | byte << np.uint32(8 * place))
        loose = generator.integers(0, 2**32, 256, dtype=np.uint32)
        keep = np.uint32(0xFFFFFFFF ^ (0xFF << 8 * place))
        found.append(loose & keep | byte << np.uint32(8 * place))
    return np.concatenate(found)


def codes_of(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Registers [R] -> the codes in the low and the high nibbles of their bytes, both [R, 4]."""
    parts = packed.view(np.uint8).reshape(-1, 4)
    return SIGNED[parts & 15], SIGNED[parts >> 4]


# --- PTX ------------------------------------------------------------------------------------------


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a | b | c)
    for index in range(8):
        if int(table) >> index & 1:
            terms = (x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            first, second, third = terms
            result = result | first & second & third
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    pool = [x >> np.uint32(8 * i) & np.uint32(0xFF) for x in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        choice = int(selector) >> 4 * i & 15
        assert choice < 8, "sign replication is not emulated"
        result = result | pool[choice] << np.uint32(8 * i)
    return result


def _fma_f16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # FP64 holds a product of FP16 numbers, and these sums, exactly: one rounding, as fma has.
    halves = [np.ascontiguousarray(np.broadcast_to(x, a.shape)).view(np.float16) for x in (a, b, c)]
    x, y, z = (half.astype(np.float64) for half in halves)
    return (x * y + z).astype(np.float16).view(np.uint32)


def _cvt_e4m3x2(a: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(a.view(np.float16).astype(np.float32)).clamp(-448, 448)
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.ascontiguousarray(codes).view(np.uint16).astype(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.f16x2": _fma_f16x2,
    "cvt.rn.satfinite.e4m3x2.f16x2": _cvt_e4m3x2,
    "mov.b32": lambda a, b=None: a if b is None else a | b << np.uint32(16),
}


def emulate(ptx: str, packed: np.ndarray, *scales: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs $0 and $1 of inline PTX for registers $2; scales: the first of each four after it."""
    registers = {"$2": packed}
    registers |= {f"${3 + 4 * i}": np.uint32(value) for i, value in enumerate(scales)}
    body = ptx.strip().removeprefix("{").removesuffix("}").replace("{", "").replace("}", "")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[s] if re.match(r"[$a-z]", s) else np.uint32(int(s, 0)) for s in sources]
        with np.errstate(over="ignore"):
            registers[target] = INSTRUCTIONS[name](*values)
        # Outputs may share a register with $2 or a scale, so nothing is read after the first.
        if "$0" in registers:
            assert not any(s.startswith("$") for s in sources), line
    return registers["$0"], registers["$1"]


def as_bytes(registers: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(registers).view(dtype).reshape(-1, 4)


def e4m3(registers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(as_bytes(registers, np.uint8)).view(torch.float8_e4m3fn).float()


def half_bits(x: float) -> int:
    return int(np.float16(x).view(np.uint16)) * 0x10001


def test_the_emulator_knows_ptx():
    a, b, c = (np.array([x], dtype=np.uint32) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    assert _lop3(a, b, c, np.uint32(0x6A))[0] == (a & b ^ c)[0]
    assert _lop3(a, b, c, np.uint32(0xCA))[0] == (a & b | ~a & c)[0]
    x, y = np.array([0x33221100], dtype=np.uint32), np.array([0x77665544], dtype=np.uint32)
    assert _prmt(x, y, np.uint32(0x4140))[0] == 0x44114400
    assert _prmt(x, y, np.uint32(0x7531))[0] == 0x77553311


@pytest.mark.parametrize("t_low", INT8_SCALES.tolist())
def test_int8_ptx_multiplies_by_the_scale_of_each_half(t_low):
    packed, t_high = words(), 16 - t_low
    constants = [(128 - 8 * t) * 0x01010101 & 0xFFFFFFFF for t in (t_low, t_high)]
    found = emulate(convert.INT8_PTX.value, packed, t_low, constants[0], t_high, constants[1])
    for registers, codes, t in zip(found, codes_of(packed), (t_low, t_high), strict=True):
        assert np.array_equal(as_bytes(registers, np.int8), codes * t)


def test_int8_ptx_per_channel_is_sixteen_times_the_code():
    packed = words()
    found = emulate(convert.INT8_TIMES_16_PTX.value, packed)
    for registers, codes in zip(found, codes_of(packed), strict=True):
        assert np.array_equal(as_bytes(registers, np.int8), codes * 16)


def test_code_ptx_is_the_code_in_units_of_the_least_e4m3_number():
    packed = words()
    found = emulate(convert.CODE_PTX.value, packed)
    for registers, codes in zip(found, codes_of(packed), strict=True):
        assert np.array_equal(e4m3(registers).numpy(), codes * 2.0**-9)
        assert np.array_equal(as_bytes(registers, np.uint8) == 0x80, np.zeros_like(codes, bool))


def test_lut_ptx_rounds_the_product_once():
    packed = words()
    codes = codes_of(packed)
    for i, t in enumerate(LUT_SCALES.tolist()):
        pair = (t, float(LUT_SCALES[-1 - i]))
        exact = [float(np.float16(-1032 * t)) == -1032 * t for t in pair]
        assert all(exact)
        constants = [half_bits(x) for t in pair for x in (t, -1032 * t)]
        found = emulate(convert.LUT_PTX.value, packed, *constants)
        for registers, q, scale in zip(found, codes, pair, strict=True):
            wanted = round_e4m3(torch.from_numpy(q).float() * scale)
            assert torch.equal(e4m3(registers), wanted)


# --- plain Triton ---------------------------------------------------------------------------------


@triton.jit
def _int8(packed, t, low, high, R: tl.constexpr, B: tl.constexpr):
    r, i = tl.arange(0, R), tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    scale = tl.load(t + r).to(tl.int32)[:, None]
    a, b = convert.int8_operands(tl.load(packed + i), scale, 16 - scale)
    tl.store(low + i, a)
    tl.store(high + i, b)


@triton.jit
def _times_16(packed, low, high, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = convert.int8_operands_times_16(tl.load(packed + i))
    tl.store(low + i, a)
    tl.store(high + i, b)


@triton.jit
def _codes(packed, low, high, unit, B: tl.constexpr, FP8: tl.constexpr):
    i = tl.arange(0, B)
    a, b = convert.code_operands(tl.load(packed + i), FP8)
    tl.store(low + i, a)
    tl.store(high + i, b)
    tl.store(unit, convert.code_unit(FP8))


@triton.jit
def _lut(packed, t, u, low, high, R: tl.constexpr, B: tl.constexpr, FP8: tl.constexpr):
    r, i = tl.arange(0, R), tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    t_low, t_high = tl.load(t + r)[:, None], tl.load(u + r)[:, None]
    a, b = convert.lut_operands(tl.load(packed + i), t_low, t_high, FP8)
    tl.store(low + i, a)
    tl.store(high + i, b)


BYTES = torch.arange(256, dtype=torch.uint8)
LOW = torch.from_numpy(SIGNED).repeat(16)
HIGH = torch.from_numpy(SIGNED).repeat_interleave(16)


def test_int8_operands_of_every_byte_and_scale():
    t = INT8_SCALES[:16]
    low, high = (torch.full((16, 256), 99, dtype=torch.int8) for _ in range(2))
    _int8[(1,)](BYTES.repeat(16, 1), t, low, high, 16, 256)
    assert torch.equal(low.long(), LOW * t[:, None])
    assert torch.equal(high.long(), HIGH * (16 - t)[:, None])


def test_int8_operands_per_channel_of_every_byte():
    low, high = (torch.full((256,), 99, dtype=torch.int8) for _ in range(2))
    _times_16[(1,)](BYTES, low, high, 256)
    assert torch.equal(low.long(), 16 * LOW)
    assert torch.equal(high.long(), 16 * HIGH)


@pytest.mark.parametrize("fp8", [True, False])
def test_code_operands_of_every_byte(fp8):
    dtype = torch.uint8 if fp8 else torch.float16
    low, high = (torch.full((256,), 0x7E, dtype=dtype) for _ in range(2))
    unit = torch.zeros(1)
    _codes[(1,)](BYTES, low, high, unit, 256, fp8)
    if fp8:
        low, high = low.view(torch.float8_e4m3fn), high.view(torch.float8_e4m3fn)
    assert torch.equal(low.double(), LOW * unit.double())
    assert torch.equal(high.double(), HIGH * unit.double())


@pytest.mark.parametrize("fp8", [True, False])
def test_lut_operands_of_every_byte_and_scale(fp8):
    t = LUT_SCALES[: len(LUT_SCALES) // 8 * 8]
    t = torch.cat((t, LUT_SCALES[-8:])).half()
    t = torch.cat((t, t[: -len(t) % 128]))
    u = t.flip(0)
    dtype = torch.uint8 if fp8 else torch.float16
    low, high = (torch.full((128, 256), 0x7E, dtype=dtype) for _ in range(2))
    assert len(t) == 128
    _lut[(1,)](BYTES.repeat(128, 1), t, u, low, high, 128, 256, fp8)
    if fp8:
        low, high = low.view(torch.float8_e4m3fn), high.view(torch.float8_e4m3fn)
    assert torch.equal(low.float(), round_e4m3(LOW * t.float()[:, None]))
    assert torch.equal(high.float(), round_e4m3(HIGH * u.float()[:, None]))


def test_the_interpreter_runs_plain_triton():
    assert numbers.INTERPRETED.value
