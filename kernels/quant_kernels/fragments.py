"""Fragment layout (Hopper): codes lie as the threads of a WGMMA hold them.

The first operand of an MMA, [64, 32] of bytes, is held by a warpgroup's 128 threads; thread
t = 32 w + 4 r + c has rows 16 w + r and 16 w + 8 + r, and of each the columns 4 c .. 4 c + 3 and
16 + 4 c .. 16 + 4 c + 3 (PTX ISA, wgmma; drawn in csrc/cuda/convert.cuh). So a thread's codes for
64 columns are 16 bytes, read at once:

    codes [N / 64, K / 128, 2, 128, 16]   64 rows, 128 columns, half of them, thread, its bytes
    bytes: four 32-bit words, (step of 32 columns, row or row + 8) = (0, 0), (0, 1), (1, 0), (1, 1)

A word has eight codes of one row: low[i] of column 4 c + i and high[i] of column 16 + 4 c + i,

    int8, a scale a row   byte i: q(low[i]) in its upper nibble, q(high[i]) in its lower one
    int8 in groups        byte i: q(low[i]) + 8 in its lower nibble, q(high[i]) + 8 in its upper one
    FP8, but for lut      byte i: |q(low[i])| in bits 0-2, its sign in bit 7, |q(high[i])| in bits
                          4-6, whose sign is bit 3 of byte i + 1 (of 0 for 3)
      with a code of -8   likewise, with |q| - 1 where q is negative
    lut                   nibble i: |q(low[i])|, nibble 4 + i: |q(high[i])|, three bits each, and
                          signs in bits 8 i + 7 (low) and 8 i + 3 (high)
      with a code of -8   nibble i: q(low[i]), nibble 4 + i: q(high[i]), two's complement with bits
                          2 and 3 exchanged

Rows and columns are padded with q = 0. Kernels for codes in [-7, 7] take fewer instructions, so the
dtype says whether there is a -8: uint8 where there is none, int32 words [..., 128, 4] where there
may be. int8 has room for all and is uint8.

    t [N / 64, K / 128, 128 / g, 64]: E4M3 for lut, uint8 for int8, BF16 for exact; empty, with
    a scale a row, [0, K, 1, 1].  c [N] FP32, not padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant_kernels.formats import CODE_MIN, FormatError, WeightFormat, join_scales, split_scales
from quant_kernels.packing import CODES_AT_ONCE, PackedWeight, pack_int4, unpack_int4

FRAGMENT_ROWS, FRAGMENT_COLUMNS = 64, 128
THREADS = 128
SCALE_DTYPES = {"lut": torch.float8_e4m3fn, "exact": torch.bfloat16, "int8": torch.uint8}
COLUMNS_MULTIPLE = 16  # activations are copied in rows of 16 bytes


@dataclass(frozen=True)
class FragmentWeight:
    """A quantized linear in the fragment layout (module docstring)."""

    LAYOUT: ClassVar[str] = "fragment"
    codes: Tensor
    t: Tensor
    c: Tensor
    fmt: WeightFormat
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return len(self.c), self.columns

    @property
    def has_minus_eight(self) -> bool:
        """Whether the kernel must expect codes of -8 (always so for int8, where it is free)."""
        return self.codes.dtype == torch.int32 or self.fmt.scheme == "w4a8"


def fragment_shapes(
    rows: int, columns: int, fmt: WeightFormat
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The shapes of codes (without their last dimension, 16 or 4) and t."""
    blocks = -(-rows // FRAGMENT_ROWS), -(-columns // FRAGMENT_COLUMNS)
    t = (0, columns, 1, 1)
    if not fmt.per_channel:
        t = (*blocks, FRAGMENT_COLUMNS // fmt.group_size, FRAGMENT_ROWS)
    return (*blocks, 2, THREADS), t


def fragment_weight(weight: PackedWeight) -> FragmentWeight:
    """Checkpoint layout -> fragment layout, some rows at a time.

    Raises FormatError where K is no multiple of 16.
    """
    (rows, columns), fmt = weight.shape, weight.fmt
    if columns % COLUMNS_MULTIPLE:
        raise FormatError(
            f"in_features {columns} is not a multiple of {COLUMNS_MULTIPLE}, which the fragment "
            f"layout needs; the reference backend takes it"
        )
    code_shape, t_shape = fragment_shapes(rows, columns, fmt)
    parts, minus_eight = [], False
    step = max(1, CODES_AT_ONCE // (columns * FRAGMENT_ROWS)) * FRAGMENT_ROWS
    for start in range(0, rows, step):
        codes = unpack_int4(weight.words[start : start + step])
        minus_eight = minus_eight or bool((codes == CODE_MIN).any())
        parts.append(codes)
    encode = encoding(fmt, minus_eight)
    words = torch.empty(*code_shape, 4, dtype=torch.int32, device=weight.words.device)
    for i, codes in enumerate(parts):
        low, high = _to_threads(_padded(codes, code_shape[1] * FRAGMENT_COLUMNS))
        start = i * step // FRAGMENT_ROWS
        words[start : start + len(low)] = _signed(encode(low.long(), high.long()))
    t, c = split_scales(weight.scales, fmt)
    if fmt.per_channel:
        t = t.new_empty(t_shape)
    else:
        blocks, groups = t_shape[0], t_shape[1] * t_shape[2]
        t = torch.nn.functional.pad(t, (0, groups - t.shape[1], 0, blocks * FRAGMENT_ROWS - len(t)))
        t = t.view(blocks, FRAGMENT_ROWS, t_shape[1], t_shape[2]).permute(0, 2, 3, 1)
    if fmt.scheme == "w4a8" or not minus_eight:
        words = words.view(torch.uint8)
    t = t.contiguous().to(SCALE_DTYPES[fmt.numerics])
    if words.is_cuda:
        # A GEMM reads its weight before it waits for the kernel launched ahead of it, which may be
        # the one that wrote it.
        torch.cuda.synchronize(words.device)
    return FragmentWeight(words, t, c.flatten(), fmt, columns)


def unfragment_weight(weight: FragmentWeight) -> PackedWeight:
    """Fragment layout -> checkpoint layout. Inverse of `fragment_weight`, bit for bit."""
    (rows, columns), fmt = weight.shape, weight.fmt
    words = weight.codes.view(torch.int32).long() & 0xFFFFFFFF
    low, high = decoding(fmt, weight.codes.dtype == torch.int32)(words)
    codes = _from_threads(low, high)[:rows, :columns].to(torch.int8)
    if fmt.per_channel:
        t = torch.ones_like(weight.c).unsqueeze(1)
    else:
        t = weight.t.float().permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        t = t[:rows, : fmt.groups(columns)]
    scales = join_scales(t, weight.c.unsqueeze(1)).contiguous()
    return PackedWeight(pack_int4(codes), scales, fmt)


def encoding(fmt: WeightFormat, minus_eight: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """low, high [..., 4] codes (int64) -> words [...] (int64, 32 bits), as the format is stored."""
    return _CODINGS[_coding(fmt, minus_eight)][0]


def decoding(fmt: WeightFormat, minus_eight: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Words [...] -> low, high [..., 4]. Inverse of `encoding`."""
    return _CODINGS[_coding(fmt, minus_eight)][1]


def _coding(fmt: WeightFormat, minus_eight: bool) -> str:
    if fmt.scheme == "w4a8":
        return "halves" if fmt.per_channel else "unsigned"
    scaled = fmt.numerics == "lut" and not fmt.per_channel
    return ("lookup" if scaled else "raw") + ("_all" if minus_eight else "")


def _bits(x: Tensor, *shifts: int) -> Tensor:
    """x [..., 4] -> sum of x[i] << shifts[i]."""
    return (x << torch.tensor(shifts, device=x.device)).sum(-1)


def _fields(words: Tensor, mask: int, *shifts: int) -> Tensor:
    return (words.unsqueeze(-1) >> torch.tensor(shifts, device=words.device)) & mask


def _encode_halves(low: Tensor, high: Tensor) -> Tensor:
    return _bits(low & 15, 4, 12, 20, 28) + _bits(high & 15, 0, 8, 16, 24)


def _decode_halves(words: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _fields(words, 15, 4, 12, 20, 28), _fields(words, 15, 0, 8, 16, 24)
    return (low ^ 8) - 8, (high ^ 8) - 8


def _encode_unsigned(low: Tensor, high: Tensor) -> Tensor:
    return _bits(low - CODE_MIN, 0, 8, 16, 24) + _bits(high - CODE_MIN, 4, 12, 20, 28)


def _decode_unsigned(words: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _fields(words, 15, 0, 8, 16, 24), _fields(words, 15, 4, 12, 20, 28)
    return low + CODE_MIN, high + CODE_MIN


def _encode_raw(low: Tensor, high: Tensor) -> Tensor:
    return _raw_sizes(low.abs(), high.abs()) + _raw_signs(low, high)


def _decode_raw(words: Tensor) -> tuple[Tensor, Tensor]:
    low, high, low_negative, high_negative = _raw_fields(words)
    return low * (1 - 2 * low_negative), high * (1 - 2 * high_negative)


def _encode_raw_all(low: Tensor, high: Tensor) -> Tensor:
    # |q| - 1 of a negative q is ~q.
    return _raw_sizes(low ^ -(low < 0).long(), high ^ -(high < 0).long()) + _raw_signs(low, high)


def _decode_raw_all(words: Tensor) -> tuple[Tensor, Tensor]:
    low, high, low_negative, high_negative = _raw_fields(words)
    return low ^ -low_negative, high ^ -high_negative


def _raw_sizes(low: Tensor, high: Tensor) -> Tensor:
    return _bits(low, 0, 8, 16, 24) + _bits(high, 4, 12, 20, 28)


def _raw_signs(low: Tensor, high: Tensor) -> Tensor:
    return _bits((low < 0).long(), 7, 15, 23, 31) + _bits((high < 0).long(), 11, 19, 27, 3)


def _raw_fields(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _fields(words, 7, 0, 8, 16, 24), _fields(words, 7, 4, 12, 20, 28)
    return *sizes, _fields(words, 1, 7, 15, 23, 31), _fields(words, 1, 11, 19, 27, 3)


def _encode_lookup(low: Tensor, high: Tensor) -> Tensor:
    word = _bits(low.abs(), 0, 4, 8, 12) + _bits(high.abs(), 16, 20, 24, 28)
    return word + _bits((low < 0).long(), 7, 15, 23, 31) + _bits((high < 0).long(), 3, 11, 19, 27)


def _decode_lookup(words: Tensor) -> tuple[Tensor, Tensor]:
    low = _fields(words, 7, 0, 4, 8, 12) * (1 - 2 * _fields(words, 1, 7, 15, 23, 31))
    high = _fields(words, 7, 16, 20, 24, 28) * (1 - 2 * _fields(words, 1, 3, 11, 19, 27))
    return low, high


def _encode_lookup_all(low: Tensor, high: Tensor) -> Tensor:
    return _bits(_exchanged(low), 0, 4, 8, 12) + _bits(_exchanged(high), 16, 20, 24, 28)


def _decode_lookup_all(words: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _fields(words, 15, 0, 4, 8, 12), _fields(words, 15, 16, 20, 24, 28)
    return (_exchanged(low) ^ 8) - 8, (_exchanged(high) ^ 8) - 8


def _exchanged(nibbles: Tensor) -> Tensor:
    """The lowest four bits, bits 2 and 3 exchanged."""
    return nibbles & 3 | (nibbles & 4) << 1 | (nibbles & 8) >> 1


_CODINGS = {
    "halves": (_encode_halves, _decode_halves),
    "unsigned": (_encode_unsigned, _decode_unsigned),
    "raw": (_encode_raw, _decode_raw),
    "raw_all": (_encode_raw_all, _decode_raw_all),
    "lookup": (_encode_lookup, _decode_lookup),
    "lookup_all": (_encode_lookup_all, _decode_lookup_all),
}


def _padded(codes: Tensor, columns: int) -> Tensor:
    """codes [n, K] with zeros to whole fragments."""
    rows = -(-len(codes) // FRAGMENT_ROWS) * FRAGMENT_ROWS
    return torch.nn.functional.pad(codes, (0, columns - codes.shape[1], 0, rows - len(codes)))


# Dimensions of [rows, columns]: fragment, w, h, r; block, half, step, low or high, c, i.
_ROW_DIMS, _COLUMN_DIMS = (4, 2, 8), (2, 2, 2, 4, 4)


def _to_threads(codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes [64 F, 128 B] -> low, high [F, B, 2, 128, 4 words, 4]."""
    x = codes.view(-1, *_ROW_DIMS, codes.shape[1] // FRAGMENT_COLUMNS, *_COLUMN_DIMS)
    x = x.permute(7, 0, 4, 5, 1, 3, 8, 6, 2, 9)  # low or high; F, B, half, w, r, c, step, h, i
    x = x.reshape(2, x.shape[1], x.shape[2], 2, THREADS, 4, 4)
    return x[0], x[1]


def _from_threads(low: Tensor, high: Tensor) -> Tensor:
    """Inverse of `_to_threads`."""
    fragments, blocks = low.shape[:2]
    x = torch.stack((low, high)).view(2, fragments, blocks, 2, 4, 8, 4, 2, 2, 4)
    x = x.permute(1, 4, 8, 5, 2, 3, 7, 0, 6, 9)
    return x.reshape(fragments * FRAGMENT_ROWS, blocks * FRAGMENT_COLUMNS)


def _signed(words: Tensor) -> Tensor:
    """32 bits of an int64 as int32."""
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)
