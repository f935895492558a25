"""The C++ activations against their definition: bit for bit where no sum or exp is in it.

RMSNorm's sum has another order here and silu's exponential another last bit. How far that moves
codes and scales is derived in `triton/test_activation.py`, whose bounds `assert_next_to` holds.
"""

import math

import pytest
import torch
from torch import Tensor

from quant_kernels import ops
from tests.quant_kernels.triton.test_activation import (
    DTYPES,
    assert_next_to,
    assert_nothing_else_written,
    assert_same,
    each_dtype,
    each_kind,
    poisoned,
    tokens,
)

BACKENDS = ("cpu", "reference")
SHAPES = [(1, 1), (3, 7), (2, 16), (5, 64), (4, 300), (3, 1025)]
THREADS = (1, 2, 3, 16, 64)

pytestmark = pytest.mark.usefixtures("isa")


def bit_patterns(dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of every size, subnormal ones, infinities and NaN: [64, 1024]."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (64, 1024), generator=generator)
        return bits.to(torch.int32).view(dtype)
    bits = torch.randperm(2**16, generator=generator) - 2**15
    return bits.to(torch.int16).view(64, 1024).view(dtype)


def by_both(x: Tensor, kind: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    found, wanted = poisoned(tuple(x.shape), kind), poisoned(tuple(x.shape), kind)
    for pair, backend in zip((found, wanted), BACKENDS, strict=True):
        ops.quantize_activation(x, *pair, backend=backend)
    return found, wanted


@each_kind
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_the_definitions(kind, dtype, shape):
    found, wanted = by_both(tokens(shape, dtype), kind)
    assert_same(found, wanted)
    assert_nothing_else_written(*found)


@each_kind
@each_dtype
def test_numbers_of_every_size(kind, dtype):
    """Rows of one exponent and its neighbours, so that every number is a tenth of its row's."""
    x = bit_patterns(dtype, 0)
    x = x[x.isfinite()].abs().sort().values[: 63 * 1024].view(-1, 64)
    assert_same(*by_both(x, kind))
    assert_same(*by_both(-x, kind))


@each_kind
@each_dtype
def test_tokens_that_no_scale_fits(kind, dtype):
    """Zeros, equal numbers, NaN, Inf, the largest and the smallest numbers of the dtype."""
    x = tokens((10, 33), dtype).contiguous()
    x[0], x[1], x[2] = 0.0, -0.3, -0.0
    x[3, 5], x[4, 32], x[5, 0] = math.nan, math.inf, -math.inf
    x[6, 1], x[6, 2] = math.inf, math.nan
    x[7] *= torch.finfo(dtype).max / x[7].abs().max() / 2
    x[8] = torch.linspace(1, 9, 33).to(dtype) * torch.finfo(dtype).tiny
    x[9] = torch.linspace(-9, 9, 33).to(dtype) * torch.finfo(dtype).smallest_normal / 16
    found, wanted = by_both(x, kind)
    assert_same(found, wanted)
    assert found[1][0] == 1
    assert found[1][2] == 1
    assert bool(found[1][[3, 6]].isnan().all())
    assert bool(found[1][[4, 5]].isinf().all())


def test_ties_go_to_even_after_a_rounded_division():
    """a = 3, and x / a a tie: a product with the rounded 1 / 3 is not at the tie any more."""
    x = torch.cat((torch.arange(-126, 127).float() + 0.5, torch.tensor([127.0]))).mul(3)[None]
    found, wanted = by_both(x, torch.int8)
    assert float(found[1]) == 3
    assert bool((found[0][0, :-1] % 2 == 0).all())
    assert_same(found, wanted)
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat(((grid[1:] + grid[:-1]) / 2, grid[-1:]))
    found, wanted = by_both((middles * 3)[None], torch.float8_e4m3fn)
    assert float(found[1]) == 3
    lower = torch.arange(126, dtype=torch.int32)
    assert torch.equal(found[0].view(torch.uint8)[0, :-1].int(), lower + lower % 2)
    assert_same(found, wanted)


@each_kind
def test_quotients_beside_ties_are_rounded_as_a_division_does(kind):
    """Next to every tie and 2 units in the last place around it, for scales of every size."""
    generator = torch.Generator().manual_seed(5)
    exponents = torch.cat((torch.arange(-120, 110, 5), torch.randint(-20, 20, (400,)))).float()
    scales = (1 + torch.rand(len(exponents), generator=generator)) * 2**exponents
    scales[::7] = 2 ** exponents[::7] * (2 - 2.0**-23)  # mantissas of ones
    if kind == torch.int8:
        ties, limit = torch.arange(-127, 127) + 0.5, 127
    else:
        grid = torch.arange(127, dtype=torch.uint8).view(kind).float()
        ties, limit = (grid[1:] + grid[:-1]) / 2, 448
    x = [(scales[:, None] * ties)]
    for direction in (math.inf, -math.inf):
        for _ in range(2):
            x.append(torch.nextafter(x[-1] if len(x) % 2 else x[0], torch.tensor(direction)))
    rows = torch.cat((*x, scales[:, None] * limit), 1)
    found, wanted = by_both(rows, kind)
    assert_same(found, wanted)
    signs = found[0].view(torch.uint8) & 128
    assert kind == torch.int8 or torch.equal(signs, wanted[0].view(torch.uint8) & 128)


@each_kind
@each_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=("w-bf16", "w-fp16", "w-fp32"))
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


@each_dtype
def test_the_residual_stream_is_rounded_once_whatever_the_numbers(dtype):
    x, before = bit_patterns(dtype, 1), bit_patterns(dtype, 2)
    weight, stream = torch.ones(1024), before.clone()
    pair = poisoned((64, 1024), torch.int8)
    ops.rms_norm_quantize(x, weight, 1e-6, *pair, residual=stream, backend="cpu")
    wanted = (x.float() + before.float()).to(dtype)
    torch.testing.assert_close(stream, wanted, rtol=0, atol=0, equal_nan=True)


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
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (4, 300), (2, 5000)])
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


def test_silu_is_as_exact_as_fp32_allows():
    """One gate a row, up 1: the scale is |silu| / 127. A few roundings of 2^-24 of e^-g and of what
    follows, each of them at most once in the quotient: 4 units are 2.4e-7."""
    gate = torch.linspace(-80, 80, 4001)[:, None]
    codes, scale = poisoned((4001, 1), torch.int8)
    gate_up = torch.cat((gate, torch.ones_like(gate)), 1)
    ops.silu_mul_quantize(gate_up, codes, scale, backend="cpu")
    wanted = torch.nn.functional.silu(gate.double()).abs() / 127
    wanted[gate == 0] = 1.0
    torch.testing.assert_close(scale.double(), wanted, rtol=2.4e-7, atol=0)


@each_kind
def test_threads_and_neighbours_change_nothing(kind, threads):
    m, k = 1000, 2100
    x, weight = tokens((m, k), torch.bfloat16), tokens((1, k), torch.bfloat16, seed=1)[0]
    stream = tokens((m, k), torch.bfloat16, seed=2).clone()

    def everything(rows: slice) -> list[Tensor]:
        n = len(range(m)[rows])
        outputs = [poisoned((n, width), kind) for width in (k, k, k // 2)]
        residual = stream[rows].clone()
        ops.quantize_activation(x[rows], *outputs[0], backend="cpu")
        ops.rms_norm_quantize(x[rows], weight, 1e-6, *outputs[1], residual=residual, backend="cpu")
        ops.silu_mul_quantize(x[rows], *outputs[2], backend="cpu")
        for pair in outputs:
            assert_nothing_else_written(*pair)
        return [*(part.view(torch.uint8) for pair in outputs for part in pair), residual]

    threads(1)
    wanted = everything(slice(None))
    for count in THREADS:
        threads(count)
        assert all(map(torch.equal, everything(slice(None)), wanted))
    for rows in (slice(7, 8), slice(500, 533)):
        alone = everything(rows)
        assert all(torch.equal(x, y[rows]) for x, y in zip(alone, wanted, strict=True))


def test_subnormal_numbers_survive_a_caller_who_flushes_them():
    x = torch.linspace(-9, 9, 64)[None] * 2.0**-133
    found = poisoned((1, 64), torch.int8)
    wanted = by_both(x, torch.int8)[1]
    assert torch.set_flush_denormal(True)
    try:
        ops.quantize_activation(x, *found, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, wanted)


@each_kind
def test_no_tokens(kind):
    x, weight = torch.zeros(0, 64), torch.ones(64)
    around = torch.full((2, 1), 77.0)
    codes, scale = torch.zeros(0, 64, dtype=kind), around[1:1]
    ops.quantize_activation(x, codes, scale, backend="cpu")
    ops.rms_norm_quantize(x, weight, 1e-6, codes, scale, residual=x.clone(), backend="cpu")
    ops.silu_mul_quantize(torch.zeros(0, 128), codes, scale, backend="cpu")
    assert bool((around == 77).all())
