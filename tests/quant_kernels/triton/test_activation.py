"""Codes, scales and residuals against the definition, bit for bit wherever no sum or exp is in it.

RMSNorm's sum has another order here and silu's exponential another last bit. Both move y by a few
units of 2^-24 and so y / a by less than 2^-21 of itself. A code is then at most one step off, and
only next to a tie: ties lie at least 2^-4 of a number apart for E4M3 and 2^-7 for INT8, so it is a
share of 2 * 2^-21 * 2^7 = 2^-13. Where y is first rounded to p bits (BF16: 8, FP16: 11), a share of
2 * 2^-21 * 2^p goes to the neighbour, at most 2^(1 - p) away, and that moves a share of
2^(1 - p) * 2^7 of the codes: 2^-12 in all, 0.025%; MOVED is four times it. A scale moves by 2^-21,
unless the largest number of its token goes to a neighbour; with these seeds none does.
"""

import math

import pytest
import torch
from torch import Tensor

from quant_kernels import ops
from quant_kernels.triton.activation import WIDEST_BLOCK

MOVED = 0.001
SCALE_MOVED = 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = (torch.float8_e4m3fn, torch.int8)
BACKENDS = ("triton", "reference")

each_kind = pytest.mark.parametrize("kind", KINDS, ids=("fp8", "int8"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "fp16", "fp32"))


def tokens(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of different sizes, with outliers, as a view whose rows are apart and not aligned."""
    generator = torch.Generator().manual_seed(seed)
    m, k = shape
    wide = torch.randn(m, k + 5, generator=generator)
    wide *= torch.randn(m, 1, generator=generator).exp() * 1.7
    wide[:, 3::37] *= 11.3
    return wide.to(dtype)[:, 2 : 2 + k]


def poisoned(shape: tuple[int, int], kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales full of what no op writes there, inside larger tensors."""
    m, k = shape
    codes = torch.full((m + 1, k + 7), 0xAA, dtype=torch.uint8).view(kind)
    return codes[:m, :k], torch.full((m + 1, 3), math.nan)[:m, 1:2]


def values(codes: Tensor) -> Tensor:
    """Codes as integers that are neighbours where the codes are; every NaN is 999."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    signed = torch.where(bits < 128, bits, 127 - bits)  # -0 is one below 0
    return signed.masked_fill(codes.float().isnan(), 999)


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values(found[0]), values(wanted[0]))


def assert_next_to(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[1], wanted[1], rtol=SCALE_MOVED, atol=0, equal_nan=True)
    apart = (values(found[0]) - values(wanted[0])).abs()
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) <= max(1, MOVED * apart.numel())


def assert_nothing_else_written(codes: Tensor, scale: Tensor) -> None:
    """What lies around the views of `poisoned`."""
    m, k = codes.shape
    around = codes.view(torch.uint8).as_strided((m + 1, k + 7), (k + 7, 1), 0)
    assert bool((around[:, k:] == 0xAA).all())
    assert bool((around[m:] == 0xAA).all())
    beside = scale.as_strided((m + 1, 3), (3, 1), 0)
    assert bool(beside[:, [0, 2]].isnan().all())
    assert bool(beside[m].isnan().all())


@each_kind
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 300), (3, 1025)])
def test_codes_and_scales_are_the_definitions(kind, dtype, shape):
    x = tokens(shape, dtype)
    found, wanted = poisoned(shape, kind), poisoned(shape, kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.quantize_activation(x, *pair, backend=backend)
    assert_same(found, wanted)
    assert_nothing_else_written(*found)


@each_kind
def test_tokens_wider_than_a_block(kind):
    shape = (2, 2 * WIDEST_BLOCK + 40)
    x = tokens(shape, torch.bfloat16)
    x[1, -3] = 517.0  # the largest, in the last block
    found, wanted = poisoned(shape, kind), poisoned(shape, kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.quantize_activation(x, *pair, backend=backend)
    assert_same(found, wanted)
    assert_nothing_else_written(*found)


@each_kind
@each_dtype
def test_tokens_that_no_scale_fits(kind, dtype):
    """Zeros, equal numbers, NaN, Inf, the largest and the smallest numbers of the dtype."""
    x = tokens((10, 33), dtype).contiguous()
    x[0], x[1], x[2] = 0.0, -0.3, -0.0
    x[3, 5], x[4, 32], x[5, 0] = math.nan, math.inf, -math.inf
    x[6, 1], x[6, 2] = math.inf, math.nan
    x[7] *= torch.finfo(dtype).max / x[7].abs().max() / 2
    # Normal numbers with a subnormal scale: the interpreter reads subnormal BF16 wrongly.
    x[8] = torch.linspace(1, 9, 33).to(dtype) * torch.finfo(dtype).tiny
    found, wanted = poisoned((10, 33), kind), poisoned((10, 33), kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.quantize_activation(x, *pair, backend=backend)
    assert_same(found, wanted)
    assert found[1][0] == 1
    assert found[1][2] == 1
    assert bool(found[1][[3, 6]].isnan().all())
    assert bool(found[1][[4, 5]].isinf().all())


def test_int8_ties_go_to_even_after_a_rounded_division():
    """a = 3, x / a = n + 1/2: a product with the rounded 1 / 3 is not at the tie any more."""
    x = torch.cat((torch.arange(-126, 127).float() + 0.5, torch.tensor([127.0]))).mul(3)
    codes, scale = torch.full((1, 254), -86, dtype=torch.int8), torch.full((1, 1), math.nan)
    ops.quantize_activation(x[None], codes, scale, backend="triton")
    assert float(scale) == 3
    assert bool((codes[0, :-1] % 2 == 0).all())
    assert codes[0, -1] == 127
    assert torch.equal(codes[0].float(), (x / 3).round())


def test_fp8_ties_go_to_even_after_a_rounded_division():
    """a = 3 again, and x / a the middle of two neighbouring E4M3 numbers."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat(((grid[1:] + grid[:-1]) / 2, grid[-1:]))
    codes, scale = torch.full((1, 127), 0xAA, dtype=torch.uint8), torch.full((1, 1), math.nan)
    x = (middles * 3)[None]
    ops.quantize_activation(x, codes.view(torch.float8_e4m3fn), scale, backend="triton")
    assert float(scale) == 3
    lower = torch.arange(126, dtype=torch.int32)
    assert torch.equal(codes[0, :-1].int(), lower + lower % 2)
    assert codes[0, -1] == 126


@each_kind
@each_dtype
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=("bf16", "fp32"))
@pytest.mark.parametrize("shape", [(3, 33), (4, 300)])
@pytest.mark.parametrize("with_residual", [False, True], ids=("", "residual"))
def test_rms_norm(kind, dtype, weight_dtype, shape, with_residual):
    x = tokens(shape, dtype)
    weight = (tokens((1, shape[1]), torch.float32, seed=1)[0] + 1.3).to(weight_dtype)
    before = tokens((shape[0], shape[1] + 3), dtype, seed=2) if with_residual else None
    outputs, streams = [], []
    for backend in BACKENDS:
        pair = poisoned(shape, kind)
        stream = None if before is None else before.clone()
        part = None if stream is None else stream[:, 1:-2]
        ops.rms_norm_quantize(x, weight, 0.0123, *pair, residual=part, backend=backend)
        outputs.append(pair)
        streams.append(stream)
    assert_next_to(*outputs)
    assert_nothing_else_written(*outputs[0])
    if before is not None:
        assert torch.equal(streams[0], streams[1])
        assert torch.equal(streams[0][:, 1:-2], (x.float() + before[:, 1:-2].float()).to(dtype))


@pytest.mark.parametrize("with_residual", [False, True], ids=("", "residual"))
def test_rms_norm_of_tokens_wider_than_a_block(with_residual):
    shape = (2, WIDEST_BLOCK + 77)
    x, weight = tokens(shape, torch.bfloat16), tokens((1, shape[1]), torch.bfloat16, seed=1)[0]
    x[:, -70:] *= 9.7  # what the last block holds is felt in the mean
    outputs, streams = [], []
    for backend in BACKENDS:
        pair, stream = poisoned(shape, KINDS[0]), tokens(shape, torch.bfloat16, seed=2).clone()
        residual = stream if with_residual else None
        ops.rms_norm_quantize(x, weight, 1e-5, *pair, residual=residual, backend=backend)
        outputs.append(pair)
        streams.append(stream)
    assert_next_to(*outputs)
    assert torch.equal(*streams)


def test_rms_norm_rounds_before_it_norms_and_before_it_quantizes():
    """Sums in BF16 lose bits here; codes of the unrounded stream, or of unrounded y, are others."""
    x, added = tokens((6, 257), torch.bfloat16), tokens((6, 257), torch.bfloat16, seed=3)
    weight = tokens((1, 257), torch.bfloat16, seed=4)[0]
    codes, scale = poisoned((6, 257), KINDS[1])
    stream = added.clone()
    ops.rms_norm_quantize(x, weight, 1e-6, codes, scale, residual=stream, backend="triton")
    exact = x.float() + added.float()
    unrounded = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
    largest = unrounded.abs().amax(-1, keepdim=True)
    assert not torch.equal(stream.float(), exact)
    assert not torch.allclose(scale * 127, largest, rtol=1e-4, atol=0)
    torch.testing.assert_close(scale * 127, (scale * 127).bfloat16().float(), rtol=3e-7, atol=0)


@each_kind
def test_rms_norm_of_zeros_and_of_nan(kind):
    x = tokens((4, 65), torch.bfloat16).contiguous()
    x[0], x[1, 64], x[2, 3] = 0.0, math.nan, math.inf
    weight = tokens((1, 65), torch.bfloat16, seed=1)[0]
    found, wanted = poisoned((4, 65), kind), poisoned((4, 65), kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.rms_norm_quantize(x, weight, 1e-6, *pair, backend=backend)
    assert_next_to(found, wanted)
    assert found[1][0] == 1
    assert bool(found[1][1:3].isnan().all())


@each_kind
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (4, 300), (2, WIDEST_BLOCK + 77)])
def test_silu_mul(kind, dtype, shape):
    gate_up = tokens((shape[0], 2 * shape[1]), dtype)
    found, wanted = poisoned(shape, kind), poisoned(shape, kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.silu_mul_quantize(gate_up, *pair, backend=backend)
    assert_next_to(found, wanted)
    assert_nothing_else_written(*found)


@each_kind
@each_dtype
def test_silu_mul_at_its_ends(kind, dtype):
    """Gates whose exponential overflows or vanishes, zeros, NaN and Inf in either half."""
    gates = torch.tensor([-200.0, -100.0, -88.8, -20.0, 0.0, 20.0, 90.0, 200.0])
    gate_up = torch.cat((gates, torch.linspace(-3, 2.7, 8))).repeat(7, 1).to(dtype)
    gate_up[1] = 0.0
    gate_up[2, 2], gate_up[3, 10] = math.nan, math.nan
    gate_up[4, 6], gate_up[5, 6], gate_up[6, 14] = math.inf, -math.inf, -math.inf
    found, wanted = poisoned((7, 8), kind), poisoned((7, 8), kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.silu_mul_quantize(gate_up, *pair, backend=backend)
    assert_next_to(found, wanted)
    assert found[1][1] == 1
    assert bool(found[1][[2, 3, 5]].isnan().all())


@each_kind
def test_no_tokens(kind):
    x, weight = torch.zeros(0, 64), torch.ones(64)
    around = torch.full((2, 1), 77.0)
    codes, scale = torch.zeros(0, 64, dtype=kind), around[1:1]
    ops.quantize_activation(x, codes, scale, backend="triton")
    ops.rms_norm_quantize(x, weight, 1e-6, codes, scale, residual=x.clone(), backend="triton")
    ops.silu_mul_quantize(torch.zeros(0, 128), codes, scale, backend="triton")
    assert bool((around == 77).all())
