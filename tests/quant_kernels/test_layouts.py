"""The kernels' layouts: where every code lies, and that nothing is lost there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels import packing
from quant_kernels.formats import (
    FormatError,
    WeightFormat,
    every_format,
    join_scales,
    round_row_unit,
    split_scales,
)
from quant_kernels.kv4 import KVCodes
from quant_kernels.packing import (
    PackedWeight,
    block_weight,
    blocked_shapes,
    join_weight,
    pack_int4,
    span_of,
    split_weight,
    unblock_weight,
)


def random_weight(n: int, k: int, fmt: WeightFormat, seed: int) -> PackedWeight:
    """Random codes, and scales on the format's grid that differ in every row and group."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    rough = torch.rand(n, fmt.groups(k), generator=generator).add(0.05)
    rough = (rough * torch.rand(n, 1, generator=generator).mul(4).exp()).bfloat16()
    t, c = split_scales(rough, fmt)
    return PackedWeight(pack_int4(codes), join_scales(t, round_row_unit(c)), fmt)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(every_format()),
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(0, 2**20),
)
def test_split_layout_round_trips(fmt, n, blocks, seed):
    k = blocks * max(64, fmt.group_size)
    weight = random_weight(n, k, fmt, seed)
    split = split_weight(weight)
    assert split.shape == (n, k)
    back = join_weight(split)
    assert torch.equal(back.words, weight.words)
    assert torch.equal(back.scales, weight.scales)
    assert back.scales.is_contiguous()


def fits(fmt: WeightFormat, k: int) -> bool:
    return fmt.per_channel or k % fmt.group_size == 0


@pytest.mark.parametrize(
    ("fmt", "k"), [(fmt, k) for fmt in every_format() for k in (128, 192, 384) if fits(fmt, k)]
)
def test_every_code_lies_where_the_docstring_says(fmt, k):
    n = 5
    weight = random_weight(n, k, fmt, 7)
    codes = packing.unpack_int4(weight.words)
    split = split_weight(weight)
    span = span_of(k, fmt)
    for row in range(n):
        for column in range(k):
            b, j = divmod(column, span)
            byte = int(split.codes[b, row, j % (span // 2)])
            nibble = byte >> 4 if j >= span // 2 else byte & 15
            assert nibble == int(codes[row, column]) % 16
    t, c = split_scales(weight.scales, fmt)
    assert torch.equal(split.c, c.flatten())
    if not fmt.per_channel:
        assert torch.equal(split.t.float(), t.T)


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_half_a_span_lies_in_one_group(fmt):
    for k in range(64, 1025, 64):
        if fits(fmt, k):
            half = span_of(k, fmt) // 2
            assert k % (2 * half) == 0
            assert fmt.per_channel or fmt.group_size % half == 0


def test_rows_change_their_layout_some_at_a_time(monkeypatch):
    fmt = WeightFormat("w4a8", 64, "int8")
    weight = random_weight(23, 192, fmt, 3)
    whole = split_weight(weight)
    monkeypatch.setattr(packing, "CODES_AT_ONCE", 5 * 192)
    assert torch.equal(split_weight(weight).codes, whole.codes)
    assert torch.equal(join_weight(whole).words, weight.words)


def test_a_width_that_has_no_split_layout_is_refused():
    with pytest.raises(FormatError, match=r"in_features 96 .*multiple of 64.*reference backend"):
        split_weight(random_weight(4, 96, WeightFormat("w4a8", 32, "int8"), 0))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([32, 64, 96, 128]), st.integers(0, 99))
def test_cache_rows_round_trip(tokens, heads, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, heads, dim)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scale, offset = torch.randn(2, tokens, heads, 1, generator=generator).half()
    packed, scales = packing.pack_kv(KVCodes(codes, scale, offset))
    back = packing.unpack_kv(packed, scales)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scale, scale)
    assert torch.equal(back.offset, offset)
    # Partners under RoPE share a byte.
    assert torch.equal(packed & 15, codes[..., : dim // 2].view(torch.uint8) & 15)
    assert torch.equal(packed >> 4, codes[..., dim // 2 :].view(torch.uint8) & 15)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(every_format()),
    st.integers(1, 150),
    st.integers(1, 20),
    st.integers(0, 2**20),
)
def test_blocked_layout_round_trips(fmt, n, steps, seed):
    k = steps * max(8, fmt.group_size)
    weight = random_weight(n, k, fmt, seed)
    blocked = block_weight(weight)
    assert blocked.shape == (n, k)
    shapes = blocked_shapes(n, k, fmt)
    assert (tuple(blocked.codes.shape), tuple(blocked.t.shape)) == shapes
    back = unblock_weight(blocked)
    assert torch.equal(back.words, weight.words)
    assert torch.equal(back.scales, weight.scales)


@pytest.mark.parametrize(
    ("fmt", "k"), [(fmt, k) for fmt in every_format() for k in (8, 96, 192, 384) if fits(fmt, k)]
)
def test_every_blocked_code_lies_where_the_docstring_says(fmt, k):
    n = 70
    weight = random_weight(n, k, fmt, 7)
    b = packing.unpack_int4(weight.words).int() + 8
    t, _ = split_scales(weight.scales, fmt)
    blocked = block_weight(weight)
    row, column = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    if fmt.scheme == "w4a8":
        half, nibble, o = row % 64 // 32, row % 32 // 16, row % 16
        found = blocked.codes[row // 64, column // 4, half, 4 * o + column % 4]
    else:
        word, j = column % 32, column % 128 // 32
        nibble = j % 2
        found = blocked.codes[row // 8, column // 128, row % 8, 2 * word + j // 2]
    assert torch.equal((found.int() >> 4 * nibble) & 15, b)
    if fmt.per_channel:
        return
    group = column // fmt.group_size
    if fmt.scheme == "w4a8":
        scale = blocked.t[row // 64, group // 2, row % 64, group % 2]
    else:
        scale = blocked.t[row // 8, group, row % 8]
    assert torch.equal(scale.float(), t.gather(1, group))


def test_blocked_padding_multiplies_to_nothing():
    for fmt in every_format():
        blocked = block_weight(random_weight(1, 128, fmt, 3))
        beyond = blocked.codes[:, :, 1] if fmt.scheme == "w4a8" else blocked.codes[1:]
        assert bool((beyond == 0x88).all())


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_blocking_some_rows_at_a_time_is_blocking_all(rows, monkeypatch):
    for fmt in every_format():
        weight = random_weight(3 * rows, 128, fmt, 11)
        whole = block_weight(weight)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "CODES_AT_ONCE", 128 * rows)
            assert torch.equal(block_weight(weight).codes, whole.codes)
