"""What a number is: codes, scale grids and `effective_weight`, the one definition of numerics.

Notation: W [N, K] = [out_features, in_features], a group is g consecutive k, G = K / g.
A weight is stored as an INT4 code q in [-8, 7] and one BF16 scale s per group. What a kernel
multiplies is not always q * s; it is

    W^[n, k] = P(q[n, k], t[n, G(k)]) * c[n]            P: the product, in the operand's type
    s[n, G]  = t[n, G] * c[n]                           t: group scale, c: row unit (FP32)

| scheme | numerics | t | P(q, t) | c |
|---|---|---|---|---|
| w4afp8 | lut   | E4M3, at most 56, one group a row at 56 | E4M3(q * t) | s_max / 56 |
| w4afp8 | exact | s itself (applied to FP32 partial sums) | q * t       | 1          |
| w4a8   | int8  | integer 1..16, one group a row at 16    | q * t       | s_max / 16 |
| any    | any, one group a row (per channel) | 1           | q           | s          |

`lut` is what Hopper mixed-input GEMMs with a lookup table multiply (CUTLASS example 55, vLLM's
W4A8-FP8 path): the group scale is an E4M3 number and so is every product. 56 is the largest t whose
product with -8 still fits E4M3 (448), and it is the anchor by which vLLM's loader recovers t and c
from the BF16 scales in the file. `int8` is a two-level integer scale: |q * t| <= 128 fits INT8, so
one INT32 accumulator runs over all of K.

Row units are kept to four significant bits. Then t * c is exact in BF16, so the file says exactly
what the kernel multiplies, and t, c follow from s without loss (`split_scales`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels import cpu

CODE_MIN, CODE_MAX = -8, 7
E4M3_MAX = 448.0
INT8_MAX = 127.0
LUT_ANCHOR = 56.0
INT8_ANCHOR = 16.0
# The smallest group scale in use, 224 times below the anchor: a group that would want less hardly
# counts in its row. Products stay in E4M3's normal range, which ends at 2^-6.
LUT_SCALE_MIN = 0.25
ROW_UNIT_BITS = 4
GROUP_SIZES = (32, 64, 128)
PER_CHANNEL = -1
NUMERICS = {"w4afp8": ("lut", "exact"), "w4a8": ("int8",)}


class FormatError(ValueError):
    """A shape or a number that the format cannot hold; the message says what would fit."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one linear are stored and multiplied.

    scheme: "w4afp8" (INT4 x FP8 E4M3) or "w4a8" (INT4 x INT8).
    numerics: "lut" or "exact" for w4afp8, "int8" for w4a8 (the table in the module docstring).
    group_size: 32, 64, 128, or -1 for one scale per output channel.
    """

    scheme: str
    group_size: int
    numerics: str

    def __post_init__(self) -> None:
        if self.scheme not in NUMERICS:
            raise FormatError(f"scheme {self.scheme!r} is unknown; known: {', '.join(NUMERICS)}")
        if self.numerics not in NUMERICS[self.scheme]:
            known = ", ".join(NUMERICS[self.scheme])
            raise FormatError(f"{self.scheme} has no numerics {self.numerics!r}; it has: {known}")
        if self.group_size != PER_CHANNEL and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise FormatError(
                f"group size {self.group_size} is not supported; use {sizes}, "
                f"or {PER_CHANNEL} for one scale per output channel"
            )

    @property
    def activation(self) -> str:
        """The activations' type: "fp8" (E4M3) or "int8", per token, dynamic, symmetric."""
        return "fp8" if self.scheme == "w4afp8" else "int8"

    @property
    def per_channel(self) -> bool:
        return self.group_size == PER_CHANNEL

    @property
    def anchor(self) -> float | None:
        """The group scale t that at least one group of every row has; None where t is free."""
        if self.per_channel or self.numerics == "exact":
            return None
        return LUT_ANCHOR if self.numerics == "lut" else INT8_ANCHOR

    @property
    def label(self) -> str:
        """For people: "w4afp8 g64 lut", "w4a8 channel int8"."""
        group = "channel" if self.per_channel else f"g{self.group_size}"
        return f"{self.scheme} {group} {self.numerics}"

    def check(self, out_features: int, in_features: int, name: str = "weight") -> None:
        """Raise FormatError, with advice, where a [N, K] weight does not fit the format."""
        shape = f"{name} [{out_features}, {in_features}]"
        if in_features % 8:
            raise FormatError(f"{shape}: in_features must be a multiple of 8 to pack INT4 codes")
        if not self.per_channel and in_features % self.group_size:
            fits = [g for g in GROUP_SIZES if in_features % g == 0]
            advice = " or ".join([*(str(g) for g in reversed(fits)), "-1 (per channel)"])
            raise FormatError(
                f"{shape}: group size {self.group_size} leaves a ragged group of "
                f"{in_features % self.group_size} columns; use {advice}, or ignore this layer"
            )

    def groups(self, in_features: int) -> int:
        """G, the number of scales in a row."""
        return 1 if self.per_channel else in_features // self.group_size


def every_format() -> list[WeightFormat]:
    """All supported weight formats."""
    return [
        WeightFormat(scheme, group_size, numerics)
        for scheme, known in NUMERICS.items()
        for numerics in known
        for group_size in (*GROUP_SIZES, PER_CHANNEL)
    ]


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 value (ties to even, saturating at +-448), as FP32; any shape.

    `torch.float8_e4m3fn` rounds to nearest even but turns overflow into NaN, hence the clamp.
    """
    return e4m3_values(x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn))


def e4m3_values(codes: Tensor) -> Tensor:
    """float8_e4m3fn codes [...] -> their values, FP32; exact."""
    if codes.device.type == "cpu" and cpu.usable():
        return cpu.e4m3_to_float(codes.contiguous())
    return codes.float()


def round_row_unit(c: Tensor) -> Tensor:
    """Round positive FP32 numbers to four significant bits (to nearest)."""
    mantissa, exponent = torch.frexp(c.float())  # mantissa in [0.5, 1)
    steps = float(2**ROW_UNIT_BITS)
    return torch.ldexp((mantissa * steps).round() / steps, exponent)


def join_scales(t: Tensor, c: Tensor) -> Tensor:
    """Group scales t [N, G] and row units c [N, 1] -> stored scales s [N, G], BF16."""
    return (t.float() * c.float()).to(torch.bfloat16)


def split_scales(scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Stored scales s [N, G] -> group scales t [N, G] and row units c [N, 1], both FP32.

    Inverse of `join_scales` for scales on the format's grid. Other scales are rounded to the grid,
    for `lut` as vLLM's loader does it: c = s_max / 56, t = E4M3(s / c). `on_grid` tells them apart.
    """
    s = scales.float()
    anchor = fmt.anchor
    if anchor is None:
        if fmt.per_channel:
            return torch.ones_like(s), s
        return s, torch.ones_like(s[:, :1])
    c = s.amax(dim=1, keepdim=True) / anchor
    c = torch.where(c > 0, c, torch.ones_like(c))
    ratio = s / c
    t = round_e4m3(ratio) if fmt.numerics == "lut" else ratio.round()
    return t, c


def on_grid(scales: Tensor, fmt: WeightFormat) -> bool:
    """True when the stored scales [N, G] survive `split_scales` and `join_scales` unchanged."""
    t, c = split_scales(scales, fmt)
    return torch.equal(join_scales(t, c), scales.to(torch.bfloat16))


def product_levels(t: Tensor, fmt: WeightFormat) -> Tensor:
    """P(q, t) for all 16 codes: group scales t [...] -> levels [..., 16], FP32, ascending in q."""
    q = torch.arange(CODE_MIN, CODE_MAX + 1, dtype=torch.float32, device=t.device)
    product = t.float().unsqueeze(-1) * q
    return round_e4m3(product) if fmt.numerics == "lut" else product


def kernel_operand(codes: Tensor, scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """The weight as the tensor core sees it, and the row unit that the epilogue applies.

    codes [N, K] int8 in [-8, 7], scales [N, G] as stored -> P(q, t) [N, K] FP32, c [N, 1] FP32.
    For `lut` and `int8` the operand is exact in E4M3 and INT8 (so also in BF16); for grouped
    `exact` it is q * s in FP32, the sum of what the kernel scales group by group.
    """
    rows, columns = codes.shape
    groups = fmt.groups(columns)
    if scales.shape != (rows, groups):
        raise FormatError(
            f"codes [{rows}, {columns}] with {fmt} need scales [{rows}, {groups}], "
            f"got {list(scales.shape)}"
        )
    t, c = split_scales(scales, fmt)
    product = codes.float().view(rows, groups, -1) * t.unsqueeze(-1)
    if fmt.numerics == "lut" and not fmt.per_channel:
        # |q * t| <= 8 * 56 = 448: nothing saturates, so this is `round_e4m3` without its clamp.
        product = e4m3_values(product.to(torch.float8_e4m3fn))
    return product.view(rows, columns), c


def effective_weight(codes: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """The weight that a kernel really multiplies: W^ [N, K], FP32.

    codes [N, K] int8 in [-8, 7]; scales [N, G] as stored (BF16 or FP32 with BF16 values).
    """
    operand, c = kernel_operand(codes, scales, fmt)
    return operand * c


def nearest_codes(weight: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Round to nearest on the true grid: codes [N, K] int8 that minimize each |W - W^|.

    weight [N, K]; scales [N, G] as stored. Ties go to the smaller code.
    """
    rows, columns = weight.shape
    t, c = split_scales(scales, fmt)
    levels = product_levels(t, fmt) * c.unsqueeze(-1)  # [N, G, 16]
    grouped = weight.float().reshape(rows, fmt.groups(columns), -1).contiguous()
    return (
        (torch.searchsorted(midpoints(levels), grouped) + CODE_MIN)
        .view(rows, columns)
        .to(torch.int8)
    )


def midpoints(levels: Tensor) -> Tensor:
    """Decision boundaries between neighbouring levels: [..., 16] -> [..., 15]."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def bits_per_weight(in_features: int, fmt: WeightFormat) -> float:
    """Stored bits per weight: 4 for the code, and a BF16 scale per group."""
    return 4.0 + 16.0 * fmt.groups(in_features) / in_features
