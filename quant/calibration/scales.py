"""Which scales: absmax, or a search for the least squared error on the format's true grid.

Per output row n, with codes rounded to nearest on the grid that the scales span,

    minimize over (c, t)   sum_k h[k] * (W[n, k] - W^[n, k])^2

    "absmax"   no search: the range [-8, 7] just covers max|W| of the group (scale max|W| / 7.5)
    "mse"      h = 1
    "hessian"  h[k] = mean(x[k]^2), the activations' second moments: the diagonal of the Hessian

A row's groups share the unit c, and one of them sits at the anchor (`formats.py`), so the search is
nested: a few units around the one that the row's largest scale asks for, and for each of them every
admissible t of every group.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant.calibration.grid import CELLS_PER_UNIT, E4M3_MANTISSAS, LAST_CELL, cell_tables
from quant.passes import SCALE_SEARCHES
from quant_kernels import cpu
from quant_kernels.cpu_rounding import group_errors
from quant_kernels.formats import (
    CODE_MAX,
    CODE_MIN,
    INT8_ANCHOR,
    LUT_ANCHOR,
    LUT_SCALE_MIN,
    WeightFormat,
    effective_weight,
    join_scales,
    nearest_codes,
    round_e4m3,
    round_row_unit,
)

# A scale of max|W| / HALF_RANGE clips at most half a step, and only at the positive end.
HALF_RANGE = (CODE_MAX - CODE_MIN) / 2
# Clipping below half of the range never pays for 4 bits.
SMALLEST_SHRINK = 0.5
# Largest scale tried, relative to absmax: covers max|W| with the positive end, code 7.
LARGEST_SHRINK = 1.08
FREE_STEPS = 24
TINY = 1e-8
# Times a number of four significant bits, rounded to four again: the one below, itself, the next.
NEIGHBOURING_UNITS = (15 / 16, 1.0, 13 / 12)
# Weights that are searched at a time, in whole rows: what lies between stays in cache.
WEIGHTS_AT_ONCE = 1 << 20


def choose_scales(
    weight: Tensor, fmt: WeightFormat, method: str, second_moments: Tensor | None = None
) -> Tensor:
    """Scales for weight [N, K]: stored scales [N, G] BF16, on fmt's grid.

    second_moments [K]: mean(x[k]^2) over the calibration tokens; needed by method "hessian".
    """
    if method not in SCALE_SEARCHES:
        raise ValueError(f"scale search {method!r} is unknown; known: {', '.join(SCALE_SEARCHES)}")
    if method == "hessian" and second_moments is None:
        raise ValueError("scale search 'hessian' needs the activations' second moments")
    importance = torch.ones(weight.shape[1], device=weight.device)
    if method == "hessian":
        assert second_moments is not None
        # A channel that calibration never excites still gets a say: 1e-3 of the mean.
        importance = second_moments.float()
        importance = importance + importance.mean().clamp_min(TINY) * 1e-3
    rows = [
        _choose(part.float(), importance, fmt, search=method != "absmax")
        for part in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1]))
    ]
    return torch.cat(rows)


def _choose(weight: Tensor, importance: Tensor, fmt: WeightFormat, search: bool) -> Tensor:
    groups = fmt.groups(weight.shape[1])
    w = weight.reshape(len(weight), groups, -1)  # [N, G, g]
    full = (w.abs().amax(dim=-1) / HALF_RANGE).clamp_min(TINY)  # [N, G], the absmax scales
    errors = _SquaredErrors(w, importance.view(groups, -1))
    if fmt.anchor is None:
        scales = _search_free(errors, full) if search else full
        one = torch.ones_like(full[:, :1])
        return join_scales(scales, one)
    best_c = round_row_unit(full.amax(dim=1, keepdim=True) / fmt.anchor)
    best_t = _nearest_group_scale(full / best_c, fmt)
    best_t.scatter_(1, full.argmax(dim=1, keepdim=True), fmt.anchor)
    if not search:
        return join_scales(best_t, best_c)
    absmax = join_scales(best_t, best_c)
    rounded = effective_weight(nearest_codes(weight, absmax, fmt), absmax, fmt)
    best_error = ((weight - rounded).square() * importance).sum(dim=1, keepdim=True)
    free = _search_free(errors, full)
    wish = round_row_unit(free.amax(dim=1, keepdim=True) / fmt.anchor)
    for factor in NEIGHBOURING_UNITS:
        c = round_row_unit(wish * factor)
        t, error = _search_groups(errors, c, full, fmt)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_t, best_c = torch.where(better, t, best_t), torch.where(better, c, best_c)
    return join_scales(best_t, best_c)


class _SquaredErrors:
    """sum h (w - nearest level * unit)^2 by group, for w [N, G, g] and h [G, g]."""

    def __init__(self, w: Tensor, h: Tensor) -> None:
        self._w, self._h = w.contiguous(), h
        self._in_one_pass = w.device.type == "cpu" and cpu.usable()
        if self._in_one_pass:
            return
        # Memory that is fetched anew from the system for every candidate costs more than the work.
        self._y, self._nearest = torch.empty_like(w), torch.empty_like(w)
        self._cell = torch.empty(w.numel(), dtype=torch.int32, device=w.device)
        self._tables = cell_tables(w.device)[1]

    def of(self, unit: Tensor, mantissa: float | None = None) -> Tensor:
        """For unit [N, G]: [N, G]. Levels are the codes q, or E4M3(q mantissa)."""
        if self._in_one_pass:
            levels = None if mantissa is None else _product_sizes(mantissa)
            return group_errors(self._w, self._h, unit, levels)
        y = torch.div(self._w, unit.unsqueeze(-1), out=self._y)
        if mantissa is None:
            nearest = torch.round(y, out=self._nearest).clamp_(CODE_MIN, CODE_MAX)
        else:
            nearest = torch.mul(y, CELLS_PER_UNIT, out=self._nearest).ceil_()
            nearest.clamp_(-LAST_CELL, LAST_CELL).add_(LAST_CELL)
            self._cell.copy_(nearest.view(-1))
            levels = self._tables[E4M3_MANTISSAS.index(mantissa)]
            torch.index_select(levels, 0, self._cell, out=nearest.view(-1))
        return (y.sub_(nearest).square_().mul_(self._h)).sum(dim=-1) * unit.square()


@functools.cache
def _product_sizes(mantissa: float) -> Tensor:
    """E4M3(q mantissa) for q = 0 .. 8, on the CPU."""
    return round_e4m3(mantissa * torch.arange(1.0 - CODE_MIN))


def _search_free(errors: _SquaredErrors, full: Tensor) -> Tensor:
    """Best scale [N, G] where any scale may be stored (BF16)."""
    best, best_error = full, torch.full_like(full, torch.inf)
    span = LARGEST_SHRINK - SMALLEST_SHRINK
    for shrink in (1.0, *(SMALLEST_SHRINK + span * i / FREE_STEPS for i in range(FREE_STEPS + 1))):
        scale = (full * shrink).to(torch.bfloat16).float()
        error = errors.of(scale)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def _search_groups(
    errors: _SquaredErrors, c: Tensor, full: Tensor, fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Best group scales for the row units c [N, 1]: t [N, G] and the rows' errors [N, 1]."""
    candidates = _candidates(full / c, fmt)
    anchor_error = errors.of(c * candidates[0].power, candidates[0].mantissa)
    best_t, best_error = candidates[0].t, anchor_error
    for candidate in candidates[1:]:
        error = errors.of(c * candidate.power, candidate.mantissa)
        best_t = torch.where(error < best_error, candidate.t, best_t)
        best_error = torch.minimum(error, best_error)
    # One group of every row has to sit at the anchor: the one that loses least by it.
    regret = anchor_error - best_error
    cheapest = regret.argmin(dim=1, keepdim=True)
    best_t = best_t.scatter(1, cheapest, candidates[0].t[0, 0].item())
    return best_t, best_error.sum(dim=1, keepdim=True) + regret.gather(1, cheapest)


class _Candidate(NamedTuple):
    """Group scales t [N, G] to try: products are power [N, G] times q, or E4M3(q mantissa)."""

    t: Tensor
    power: Tensor
    mantissa: float | None = None


def _candidates(ideal: Tensor, fmt: WeightFormat) -> list[_Candidate]:
    """The anchor, then every group scale worth trying; ideal [N, G] is the absmax scale over c.

    int8: every integer. lut: every E4M3 mantissa, at the exponent that puts t within an octave
    below the largest useful scale; products of one mantissa are the same up to a power of two.
    """
    if fmt.numerics == "int8":
        every = [torch.full_like(ideal, t) for t in range(int(INT8_ANCHOR), 0, -1)]
        return [_Candidate(t, t) for t in every]
    anchor = torch.full_like(ideal, LUT_ANCHOR)
    mantissa = LUT_ANCHOR / 32  # 56 = 1.75 * 2^5
    candidates = [_Candidate(anchor, anchor / mantissa, mantissa)]
    for mantissa in E4M3_MANTISSAS:
        power = torch.exp2(torch.log2(ideal * LARGEST_SHRINK / mantissa).floor())
        largest = 2.0 ** math.floor(math.log2(LUT_ANCHOR / mantissa))
        power = power.clamp(LUT_SCALE_MIN, largest)
        candidates.append(_Candidate(mantissa * power, power, mantissa))
    return candidates


def _nearest_group_scale(ratio: Tensor, fmt: WeightFormat) -> Tensor:
    assert fmt.anchor is not None
    if fmt.numerics == "int8":
        return ratio.round().clamp(1, fmt.anchor)
    return ratio.clamp(LUT_SCALE_MIN, fmt.anchor).to(torch.float8_e4m3fn).float()
