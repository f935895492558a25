"""Roundings and conversions against torch's, on all codes and on numbers around every boundary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.formats import round_e4m3
from quant_kernels.triton import numbers


def awkward_numbers() -> Tensor:
    """FP32 numbers around E4M3's and BF16's boundaries: their grids, the ties, and next to both."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values.unique()
    points = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    near = [torch.nextafter(points, torch.full_like(points, end)) for end in (-1e9, 1e9)]
    generator = torch.Generator().manual_seed(0)
    loose = torch.randn(4096, generator=generator) * torch.randn(4096, generator=generator).exp()
    limits = torch.tensor([448.0, 464.0, 480.0, 1e6, -1e6, 0.0, -0.0, 1e-12, -1e-12])
    x = torch.cat((points, *near, loose * 100, loose * 1e-3, limits))
    return torch.cat((x, x[: -len(x) % 1024])).contiguous()


@triton.jit
def _bytes(x, out, N: tl.constexpr, FP8: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, numbers.e4m3_byte(tl.load(x + i), FP8))


@triton.jit
def _bf16(x, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, numbers.round_to(tl.load(x + i), out))


@triton.jit
def _fp16(code, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, numbers.e4m3_to_fp16(tl.load(code + i)))


@triton.jit
def _nibbles(packed, low, high, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(low + i, numbers.low_code(tl.load(packed + i)))
    tl.store(high + i, numbers.high_code(tl.load(packed + i)))


@triton.jit
def _nearest(x, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, numbers.round_nearest(tl.load(x + i)))


def test_e4m3_bytes_are_torchs():
    x = awkward_numbers()
    found = torch.full((len(x),), 0xAA, dtype=torch.uint8)
    _bytes[(len(x) // 1024,)](x, found, 1024, True)
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found, wanted.view(torch.uint8))
    assert torch.equal(found.view(torch.float8_e4m3fn).float(), round_e4m3(x))


def test_nan_becomes_the_code_for_it():
    x = torch.tensor([float("nan")]).repeat(16)
    found = torch.zeros(16, dtype=torch.uint8)
    _bytes[(1,)](x, found, 16, False)
    assert bool(found.view(torch.float8_e4m3fn).isnan().all())


def test_bf16_is_rounded_to_nearest_even():
    x = torch.cat((awkward_numbers(), torch.tensor([float("inf"), -float("inf")]).repeat(512)))
    found = torch.zeros(len(x), dtype=torch.bfloat16)
    _bf16[(len(x) // 1024,)](x, found, 1024)
    assert torch.equal(found, x.bfloat16())


def test_every_e4m3_code_in_fp16():
    codes = torch.arange(256, dtype=torch.uint8)
    found = torch.zeros(256, dtype=torch.float16)
    _fp16[(1,)](codes, found, 256)
    wanted = codes.view(torch.float8_e4m3fn).half()
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))
    assert int(found.isnan().sum()) == 2


def test_every_byte_holds_two_signed_codes():
    packed = torch.arange(256, dtype=torch.uint8)
    low, high = (torch.zeros(256, dtype=torch.int8) for _ in range(2))
    _nibbles[(1,)](packed, low, high, 256)
    signed = torch.tensor([i if i < 8 else i - 16 for i in range(16)], dtype=torch.int8)
    assert torch.equal(low, signed.repeat(16))
    assert torch.equal(high, signed.repeat_interleave(16))


def test_integers_are_the_nearest_with_ties_to_even():
    x = torch.arange(-520, 504).float() / 2
    found = torch.zeros(len(x))
    _nearest[(1,)](x, found, 1024)
    assert torch.equal(found, x.round())
