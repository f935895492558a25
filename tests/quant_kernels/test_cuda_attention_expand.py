"""Prefill over pages that a kernel before it has unpacked: the bits of the other one.

Both kernels run in the simulator, as in test_cuda_attention.py; the workspace is NaN before.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from quant_kernels.cuda_attention import prefill_call
from tests.quant_kernels.test_cuda_attention import PREFILL, finish, prefill, wanted_of
from tests.quant_kernels.test_cuda_attention_calls import (
    BAD_ALIGNMENT,
    BAD_SHAPE,
    SMALL_WORKSPACE,
)
from tests.quant_kernels.test_cuda_attention_options import CAPPED, NEVER, skipped_pages, with_sink
from tests.quant_kernels.triton.test_prefill_attention import (
    Case,
    arguments,
    check_against_reference,
)

EXPANDED = [
    *PREFILL,
    Case(64, 4, 1, ((70, 1100), (33, 600))),  # more pages than stages
    Case(128, 8, 1, ((20, 700), (1, 1), (0, 0), (5, 640)), symmetric=True),
    Case(128, 2, 2, ((200, 900), (64, 64), (100, 1000)), window=200),  # images of some pages
    Case(256, 8, 1, ((17, 500), (16, 16))),
]


@pytest.mark.parametrize("case", EXPANDED, ids=str)
def test_expanded_pages_give_the_same_bits(simulator, case):
    given = arguments(case, seed=11, spread=3.0)
    wanted = prefill(simulator, case, given, late=False)
    for late, resident, workers, seed in (
        (False, 1, 1, 0),
        (True, 1, 2, 1),
        (True, 3, 3, 2),
        (True, 2, 999, 3),
    ):
        found = prefill(
            simulator, case, given, late=late, resident=resident, seed=seed, workers=workers
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", PREFILL[::3], ids=str)
def test_expanded_prefill_is_the_references(simulator, case):
    given = arguments(case)
    found = prefill(simulator, case, given, workers=2)
    check_against_reference(found, wanted_of(given, case.window), given[3])


@pytest.mark.parametrize(
    "options", [{"soft_cap": 2.0}, {"soft_cap": 30.0, "skip_threshold": NEVER}]
)
@pytest.mark.parametrize("case", CAPPED, ids=str)
def test_options_give_the_same_bits(simulator, case, options):
    given = arguments(case)
    wanted = prefill(simulator, case, given, late=False, **options)
    found = prefill(simulator, case, given, resident=3, seed=2, workers=3, **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("soft_cap", [0.0, 50.0])
@pytest.mark.parametrize(("dim", "window"), [(64, 0), (64, 300), (128, 0), (256, 0)])
def test_the_same_pages_are_skipped(simulator, dim, window, soft_cap):
    sink = with_sink(dim, window)
    options = {"soft_cap": soft_cap, "skip_threshold": 8.0}
    wanted = prefill(simulator, sink.case, sink.given, late=False, **options)
    counts = skipped_pages(simulator)
    for resident, seed in ((1, 1), (2, 3)):
        found = prefill(
            simulator, sink.case, sink.given, resident=resident, seed=seed, workers=2, **options
        )
        assert torch.equal(found, wanted)
        assert skipped_pages(simulator) == counts


def test_chunks_over_expanded_pages_are_the_prompt(simulator):
    whole = Case(64, 2, 1, ((150, 150),))
    given = arguments(whole, seed=5)
    wanted = prefill(simulator, whole, given)
    for first, last in ((0, 83), (83, 150)):
        bounds, total = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        chunk = [given[0][first:last], given[1][first:last], *given[2:5], bounds, total]
        case = Case(64, 2, 1, ((last - first, last),))
        assert torch.equal(prefill(simulator, case, chunk, workers=2), wanted[first:last])


def tiles_of(simulator, case: Case, workers: int) -> list[list[int]]:
    given = arguments(case)
    longest = max(length for length, _ in case.lengths)
    out = torch.empty(given[0].shape)
    call = prefill_call(*given, longest, out, 0.1, 0, workspace=out, workers=workers)
    rows, count = torch.zeros(2000, 6, dtype=torch.int32), ctypes.c_int(0)
    run = simulator.quant_simulate_prefill_tiles
    run.restype = ctypes.c_char_p
    finish(
        run(ctypes.byref(call), ctypes.c_void_p(rows.data_ptr()), len(rows), ctypes.byref(count))
    )
    return rows[: count.value].tolist()


@pytest.mark.parametrize("workers", [1, 2, 5, 132, 1000])
def test_the_schedule_deals_every_tile_once(simulator, workers):
    ragged = tuple((n, n) for n in (130, 1, 0, 64, 65, 300, 0)) + 33 * ((40, 40),)
    for lengths in (((1, 1),), ((0, 0), (700, 700)), ((500, 2000), (3, 3)), ragged):
        case = Case(64, 8, 4, lengths)  # tiles of 64 tokens
        found = tiles_of(simulator, case, workers)
        wanted, start = set(), 0
        for sequence, (length, _) in enumerate(lengths):
            for first in range(0, length, 64):
                tokens = min(64, length - first)
                wanted |= {(sequence, head, start + first, tokens) for head in range(4)}
            start += length
        assert {tuple(row[1:5]) for row in found} == wanted
        assert len(found) == len(wanted)


@pytest.mark.parametrize("batch", [1, 16])
def test_whole_prompts_are_dealt_evenly(simulator, batch):
    # 132 blocks, and tiles of 64 tokens; a page, and what a tile costs besides, some three pages.
    found = tiles_of(simulator, Case(64, 8, 4, batch * ((2048, 2048),)), 132)
    work = torch.zeros(132)
    for block, *_, end in found:
        work[block] += end + 3
    tiles = [row[-1] for row in found if row[0] == 7]
    assert tiles == sorted(tiles, reverse=True)
    assert float(work.max()) <= max(35, 1.05 * float(work.mean()))


def call_of(case: Case, table_pages: int, workspace_bytes: int = 1 << 40):
    given = arguments(case)
    longest = max(length for length, _ in case.lengths)
    call = prefill_call(*given, longest, torch.empty(given[0].shape), 0.1, case.window)
    call.table_pages, call.workers = table_pages, 2
    call.workspace, call.workspace_bytes = 1 << 20, workspace_bytes
    return call


def test_a_workspace_holds_the_pages_that_queries_see(simulator):
    size = simulator.quant_cuda_prefill_workspace
    size.restype = ctypes.c_int64

    def images(case: Case, table_pages: int) -> float:
        bytes_of_image = 2 * 64 * case.dim + 4 * 4 * 64 + 128
        call = call_of(case, table_pages)
        return size(ctypes.byref(call)) / (len(case.lengths) * case.kv_heads * bytes_of_image)

    for dim in (64, 128, 256):
        assert images(Case(dim, 4, 2, ((9, 9), (5, 5))), 30) == 30
    # The keys of queries at positions p .. p + n - 1: window + n - 1 in a row.
    for window, length in ((1, 1), (1, 2), (1, 64), (1, 65), (64, 1), (65, 1), (66, 1), (130, 77)):
        most = max((first + window + length - 2) // 64 - first // 64 + 1 for first in range(64))
        assert images(Case(64, 2, 1, ((length, 2000),), window=window), 1000) == most
        assert images(Case(64, 2, 1, ((length, 2000),), window=window), 1) == 1


def test_workspaces_that_do_not_do_are_refused(simulator):
    case = Case(64, 2, 1, ((9, 9),))
    needed = 2 * (2 * 64 * 64 + 4 * 4 * 64 + 128)

    def status(**changes: int) -> int:
        call = call_of(case, 2, needed)
        for name, value in changes.items():
            setattr(call, name, value)
        return simulator.quant_cuda_prefill_check(ctypes.byref(call))

    assert status() == 0
    assert status(workspace_bytes=needed - 1) == SMALL_WORKSPACE
    assert status(workspace=None, workspace_bytes=0, table_pages=0) == 0
    assert status(workspace=(1 << 20) + 8) == BAD_ALIGNMENT
    assert status(table_pages=0) == status(workers=0) == BAD_SHAPE


def test_expanding_pays_where_many_tiles_read_many_pages(simulator):
    def gains(length: int, total: int, heads: int = 32, batch: int = 1, window: int = 0) -> bool:
        call = call_of(Case(128, 1, 1, ((1, 1),), window=window), math.ceil(total / 64))
        call.max_query_len, call.workers = length, 132
        call.attention.heads, call.attention.kv_heads = heads, 8
        call.attention.batch = batch
        return bool(simulator.quant_cuda_prefill_gains(ctypes.byref(call)))

    # Of 32 heads and 8 KV heads a tile is 32 tokens.
    assert [gains(n, n) for n in (1, 512, 1024, 2048, 8192)] == [False, False, False, True, True]
    assert [gains(n, n, batch=16) for n in (512, 1024, 2048)] == [False, True, True]
    assert [gains(n, n, heads=8) for n in (2048, 4096, 8192)] == [False, True, True]
    assert [gains(256, n) for n in (256, 65536)] == [False, False]
    assert [gains(512, n) for n in (512, 4096, 65536)] == [False, True, True]  # chunks
    assert gains(8192, 8192, window=4096)
    assert not gains(8192, 8192, window=128)
    assert gains(2048, 100_000)
    assert not gains(2048, 200_000)  # a workspace of 440 MB
    assert not gains(8192, 8192, batch=16)
