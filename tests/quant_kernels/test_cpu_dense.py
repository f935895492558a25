"""The C++ ops of a dense cache: RoPE to the last bit of the definition, decode attention against
softmax in FP64, and the same query over the same keys always the same bits."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from quant_kernels import ops
from quant_kernels.packing import KV_PAGE
from quant_kernels.registration import OpError

SPAN = 16 * KV_PAGE  # keys that the kernel sums before they join the others
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # of rounding

each_isa = pytest.mark.usefixtures("isa")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "fp16", "fp32"))


@dataclasses.dataclass
class Case:
    """Decode of sequences of these lengths, over pages in no order. What no query may see is NaN:
    places behind a sequence's last key, and every page that is nobody's."""

    lengths: tuple[int, ...]
    dim: int = 64
    heads: int = 6
    kv_heads: int = 2
    window: int = 0
    dtype: torch.dtype = torch.bfloat16
    spread: float = 1.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.lengths) + self.dim)
        counts = [-(-length // KV_PAGE) for length in self.lengths]
        pages = torch.randperm(sum(counts) + 2, generator=generator).int()
        shape = (2, len(pages), self.kv_heads, KV_PAGE, self.dim)
        self.kv = torch.full(shape, math.nan, dtype=self.dtype)
        self.table = torch.full((len(counts), max(1, *counts) + 1), -(10**6), dtype=torch.int32)
        self.keys, self.values = [], []
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            own = pages[sum(counts[:row]) :][:count]
            self.table[row, :count] = own
            rows = torch.randn(2, length, self.kv_heads, self.dim, generator=generator)
            rows[0] *= self.spread
            rows = rows.to(self.dtype)
            for i, kept in enumerate((self.keys, self.values)):
                kept.append(rows[i])
                for t in range(length):
                    self.kv[i, own[t // KV_PAGE], :, t % KV_PAGE] = rows[i, t]
        q = torch.randn(len(counts), self.heads, self.dim, generator=generator)
        self.q = q.to(self.dtype)
        self.kv_lens = torch.tensor(self.lengths, dtype=torch.int32)
        self.sm_scale = self.dim**-0.5

    def run(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """What the op writes into NaN, with NaN around it."""
        around = torch.full((len(self.q[rows]) + 2, self.heads, self.dim + 8), math.nan)
        around = around.to(dtype)
        out = around[1:-1, :, : self.dim]
        ops.dense_decode_attention(
            self.q[rows], self.kv, self.table[rows], self.kv_lens[rows], out,
            sm_scale=self.sm_scale, window=self.window, backend="cpu",
        )  # fmt: skip
        assert bool(around[0].isnan().all() & around[-1].isnan().all())
        assert bool(around[:, :, self.dim :].isnan().all())
        return out

    def exact(self) -> Tensor:
        """Softmax in FP64."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for row, length in enumerate(self.lengths):
            first = max(0, length - self.window) if self.window else 0
            for head in range(self.heads if length else 0):
                shared = head // (self.heads // self.kv_heads)
                keys = self.keys[row][first:, shared].double()
                p = torch.softmax(keys @ self.q[row, head].double() * self.sm_scale, 0)
                out[row, head] = p @ self.values[row][first:, shared].double()
        return out


CASES = [
    Case((1, 63, 64, 65, 200)),
    Case((0, 5, 0)),
    Case((2 * SPAN + 70, SPAN, 3), dim=32, heads=3, kv_heads=1),
    Case((130, SPAN + 1), dim=128, heads=8, kv_heads=1, dtype=torch.float16),
    Case((300, 4, 77), window=65, dtype=torch.float32),
    Case((2 * SPAN + 9,), window=SPAN + 3, heads=2, kv_heads=2),
    Case((70, 129), dim=96, heads=71, kv_heads=1),  # heads of several tiles
    Case((190,), dim=256, heads=4, kv_heads=4, spread=9.0),
]


@each_isa
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.lengths}, {c.dim}")
def test_attention_is_softmax(case):
    found, wanted = case.run(), case.exact()
    # Products of 16-bit numbers are exact in FP32, sums of them round a few times: of scores up to
    # 2^6 that moves p by 1e-5 of itself at most, and the output by as much of the values' size.
    assert float((found - wanted).abs().max()) < 1e-4
    assert bool((found[case.kv_lens == 0] == 0).all())


@each_isa
@each_dtype
def test_an_output_is_rounded_once(dtype):
    case = Case((5, 100, 64), dtype=dtype)
    assert torch.equal(case.run(dtype=dtype), case.run().to(dtype))


@each_isa
@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: f"{c.lengths}, {c.dim}")
def test_a_sequence_alone_on_any_number_of_threads_has_the_bits_of_the_batch(case, threads):
    whole = case.run()
    for count in (1, 2, 5, 64):
        threads(count)
        assert torch.equal(case.run(), whole)
        alone = [case.run(slice(row, row + 1)) for row in range(len(case.lengths))]
        assert torch.equal(torch.cat(alone), whole)


@each_isa
def test_nan_stays_in_its_head():
    case = Case((40, 70))
    wanted = case.run()
    case.q[1, 2, 7] = math.nan
    found = case.run()
    assert bool(found[1, 2].isnan().all())
    found[1, 2] = wanted[1, 2]
    assert torch.equal(found, wanted)


def appended(dtype: torch.dtype, dim: int, normed: bool, backend: str) -> tuple[Tensor, Tensor]:
    """(q, kv) after dense_rope_append of nine tokens, two of which store nothing."""
    generator = torch.Generator().manual_seed(dim)
    heads, kv_heads = 6, 2
    qkv = torch.randn(9, (heads + 2 * kv_heads) * dim + 3, generator=generator).to(dtype)[:, :-3]
    angles = torch.rand(80, dim // 2, generator=generator) * 6
    norms = None
    if normed:
        norms = tuple(torch.rand(dim, generator=generator).to(dtype) for _ in range(2))
    slots = torch.tensor([5, 70, 64, -1, 191, 0, 128, 63, -1], dtype=torch.int32)
    q = torch.full((9, heads, dim), math.nan, dtype=dtype)
    kv = torch.full((2, 4, kv_heads, KV_PAGE, dim), 77.0, dtype=dtype)
    ops.dense_rope_append(
        qkv, torch.arange(70, 79), angles.cos(), angles.sin(), slots, q, kv,
        norms=norms, eps=1e-5, backend=backend,
    )  # fmt: skip
    kv[:, -1] = 77.0  # the spare page, where a backend may put what is to be nowhere
    return q, kv


@each_isa
@each_dtype
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_rope_has_the_definitions_bits(dtype, dim):
    for found, wanted in zip(
        appended(dtype, dim, False, "cpu"), appended(dtype, dim, False, "reference"), strict=True
    ):
        assert torch.equal(found, wanted)
    assert int((appended(dtype, dim, False, "cpu")[1] != 77).sum()) == 2 * 7 * 2 * dim


@each_isa
@each_dtype
def test_normed_heads_are_next_to_the_definitions(dtype):
    for found, wanted in zip(
        appended(dtype, 64, True, "cpu"), appended(dtype, 64, True, "reference"), strict=True
    ):
        # The norm's sum has another order, and roundings of numbers up to 4 follow it.
        assert float((found.float() - wanted.float()).abs().max()) <= 4 * 4 * UNIT[dtype]


@each_dtype
def test_heads_that_no_vector_fits_are_torchs(dtype):
    case = Case((5, 70), dim=80, dtype=dtype)
    case.table.clamp_(min=0)
    case.kv.nan_to_num_(0)
    assert float((case.run() - case.exact()).abs().max()) < 8 * UNIT[dtype] + 1e-5
    for found, wanted in zip(
        appended(dtype, 80, True, "cpu"), appended(dtype, 80, True, "reference"), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [0, 70])
def test_chunks_of_a_prompt_see_what_decode_sees(window, backend):
    """prefill over the last tokens: every query alone, as decode of a shorter sequence."""
    case = Case((150, 9), window=window, dtype=torch.float32)
    case.table.clamp_(min=0)
    case.kv.nan_to_num_(0)
    queries = torch.randn(40 + 9, case.heads, case.dim)
    out = torch.full(queries.shape, math.nan)
    ops.dense_prefill_attention(
        queries, case.kv, case.table, (40, 9), case.lengths, out,
        sm_scale=case.sm_scale, window=window, backend=backend,
    )  # fmt: skip
    places = itertools.chain(((0, 110 + i) for i in range(40)), ((1, i) for i in range(9)))
    for i, (row, position) in enumerate(places):
        alone = torch.full_like(out[:1], math.nan)
        ops.dense_decode_attention(
            queries[i : i + 1], case.kv, case.table[row : row + 1],
            torch.tensor([position + 1], dtype=torch.int32), alone,
            sm_scale=case.sm_scale, window=window, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    case = Case((70, 5))
    given = (case.q, case.kv, case.table, case.kv_lens, torch.zeros(case.q.shape))
    for place, value, message in (
        (0, case.q.float(), "q must be bfloat16"),
        (1, case.kv[:, :, :, :32], r"kv must be .* \[2, 5, 2, 64, 64\]"),
        (1, case.kv.transpose(3, 4), "kv must be"),
        (2, case.table.long(), "block_table must be int32"),
        (3, case.kv_lens[:1], "kv_lens must be int32"),
        (4, torch.zeros(2, 6, 32), "out must be"),
    ):
        changed = list(given)
        changed[place] = value
        with pytest.raises(OpError, match=f"dense_decode_attention: {message}"):
            ops.dense_decode_attention(*changed, sm_scale=1.0)
    with pytest.raises(OpError, match="6 query heads over 4 KV heads"):
        ops.dense_decode_attention(case.q, case.kv.repeat(1, 1, 2, 1, 1), *given[2:], sm_scale=1.0)
    for query_lens, kv_lens in (
        ((1, 2), (70, 5)),
        ((1,), (70, 5)),
        ((2, 0), (70, 5)),
        ((1, 1), (70, 0)),
    ):
        with pytest.raises(OpError, match="dense_prefill_attention"):
            ops.dense_prefill_attention(
                case.q, case.kv, case.table, query_lens, kv_lens, given[4], sm_scale=1.0
            )
    case.table[0, 1] = 10**6
    with pytest.raises(RuntimeError, match=r"dense_decode_attention: .* out of range"):
        ops.dense_decode_attention(*given, sm_scale=1.0, backend="cpu")
