"""The fragment layout: where every code lies, what the kernels make of it, and the way back."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels.cuda_gemm import kind_of
from quant_kernels.cuda_tuning import KINDS
from quant_kernels.formats import (
    FormatError,
    WeightFormat,
    every_format,
    round_e4m3,
)
from quant_kernels.fragments import (
    decoding,
    encoding,
    fragment_weight,
    unfragment_weight,
)
from quant_kernels.packing import PackedWeight, pack_int4, unpack_int4
from tests.quant_kernels.weights import random_packed

FORMATS = every_format()
F8 = torch.float8_e4m3fn
# Units in which the kernels' operands count (convert.cuh): 16 q, and E4M3 codes from 2^-9 on.
UNITS = {"int8-channel": 16.0, "fp8-channel": 2.0**-9, "exact": 2.0**-9}


def registers(simulator, kind: str, words: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The kernels' own conversion: words [n] -> operands' bytes [n, 8] (low, then high)."""
    words = ((words ^ 0x80000000) - 0x80000000).to(torch.int32).contiguous()
    low, high = torch.empty_like(words), torch.empty_like(words)
    simulator.quant_simulate_convert(
        KINDS.index(kind), ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(t.data_ptr()),
        ctypes.c_int64(len(words)), ctypes.c_void_p(low.data_ptr()),
        ctypes.c_void_p(high.data_ptr()),
    )  # fmt: skip
    return torch.stack((low, high), 1).view(torch.uint8)


def values(kind: str, operands: torch.Tensor) -> torch.Tensor:
    """What an MMA takes bytes for."""
    return operands.view(torch.int8 if "int8" in kind else F8).float()


def every_code_everywhere(least: int) -> torch.Tensor:
    """codes [n, 8]: each code in each place, among neighbours at both ends and in the middle."""
    rows = []
    for place in range(8):
        for code in range(least, 8):
            for others in (least, 0, 7, -1):
                row = torch.full((8,), others)
                row[place] = code
                rows.append(row)
    return torch.cat((torch.stack(rows), torch.randint(least, 8, (500, 8))))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("least", [-8, -7])
def test_operands_are_the_codes_times_their_scale(simulator, fmt, least):
    torch.manual_seed(0)
    codes = every_code_everywhere(least)
    if fmt.per_channel or fmt.numerics == "exact":
        t = torch.ones(1)
    elif fmt.numerics == "lut":  # every E4M3 number up to the anchor, subnormal ones too
        t = torch.arange(0x67 + 1, dtype=torch.uint8).view(F8).float()
    else:
        t = torch.arange(17).float()
    kind = kind_of(fragment_weight(random_packed(64, 128, fmt, least)))
    words = encoding(fmt, least == -8)(codes[:, :4], codes[:, 4:]).repeat(len(t))
    scales = t.repeat_interleave(len(codes))
    stored = scales.to(F8).view(torch.uint8) if fmt.numerics == "lut" else (scales.to(torch.uint8))
    products = codes.repeat(len(t), 1) * scales.unsqueeze(1)
    wanted = round_e4m3(products) if fmt.numerics == "lut" and not fmt.per_channel else products
    found = values(kind, registers(simulator, kind, words, stored.contiguous()))
    assert torch.equal(found, wanted * UNITS.get(kind.removesuffix("-8"), 1.0))


def every_four() -> torch.Tensor:
    """codes [16^4, 4] from -8 on."""
    return torch.cartesian_prod(*[torch.arange(-8, 8)] * 4)


@pytest.mark.parametrize("least", [-8, -7])
def test_tables_of_every_scale_give_every_four_codes_bit_for_bit(simulator, least):
    fmt = WeightFormat("w4afp8", 128, "lut")
    four = every_four().clamp(min=least)
    codes = torch.cat((four, four.flip(0)), 1)
    words = encoding(fmt, least == -8)(codes[:, :4], codes[:, 4:])
    for t in range(0x7F):  # all but the NaN
        stored = torch.full((len(words),), t, dtype=torch.uint8)
        products = torch.arange(-8, 8) * stored[:1].view(F8).float()
        wanted = products.clamp(-448, 448).to(F8).view(torch.uint8)
        found = registers(simulator, "lut-8" if least == -8 else "lut", words, stored)
        assert torch.equal(found, wanted[codes + 8]), t


@pytest.mark.parametrize("kind", ["fp8-channel-8", "exact-8"])
def test_unscaled_codes_of_every_four_nibbles_bit_for_bit(simulator, kind):
    """Signs are added beside other codes: every four codes in nibbles that follow each other."""
    torch.manual_seed(0)
    fmt = WeightFormat("w4afp8", -1 if kind.startswith("fp8") else 128, "exact")
    four = every_four()
    for start in range(8):
        nibbles = torch.cat((four, torch.randint(-8, 8, (len(four), 4))), 1).roll(start, 1)
        codes = torch.cat((nibbles[:, ::2], nibbles[:, 1::2]), 1)
        words = encoding(fmt, True)(codes[:, :4], codes[:, 4:])
        found = registers(simulator, kind, words, torch.zeros(1, dtype=torch.uint8))
        assert torch.equal(found.long(), codes.abs() + 128 * (codes < 0))
        assert torch.equal(torch.cat(decoding(fmt, True)(words), 1), codes)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("minus_eight", [True, False])
def test_words_and_codes_are_each_others_inverse(fmt, minus_eight):
    codes = every_code_everywhere(-8 if minus_eight else -7)
    words = encoding(fmt, minus_eight)(codes[:, :4], codes[:, 4:])
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32
    assert torch.equal(torch.cat(decoding(fmt, minus_eight)(words), 1), codes)
    assert len(words.unique()) == len(codes.unique(dim=0))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS), st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**31),
    st.sampled_from((-8, -7)),
)  # fmt: skip
def test_a_weight_comes_back_bit_for_bit(fmt, rows, multiples, seed, least):
    columns = multiples * (16 if fmt.per_channel else fmt.group_size)
    torch.manual_seed(seed % 1000)
    weight = random_packed(rows, columns, fmt, least)
    back = unfragment_weight(fragment_weight(weight))
    assert torch.equal(back.words, weight.words)
    assert torch.equal(back.scales, weight.scales)
    assert back.fmt == fmt


def test_every_code_lies_where_the_instruction_reads_it():
    # PTX ISA, wgmma.m64nNk32, operand A of 8 bits: register r of thread t has row
    # 16 (t / 32) + (t % 32) / 4 + 8 (r % 2), columns 4 (t % 4) + 16 (r / 2) + 0 .. 3.
    fmt = WeightFormat("w4a8", -1, "int8")
    rows, columns = 128, 256
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for plane in range(4):  # the bits of the place, four at a time
        place = torch.arange(rows * columns).view(rows, columns)
        codes = ((place >> 4 * plane) & 15) - 8
        weight = PackedWeight(pack_int4(codes.to(torch.int8)), torch.ones(rows, 1).bfloat16(), fmt)
        words = fragment_weight(weight).codes.view(torch.int32).long() & 0xFFFFFFFF
        low, high = decoding(fmt, True)(words)  # [F, B, 2, 128, 4, 4]
        for fragment in range(2):
            for block in range(2):
                for half in range(2):
                    for word in range(4):
                        step, h = divmod(word, 2)
                        t = torch.arange(128)
                        row = 64 * fragment + 16 * (t // 32) + t % 32 // 4 + 8 * h
                        column = 128 * block + 64 * half + 32 * step + 4 * (t % 4)
                        for i in range(4):
                            here = (fragment, block, half, slice(None), word, i)
                            seen[row, column + i] += (low[here] + 8) << 4 * plane
                            seen[row, column + 16 + i] += (high[here] + 8) << 4 * plane
    assert torch.equal(seen, torch.arange(rows * columns).view(rows, columns))


def test_the_codes_say_whether_there_is_a_minus_eight():
    for fmt in FORMATS:
        for least in (-8, -7):
            weight = fragment_weight(random_packed(70, 128, fmt, least))
            assert weight.has_minus_eight == (least == -8 or fmt.scheme == "w4a8")
            expected = torch.int32 if least == -8 and fmt.scheme == "w4afp8" else torch.uint8
            assert weight.codes.dtype == expected


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_padding_is_zeros(fmt):
    rows, columns = 3, 32 if fmt.per_channel else fmt.group_size
    weight = fragment_weight(random_packed(rows, columns, fmt))
    whole = unfragment_weight(dataclasses.replace(weight, c=torch.ones(64), columns=128))
    codes = unpack_int4(whole.words)
    assert int(codes[rows:].abs().max()) == 0
    assert columns == 128 or int(codes[:, columns:].abs().max()) == 0


def test_columns_that_activations_cannot_be_copied_in_are_refused():
    fmt = WeightFormat("w4a8", -1, "int8")
    with pytest.raises(FormatError, match="in_features 24 is not a multiple of 16"):
        fragment_weight(random_packed(8, 24, fmt))
