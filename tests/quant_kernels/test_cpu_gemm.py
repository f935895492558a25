"""The C++ GEMMs against the reference: INT8 bit for bit, FP8 within its sums' roundings."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.calibration.scales import choose_scales
from quant_kernels import cpu, cpu_gemm, ops, reference
from quant_kernels.formats import (
    WeightFormat,
    effective_weight,
    every_format,
    kernel_operand,
    nearest_codes,
)
from quant_kernels.packing import (
    BlockedWeight,
    PackedWeight,
    block_weight,
    pack_int4,
    unpack_int4,
)

ROOT = Path(__file__).parents[2]
FORMATS = every_format()
INT8_FORMATS = [fmt for fmt in FORMATS if fmt.scheme == "w4a8"]
ISAS = cpu_gemm.isas() if cpu.available() else ()
U = 2.0**-24  # FP32's unit roundoff
KINDS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 128), (40, 64), (72, 384), (136, 576), (200, 1152), (8, 8), (65, 1048))

pytestmark = pytest.mark.skipif(not cpu.available(), reason="libquant_cpu.so was not built")


@pytest.fixture(autouse=True, params=ISAS)
def isa(request):
    """Every instruction set that this machine has, in turn."""
    cpu_gemm.set_isa(request.param)
    yield request.param
    cpu_gemm.set_isa(None)


def make_weight(n: int, k: int, fmt: WeightFormat, seed: int = 0) -> PackedWeight:
    """A packed weight whose scales differ between rows and groups by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, 1, generator=generator).mul(4).exp() * 0.01
    weight *= torch.rand(k, generator=generator).add(0.05)
    weight[:, ::7] *= 3
    scales = choose_scales(weight, fmt, "absmax")
    return PackedWeight(pack_int4(nearest_codes(weight, scales, fmt)), scales, fmt)


def make_tokens(m: int, k: int, fmt: WeightFormat, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Quantized tokens of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x *= torch.rand(m, 1, generator=generator).mul(5).exp()
    return reference.quantize_activation(x, fmt.activation)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def multiply(
    tokens: tuple[Tensor, Tensor],
    weight: PackedWeight | BlockedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The kernel's answer, in a poisoned output."""
    blocked = block_weight(weight) if isinstance(weight, PackedWeight) else weight
    m, n = len(tokens[0]), blocked.shape[0]
    out = torch.full((m, n // 2 if silu_mul else n), float("nan"), dtype=dtype)
    ops.gemm(*tokens, blocked, out, bias=bias, residual=residual, silu_mul=silu_mul, backend="cpu")
    return out


def bound(tokens: tuple[Tensor, Tensor], weight: PackedWeight, *addends: Tensor | None) -> Tensor:
    """How far two FP32 evaluations of Y may lie apart, [M, N]; 0 for INT8, whose sums are exact.

    Products of an E4M3 code and an operand are exact in FP32 (but for q t of grouped `exact`, which
    rounds once more). A sum of K of them in any order is off by at most (K - 1) U sum|x w|, to
    first order; the two factors and two addends round once each. Twice, as either evaluation may be
    off, and twice again for the higher orders.
    """
    if weight.fmt.scheme == "w4a8":
        return torch.zeros(len(tokens[0]), len(weight.words), dtype=torch.float64)
    w = effective_weight(unpack_int4(weight.words), weight.scales, weight.fmt).double()
    total = (tokens[0].double() * tokens[1].double()).abs() @ w.abs().T
    for addend in addends:
        total = total if addend is None else total + addend.double().abs()
    return 4 * (w.shape[1] + 5) * U * total


def assert_close(found: Tensor, wanted: Tensor, within: Tensor) -> None:
    assert bool(((found.double() - wanted.double()).abs() <= within).all())


def fits(fmt: WeightFormat, k: int) -> bool:
    return fmt.per_channel or k % fmt.group_size == 0


def cases() -> list[tuple[WeightFormat, int, int, int]]:
    """(format, N, K, M): every format, with every shape it takes and tokens around the tiles."""
    tokens = (1, 2, 3, 4, 5, 6, 7, 12, 13, 31, 48, 49, 70)
    found = []
    for i, fmt in enumerate(FORMATS):
        for j, (n, k) in enumerate(SHAPES):
            if fits(fmt, k):
                found += [(fmt, n, k, tokens[(3 * i + 5 * j + step) % 13]) for step in (0, 4, 9)]
    return found


@pytest.mark.parametrize(("fmt", "n", "k", "m"), cases(), ids=str)
def test_every_format_at_the_edges_of_blocks_and_tiles(fmt, n, k, m):
    weight, tokens = make_weight(n, k, fmt), make_tokens(m, k, fmt)
    bias = noise(n) if m % 2 else None
    residual = noise(m, n, seed=3).bfloat16() if n % 16 else None
    found = multiply(tokens, weight, bias=bias, residual=residual)
    wanted = reference.gemm(*tokens, weight, bias, torch.float32, residual)
    assert_close(found, wanted, bound(tokens, weight, bias, residual))


@pytest.mark.parametrize("fmt", [*FORMATS[:4], FORMATS[6], *INT8_FORMATS], ids=str)
def test_every_number_of_tokens_and_the_row_of_a_batch_is_the_row_alone(fmt):
    k = 648 if fmt.per_channel else 640
    weight, tokens = block_weight(make_weight(72, k, fmt)), make_tokens(100, k, fmt)
    whole = multiply(tokens, weight)
    for m in range(71):
        part = (tokens[0][100 - m :], tokens[1][100 - m :])
        assert torch.equal(multiply(part, weight), whole[100 - m :]), m
    if fmt.scheme == "w4a8":
        wanted = reference.gemm(*tokens, make_weight(72, k, fmt), out_dtype=torch.float32)
        assert torch.equal(whole, wanted)


@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[3], INT8_FORMATS[0]], ids=str)
def test_threads_do_not_change_a_bit(fmt):
    weight, before = block_weight(make_weight(328, 256, fmt)), torch.get_num_threads()
    tokens = {m: make_tokens(m, 256, fmt) for m in (1, 70, 500)}
    found = {}
    try:
        for threads in (1, 2, 3, 7, 64, 5):
            torch.set_num_threads(threads)
            for m, some in tokens.items():
                y = multiply(some, weight)
                assert torch.equal(y, found.setdefault(m, y)), (threads, m)
    finally:
        torch.set_num_threads(before)
    for m, y in found.items():
        wanted = reference.gemm(*tokens[m], make_weight(328, 256, fmt), out_dtype=torch.float32)
        assert_close(y, wanted, bound(tokens[m], make_weight(328, 256, fmt)))


def test_several_python_threads_may_call_at_once():
    fmt = INT8_FORMATS[2]
    weight = block_weight(make_weight(200, 512, fmt))
    tokens = [make_tokens(5 + i, 512, fmt, seed=i) for i in range(8)]
    wanted = [multiply(some, weight) for some in tokens]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(5):
            found = executor.map(lambda some: multiply(some, weight), tokens)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("fmt", [INT8_FORMATS[0], FORMATS[0]], ids=str)
def test_narrow_outputs_are_the_fp32_result_rounded_once(fmt, dtype):
    weight, tokens = make_weight(136, 192, fmt), make_tokens(7, 192, fmt)
    bias, residual = noise(136).to(dtype), noise(7, 136, seed=3).to(dtype)
    # Beyond FP16's largest number, among its subnormals, and signs of zero.
    tokens[1][:3] *= torch.tensor([[1e6], [1e-9], [-0.0]])
    wide = multiply(tokens, weight, bias=bias, residual=residual)
    narrow = multiply(tokens, weight, bias=bias, residual=residual, dtype=dtype)
    assert torch.equal(narrow, wide.to(dtype))
    plain = multiply(tokens, weight, dtype=dtype)
    assert torch.equal(plain, multiply(tokens, weight).to(dtype))
    assert torch.equal(plain.signbit(), multiply(tokens, weight).signbit())


def test_values_that_are_no_numbers_stay_none():
    fmt = INT8_FORMATS[3]
    weight, tokens = make_weight(64, 64, fmt), make_tokens(3, 64, fmt)
    tokens[1][1] = torch.nan
    tokens[1][2] = torch.inf
    for dtype in KINDS:
        y = multiply(tokens, weight, dtype=dtype)
        assert bool(y[0].isfinite().all())
        assert bool(y[1].isnan().all())
        assert bool(y[2].isinf().any())
        assert torch.equal(y[2].isnan(), multiply(tokens, weight)[2].isnan())


@pytest.mark.parametrize("rows", [128, 80, 392, 2])
@pytest.mark.parametrize("fmt", [*INT8_FORMATS, FORMATS[0], FORMATS[7]], ids=str)
def test_gate_and_up_become_one_output(fmt, rows):
    # exp is within 2 ulp, the two operations after it round once each, and so do the reference's
    # own three: 8 ulp of silu, which up multiplies. FP8 sums differ before that.
    weight, tokens = make_weight(rows, 384, fmt), make_tokens(9, 384, fmt)
    tokens[1].mul_(0.1)
    bias = noise(rows)
    found = multiply(tokens, weight, bias=bias, silu_mul=True)
    y = reference.gemm(*tokens, weight, bias, torch.float32)
    wanted = reference.silu_mul(y)
    if fmt.scheme == "w4a8":
        assert_close(found, wanted, 8 * 2 * U * wanted.double().abs() + 1e-30)
    else:
        gate_off, up_off = bound(tokens, weight, bias).chunk(2, dim=-1)
        gate, up = y.double().chunk(2, dim=-1)
        slack = 1.1 * gate_off * up.abs() + up_off * gate.abs() + gate_off * up_off  # |silu'| < 1.1
        assert_close(found, wanted, slack + 16 * U * wanted.double().abs() + 1e-30)
    narrow = multiply(tokens, weight, bias=bias, silu_mul=True, dtype=torch.bfloat16)
    assert torch.equal(narrow, found.bfloat16())


@pytest.mark.parametrize("fmt", [INT8_FORMATS[0], FORMATS[0]], ids=str)
def test_gate_and_up_may_be_quantized_as_they_are_stored(fmt):
    weight, tokens = block_weight(make_weight(80, 384, fmt)), make_tokens(9, 384, fmt)
    for kind, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        out = torch.full((9, 40), torch.nan, dtype=torch.bfloat16)
        codes = torch.full((9, 40), 0x55, dtype=torch.uint8).view(dtype)
        scale = torch.full((9, 1), torch.nan)
        ops.gemm(*tokens, weight, out, silu_mul=True, codes=codes, scale=scale, backend="cpu")
        wanted = reference.quantize_activation(out, kind)
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(scale, wanted[1])


def test_silu_is_within_its_bound_over_the_whole_range():
    # A weight of 2 rows that passes the token's scale on: gate and up are x_scale.
    fmt = WeightFormat("w4a8", -1, "int8")
    weight = PackedWeight(
        pack_int4(torch.ones(2, 8, dtype=torch.int8)), torch.ones(2, 1).bfloat16(), fmt
    )
    codes = torch.zeros(4001, 8, dtype=torch.int8)
    codes[:, 0] = 1
    scale = torch.linspace(-86, 100, 4001).unsqueeze(1)
    found = multiply((codes, scale), weight, silu_mul=True)
    wanted = torch.nn.functional.silu(scale.double()) * scale.double()
    assert_close(found, wanted, 8 * 2 * U * wanted.abs())


def test_pointers_and_strides_of_any_alignment_and_nothing_written_around():
    for fmt in (INT8_FORMATS[0], INT8_FORMATS[3], FORMATS[1]):
        k, m, n = 320, 11, 72
        weight, (codes, scale) = make_weight(n, k, fmt), make_tokens(m, k, fmt)
        blocked = block_weight(weight)
        moved = BlockedWeight(*(displaced(p) for p in (blocked.codes, blocked.t, blocked.c)), fmt)
        wide = torch.zeros(m, k + 29, dtype=torch.uint8)
        wide[:, 13 : 13 + k] = codes.view(torch.uint8)
        scales = noise(m, 3)
        scales[:, 1:2] = scale
        residual = noise(m, n + 5)
        around = torch.full((m + 2, n + 9), 77.0, dtype=torch.bfloat16)
        out = around[1:-1, 3 : 3 + n]
        x = wide.view(codes.dtype)[:, 13 : 13 + k]
        ops.gemm(
            x, scales[:, 1:2], moved, out, residual=residual[:, 1 : n + 1],
            bias=noise(n + 1)[1:], backend="cpu",
        )  # fmt: skip
        wanted = reference.gemm(
            codes, scale, weight, noise(n + 1)[1:], torch.float32, residual[:, 1 : n + 1]
        )
        off = bound((codes, scale), weight, noise(n + 1)[1:], residual[:, 1 : n + 1])
        assert_close(out, wanted.bfloat16(), 2 * off + wanted.abs() * (off > 0) / 128)
        inside = torch.zeros_like(around, dtype=torch.bool)
        inside[1:-1, 3 : 3 + n] = True
        assert bool((around[~inside] == 77.0).all())


def displaced(part: Tensor) -> Tensor:
    """The same numbers one element further in memory."""
    memory = torch.empty(part.numel() + 1, dtype=part.dtype)
    memory[1:] = part.flatten()
    return memory[1:].view(part.shape)


def test_the_residual_may_be_the_output():
    fmt = INT8_FORMATS[1]
    weight, tokens = make_weight(136, 128, fmt), make_tokens(33, 128, fmt)
    out = noise(33, 136).bfloat16()
    wanted = reference.gemm(*tokens, weight, None, torch.bfloat16, out.clone())
    ops.gemm(*tokens, block_weight(weight), out, residual=out, backend="cpu")
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_int8_sums_are_exact_at_their_extremes(group_size):
    # Every product as large as there are, beyond what FP32 or 16 bits can count.
    k, fmt = 4096, WeightFormat("w4a8", group_size, "int8")
    codes = torch.full((3, k), -128, dtype=torch.int8)
    codes[1] = 127
    codes[2, ::2] = 127
    codes[:, -1] = 1
    q = torch.full((3, k), -8, dtype=torch.int8)
    q[1] = 7
    q[2, 1::2] = 7
    scales = torch.full((3, fmt.groups(k)), 16.0, dtype=torch.bfloat16)
    weight = PackedWeight(pack_int4(q), scales, fmt)
    found = multiply((codes, torch.ones(3, 1)), weight)
    assert torch.equal(found, 16 * (codes.long() @ q.long().T).float())


@pytest.mark.parametrize("fmt", FORMATS[:4], ids=str)
def test_one_fp8_product_is_exact_whatever_its_factors(fmt):
    # Token m is E4M3's code m once, beside zeros: a product that is not its own sum would show, and
    # so would a factor or a product that is flushed to zero, down to 2^-18.
    n, k, generator = 136, 640, torch.Generator().manual_seed(5)
    t = torch.randint(1, 103, (n, fmt.groups(k)), dtype=torch.uint8, generator=generator)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    column = torch.randint(k, (256,), generator=generator)
    t[:, -1] = q[:, -1] = 1  # 2^-9, and so is token 1
    column[1] = k - 1
    t[:, 0] = 102  # 56, so that t is what a scale is split into
    scales = t.view(torch.float8_e4m3fn).bfloat16()
    codes = torch.zeros(256, k, dtype=torch.uint8)
    codes[range(256), column] = torch.arange(256, dtype=torch.uint8)
    tokens = (codes.view(torch.float8_e4m3fn), torch.ones(256, 1))
    operand, c = kernel_operand(q, scales, fmt)
    value = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    wanted = value.unsqueeze(1) * operand.T[column] * c.T
    assert fmt.per_channel or bool((wanted[1] == 2.0**-18).all())
    found = multiply(tokens, PackedWeight(pack_int4(q), scales, fmt))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if not fmt.per_channel], ids=str)
def test_scales_of_another_row_or_group_are_told_apart(fmt):
    g = fmt.group_size
    weight, tokens = block_weight(make_weight(64, 4 * g, fmt)), make_tokens(4, 4 * g, fmt)
    right = multiply(tokens, weight)
    for dim in (1, 2):
        t = weight.t if weight.t.dtype == torch.float32 else weight.t.view(torch.uint8)
        other = t.roll(1, dims=dim).view(weight.t.dtype)
        wrong = multiply(tokens, BlockedWeight(weight.codes, other, weight.c, fmt))
        x, y = wrong.double(), right.double()
        assert 1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()) > 1e-4


@pytest.mark.parametrize("fmt", [INT8_FORMATS[0], FORMATS[0]], ids=str)
def test_no_tokens_and_no_rows_are_no_work(fmt):
    assert multiply(make_tokens(0, 128, fmt), make_weight(40, 128, fmt)).shape == (0, 40)
    empty = make_weight(64, 128, fmt)
    none = PackedWeight(empty.words[:0], empty.scales[:0], fmt)
    assert multiply(make_tokens(3, 128, fmt), none).shape == (3, 0)


def test_a_forked_child_computes_too():
    code = """
import os, torch
from quant_kernels import cpu_gemm
from quant_kernels.formats import WeightFormat
from quant_kernels.packing import PackedWeight, block_weight, pack_int4
torch.set_num_threads(4)
q = torch.randint(-8, 8, (512, 256), dtype=torch.int8)
fmt = WeightFormat("w4a8", -1, "int8")
weight = block_weight(PackedWeight(pack_int4(q), torch.ones(512, 1).bfloat16(), fmt))
x, scale = torch.randint(-127, 128, (40, 256), dtype=torch.int8), torch.ones(40, 1)
wanted = (x.long() @ q.long().T).float().numpy().tobytes()
def right():  # without torch's own threads, which do not survive a fork
    y = torch.empty(40, 512)
    cpu_gemm.gemm(x, scale, weight, y, None, None, False, None)
    return y.numpy().tobytes() == wanted
assert right()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if right() and right() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert right()
print("done")
"""
    assert run_python(code).returncode == 0


def test_an_instruction_set_is_forced_by_the_environment(isa):
    code = "from quant_kernels import cpu_gemm as g; print(g.isa(), *g.isas())"
    first, *have = run_python(code, QUANT_CPU_ISA=isa).stdout.split()
    assert first == isa
    assert tuple(have) == ISAS
    code = """
import torch
from quant_kernels import cpu_gemm
from quant_kernels.formats import WeightFormat
from quant_kernels.packing import PackedWeight, block_weight
fmt = WeightFormat("w4a8", -1, "int8")
weight = block_weight(PackedWeight(torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), fmt))
x, y = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2, 4)
cpu_gemm.gemm(x, torch.ones(2, 1), weight, y, None, None, False, None)
"""
    refused = run_python(code, QUANT_CPU_ISA="mmx")
    assert refused.returncode != 0
    assert "[4, 8]: the instruction set that was asked for" in refused.stderr
    assert f"this machine has {', '.join(ISAS)}" in refused.stderr
    with pytest.raises(ValueError, match=f"'mmx' is unknown.*{ISAS[-1]}"):
        cpu_gemm.set_isa("mmx")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
