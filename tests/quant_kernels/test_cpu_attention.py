"""The C++ attention against its definition, and against itself: the same query over the same keys
gives the same bits however it is asked.

The kernel takes the power of two that joins P anew for every row and page, from what the row sees.
`rounded_by_page` gives the definition that power; then only FP32 roundings are left between the
two. Against the definition's own power, P differs where E4M3 holds it as a subnormal number.
"""

import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from quant_kernels import cpu, ops, reference_attention
from quant_kernels.formats import round_e4m3
from quant_kernels.packing import KV_PAGE
from quant_kernels.registration import HEAD_DIMS
from tests.quant_kernels.triton.test_prefill_attention import CASES, Case, arguments, run

THREADS = (1, 2, 3, 5, 8, 64)
SPAN = 16 * KV_PAGE  # keys that the kernel sums before they join the others
LONGER = [
    *CASES,
    Case(64, 6, 2, ((0, 0), (3, 2 * SPAN + 70), (1, SPAN), (0, 5))),
    Case(32, 3, 1, ((9, 3 * SPAN + 1),), window=SPAN + 50),
    Case(128, 71, 1, ((1, 130), (3, 65)), symmetric=True),  # heads of several tiles
]

each_isa = pytest.mark.usefixtures("isa")


def rounded_by_page(weighted: Tensor) -> Tensor:
    """round_e4m3 of [Hq, S, T] weights, a row's largest in a page brought to [31, 62) before."""
    pages = torch.nn.functional.pad(weighted, (0, -weighted.shape[-1] % KV_PAGE))
    pages = pages.unflatten(-1, (-1, KV_PAGE))
    largest = pages.abs().amax(-1, keepdim=True)
    power = torch.exp2(5 - torch.log2(largest.clamp(min=1e-30) / 31 * 32).floor())
    rounded = round_e4m3(pages * power) / power
    return rounded.flatten(-2)[..., : weighted.shape[-1]]


def sizes(scales: Tensor) -> tuple[float, float]:
    """The largest scale, and the largest value that codes can stand for, of a cache's values."""
    values = scales[1].float().nan_to_num(0).abs()
    return float(values[..., 0].max()), float((values[..., 0] * 8 + values[..., 1]).max())


@each_isa
@pytest.mark.parametrize("case", LONGER, ids=str)
def test_attention_is_the_references(case, monkeypatch):
    given = arguments(case)
    found = run(case, given, "cpu")
    assert bool(found.isfinite().all())
    scale, largest = sizes(given[3])
    # With the definition's power of two. P is subnormal below 2^-6, here 2^-11 of the page's
    # largest weight, and then moves by half of 2^-9 at most, 2^-10 / 31 of it: as much in a page of
    # 64 keys as 64 * 2^-10 / 31 of its largest weight, times a code of at most 8. The weights of
    # all pages are at most the scale times l.
    pages = max(math.ceil(total / KV_PAGE) for _, total in case.lengths)
    away = (found - run(case, given, "reference")).abs()
    assert float(away.max()) <= max(1.0, pages * KV_PAGE * 8 * 2.0**-10 / 31) * scale
    # With the kernel's own: |S| is under 2^6, a few roundings of 2^-24 move p by less than 2e-5 of
    # itself, and where that crosses one of E4M3's ties, a sixteenth of P apart at least, P moves by
    # an eighth at most and the output by a value's scale.
    monkeypatch.setattr(reference_attention, "round_e4m3", rounded_by_page)
    away = (found - run(case, given, "reference")).abs()
    assert float((away.amax(-1) > 2e-5 * largest).float().mean()) < 0.01
    assert float(away.max()) <= scale


@pytest.mark.parametrize("case", [LONGER[1], LONGER[-2]], ids=str)
def test_tiles_give_the_bits_of_vectors(case):
    """Products are exact, and all else is the same: prefill may use tiles and decode vectors."""
    if "amx" not in cpu.isas():
        pytest.skip("this machine has no amx")
    given, found = arguments(case, seed=4, spread=9.0), []
    for name in ("amx", "avx512_vnni"):
        cpu.set_isa(name)
        found.append(run(case, given, "cpu"))
    cpu.set_isa(None)
    assert torch.equal(*found)


@each_isa
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_heads_of_every_shape(ratio, dim, monkeypatch):
    case = Case(dim, 2 * ratio, 2, ((5, 150), (1, 1), (2, 64)), symmetric=ratio == 3)
    given = arguments(case, seed=dim)
    monkeypatch.setattr(reference_attention, "round_e4m3", rounded_by_page)
    away = (run(case, given, "cpu") - run(case, given, "reference")).abs()
    assert float((away.amax(-1) > 2e-5 * sizes(given[3])[1]).float().mean()) < 0.02


@each_isa
def test_values_of_very_different_sizes(monkeypatch):
    case = Case(64, 4, 1, ((66, 200),))
    given = arguments(case, seed=3, spread=12.0)
    monkeypatch.setattr(reference_attention, "round_e4m3", rounded_by_page)
    away = (run(case, given, "cpu") - run(case, given, "reference")).abs()
    assert float((away.amax(-1) > 2e-5 * sizes(given[3])[1]).float().mean()) < 0.01


def asked(given: list[Tensor], first: int, count: int, window: int, decode: bool) -> Tensor:
    """Queries [first, first + count) of a single sequence, by prefill or decode."""
    codes, scale, *cache, _, total = given
    part, end = slice(first, first + count), int(total) - len(codes) + first + count
    out = torch.full((count, *codes.shape[1:]), math.nan)
    lengths = torch.tensor([end], dtype=torch.int32)
    options = dict(sm_scale=1 / math.sqrt(codes.shape[2]), window=window, backend="cpu")
    if decode:
        ops.decode_attention(codes[part], scale[part], *cache, lengths, out, **options)
    else:
        bounds = torch.tensor([0, count], dtype=torch.int32)
        ops.prefill_attention(
            codes[part], scale[part], *cache, bounds, lengths, count, out, **options
        )
    return out


@each_isa
@pytest.mark.parametrize("window", [0, 1, 70, SPAN + 9])
@pytest.mark.parametrize(
    ("dim", "ratio", "queries", "total"),
    [(64, 3, 150, 150), (96, 1, 70, 133), (128, 8, 21, 2 * SPAN + 10), (32, 2, 130, SPAN + 65)],
)
def test_chunks_and_decode_give_the_bits_of_one_prefill(dim, ratio, queries, total, window):
    case = Case(dim, ratio, 1, ((queries, total),), symmetric=ratio == 2)
    given = arguments(case, seed=5, spread=9.0)
    wanted = asked(given, 0, queries, window, decode=False)
    for chunk in (1, 7, 16, 64, 83):
        starts = range(0, queries, chunk)
        parts = [asked(given, s, min(chunk, queries - s), window, decode=False) for s in starts]
        assert torch.equal(torch.cat(parts), wanted)
    single = [asked(given, i, 1, window, decode=True) for i in range(queries)]
    assert torch.equal(torch.cat(single), wanted)


@each_isa
def test_a_batch_and_the_place_of_pages_change_no_bit():
    case = Case(64, 4, 2, ((5, 70), (1, 2 * SPAN + 1), (0, 9), (90, 90), (2, 64)))
    given = arguments(case, seed=6, spread=9.0)
    wanted = run(case, given, "cpu")
    bounds = given[5].tolist()
    for b, (queries, total) in enumerate(case.lengths):
        rows = slice(bounds[b], bounds[b + 1])
        alone = [given[0][rows], given[1][rows], *given[2:4], given[4][b : b + 1]]
        alone += [torch.tensor([0, queries]).int(), torch.tensor([total]).int()]
        found = run(Case(64, 4, 2, ((queries, total),)), alone, "cpu")
        assert torch.equal(found, wanted[rows])
    order = torch.randperm(given[2].shape[1], generator=torch.Generator().manual_seed(9))
    given[2], given[3] = (x[:, order].contiguous() for x in given[2:4])
    given[4] = order.argsort()[given[4].long()].int()
    assert torch.equal(run(case, given, "cpu"), wanted)


@each_isa
@pytest.mark.parametrize(
    "case",
    [
        Case(128, 8, 1, ((1, 5 * SPAN + 3),)),  # few tiles: spans are shared out
        Case(64, 3, 1, ((30, 3 * SPAN),), window=2 * SPAN),
        Case(64, 8, 8, ((1, SPAN), (1, 2 * SPAN), (40, 500))),
        Case(64, 4, 4, ((260, 300),)),  # many: a tile stays whole
    ],
    ids=str,
)
def test_threads_change_no_bit(case, threads):
    given = arguments(case, seed=7, spread=9.0)
    threads(1)
    wanted = run(case, given, "cpu")
    for count in THREADS:
        threads(count)
        for _ in range(3):
            assert torch.equal(run(case, given, "cpu"), wanted)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_once(dtype):
    case = Case(32, 2, 1, ((20, 90),))
    given = arguments(case, seed=1)
    assert torch.equal(run(case, given, "cpu", dtype), run(case, given, "cpu").to(dtype))


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_strided_queries_and_outputs_anywhere_in_memory(dtype):
    case = CASES[1]
    given = arguments(case, seed=2)
    wanted = run(case, given, "cpu", dtype)
    tokens, heads, dim = given[0].shape
    wide = torch.full((tokens, heads + 2, dim + 1), 0xFF, dtype=torch.uint8)
    wide[:, 1:-1, 1:] = given[0].view(torch.uint8)
    scales = torch.full((tokens, heads + 3), math.nan)
    scales[:, 1 : heads + 1] = given[1]
    cache = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in given[2:4]]
    out = torch.full((tokens + 1, heads + 1, dim + 3), 77.0, dtype=dtype)
    ops.prefill_attention(
        wide.view(torch.float8_e4m3fn)[:, 1:-1, 1:], scales[:, 1 : heads + 1], *cache, *given[4:],
        70, out[:-1, :heads, 1:-2], sm_scale=1 / 8, backend="cpu",
    )  # fmt: skip
    assert torch.equal(out[:-1, :heads, 1:-2], wanted)
    for around in (out[-1], out[:, heads], out[:, :, 0], out[:, :, -2:]):
        assert bool((around == 77).all())


@each_isa
def test_queries_without_keys_give_zeros():
    case = Case(32, 2, 1, ((7, 3), (1, 0)))
    found = run(case, arguments(case), "cpu")
    assert bool((found[[0, 1, 2, 3, 7]] == 0).all())
    assert bool((found[4:7] != 0).any(-1).all())


@each_isa
@pytest.mark.parametrize("kind", [0, 1], ids=("key", "value"))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_that_is_not_finite_reaches_the_queries_that_see_it_and_no_other(
    kind, bad, symmetric
):
    case = Case(64, 2, 1, ((90, 200),), symmetric=symmetric)  # queries at 110 .. 199
    given = arguments(case, seed=8)
    clean = run(case, given, "cpu")
    position = 150
    page = int(given[4][0, position // KV_PAGE])
    given[3][kind, page, :, position % KV_PAGE] = torch.tensor([bad, 0.0 if symmetric else bad])
    found = run(case, given, "cpu")
    assert torch.equal(found[:40], clean[:40])
    if kind == 0 and bad == math.inf:  # a score of -Inf is a key that hardly counts
        finite = run(case, given, "reference")[40:].isfinite()
        assert bool(finite.any())
        assert torch.equal(found[40:].isfinite(), finite)
    else:
        assert not bool(found[40:].isfinite().any())


@each_isa
def test_a_query_that_is_nan_is_nan_alone():
    case = Case(64, 2, 1, ((20, 90),))
    given = arguments(case, seed=9)
    wanted = run(case, given, "cpu")
    given[0].view(torch.uint8)[3, 1, 5] = 0xFF
    given[1][7, 0] = math.nan
    found = run(case, given, "cpu")
    assert bool(found[3, 1].isnan().all())
    assert bool(found[7, 0].isnan().all())
    found[3, 1], found[7, 0] = wanted[3, 1], wanted[7, 0]
    assert torch.equal(found, wanted)


@each_isa
def test_no_queries_and_no_sequences():
    case = Case(64, 2, 1, ((0, 70),))
    given = arguments(case)
    assert run(case, given, "cpu").numel() == 0
    around = torch.full((2, 2, 64), 77.0)
    empty = [given[0], given[1], *given[2:4], given[4][:0], given[6][:0]]
    ops.decode_attention(*empty, around[1:1], sm_scale=1.0, backend="cpu")
    assert bool((around == 77).all())


@pytest.mark.parametrize(
    ("place", "index", "value"),
    [(4, (0, 1), 10**6), (4, (0, 0), -1), (6, 0, 10**5), (5, 1, 30)],
    ids=("page", "negative page", "length beyond the table", "queries beyond the tokens"),
)
def test_what_would_read_or_write_elsewhere_is_refused(place, index, value):
    case = Case(64, 2, 1, ((20, 90),))
    given = arguments(case)
    given[place][index] = value
    out = torch.full(given[0].shape, 77.0)
    with pytest.raises(RuntimeError, match=r"prefill_attention: .* out of range"):
        ops.prefill_attention(*given, 20, out, sm_scale=1.0, backend="cpu")
    assert bool((out == 77).all())


def test_the_best_instruction_set_runs_unless_another_is_named():
    assert cpu.isa() == cpu.isas()[0]
    with pytest.raises(ValueError, match=r"'avx1024' is unknown, .* it has: .*portable"):
        cpu.set_isa("avx1024")
    code = """
import torch
from quant_kernels import cpu, ops
try:
    ops.quantize_activation(
        torch.ones(1, 8), torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 1), backend="cpu"
    )
    print(cpu.isa())
except RuntimeError as error:
    print(error)
"""
    refusal = (
        "quantize_activation: the instruction set that was asked for is unknown, or this machine "
        f"lacks it; this machine has {', '.join(cpu.isas())} (argument of set_isa, or "
        "$QUANT_CPU_ISA)"
    )
    for name, wanted in (("portable", "portable"), ("avx1024", refusal), ("", cpu.isas()[0])):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "QUANT_CPU_ISA": name},
        )  # fmt: skip
        assert done.stdout.strip() == wanted


def test_c_functions_check_their_arguments_before_they_touch_memory():
    """Zeroed structs, and sizes without memory; fields have eight bytes (quant_cpu.h)."""
    library = cpu.library()
    ok, null, negative, heads = 0, 1, 2, 10  # QuantCpuStatus
    for name in ("quantize_activation", "silu_mul_quantize"):
        function = library[f"quant_cpu_{name}"]
        assert function(None) == null
        for rows, status in ((0, ok), (-1, negative), (3, null)):
            call = struct.pack("11q", 0, 8, 0, rows, 8, 0, 8, 0, 0, 1, 1)
            assert function(call) == status
    for name, fields in (("rope_append", 36), ("attention", 26)):
        function = library[f"quant_cpu_{name}"]
        assert function(None) == null
        assert function(bytes(8 * fields)) == heads
    sizes = {"batch": 17, "tokens": 18, "pages": 19, "heads": 20, "kv_heads": 21, "head_dim": 22}
    for batch, status in ((0, ok), (2, null), (-1, negative)):
        call = [0] * 26
        for name, value in zip(sizes, (batch, 2, 4, 6, 2, 64), strict=True):
            call[sizes[name]] = value
        assert library.quant_cpu_attention(struct.pack("26q", *call)) == status
