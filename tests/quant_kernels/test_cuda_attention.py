"""The Hopper attention kernels' own source on a CPU: numbers, races, deadlocks, schedules.

The simulator runs the kernels thread by thread (csrc/cuda/simulate/simulator.h), MMAs and copies at
once or as late as the program allows. Pages nobody has, and places behind the last key, hold NaN
scales; outputs and workspaces are NaN before.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from quant_kernels import cuda_attention, reference_attention
from quant_kernels.cuda_attention import decode_call, prefill_call
from quant_kernels.kv4 import KVFormat, dequantize_kv, quantize_kv
from quant_kernels.packing import KV_PAGE, pack_kv
from quant_kernels.reference import quantize_activation
from tests.quant_kernels.triton.test_prefill_attention import (
    Case,
    arguments,
    check_against_reference,
)

DIMS = (64, 128, 256)

PREFILL = [
    Case(64, 2, 2, ((130, 130), (3, 3))),  # two tiles of queries; pages, and a tail
    Case(64, 3, 1, ((70, 100), (0, 80), (1, 65)), symmetric=True),  # 126 of 128 rows; no queries
    Case(64, 8, 1, ((37, 420),)),  # more pages than stages; three tiles
    Case(64, 2, 1, ((20, 10), (7, 0), (1, 64))),  # rows and tiles that see no key
    Case(64, 1, 1, ((140, 600),), window=130),
    Case(64, 1, 1, ((90, 90),), window=1),
    Case(128, 8, 2, ((65, 300), (7, 70))),
    Case(128, 4, 1, ((40, 400), (9, 9)), window=50),
    Case(128, 1, 1, ((150, 330),), symmetric=True),
    Case(256, 4, 1, ((35, 430), (3, 3))),
    Case(256, 1, 1, ((130, 130),), window=70),
]
DECODE = [  # dim, heads, kv_heads, lengths, window, workers
    (64, 3, 3, (100, 1, 64, 65), 0, 5),
    (64, 6, 2, (0, 260, 0, 30), 0, 4),
    (64, 2, 2, (0, 0), 0, 3),
    (64, 16, 1, (130, 5), 0, 2),  # two blocks of heads
    (64, 4, 2, (400, 20, 129), 70, 5),
    (64, 2, 1, (400, 65), 1, 3),
    (64, 1, 1, (1300,), 0, 2),  # from here on more pages than stages, now and then
    (128, 8, 1, (1100, 1), 0, 2),
    (128, 4, 1, (70, 0, 300), 0, 5),
    (128, 24, 2, (200,), 0, 7),
    (256, 3, 1, (65, 530), 0, 1),
    (256, 9, 1, (40, 100), 33, 2),
]


# --- running them ---
def finish(said: bytes | None) -> None:
    if said is not None:
        raise RuntimeError(said.decode())


def prefill(
    simulator,
    case: Case,
    given: list[Tensor],
    *,
    resident: int = 2,
    late: bool = True,
    seed: int = 0,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    **options: float,
) -> Tensor:
    """workers: how many blocks share the tiles, over pages unpacked before; 0: as each unpacks."""
    if out is None:
        out = torch.full(given[0].shape, math.nan, dtype=dtype)
    longest = max(length for length, _ in case.lengths)
    call = prefill_call(*given, longest, out, 1 / math.sqrt(case.dim), case.window, **options)
    workspace = torch.empty(0)
    if workers:
        simulator.quant_cuda_prefill_workspace.restype = ctypes.c_int64
        size = simulator.quant_cuda_prefill_workspace(ctypes.byref(call))
        workspace = torch.full((size // 4 + 16,), math.nan)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), size
        call.workers = workers
    run = simulator.quant_simulate_prefill
    run.restype = ctypes.c_char_p
    finish(run(ctypes.byref(call), resident, late, seed))
    assert bool(workspace[-16:].isnan().all())
    return out


def decode(
    simulator,
    given: list[Tensor],
    *,
    window: int = 0,
    workers: int = 5,
    resident: int = 2,
    late: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    soft_cap: float = 0.0,
) -> Tensor:
    q_codes, q_scale, codes, scales, table, _, lengths = given
    _, heads, dim = q_codes.shape
    out = torch.full(q_codes.shape, math.nan, dtype=dtype)
    row = heads // codes.shape[2] * (dim + cuda_attention.ROW_EXTRAS)
    workspace = torch.full((workers * row + 16,), math.nan)
    flags = torch.zeros(workers, dtype=torch.int32)
    call = decode_call(
        q_codes, q_scale, codes, scales, table, lengths, out, 1 / math.sqrt(dim), window,
        workspace[:-16], workers, soft_cap,
    )  # fmt: skip
    run = simulator.quant_simulate_decode
    run.restype = ctypes.c_char_p
    finish(run(ctypes.byref(call), ctypes.c_void_p(flags.data_ptr()), resident, late, seed))
    assert int(flags.abs().max()) == 0  # as the next launch wants them
    assert bool(workspace[-16:].isnan().all())
    return out


def decode_arguments(dim: int, heads: int, kv_heads: int, lengths: tuple[int, ...]) -> list[Tensor]:
    case = Case(dim, heads, kv_heads, tuple((1, length) for length in lengths))
    return arguments(case, seed=sum(lengths))


def wanted_of(given: list[Tensor], window: int = 0, soft_cap: float = 0.0) -> Tensor:
    sm_scale = 1 / math.sqrt(given[0].shape[2])
    return reference_attention.prefill_attention(
        *given, sm_scale=sm_scale, window=window, soft_cap=soft_cap
    )


# --- prefill ---
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_is_the_references(simulator, case):
    given = arguments(case)
    wanted = wanted_of(given, case.window)
    found = prefill(simulator, case, given, late=False)
    check_against_reference(found, wanted, given[3])
    for resident, seed in (
        (1, 1),
        (3, 2),
        (2, 3),
    ):  # any order of threads and copies: the same bits
        again = prefill(simulator, case, given, resident=resident, seed=seed)
        assert torch.equal(again, found)


def test_chunks_of_a_prompt_are_the_prompt(simulator):
    whole = Case(64, 2, 1, ((150, 150),))
    given = arguments(whole, seed=5)
    wanted = prefill(simulator, whole, given)
    for first, last in ((0, 83), (83, 150)):
        case = Case(64, 2, 1, ((last - first, last),))
        part = slice(first, last)
        bounds, total = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        chunk = [given[0][part], given[1][part], *given[2:5], bounds, total]
        # A row's pages, their order and M do not depend on the rows beside it.
        assert torch.equal(prefill(simulator, case, chunk), wanted[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_once(simulator, dtype):
    case = Case(64, 2, 1, ((20, 90),))
    given = arguments(case, seed=1)
    wanted = prefill(simulator, case, given).to(dtype)
    assert torch.equal(prefill(simulator, case, given, dtype=dtype), wanted)
    given = decode_arguments(64, 2, 1, (90, 0))
    wanted = decode(simulator, given).to(dtype)
    assert torch.equal(decode(simulator, given, dtype=dtype), wanted)


def test_strided_queries_and_outputs(simulator):
    case = PREFILL[1]
    given = arguments(case, seed=2)
    wanted = prefill(simulator, case, given)
    tokens, heads, dim = given[0].shape
    wide = torch.full((tokens, heads + 2, dim), 0xFF, dtype=torch.uint8)
    wide[:, 1:-1] = given[0].view(torch.uint8)
    scales = torch.full((tokens, heads + 3), math.nan)
    scales[:, :heads] = given[1]
    out = torch.full((tokens, heads + 1, dim), math.nan)
    strided = [wide.view(torch.float8_e4m3fn)[:, 1:-1], scales[:, :heads], *given[2:]]
    prefill(simulator, case, strided, out=out[:, :heads])
    assert torch.equal(out[:, :heads], wanted)
    assert bool(out[:, heads].isnan().all())


def test_where_pages_lie_does_not_matter(simulator):
    case = PREFILL[6]
    given = arguments(case, seed=4)
    wanted = prefill(simulator, case, given)
    order = torch.randperm(given[2].shape[1], generator=torch.Generator().manual_seed(9))
    given[2], given[3] = (x[:, order].contiguous() for x in given[2:4])
    given[4] = order.argsort()[given[4].long()].int()
    assert torch.equal(prefill(simulator, case, given), wanted)


# --- decode ---
@pytest.mark.parametrize(("dim", "heads", "kv_heads", "lengths", "window", "workers"), DECODE)
def test_decode_is_the_references(simulator, dim, heads, kv_heads, lengths, window, workers):
    given = decode_arguments(dim, heads, kv_heads, lengths)
    wanted = wanted_of(given, window)
    found = decode(simulator, given, window=window, workers=workers, late=False)
    values = given[3][1].float().nan_to_num(0)
    largest = float((values[..., 0].abs() * 8 + values[..., 1].abs()).max())
    error = (found - wanted).abs()
    # As check_against_reference: what is not FP32 rounding is an E4M3 step at a tie.
    assert bool(found.isfinite().all())
    assert int((error.amax(-1) > 2e-5 * largest).sum()) <= 1
    assert float(error.max()) <= float(values[..., 0].abs().max())
    assert bool((found[torch.tensor(lengths) == 0] == 0).all())
    for resident, seed in ((1, 1), (5, 2), (2, 3)):
        again = decode(
            simulator, given, window=window, workers=workers, resident=resident, seed=seed
        )
        assert torch.equal(again, found)


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 40])
def test_any_number_of_workers_gives_the_same(simulator, workers):
    given = decode_arguments(64, 2, 1, (700, 0, 100))
    wanted = decode(simulator, given, workers=7)
    # M, and with it every P, does not depend on the split; only the order of FP32 sums does.
    found = decode(simulator, given, workers=workers, resident=3)
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [0, 1, 64, 65, 1000])
def test_the_schedule_covers_every_page_once(simulator, window):
    for lengths in ((5,), (0, 0, 3), (64, 65, 0, 400), (0, 2000, 1, 0, 130, 64, 0)):
        seen = [n for n in lengths]
        pages = [
            len({key // KV_PAGE for key in range(max(0, n - window) if window else 0, n)})
            for n in seen
        ]
        ends = torch.tensor(pages).cumsum(0).int()
        for heads, workers in ((1, 1), (2, 3), (3, 7), (8, 132)):
            count, sizes, last = torch.zeros(len(pages), heads, max(pages)), [], {}
            for worker in range(workers):
                rows = torch.zeros(200, 4, dtype=torch.int32)
                found = simulator.quant_decode_work(
                    ctypes.c_void_p(ends.data_ptr()), len(pages), heads, workers, worker,
                    ctypes.c_void_p(rows.data_ptr()), len(rows),
                )  # fmt: skip
                part = rows[:found].tolist()
                for i, (sequence, head, begin, end) in enumerate(part):
                    count[sequence, head, begin:end] += 1
                    assert last.get((sequence, head), worker - 1) == worker - 1  # in order, no gaps
                    last[sequence, head] = worker
                    # What others wait for comes before what waits for others.
                    assert i == 0 or end == pages[sequence]
                sizes.append(sum(end - begin for *_, begin, end in part))
            for sequence, n in enumerate(pages):
                assert bool((count[sequence, :, :n] == 1).all())
                assert bool((count[sequence, :, n:] == 0).all())
            held = [size for size in sizes if size]
            assert len(held) == min(workers, heads * sum(pages))
            assert max(held) - min(held) <= 1


def test_values_of_very_different_sizes(simulator):
    case = Case(64, 4, 1, ((66, 400),))
    given = arguments(case, seed=3, spread=12.0)
    pages = torch.arange(given[3].shape[1]).view(-1, 1, 1)
    given[3][1, ..., 0] *= 2.0 ** -(pages % 5)  # a z for every page
    last = [given[0][-1:], given[1][-1:], *given[2:5], torch.tensor([0, 1]).int(), given[6]]
    # A page's own z may be smaller than the reference's, and finer where E4M3 is subnormal: half of
    # 2^-9 on either side, times z / 256 with z <= 2^-3, codes of at most 8, 400 keys, l > 1/2.
    bound = 2 * 2.0**-10 * 2.0**-3 / 256 * 8 * 400 / 0.5
    for found, wanted in (
        (prefill(simulator, case, given), wanted_of(given)),
        (decode(simulator, last, workers=2), wanted_of(last)),
    ):
        error = (found - wanted).abs().amax(-1)
        assert float((error > bound).float().mean()) < 0.03
        assert float(error.max()) <= float(given[3][1, ..., 0].float().nan_to_num(0).abs().max())
        product = (found * wanted).sum()
        assert float(1 - 2 * product / (found.square().sum() + wanted.square().sum())) < 1e-5


# --- against FP64 ---
def cache_of(keys: Tensor, values: Tensor) -> list[Tensor]:
    """kv_codes, kv_scales and block_table of one sequence, [T, Hk, D] each."""
    total, heads, dim = keys.shape
    pages = math.ceil(total / KV_PAGE)
    codes = torch.full((2, pages, heads, KV_PAGE, dim // 2), 0xFF, dtype=torch.uint8)
    scales = torch.full((2, pages, heads, KV_PAGE, 2), math.nan).half()
    slots = torch.arange(total)
    for i, rows in enumerate((keys, values)):
        packed, pairs = pack_kv(quantize_kv(rows, KVFormat()))
        codes[i, slots // KV_PAGE, :, slots % KV_PAGE] = packed
        scales[i, slots // KV_PAGE, :, slots % KV_PAGE] = pairs
    return [codes, scales, torch.arange(pages).int().unsqueeze(0)]


def exact(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in FP64 over the cache's numbers, and how far E4M3 may move it.

    P is rounded by 2^-4 of itself at most, or by half of the smallest step, 2^-10, in units of
    z / 256 <= 2 max |s| / 256; each times its code.
    """
    k, v = quantize_kv(keys, KVFormat()), quantize_kv(values, KVFormat())
    ratio = q.shape[1] // keys.shape[1]

    def heads(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(ratio, dim=1).transpose(0, 1)  # [Hq, T, ...]

    score = q.double().transpose(0, 1) @ heads(dequantize_kv(k)).mT / math.sqrt(q.shape[2])
    length, total = len(q), len(keys)
    seen = torch.arange(total) <= torch.arange(total - length, total)[:, None]
    p = score.masked_fill(~seen, -math.inf).softmax(-1)
    top = score.masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
    unnormed = torch.exp(score.masked_fill(~seen, -math.inf) - top).sum(-1, keepdim=True)
    codes, scale = heads(v.codes).abs(), heads(v.scale).abs()
    least = 2.0**-10 * 2 * scale.amax(1, keepdim=True) / 256 * 2 / unnormed  # M is up to 1 above
    bound = (p * scale.mT) @ codes * 2.0**-4 + least * (seen.double() @ codes)
    return (p @ heads(dequantize_kv(v))).transpose(0, 1), bound.transpose(0, 1)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("outliers", [False, True])
def test_the_error_against_fp64_is_that_of_rounding_p(simulator, dim, outliers):
    generator = torch.Generator().manual_seed(dim + outliers)
    x, keys, values = (torch.randn(200, n, dim, generator=generator) for n in (4, 2, 2))
    if outliers:  # a channel of keys, tokens of values, elements of queries
        keys[..., 3] += 12
        values[::17] *= 20
        x[torch.rand(x.shape, generator=generator) < 0.003] *= 15
    codes, scale = quantize_activation(x[-70:], "fp8")
    given = [codes, scale.squeeze(-1), *cache_of(keys, values)]
    given += [torch.tensor([0, 70]).int(), torch.tensor([200]).int()]
    wanted, bound = exact(codes.float() * scale, keys, values)
    slack = 1e-4 * wanted.abs().max()
    error = (prefill(simulator, Case(dim, 4, 2, ((70, 200),)), given) - wanted).abs()
    assert bool((error <= bound + slack).all())
    given[:2] = codes[-1:], scale[-1:].squeeze(-1)
    given[5] = torch.tensor([0, 1]).int()
    error = (decode(simulator, given) - wanted[-1:]).abs()
    assert bool((error <= bound[-1:] + slack).all())
