"""Nearest codes, column by column: what `formats.nearest_codes` gives, at a fraction of its time.

A searched midpoint costs 5 to 18 ns a weight. The grids that scale search makes have more structure
than that. With t = m 2^e, m one of E4M3's eight mantissas, products of numerics `lut` are

    P(q, t) = 2^e E4M3(q m),         E4M3(q m) a multiple of 1/8, at most 15 in magnitude

so the midpoints between them, divided by 2^e, are multiples of 1/16, and all y in one cell
(i - 1, i] / 16 have the same nearest code, ties included: they go to the smaller code. A table of
cells for each m does it, with the index i = ceil(16 y). Every other grid is even: there the nearest
code of y = w / s is floor(i / 2) with i = ceil(2 y).

This is exact in FP32, ties and their neighbours included. A boundary B u, for a unit or step u of a
few bits, is an FP32 number; so is B; and w, where it is not B u, is off it by an ulp at least. The
significand of u is below 2, so w / u is off B by more than half an ulp, and is not rounded to B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.formats import (
    CODE_MAX,
    CODE_MIN,
    WeightFormat,
    midpoints,
    round_e4m3,
    split_scales,
)

E4M3_MANTISSAS = tuple(1 + i / 8 for i in range(8))
CELLS_PER_UNIT = 16
# Cells reach from -15 to 15.
LAST_CELL = 15 * CELLS_PER_UNIT
CELLS = 2 * LAST_CELL + 1


class EvenGrid:
    """Levels q * s, s [N, G]: all numerics but grouped `lut`."""

    def __init__(self, scales: Tensor, fmt: WeightFormat) -> None:
        t, c = split_scales(scales, fmt)
        self._steps = (t * c).T.contiguous()  # [G, N]
        self._half_steps = self._steps / 2
        self._values = torch.empty_like(self._steps[0])

    def round(self, w: Tensor, group: int, codes: Tensor) -> Tensor:
        """w [N] FP32 -> the nearest levels [N], valid until the next call; codes [N] is written."""
        i = torch.div(w, self._half_steps[group], out=self._values).ceil_()
        codes.copy_(i.mul_(0.5).floor_().clamp_(CODE_MIN, CODE_MAX))
        return self._values.mul_(self._steps[group])


class ProductGrid:
    """Levels E4M3(q * t) * c: grouped `lut`. scales [N, G] lie on the format's grid."""

    def __init__(self, scales: Tensor, fmt: WeightFormat) -> None:
        t, c = split_scales(scales, fmt)
        t = t.T.contiguous()  # [G, N]
        mantissas = torch.frexp(t).mantissa * 2
        self._units = t / mantissas * c.T  # [G, N]: 2^e c
        self._cells = self._units / CELLS_PER_UNIT
        # Where the table of a mantissa has y = 0.
        self._first = ((mantissas - 1) * 8).int() * CELLS + LAST_CELL
        self._codes, self._levels = (table.flatten() for table in cell_tables(t.device))
        self._index = torch.empty_like(self._first[0])
        self._values = torch.empty_like(self._units[0])

    def round(self, w: Tensor, group: int, codes: Tensor) -> Tensor:
        """As `EvenGrid.round`."""
        i = torch.div(w, self._cells[group], out=self._values).ceil_().clamp_(-LAST_CELL, LAST_CELL)
        index = self._index.copy_(i).add_(self._first[group])
        torch.index_select(self._codes, 0, index, out=codes)
        torch.index_select(self._levels, 0, index, out=self._values)
        return self._values.mul_(self._units[group])


def true_grid(scales: Tensor, fmt: WeightFormat) -> EvenGrid | ProductGrid:
    """The levels that scales [N, G] span; they are above 0 and on the format's grid."""
    even = fmt.numerics != "lut" or fmt.per_channel
    return EvenGrid(scales, fmt) if even else ProductGrid(scales, fmt)


def cell_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every mantissa and cell the nearest code, int8, and E4M3(q m), FP32: [8, CELLS] each."""
    mantissas = torch.tensor(E4M3_MANTISSAS, device=device).unsqueeze(1)
    q = torch.arange(CODE_MIN, CODE_MAX + 1, dtype=torch.float32, device=device)
    levels = round_e4m3(mantissas * q)  # [8, 16]
    ends = torch.arange(-LAST_CELL, LAST_CELL + 1, device=device) / CELLS_PER_UNIT
    index = torch.searchsorted(midpoints(levels), ends.expand(len(levels), -1).contiguous())
    return (index + CODE_MIN).to(torch.int8), levels.gather(1, index)
