"""Dense products in C++ against FP64: the bound of any order of FP32 sums, and one rounding."""

import ctypes
import math
from struct import pack

import pytest
import torch
from torch import Tensor

from quant_kernels import cpu, ops, reference
from quant_kernels.cpu_linear import MOST_TOKENS
from quant_kernels.ops import OpError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 2, 5, 6, 7, 15, 16, 17, 33, MOST_TOKENS)
# Rows of the weight around blocks of 16 and 64, columns around vectors and tiles of 32.
SHAPES = [(1, 1), (64, 32), (63, 31), (65, 33), (16, 7), (130, 100), (200, 576), (70, 1027)]
THREADS = range(1, 9)
NULL_POINTER, NEGATIVE_SIZE, UNKNOWN_TYPE = 1, 2, 4  # QuantCpuStatus

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "fp16", "fp32"))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")

pytestmark = pytest.mark.usefixtures("isa")


def inside(x: Tensor) -> Tensor:
    """x as a view of a larger tensor: rows apart and not aligned, with NaN all around."""
    m, k = x.shape
    wide = torch.full((m + 2, k + 5), math.nan, dtype=x.dtype)
    wide[1:-1, 3:-2] = x
    return wide[1:-1, 3:-2]


def rows(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of different sizes, positive on the whole."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).add(0.2)
    return inside((x * torch.randn(m, 1, generator=generator).exp()).to(dtype))


def integers(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return inside(torch.randint(-8, 8, (m, k), generator=generator).to(dtype))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """By the backend, into a poisoned view, around which nothing is written."""
    out = inside(torch.full((len(x), len(weight)), math.nan, dtype=x.dtype))
    ops.linear(x, weight, out, backend="cpu")
    around = torch.ones(out._base.shape, dtype=torch.bool)
    around[1:-1, 3:-2] = False
    assert bool(out._base[around].isnan().all())
    return out


@each_dtype
@each_shape
def test_exact_sums_are_rounded_once(dtype, shape):
    """Of integers, which FP32 adds exactly; sums beyond 256 are ties and others in BF16."""
    weight = integers(*shape, dtype, seed=1)
    for m in TOKENS:
        x = integers(m, shape[1], dtype, seed=2)
        exact = x.double() @ weight.double().T
        assert torch.equal(product(x, weight), exact.to(dtype))


@each_dtype
@each_shape
def test_sums_are_as_good_as_fp32_gives(dtype, shape):
    """K products and sums, each rounded by at most u = 2^-24 of a sum that is never above
    sum |x w| (1 + u)^K: K u (1 + 1e-3) of it for these K; then half a unit of the type."""
    weight = rows(*shape, dtype, seed=1)
    x = rows(MOST_TOKENS, shape[1], dtype, seed=2)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = 1.001 * shape[1] * 2.0**-24 * magnitude
    kind = torch.finfo(dtype)
    bound += (exact.abs() + bound) * kind.eps / 2 + kind.smallest_normal * kind.eps
    assert bool(((product(x, weight).double() - exact).abs() <= bound).all())


@each_dtype
@pytest.mark.parametrize("k", [77, 576])
def test_a_tokens_bits_are_its_own(dtype, k, threads):
    """Alone, in any batch, at any place of it, and on any number of threads."""
    x, weight = rows(MOST_TOKENS, k, dtype, seed=3), rows(333, k, dtype, seed=4)
    threads(1)
    wanted = product(x, weight)
    for count in THREADS:
        threads(count)
        assert torch.equal(product(x, weight), wanted)
        for start, end in ((0, 1), (63, 64), (3, 20), (17, 50)):
            assert torch.equal(product(x[start:end], weight), wanted[start:end])
    for start, end in ((5, 70), (330, 333)):  # nor do they depend on the other rows
        assert torch.equal(product(x, weight[start:end]), wanted[:, start:end])


@each_dtype
def test_what_is_not_finite_stays_in_its_row_and_column(dtype):
    x, weight = rows(20, 100, dtype, seed=5), rows(90, 100, dtype, seed=6)
    wanted = product(x, weight)
    x[3, 99], weight[66, 0] = math.nan, math.inf
    found = product(x, weight)
    assert bool(found[3].isnan().all())
    assert not bool(found[:, 66].isfinite().any())
    finite = torch.ones_like(found, dtype=torch.bool)
    finite[3], finite[:, 66] = False, False
    assert torch.equal(found[finite], wanted[finite])


def test_subnormal_numbers_survive_a_caller_who_flushes_them():
    x, weight = torch.linspace(-9, 9, 64)[None] * 2.0**-133, torch.eye(64)
    assert torch.set_flush_denormal(True)
    try:
        found = product(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, x)
    assert bool(found.any())


@each_dtype
def test_many_tokens_are_torchs(dtype):
    x, weight = rows(MOST_TOKENS + 1, 96, dtype, seed=7), rows(70, 96, dtype, seed=8)
    assert torch.equal(product(x, weight), reference.linear(x, weight))


def test_no_tokens_no_rows_and_no_columns():
    around = torch.full((2, 8), 77.0)
    ops.linear(torch.zeros(0, 16), torch.zeros(8, 16), around[1:1], backend="cpu")
    ops.linear(torch.zeros(2, 16), torch.zeros(0, 16), around[:, 3:3], backend="cpu")
    assert bool((around == 77).all())
    ops.linear(torch.zeros(2, 0), torch.zeros(8, 0), around, backend="cpu")
    assert bool((around == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x must be \[M, H\] and weight \[N, H\], got \[16\] and"),
        ({"x": torch.zeros(16, 3).T}, r"x must be .* contiguous, got float32 \[3, 16\]"),
        ({"x": torch.zeros(3, 16).double()}, "x must be bfloat16 or float16 or float32"),
        ({"weight": torch.zeros(8, 15)}, r"weight must be float32 \[8, 16\].* got float32 \[8, 15"),
        ({"weight": torch.zeros(8, 16).bfloat16()}, r"weight must be float32 .* got bfloat16"),
        ({"weight": torch.zeros(16, 8).T}, "weight must be float32 .* contiguous"),
        ({"out": torch.zeros(3, 9)}, r"out must be float32 \[3, 8\].* got float32 \[3, 9\]"),
        ({"out": torch.zeros(3, 8).half()}, "out must be float32 .* got float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.zeros(3, 16), "weight": torch.zeros(8, 16), "out": torch.zeros(3, 8)}
    with pytest.raises(OpError, match=f"^linear: {message}"):
        ops.linear(*{**arguments, **change}.values(), backend="cpu")


def test_the_c_function_refuses_what_it_cannot_read():
    out = torch.full((1, 4), 77.0)

    def status(**changes: int) -> int:
        call = {"x": out.data_ptr(), "x_row": 4, "weight": out.data_ptr(), "weight_row": 4,
                "out": out.data_ptr(), "out_row": 4, "type": 0, "m": 1, "n": 1, "k": 4,
                "threads": 1, **changes}  # fmt: skip
        argument = ctypes.c_char_p(pack("@PqPqPqqqqqq", *call.values()))
        return cpu.library().quant_cpu_linear(argument)

    assert {status(**{name: 0}) for name in ("x", "weight", "out")} == {NULL_POINTER}
    assert {status(**{name: -1}) for name in ("m", "n", "k")} == {NEGATIVE_SIZE}
    assert {status(type=number) for number in (-1, 3)} == {UNKNOWN_TYPE}
    assert bool((out == 77).all())
