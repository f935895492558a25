"""Prefill attention against its definition, with everything that must not be read poisoned."""

import math
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import ops
from quant_kernels.formats import round_e4m3
from quant_kernels.packing import KV_PAGE
from quant_kernels.reference import quantize_activation
from quant_kernels.triton import prefill_attention as kernels


@dataclass(frozen=True)
class Case:
    """lengths: (queries, tokens in the cache) of every sequence."""

    dim: int
    heads: int
    kv_heads: int
    lengths: tuple[tuple[int, int], ...]
    window: int = 0
    symmetric: bool = False


CASES = [
    Case(64, 2, 2, ((130, 130), (3, 3))),  # two tiles of queries, two pages and a tail
    Case(64, 3, 1, ((70, 100), (0, 80), (1, 65)), symmetric=True),  # chunks, and none at all
    Case(96, 4, 1, ((65, 65), (2, 129))),
    Case(128, 8, 1, ((5, 130),)),
    Case(256, 2, 1, ((66, 100),)),
    Case(32, 2, 1, ((20, 20), (7, 0), (1, 64))),  # queries of which nothing is stored
    Case(64, 2, 1, ((140, 200), (9, 300)), window=50),
    Case(64, 1, 1, ((90, 90),), window=1),
    Case(96, 2, 2, ((70, 260),), window=130, symmetric=True),
]


def arguments(case: Case, seed: int = 0, spread: float = 0.0) -> list[Tensor]:
    """q_codes, q_scale, kv_codes, kv_scales, block_table, cu_seqlens, kv_lens.

    Scales are 1.05 to 1.95 times 2^-4 times up to 2^-spread: with spread 0 the z of every page, and
    of all of them, is 2^-3. Pages nobody has, and places behind the last key, hold NaN scales.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    batch, tokens = len(case.lengths), sum(length for length, _ in case.lengths)
    needed = [math.ceil(total / KV_PAGE) for _, total in case.lengths]
    pages = sum(needed) + 2
    order = torch.randperm(pages, generator=generator).int()
    table = order[-1].repeat(batch, max(needed) + 1)
    shape = (2, pages, case.kv_heads, KV_PAGE)
    codes = torch.randint(0, 256, (*shape, case.dim // 2), dtype=torch.uint8, generator=generator)
    scale = (1.05 + 0.9 * rand(*shape)) * 2.0 ** (-4 - (spread * rand(*shape)).round())
    if case.symmetric:
        scale = torch.where(rand(*shape) < 0.5, -scale, scale)
    offset = torch.zeros(shape) if case.symmetric else rand(*shape).mul(2).sub(0.7)
    scales = torch.full((*shape, 2), math.nan).half()
    used = 0
    for b, (_, total) in enumerate(case.lengths):
        table[b, : needed[b]] = order[used : used + needed[b]]
        used += needed[b]
        place = torch.arange(total)
        at = (slice(None), table[b].long()[place // KV_PAGE], slice(None), place % KV_PAGE)
        scales[at] = torch.stack((scale[at], offset[at]), dim=-1).half()
    x = torch.randn(tokens, case.heads, case.dim, generator=generator) * 2
    x *= 1 + 20 * (rand(tokens, case.heads, case.dim) < 0.002)
    q_codes, q_scale = quantize_activation(x, "fp8")
    bounds = torch.tensor([0, *(length for length, _ in case.lengths)]).cumsum(0).int()
    totals = torch.tensor([total for _, total in case.lengths]).int()
    return [q_codes, q_scale.squeeze(-1), codes, scales, table, bounds, totals]


def run(
    case: Case, given: list[Tensor], backend: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    out = torch.full(given[0].shape, math.nan, dtype=dtype)
    longest = max(length for length, _ in case.lengths)
    sm_scale = 1 / math.sqrt(case.dim)
    ops.prefill_attention(
        *given, longest, out, sm_scale=sm_scale, window=case.window, backend=backend
    )
    return out


def check_against_reference(found: Tensor, wanted: Tensor, scales: Tensor) -> None:
    """Scores differ by FP32 roundings, and P by an E4M3 step where that crosses a tie.

    |S| stays under 2^6 here, and a few roundings of 2^-24 each move p by less than 2e-5 of itself.
    E4M3's ties are at least a sixteenth of P apart, so a P flips once in thousands; a step is at
    most P / 8, codes are at most 8, and p_t <= l: one flip moves an output by the value's scale.
    """
    values = scales[1].float().nan_to_num(0)
    largest = float((values[..., 0].abs() * 8 + values[..., 1].abs()).max())
    error = (found - wanted).abs()
    assert bool(found.isfinite().all())
    assert float((error.amax(-1) > 2e-5 * largest).float().mean()) < 0.03
    assert float(error.max()) <= float(values[..., 0].abs().max())
    product = (found * wanted).sum()
    assert float(1 - 2 * product / (found.square().sum() + wanted.square().sum())) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_references(case):
    given = arguments(case)
    found = run(case, given, "triton")
    check_against_reference(found, run(case, given, "reference"), given[3])
    assert torch.equal(found, run(case, given, "triton"))


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_fp16_operands_give_the_same(case, monkeypatch):
    given = arguments(case)
    wanted = run(case, given, "triton")
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: False)
    # All operands are exact in both, and the interpreter adds in FP32 in both.
    assert torch.allclose(run(case, given, "triton"), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_once(dtype):
    case = Case(32, 2, 1, ((20, 90),))
    given = arguments(case, seed=1)
    assert torch.equal(run(case, given, "triton", dtype), run(case, given, "triton").to(dtype))


def test_strided_queries_and_outputs():
    case = CASES[1]
    given = arguments(case, seed=2)
    wanted = run(case, given, "triton")
    tokens, heads, dim = given[0].shape
    wide = torch.full((tokens, heads + 2, dim), 0xFF, dtype=torch.uint8)
    wide[:, 1:-1] = given[0].view(torch.uint8)
    scales = torch.full((tokens, heads + 3), math.nan)
    scales[:, :heads] = given[1]
    out = torch.full((tokens, heads + 1, dim), math.nan)
    ops.prefill_attention(
        wide.view(torch.float8_e4m3fn)[:, 1:-1], scales[:, :heads], *given[2:], 70,
        out[:, :heads], sm_scale=1 / 8, backend="triton",
    )  # fmt: skip
    assert torch.equal(out[:, :heads], wanted)
    assert bool(out[:, heads].isnan().all())


def test_values_of_very_different_sizes():
    case = Case(64, 4, 1, ((66, 200),))
    given = arguments(case, seed=3, spread=12.0)
    found, wanted = run(case, given, "triton"), run(case, given, "reference")
    # A page's own z may be smaller than the reference's, and finer where E4M3 is subnormal: half of
    # 2^-9 on either side, times z / 256 with z <= 2^-3, codes of at most 8, 200 keys, l > 1/2.
    bound = 2 * 2.0**-10 * 2.0**-3 / 256 * 8 * 200 / 0.5
    error = (found - wanted).abs().amax(-1)
    assert float((error > bound).float().mean()) < 0.03
    assert float(error.max()) <= float(given[3][1, ..., 0].float().nan_to_num(0).abs().max())
    product = (found * wanted).sum()
    assert float(1 - 2 * product / (found.square().sum() + wanted.square().sum())) < 1e-5


def test_where_pages_lie_does_not_matter():
    case = CASES[0]
    given = arguments(case, seed=4)
    wanted = run(case, given, "triton")
    order = torch.randperm(given[2].shape[1], generator=torch.Generator().manual_seed(9))
    given[2], given[3] = (x[:, order].contiguous() for x in given[2:4])
    given[4] = order.argsort()[given[4].long()].int()
    assert torch.equal(run(case, given, "triton"), wanted)


def test_chunks_of_a_prompt_are_the_prompt():
    whole = Case(64, 2, 1, ((150, 150),))
    given = arguments(whole, seed=5)
    wanted = run(whole, given, "triton")
    first = Case(64, 2, 1, ((83, 83),))
    rest = Case(64, 2, 1, ((67, 150),))
    for case, part in ((first, slice(0, 83)), (rest, slice(83, 150))):
        length, total = case.lengths[0]
        chunk = [given[0][part], given[1][part], *given[2:5]]
        chunk += [torch.tensor([0, length]).int(), torch.tensor([total]).int()]
        # Pages, their order and M are the same; only the rows of the interpreter's products differ.
        found = run(case, chunk, "triton")
        assert torch.allclose(found, wanted[part], rtol=0, atol=1e-5)


def test_no_queries_at_all():
    case = Case(64, 2, 1, ((0, 70),))
    assert run(case, arguments(case), "triton").numel() == 0


@triton.jit
def _codes(packed, low, high, N: tl.constexpr):
    i = tl.arange(0, N)
    first, second = kernels.fp16_codes(tl.load(packed + i))
    tl.store(low + i, first)
    tl.store(high + i, second)


@triton.jit
def _powers(x, above, inverse, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    z = kernels.power_of_two_above(tl.load(x + i))
    tl.store(above + i, z)
    tl.store(inverse + i, kernels.reciprocal_of_power_of_two(z))


@triton.jit
def _rounded(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, kernels.round_p(tl.load(x + i)))


def test_every_byte_as_fp16():
    packed = torch.arange(256, dtype=torch.uint8)
    low, high = (torch.full((256,), math.nan).half() for _ in range(2))
    _codes[(1,)](packed, low, high, 256)
    signed = torch.tensor([i if i < 8 else i - 16 for i in range(16)]).half()
    assert torch.equal(low, signed.repeat(16))
    assert torch.equal(high, signed.repeat_interleave(16))


def test_powers_of_two_above_every_fp16_number():
    x = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    above, inverse = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    _powers[(len(x) // 1024,)](x, above, inverse, 1024)
    assert float(above[0]) == 1
    mantissa, exponent = torch.frexp(above)
    assert bool((mantissa == 0.5).all())
    assert bool(((above >= x) & (above / 2 < x))[1:].all())
    assert torch.equal(inverse, torch.ldexp(torch.ones_like(x), 1 - exponent))


def test_p_is_rounded_to_e4m3_and_stays_nan():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).exp() * 3
    x[:2] = torch.tensor([math.nan, 256.0])
    out = torch.zeros(1024).half()
    _rounded[(1,)](x, out, 1024)
    assert torch.equal(out[1:].float(), round_e4m3(x[1:]))
    assert math.isnan(out[0])
