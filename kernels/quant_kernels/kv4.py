"""What a number of the INT4 KV cache is, and what attention over such numbers means: `kv4`.

A row is one token of one KV head: x [D], a key (after RoPE and its scale) or a value. With codes q
and a scale s and an offset o of their own,

    asymmetric:  s = F((max x - min x) / 15.5),  o = F((max x + min x) / 2 + s / 2)
    symmetric:   s = F(-x_e / 8),  o = 0                            x_e: the x of largest |x|
    both:        q = clamp(round((x - o) / s), -8, 7)
    x^ = s q + o                         F: to FP16, round: to the nearest integer, ties to even

s and o are rounded first and the codes are computed from them, so what is stored is what was
rounded against. FP16 and not BF16: an offset's rounding moves every element of the row the same
way, and keys and values, hundreds at most, are far from FP16's largest number, 65504.

The codes are centred: an offset is the middle of its row, and what the codes add to it has no
common part. Products of codes then cancel little, which the short accumulators of FP8 tensor cores
(about 14 bits on Hopper) need, and P rounded to E4M3 meets 4.6 s in the root mean square instead of
the 8.8 s of codes from 0 to 15.

The range spans 15.5 steps and not 15: its ends are a quarter of a step beyond the outer levels, no
element is further than s / 2 from its level, and the step is smaller. A symmetric scale has the
sign that puts the largest element on -8, the code without a counterpart, so nothing near it is cut
off. Relative RMS errors of 20,000 random rows, D = 64 / 128:

| rows | range/15 | /15.5 | /16 | absmax/7 | absmax/7.5 | absmax/8, signed |
|---|---|---|---|---|---|---|
| Gaussian | 9.0 / 10.0% | 8.8 / 9.7% | 8.8 / 9.6% | 10.8 / 11.7% | 10.3 / 11.1% | 9.5 / 10.3% |
| log-normal | 11.7 / 14.6% | 10.4 / 12.7% | 11.5 / 14.0% | 22 / 28% | 21 / 26% | 19.6 / 24.7% |

A row of equal numbers has s = 0 and is exact to FP16; a row of zeros is exact. A row that holds NaN
or Inf, or whose s or o FP16 does not reach, becomes NaN or Inf as a whole.

Attention needs no x^: `reference_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels.formats import FormatError

# Measured: the tables in the module docstring.
STEPS = 15.5  # in the range of an asymmetric row
CODES = (-8, 7)
CENTRE = -0.5  # of the codes
SIGNED_STEPS = 8.0  # from zero to the largest element of a symmetric row
STORED = torch.float16


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored. symmetric: no offset."""

    bits: int = 4
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise FormatError(f"a KV cache of {self.bits} bits is not supported; only 4 are")

    @property
    def label(self) -> str:
        """For people: "kv4 asymmetric"."""
        return f"kv{self.bits} {'symmetric' if self.symmetric else 'asymmetric'}"

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per element of a key or value: the code, and the row's scale and offset."""
        return self.bits + (16 if self.symmetric else 32) / head_dim


@dataclass(frozen=True)
class KVCodes:
    """Rows of keys or values: codes [..., D] int8; scale and offset [..., 1] FP16."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def quantize_kv(x: Tensor, fmt: KVFormat) -> KVCodes:
    """x [..., D], any float dtype -> codes with one scale and offset a row; computed in FP32."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # NaN stays NaN
    if fmt.symmetric:
        extreme = torch.where(high > -low, high, low)
        scale = (-extreme / SIGNED_STEPS).to(STORED)
        offset = torch.zeros_like(scale)
    else:
        scale = ((high - low) / STEPS).to(STORED)
        offset = ((high + low) / 2 - CENTRE * scale.float()).to(STORED)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = ((x - offset.float()) / step).round_().clamp_(*CODES)
    return KVCodes(codes.nan_to_num_(0.0).to(torch.int8), scale, offset)


def dequantize_kv(rows: KVCodes) -> Tensor:
    """What the codes stand for: x^ [..., D], FP32."""
    return rows.codes.float() * rows.scale.float() + rows.offset.float()
