"""Items of several blocks, and tokens in several ranges: how large products are divided."""

import pytest
import torch

from quant_kernels import cpu, cpu_gemm, reference
from quant_kernels.packing import BlockedWeight, block_weight
from tests.quant_kernels.test_cpu_gemm import (
    FORMATS,
    INT8_FORMATS,
    assert_close,
    bound,
    isa,
    make_tokens,
    make_weight,
    multiply,
    noise,
)

__all__ = ["isa"]  # every test runs once an instruction set

pytestmark = pytest.mark.skipif(not cpu.available(), reason="libquant_cpu.so was not built")

# 600 tokens are three ranges, with AMX five; 18 blocks of outputs are items of four and one of two.
# 832 columns are three steps of 256 and one of 64, or six spans and a half; 648 end within a tile.
TOKENS, ROWS = 600, 1096
KINDS = [INT8_FORMATS[0], INT8_FORMATS[-1], FORMATS[1], FORMATS[3]]


def columns(fmt) -> int:
    return 648 if fmt.per_channel else 832


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    """One thread takes all items in order; of two, one finds the other's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_many_tokens_and_blocks_are_the_reference(fmt):
    weight, tokens = make_weight(ROWS, columns(fmt), fmt), make_tokens(TOKENS, columns(fmt), fmt)
    bias, residual = noise(ROWS), noise(TOKENS, ROWS, seed=3).bfloat16()
    whole = multiply(tokens, weight, bias=bias, residual=residual)
    wanted = reference.gemm(*tokens, weight, bias, torch.float32, residual)
    assert_close(whole, wanted, bound(tokens, weight, bias, residual))
    for some in (slice(599, 600), slice(590, 600), slice(560, 600), slice(270, 600)):
        part = (tokens[0][some], tokens[1][some])
        alone = multiply(part, weight, bias=bias, residual=residual[some])
        assert torch.equal(alone, whole[some]), some


@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_long_tokens_are_few_to_a_range(fmt):
    """The L2 cache holds 63 of them, or 31 in BF16: with AMX a range has 32."""
    tokens, k = 70, 16512
    weight, x = make_weight(72, k, fmt), make_tokens(tokens, k, fmt)
    whole = multiply(x, weight)
    assert_close(whole, reference.gemm(*x, weight, None, torch.float32), bound(x, weight))
    for some in (slice(31, 33), slice(64, 70)):
        assert torch.equal(multiply((x[0][some], x[1][some]), weight), whole[some]), some


@pytest.mark.parametrize("rows", [1152, 1096], ids=["whole blocks", "up begins within a block"])
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_gate_and_up_of_many_blocks(fmt, rows):
    weight, tokens = make_weight(rows, columns(fmt), fmt), make_tokens(TOKENS, columns(fmt), fmt)
    bias, blocked = noise(rows), block_weight(weight)
    y = multiply(tokens, blocked, bias=bias)  # tested above
    gate, up = y[:, : rows // 2], y[:, rows // 2 :]
    found = multiply(tokens, blocked, bias=bias, silu_mul=True)
    wanted = reference.silu_mul(y)
    # exp is within 2 ulp, and what follows it rounds twice, here and there.
    silu = torch.nn.functional.silu(gate).abs() * up.abs()
    assert bool(((found - wanted).abs() <= 8 * 2.0**-24 * silu + 1e-30).all())


@pytest.mark.parametrize("m", [1, 9, 70])
@pytest.mark.parametrize("fmt", [INT8_FORMATS[-1], FORMATS[3]], ids=str)
def test_a_sum_of_nothing_is_zero(fmt, m):
    dtype = torch.int8 if fmt.scheme == "w4a8" else torch.float8_e4m3fn
    x, bias = torch.empty(m, 0, dtype=dtype), noise(70)
    shape = (2, 0, 2, 64) if fmt.scheme == "w4a8" else (16, 0, 8, 64)
    empty = torch.empty(0, 0, dtype=torch.uint8)
    weight = BlockedWeight(torch.empty(shape, dtype=torch.uint8), empty, torch.ones(70), fmt)
    out = torch.full((m, 70), torch.nan)
    cpu_gemm.gemm(x, torch.ones(m, 1), weight, out, bias, None, False, None)
    assert torch.equal(out, bias.expand(m, 70))
