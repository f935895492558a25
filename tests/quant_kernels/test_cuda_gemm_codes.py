"""Gate and up whose output is quantized behind the GEMM: the reference's bits, in the simulator.

What the codes should be is defined by `out`: every bit of them can be asked for, although sums
of FP8 products have none to compare with.
"""

from __future__ import annotations

import math

import pytest
import torch

from quant_kernels import cuda_gemm, reference
from quant_kernels.cuda_tuning import BUCKETS, KINDS, Case, Config, by_model
from tests.quant_kernels.test_cuda_gemm import (
    BAD_ALIGNMENT,
    BAD_SHAPE,
    CHANNEL,
    EXACT,
    INT8,
    LUT,
    NULL_POINTER,
    SMALL_WORKSPACE,
    Problem,
    check,
    needed_bytes,
    problem,
    simulate,
    status,
)

F8 = torch.float8_e4m3fn
CODES = {"fp8": F8, "int8": torch.int8}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [INT8, LUT, EXACT, CHANNEL]


def fused(fmt, m: int, n: int, k: int, kind: str = "fp8", **options) -> Problem:
    """Gates and ups of some units, and tokens whose maxima lie far apart."""
    p = problem(fmt, m, n, k, silu_mul=True, **options)
    p.scale *= torch.rand(m, 1).mul(5).exp() / 1000
    poison(p, kind)
    return p


def poison(p: Problem, kind: str) -> None:
    p.out.fill_(math.nan)
    p.out_codes = torch.full(p.out.shape, 0x55, dtype=torch.uint8).view(CODES[kind])
    p.out_scale = torch.full((len(p.out), 1), -7.0)


def assert_quantized(p: Problem) -> None:
    """The bits of the definition; a NaN's sign and payload are no matter of it."""
    kind = "int8" if p.out_codes.dtype == torch.int8 else "fp8"
    codes, scale = reference.quantize_activation(p.out, kind)
    torch.testing.assert_close(p.out_scale, scale, rtol=0, atol=0, equal_nan=True)
    found, wanted = p.out_codes.view(torch.uint8), codes.view(torch.uint8)
    if kind == "fp8":
        found, wanted = (x.where(x & 0x7F != 0x7F, 0x7F) for x in (found, wanted))
    assert torch.equal(found, wanted)


CONFIGS = (
    Config(16, 1, 5, True),
    Config(32, 1, 2, False),
    Config(64, 2, 2, True),
    Config(128, 1, 3, False),
    Config(128, 2, 2, False),
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_codes_are_those_of_what_is_stored(simulator, config):
    # 192 rows of the gate: three row tiles, of which two clusters of two blocks make four.
    turn = CONFIGS.index(config)
    for i, m in enumerate((1, 15, 70, 129)):
        fmt, kind = FORMATS[(i + turn) % 4], ("fp8", "int8")[(i + turn // 2) % 2]
        dtype = DTYPES[(i + turn) % 3]
        p = fused(fmt, m, 2 * 192, 384, kind, dtype=dtype, bias=torch.randn(384))
        simulate(simulator, p, config, late=i % 2 == 0, seed=i)
        check(p)
        assert_quantized(p)


def test_many_tokens_and_many_columns(simulator):
    p = fused(LUT, 300, 2 * 128, 256, dtype=torch.bfloat16)
    simulate(simulator, p, Config(256, 1, 2, False))
    check(p)
    assert_quantized(p)
    # More row tiles than a warp has lanes, and two blocks a token.
    p = fused(CHANNEL, 6, 2 * 4224, 128, "int8", dtype=torch.bfloat16)
    simulate(simulator, p, Config(16, 1, 7, True))
    assert_quantized(p)


@pytest.mark.parametrize("config", [Config(16, 1, 7, True), Config(32, 1, 2, False)], ids=str)
def test_a_workspace_serves_call_after_call(simulator, config):
    """Tokens of large numbers, then of small ones, then large again, in other places."""
    shapes = {m: fused(INT8, m, 2 * 192, 384, dtype=torch.bfloat16) for m in (21, 9)}
    size = max(needed_bytes(p, config) for p in shapes.values())
    whole = torch.zeros(size + 256, dtype=torch.uint8)
    scales = {m: p.scale.clone() for m, p in shapes.items()}
    for turn, (m, factor) in enumerate(((21, 50.0), (21, 0.02), (9, 1.0), (21, 1.0), (9, 0.01))):
        p = shapes[m]
        p.scale = scales[m].roll(turn, 0) * factor
        poison(p, ("fp8", "int8")[turn % 2])
        simulate(simulator, p, config, workspace=whole[:size], seed=turn)
        assert_quantized(p)
        assert bool((whole[size:] == 0).all())


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_no_scale_fits(simulator, kind, dtype):
    p = fused(INT8, 8, 2 * 128, 256, kind, dtype=dtype)
    p.codes[0] = 0
    p.scale[1], p.scale[2] = math.nan, math.inf
    p.scale[3], p.scale[4] = 1e-20, 1e17  # of numbers that nearly vanish; beyond FP16's end
    p.scale[5] = 1e-22
    simulate(simulator, p, Config(16, 1, 2, True))
    assert_quantized(p)
    assert p.out_scale[0] == 1
    assert bool(p.out_scale[1].isnan())
    assert bool((p.out[0] == 0).all())
    assert not bool(p.out_scale[2].isfinite())


def test_rows_beside_the_outputs_are_left_alone(simulator):
    p = fused(LUT, 5, 2 * 64, 128, dtype=torch.bfloat16)
    around = torch.full((9, 96), 7.0, dtype=torch.bfloat16)
    codes = torch.full((9, 112), 0x33, dtype=torch.uint8)
    scales = torch.full((9, 3), 7.0)
    p.out, p.out_codes = around[2:7, 16:80], codes.view(F8)[2:7, 32:96]
    p.out_scale = scales[2:7, 1:2]
    simulate(simulator, p, Config(16, 1, 1, False))
    check(p)
    assert_quantized(p)
    around[2:7, 16:80], codes[2:7, 32:96], scales[2:7, 1] = 7, 0x33, 7
    assert bool((around == 7).all())
    assert bool((codes == 0x33).all())
    assert bool((scales == 7).all())


def test_what_the_second_kernel_does_not_take_is_refused(simulator):
    p = fused(LUT, 8, 2 * 128, 256, dtype=torch.bfloat16)
    split, whole = Config(16, 1, 4, True), Config(16, 1, 4, False)
    for config in (split, whole):
        assert status(simulator, p, config) == 0
        assert status(simulator, p, config, out_codes=None) == NULL_POINTER
        assert status(simulator, p, config, out_scale=None) == NULL_POINTER
        assert status(simulator, p, config, workspace=None) == NULL_POINTER
        assert status(simulator, p, config, silu_mul=0) == BAD_SHAPE
        assert status(simulator, p, config, out_codes_type=2) == BAD_SHAPE
        for name in ("out", "out_codes"):
            address = getattr(p, name).data_ptr()
            assert status(simulator, p, config, **{name: address + 8}) == BAD_ALIGNMENT
            assert status(simulator, p, config, **{f"{name}_stride": 136}) == BAD_ALIGNMENT
        size = needed_bytes(p, config) - 1
        assert status(simulator, p, config, workspace_size=size) == SMALL_WORKSPACE
    without = cuda_gemm.needed_bytes(split)
    assert status(simulator, p, split, without, out_codes=None, out_scale=None) == 0


def test_the_workspace_has_room_for_maxima(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "multiprocessors", lambda device: 132)
    n, k = 28672, 4096
    for most in (16, 100, 3000):
        found = cuda_gemm.workspace_bytes(torch.device("cuda"), [(n, k), (k, n // 2)], most)
        for kind in KINDS:
            bucket = next((b for b in BUCKETS if most <= b), BUCKETS[-1])
            config = by_model(Case(kind, 128, bucket, n, k, True), max(most, bucket), 132)
            needed = cuda_gemm.needed_bytes(config) + cuda_gemm.maxima_bytes(most, n)
            assert needed <= found
