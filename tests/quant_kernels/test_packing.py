"""The checkpoint's layout: where every bit is, and that nothing is lost on the way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels import cpu
from quant_kernels.formats import FormatError
from quant_kernels.packing import CODES_PER_WORD, pack_int4, unpack_int4


@pytest.fixture(params=["library", "torch"])
def unpack(request, monkeypatch):
    """Both ways of unpacking: the C++ library, where it is built, and plain torch."""
    assert cpu.usable(), cpu.why_unavailable()
    monkeypatch.setattr(cpu, "usable", lambda: request.param == "library")
    return unpack_int4


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


def test_bits_are_where_the_format_says(unpack):
    # Element k in bits 4 (k mod 8) of word k // 8, as q + 8; the first is the lowest nibble.
    codes = torch.tensor(
        [
            [*range(-8, 8)],
            [*range(7, -9, -1)],
            [-7, -8, -8, -8, -8, -8, -8, -8, 7, 7, 7, 7, 7, 7, 7, 7],
        ],
        dtype=torch.int8,
    )
    words = [[0x76543210, 0xFEDCBA98], [0x89ABCDEF, 0x01234567], [0x00000001, 0xFFFFFFFF]]
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32
    assert (packed.long() % 2**32).tolist() == words
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("k", range(16))
def test_every_column_has_its_own_nibble(k):
    codes = torch.full((1, 16), -8, dtype=torch.int8)  # stored as zeros
    codes[0, k] = 7
    expected = [0, 0]
    expected[k // 8] = 0xF << 4 * (k % 8)
    assert (pack_int4(codes).long() % 2**32).tolist() == [expected]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 7), st.integers(0, 20), st.integers(0, 2**31))
def test_unpack_inverts_pack(rows, words, seed):
    codes = random_codes(rows, words * CODES_PER_WORD, seed)
    packed = pack_int4(codes)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_int4(packed), codes)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_pack_inverts_unpack_on_every_word(words):
    packed = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_pack_is_compressed_tensors_pack():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(37, 256)
    assert torch.equal(pack_int4(codes), helpers.pack_to_int32(codes, 4))
    assert torch.equal(
        unpack_int4(helpers.pack_to_int32(codes, 4)),
        helpers.unpack_from_int32(pack_int4(codes), 4, codes.shape),
    )


def test_strided_codes_and_words(unpack):
    codes = random_codes(24, 16)
    assert torch.equal(unpack(pack_int4(codes[::3])), codes[::3])
    assert torch.equal(unpack(pack_int4(codes)[1::2]), codes[1::2])
    assert torch.equal(unpack(pack_int4(codes.T)), codes.T)
    assert torch.equal(unpack(pack_int4(codes).T.contiguous().T), codes)


@pytest.mark.parametrize("columns", [1, 7, 12])
def test_columns_that_do_not_fill_a_word_are_refused(columns):
    with pytest.raises(FormatError, match="K must be a multiple of 8"):
        pack_int4(torch.zeros(2, columns, dtype=torch.int8))


@pytest.mark.parametrize("code", [-9, 8, 127, -128])
def test_codes_outside_the_range_are_refused(code):
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(FormatError, match="outside"):
        pack_int4(codes)
