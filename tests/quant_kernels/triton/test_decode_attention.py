"""Decode attention: its schedule on random lengths, and its results against the definition."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_kernels import ops
from quant_kernels.packing import KV_PAGE
from quant_kernels.reference import quantize_activation
from quant_kernels.triton import decode_attention as kernels

KV_HEADS = 2


@triton.jit
def _schedule(
    kv_lens, batch, window, programs, counts, ranges, tiles, owners,
    KV_HEADS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """What the kernels work out: pages of sequences, ranges of programs, places of tiles."""
    count = kernels.tiles_of(kv_lens, batch, window, BATCH)
    tl.store(counts + tl.arange(0, BATCH), count)
    total = tl.sum(count, 0) * KV_HEADS
    for program in range(programs):
        begin, end = kernels.tile_range(program, programs, total)
        tl.store(ranges + 2 * program, begin)
        tl.store(ranges + 2 * program + 1, end)
    for tile in range(total):
        sequence, kv_head, place = kernels.segment_of(tile, count, KV_HEADS, BATCH)
        tl.store(tiles + 3 * tile, sequence)
        tl.store(tiles + 3 * tile + 1, kv_head)
        tl.store(tiles + 3 * tile + 2, place)
        tl.store(owners + tile, kernels.program_of(tile, programs, total))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 0, 1, 63, 64, 65, 200, 400]), min_size=1, max_size=4),
    st.integers(1, 23),
    st.sampled_from([0, 0, 1, 64, 65, 100, 1000]),
)
def test_every_tile_is_covered_once_and_every_slot_used_once(lengths, programs, window):
    batch = len(lengths)
    padded = triton.next_power_of_2(batch)
    # The pages that hold a visible key, spelled out.
    seen = [
        sorted({key // KV_PAGE for key in range(max(0, n - window) if window else 0, n)})
        for n in lengths
    ]
    wanted = [
        (b, head, i)
        for b, pages in enumerate(seen)
        for head in range(KV_HEADS)
        for i in range(len(pages))
    ]
    counts = torch.full((padded,), -1, dtype=torch.int32)
    ranges = torch.full((programs, 2), -1, dtype=torch.int32)
    tiles = torch.full((len(wanted) + 1, 3), -1, dtype=torch.int32)
    owners = torch.full((len(wanted) + 1,), -1, dtype=torch.int32)
    kv_lens = torch.tensor(lengths, dtype=torch.int32)
    _schedule[(1,)](
        kv_lens, batch, window, programs, counts, ranges, tiles, owners, KV_HEADS, padded
    )
    assert counts[:batch].tolist() == [len(pages) for pages in seen]
    assert [tuple(tile) for tile in tiles[:-1].tolist()] == wanted
    assert owners[-1] == -1

    ranges = ranges.tolist()
    assert [t for begin, end in ranges for t in range(begin, end)] == list(range(len(wanted)))
    sizes = [end - begin for begin, end in ranges]
    assert max(sizes) - min(sizes) <= 1
    slots, pieces = [], {}
    for program, (begin, end) in enumerate(ranges):
        for tile in range(begin, end):
            assert int(owners[tile]) == program
            sequence, head, _ = wanted[tile]
            pieces.setdefault(sequence * KV_HEADS + head, set()).add(program)
    for segment, used in pieces.items():
        # The combining kernel reads all programs from the first to the last.
        assert used == set(range(min(used), max(used) + 1))
        slots += [program + segment for program in used]
    assert len(slots) == len(set(slots))
    assert max(slots, default=0) < programs + batch * KV_HEADS - 1 or not wanted


def arguments(
    dim: int, heads: int, kv_heads: int, lengths: list[int], symmetric: bool = False, seed: int = 0
) -> list[Tensor]:
    """q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens.

    Scales are 1.05 to 1.95 times 2^-4, no powers of two, and the z of every page is 2^-3. Pages
    nobody has, and places behind the last key, hold NaN scales.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    batch, needed = len(lengths), [math.ceil(n / KV_PAGE) for n in lengths]
    pages = sum(needed) + 2
    order = torch.randperm(pages, generator=generator).int()
    table = order[-1].repeat(batch, max(needed) + 1)
    shape = (2, pages, kv_heads, KV_PAGE)
    codes = torch.randint(0, 256, (*shape, dim // 2), dtype=torch.uint8, generator=generator)
    scale = (1.05 + 0.9 * rand(*shape)) / 16
    if symmetric:
        scale = torch.where(rand(*shape) < 0.5, -scale, scale)
    offset = torch.zeros(shape) if symmetric else rand(*shape).mul(2).sub(0.7)
    scales = torch.full((*shape, 2), math.nan).half()
    used = 0
    for b, total in enumerate(lengths):
        table[b, : needed[b]] = order[used : used + needed[b]]
        used += needed[b]
        place = torch.arange(total)
        at = (slice(None), table[b].long()[place // KV_PAGE], slice(None), place % KV_PAGE)
        scales[at] = torch.stack((scale[at], offset[at]), dim=-1).half()
    x = torch.randn(batch, heads, dim, generator=generator) * 2
    x *= 1 + 20 * (rand(batch, heads, dim) < 0.002)
    q_codes, q_scale = quantize_activation(x, "fp8")
    kv_lens = torch.tensor(lengths, dtype=torch.int32)
    return [q_codes, q_scale.squeeze(-1), codes, scales, table, kv_lens]


def run(
    arguments: list[Tensor], backend: str, window: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    batch, heads, dim = arguments[0].shape
    out = torch.full((batch, heads, dim), math.nan, dtype=dtype)
    shape = (batch, heads, arguments[2].shape[2], dim)
    # 0xFF is NaN in FP32: a slot that is read and was not written shows.
    size = ops.workspace_bytes(out.device, attention=shape, backend=backend)
    workspace = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
    ops.decode_attention(
        *arguments, out, sm_scale=1 / math.sqrt(dim), window=window, workspace=workspace,
        backend=backend,
    )  # fmt: skip
    assert bool((workspace[size:] == 0xFF).all())
    return out


CASES = [
    (64, 3, 3, [100, 1, 64, 65], 0, False),
    (64, 6, 2, [0, 260, 0, 30], 0, True),
    (96, 4, 1, [190, 70], 0, False),
    (128, 8, 1, [130, 1], 0, True),
    (128, 32, 1, [65], 0, False),
    (256, 2, 1, [65], 0, False),
    (32, 2, 2, [1], 0, False),
    (64, 4, 2, [400, 20, 129], 70, False),
    (64, 2, 1, [400, 65], 1, True),
]


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "lengths", "window", "symmetric"), CASES)
def test_attention_is_the_references(dim, heads, kv_heads, lengths, window, symmetric):
    given = arguments(dim, heads, kv_heads, lengths, symmetric)
    found, wanted = (run(given, backend, window) for backend in ("triton", "reference"))
    values = given[3][1].float().nan_to_num(0)
    largest = float((values[..., 0].abs() * 8 + values[..., 1].abs()).max())
    error = (found - wanted).abs()
    assert bool(found.isfinite().all())
    # |S| stays under 2^6, and a few roundings of 2^-24 each move p by less than 2e-5 of itself.
    # Where that crosses one of E4M3's ties, at least a sixteenth of P apart, P moves by a step: at
    # most P / 8, times codes of at most 8, and p_t <= l, so the output by the value's scale.
    assert int((error.amax(-1) > 2e-5 * largest).sum()) <= 1
    assert float(error.max()) <= float(values[..., 0].abs().max())
    assert bool((found[torch.tensor(lengths) == 0] == 0).all())
    assert torch.equal(found, run(given, "triton", window))


@pytest.mark.parametrize("programs", [1, 2, 16, 40])
def test_any_number_of_programs_gives_the_same(programs, monkeypatch):
    given = arguments(64, 2, 1, [700, 0, 100], seed=1)
    wanted = run(given, "triton")
    monkeypatch.setattr(kernels, "program_count", lambda device: programs)
    # M, and with it every P, does not depend on the split; only the order of FP32 sums does.
    assert torch.allclose(run(given, "triton"), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_once(dtype):
    given = arguments(64, 2, 1, [90, 0], seed=2)
    assert torch.equal(run(given, "triton", 0, dtype), run(given, "triton").to(dtype))


def test_where_pages_lie_does_not_matter():
    given = arguments(64, 2, 1, [150, 70], seed=3)
    wanted = run(given, "triton")
    order = torch.randperm(given[2].shape[1], generator=torch.Generator().manual_seed(9))
    given[2], given[3] = (x[:, order].contiguous() for x in given[2:4])
    given[4] = order.argsort()[given[4].long()].int()
    assert torch.equal(run(given, "triton"), wanted)


def test_a_missing_or_small_workspace_is_refused_with_the_size_needed():
    given = arguments(64, 2, 1, [10])
    out = torch.zeros(1, 2, 64)
    needed = ops.workspace_bytes(out.device, attention=(1, 2, 1, 64), backend="triton")
    for workspace in (None, torch.zeros(needed - 1, dtype=torch.uint8)):
        with pytest.raises(ops.OpError, match=rf"{needed} bytes.*ops\.workspace_bytes"):
            ops.decode_attention(*given, out, sm_scale=1.0, workspace=workspace, backend="triton")


def test_too_many_sequences_are_refused():
    batch = kernels.MAX_BATCH + 1
    given = arguments(32, 1, 1, [1])
    codes = given[0].view(torch.uint8).expand(batch, 1, 32).contiguous().view(given[0].dtype)
    rest = [given[1].expand(batch, 1).contiguous(), *given[2:4], given[4].expand(batch, -1)]
    with pytest.raises(ops.OpError, match="1025 sequences"):
        ops.decode_attention(
            codes, *rest, torch.ones(batch, dtype=torch.int32), torch.zeros(batch, 1, 32),
            sm_scale=1.0, backend="triton",
        )  # fmt: skip


def test_no_sequences_at_all():
    given = arguments(64, 2, 1, [10])
    empty = [given[0][:0], given[1][:0], *given[2:4], given[4][:0], given[5][:0]]
    around = torch.full((2, 2, 64), 77.0)
    ops.decode_attention(*empty, around[1:1], sm_scale=1.0, backend="triton")
    assert bool((around == 77).all())
