"""Storage layouts and their inverses, as pure index functions.

Checkpoint layout (compressed-tensors `pack-quantized`): codes [N, K] -> int32 words [N, K / 8]; the
code of column k lies in bits 4 * (k % 8) of word k // 8, stored as q + 8.

Split layout (Triton): bytes [K / S, N, S / 2], two's-complement nibbles. Byte j of row n in span b
has the code of column b S + j in its low nibble and that of column b S + S / 2 + j in its high one:

    span b:  | columns b S .. b S + S/2 - 1 | columns b S + S/2 .. (b+1) S - 1 |
                     low nibbles                     high nibbles

so that a tile of bytes becomes two tiles of codes without moving anything between lanes, either of
them inside one group, and a tile of rows is contiguous in memory. S = min(2 g, 128), or 64 where K
is no multiple of that. Group scales become t [G, N], row units c [N].

Blocked layout (CPU), b = q + 8, rows padded with q = 0 to blocks of 64, in the order of the bytes
that csrc/cpu reads (its kernels say why):

    w4a8    codes [N / 64, K / 4, 2, 64]: byte 4 o + i of half h of step s has b of row 32 h + o and
            column 4 s + i in its low nibble, and that of row 32 h + 16 + o in its high one;
            t [N / 64, G / 2, 64, 2], groups padded to pairs with t = 0
    w4afp8  codes [N / 8, spans, 8, 64]: nibble j of 16-bit word w of a row is column 32 j + w of
            the span of 128, columns padded with q = 0; t [N / 8, G, 8]

With one scale a row t is empty, [0, K]. c [N] is not padded. The fragment layout (Hopper) is in
`fragments.py`.

KV cache layout: pages of KV_PAGE tokens, one KV head after the other. Bytes [2, pages, Hk, KV_PAGE,
D / 2] (0: keys, 1: values): channel j in the low nibble of byte j and channel j + D/2, its partner
under RoPE, in the high one, two's complement. Scale and offset [2, pages, Hk, KV_PAGE, 2], FP16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant_kernels import cpu
from quant_kernels.formats import (
    CODE_MAX,
    CODE_MIN,
    FormatError,
    WeightFormat,
    join_scales,
    split_scales,
)
from quant_kernels.kv4 import KVCodes

CODES_PER_WORD = 8
SPANS = (128, 64)
KV_PAGE = 64
BLOCK_ROWS, ROWS_TOGETHER, BLOCK_SPAN = 64, 8, 128
SCALE_DTYPES = {"lut": torch.float16, "exact": torch.float32, "int8": torch.uint8}  # of t
BLOCKED_SCALE_DTYPES = {
    "lut": torch.float8_e4m3fn,
    "exact": torch.float32,
    "int8": torch.uint8,
}
# Codes that change their layout together: temporaries stay some ten megabytes.
CODES_AT_ONCE = 2**22


@dataclass(frozen=True)
class PackedWeight:
    """A quantized linear as stored: words [N, K / 8] int32, scales [N, G] BF16, and its format."""

    LAYOUT: ClassVar[str] = "checkpoint"
    words: Tensor
    scales: Tensor
    fmt: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        rows, words = self.words.shape
        return rows, words * CODES_PER_WORD


def pack_int4(codes: Tensor) -> Tensor:
    """codes [N, K] int8 in [-8, 7], K a multiple of 8 -> words [N, K / 8] int32."""
    rows, columns = codes.shape
    if columns % CODES_PER_WORD:
        raise FormatError(f"cannot pack codes [{rows}, {columns}]: K must be a multiple of 8")
    if codes.numel() and (int(codes.min()) < CODE_MIN or int(codes.max()) > CODE_MAX):
        raise FormatError("cannot pack codes outside [-8, 7]")
    # Nibble i of a word is code 8 j + i; bit 31 is the sign, so the top nibble wraps as it should.
    words = torch.zeros(rows, columns // CODES_PER_WORD, dtype=torch.int32, device=codes.device)
    for i in range(CODES_PER_WORD):
        words |= (codes[:, i::CODES_PER_WORD].to(torch.int32) - CODE_MIN) << (4 * i)
    return words


def unpack_int4(words: Tensor) -> Tensor:
    """words [N, K / 8] int32 -> codes [N, K] int8 in [-8, 7]. Inverse of `pack_int4`."""
    if words.device.type == "cpu" and cpu.usable():
        return cpu.unpack_int4(words.contiguous(), words.shape[1] * CODES_PER_WORD)
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    return (nibbles + CODE_MIN).to(torch.int8).flatten(1)


@dataclass(frozen=True)
class SplitWeight:
    """A quantized linear in the split layout (module docstring).

    codes [K / S, N, S / 2] uint8; c [N] FP32; t [G, N]: FP16 for lut, uint8 for int8, FP32 for
    exact; empty [0, N] with one scale a row.
    """

    LAYOUT: ClassVar[str] = "split"
    codes: Tensor
    t: Tensor
    c: Tensor
    fmt: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        spans, rows, half = self.codes.shape
        return rows, spans * half * 2


def span_of(columns: int, fmt: WeightFormat) -> int:
    """S, the columns of a span; FormatError where the split layout has none for K = columns."""
    largest = SPANS[0] if fmt.per_channel else min(2 * fmt.group_size, SPANS[0])
    for span in SPANS:
        if span <= largest and columns % span == 0:
            return span
    raise FormatError(
        f"in_features {columns} is not a multiple of {SPANS[-1]}, which the split layout of "
        f"{fmt.label} needs; the reference backend takes it"
    )


def split_weight(weight: PackedWeight) -> SplitWeight:
    """Checkpoint layout -> split layout, some rows at a time."""
    rows, columns = len(weight.words), weight.words.shape[1] * CODES_PER_WORD
    fmt, device = weight.fmt, weight.words.device
    span = span_of(columns, fmt)
    codes = torch.empty(columns // span, rows, span // 2, dtype=torch.uint8, device=device)
    step = max(1, CODES_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = unpack_int4(weight.words[start : start + step]).view(torch.uint8)
        low, high = part.view(len(part), -1, 2, span // 2).unbind(2)  # [rows, K / S, S / 2]
        codes[:, start : start + step] = ((low & 15) | (high << 4)).transpose(0, 1)
    t, c = split_scales(weight.scales, fmt)
    if fmt.per_channel:
        t = t[:, :0]
    t = t.T.contiguous().to(SCALE_DTYPES[fmt.numerics])
    return SplitWeight(codes, t, c.flatten(), fmt)


def join_weight(weight: SplitWeight) -> PackedWeight:
    """Split layout -> checkpoint layout. Inverse of `split_weight`, bit for bit."""
    rows, columns = weight.shape
    words = torch.empty(rows, columns // 8, dtype=torch.int32, device=weight.codes.device)
    step = max(1, CODES_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = weight.codes[:, start : start + step].transpose(0, 1)  # [rows, K / S, S / 2]
        words[start : start + step] = pack_int4(_nibbles(part).reshape(len(part), columns))
    t = weight.t.float().T if len(weight.t) else torch.ones_like(weight.c).unsqueeze(1)
    scales = join_scales(t, weight.c.unsqueeze(1)).contiguous()
    return PackedWeight(words, scales, weight.fmt)


@dataclass(frozen=True)
class BlockedWeight:
    """A quantized linear in the blocked layout (module docstring).

    codes uint8, four dimensions; t uint8 for int8, float8_e4m3fn for lut, FP32 for exact; c [N]
    FP32.
    """

    LAYOUT: ClassVar[str] = "blocked"
    codes: Tensor
    t: Tensor
    c: Tensor
    fmt: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        rows = len(self.c)
        if self.fmt.per_channel:
            return rows, self.t.shape[1]
        if self.fmt.scheme == "w4a8":
            return rows, 4 * self.codes.shape[1]
        return rows, self.t.shape[1] * self.fmt.group_size


def blocked_shapes(
    rows: int, columns: int, fmt: WeightFormat
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of codes and t of a [rows, columns] weight in the blocked layout."""
    blocks, groups = -(-rows // BLOCK_ROWS), fmt.groups(columns)
    if fmt.scheme == "w4a8":
        codes: tuple[int, ...] = (blocks, columns // 4, 2, BLOCK_ROWS)
        t: tuple[int, ...] = (blocks, -(-groups // 2), BLOCK_ROWS, 2)
    else:
        eights = blocks * (BLOCK_ROWS // ROWS_TOGETHER)
        codes = (eights, -(-columns // BLOCK_SPAN), ROWS_TOGETHER, BLOCK_SPAN // 2)
        t = (eights, groups, ROWS_TOGETHER)
    return codes, (0, columns) if fmt.per_channel else t


def block_weight(weight: PackedWeight) -> BlockedWeight:
    """Checkpoint layout -> blocked layout, some rows at a time."""
    (rows, columns), fmt, device = weight.shape, weight.fmt, weight.words.device
    code_shape, t_shape = blocked_shapes(rows, columns, fmt)
    if device.type == "cpu":
        codes = cpu.empty_bytes(*code_shape)
    else:
        codes = torch.empty(code_shape, dtype=torch.uint8, device=device)
    blocks, padded = -(-rows // BLOCK_ROWS), -(-columns // BLOCK_SPAN) * BLOCK_SPAN
    step, eights = max(1, CODES_AT_ONCE // (columns * BLOCK_ROWS)), BLOCK_ROWS // ROWS_TOGETHER
    for start in range(0, blocks, step):
        part = unpack_int4(weight.words[start * BLOCK_ROWS : (start + step) * BLOCK_ROWS])
        count = min(step, blocks - start)
        width = columns if fmt.scheme == "w4a8" else padded
        b = torch.full((count * BLOCK_ROWS, width), -CODE_MIN, dtype=torch.uint8, device=device)
        b[: len(part), :columns] = (part - CODE_MIN).view(torch.uint8)
        if fmt.scheme == "w4a8":  # [blocks, half, nibble, 16, steps, 4]
            b = b.view(count, 2, 2, 16, columns // 4, 4).permute(2, 0, 4, 1, 3, 5)
            codes[start : start + count] = (b[0] | b[1] << 4).reshape(count, *code_shape[1:])
        else:  # [eights, 8, spans, nibble / 2, nibble % 2, 32], a byte has two of a word's nibbles
            b = b.view(count * eights, ROWS_TOGETHER, code_shape[1], 2, 2, 32).permute(
                4, 0, 2, 1, 5, 3
            )
            codes[start * eights : (start + count) * eights] = (b[0] | b[1] << 4).flatten(3)
    t, c = split_scales(weight.scales, fmt)
    if fmt.per_channel:
        t = t.new_empty(t_shape)
    elif fmt.scheme == "w4a8":
        t = _padded(t, blocks * BLOCK_ROWS, 2 * t_shape[1])
        t = t.view(blocks, BLOCK_ROWS, t_shape[1], 2).transpose(1, 2)
    else:
        t = _padded(t, blocks * BLOCK_ROWS, t.shape[1])
        t = t.view(t_shape[0], ROWS_TOGETHER, t_shape[1]).transpose(1, 2)
    return BlockedWeight(
        codes, t.contiguous().to(BLOCKED_SCALE_DTYPES[fmt.numerics]), c.flatten(), fmt
    )


def unblock_weight(weight: BlockedWeight) -> PackedWeight:
    """Blocked layout -> checkpoint layout. Inverse of `block_weight`, bit for bit."""
    (rows, columns), fmt, codes, t = weight.shape, weight.fmt, weight.codes, weight.t
    b = torch.stack((codes & 15, codes >> 4))
    if fmt.scheme == "w4a8":
        b = b.view(2, len(codes), columns // 4, 2, 16, 4).permute(1, 3, 0, 4, 2, 5)
    else:
        b = b.view(2, *codes.shape[:3], 32, 2).permute(1, 3, 2, 5, 0, 4)
    padded = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    q = b.reshape(padded, -1)[:rows, :columns].view(torch.int8) + CODE_MIN
    scales = torch.ones(rows, 1, device=codes.device)
    if not fmt.per_channel:
        scales = t.float().transpose(1, 2).reshape(padded, -1)[:rows, : fmt.groups(columns)]
    return PackedWeight(pack_int4(q), join_scales(scales, weight.c.unsqueeze(1)), fmt)


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """t [N, G] with zeros to [rows, columns]."""
    return torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def pack_kv(rows: KVCodes) -> tuple[Tensor, Tensor]:
    """Rows of the cache, D channels: bytes [..., D / 2] uint8; scale and offset [..., 2] FP16."""
    low, high = rows.codes.view(torch.uint8).chunk(2, dim=-1)
    return (low & 15) | (high << 4), torch.cat((rows.scale, rows.offset), dim=-1)


def unpack_kv(packed: Tensor, scales: Tensor) -> KVCodes:
    """bytes [..., D / 2], scale and offset [..., 2] -> rows of the cache. Inverse of `pack_kv`."""
    scale, offset = scales.chunk(2, dim=-1)
    return KVCodes(_nibbles(packed).flatten(-2), scale, offset)


def _nibbles(packed: Tensor) -> Tensor:
    """bytes [..., B] uint8 -> signed codes [..., 2, B] int8: low nibbles, then high ones."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-2)
