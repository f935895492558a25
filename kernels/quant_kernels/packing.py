"""Storage layouts and their inverses, as pure index functions.

Checkpoint layout (compressed-tensors `pack-quantized`): codes [N, K] -> int32 words [N, K / 8]; the
code of column k lies in bits 4 * (k % 8) of word k // 8, stored as q + 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels import cpu
from quant_kernels.formats import CODE_MAX, CODE_MIN, FormatError, WeightFormat

CODES_PER_WORD = 8


@dataclass(frozen=True)
class PackedWeight:
    """A quantized linear as stored: words [N, K / 8] int32, scales [N, G] BF16, and its format."""

    words: Tensor
    scales: Tensor
    fmt: WeightFormat


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
