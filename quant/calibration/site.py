"""One site: the linears that share an input share its Hessian, and are quantized together.

A site fails where its Hessian cannot be inverted, where its inputs are not finite, or where a
linear would lose more of its output than the bound allows. More damping is tried first: it trades
the compensation of earlier errors for stability, and ends at rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.calibration.compensation import compensate
from quant.calibration.hessian import LARGEST_DAMPING, InputHessian, NotPositiveDefinite
from quant.calibration.scales import choose_scales
from quant.passes import CompensatePass, Rounding
from quant.report import LayerReport
from quant.schemes import LayerPlan
from quant_kernels.formats import WeightFormat, effective_weight, nearest_codes
from quant_kernels.packing import PackedWeight, pack_int4

# A layer that loses more than half of its output's energy computes something else.
MAX_ERROR = 0.5
DAMPING_GROWTH = 10.0
# A part of a weight goes through the search with some ten arrays of its size in memory. It is this
# share of a block, so that they do not weigh against it, within what keeps a CPU or GPU busy.
PART_OF_BLOCK = 1 / 48
PART_ELEMENTS = (2**21, 2**24)
ROUNDING_ELEMENTS = 2**18


class SiteFailed(Exception):
    """A site that cannot be quantized: full names of its linears, and the reason with numbers."""

    def __init__(self, names: Sequence[str], reason: str) -> None:
        self.names = tuple(names)
        self.reason = reason
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        super().__init__(f"{names[0]}{others}: {reason}")


@dataclass(frozen=True)
class Quantized:
    """A linear's codes and scales, and the shares of its output's energy that are lost.

    error_before: by rounding to nearest with absmax scales. damping: None where there was none.
    """

    weight: PackedWeight
    error_before: float
    error_after: float
    damping: float | None


def report_row(plan: LayerPlan, found: Quantized, smoothing: str, seconds: float) -> LayerReport:
    """What a quantized linear has to say."""
    fmt = found.weight.fmt
    return LayerReport(
        name=plan.name,
        shape=plan.shape,
        scheme=fmt.scheme,
        group_size=fmt.group_size,
        numerics=fmt.numerics,
        bits_per_weight=plan.bits_per_weight,
        error_before=found.error_before,
        error_after=found.error_after,
        damping=found.damping,
        smoothing=smoothing,
        seconds=seconds,
    )


def part_elements(block_elements: int) -> int:
    """Elements of a weight to work on at once, in a block of so many weights."""
    smallest, largest = PART_ELEMENTS
    return min(max(int(block_elements * PART_OF_BLOCK), smallest), largest)


def quantize_site(
    names: Sequence[str],
    weights: Sequence[Tensor],
    fmt: WeightFormat,
    step: Rounding,
    hessian: InputHessian,
    *,
    max_error: float = MAX_ERROR,
    elements: int = PART_ELEMENTS[1],
) -> list[Quantized]:
    """Quantize weights [N_i, K] (any float type), whose inputs gave hessian [K, K].

    names: full ones, for errors. elements: of a weight that are worked on at once. Raises
    SiteFailed.
    """
    if not hessian.is_finite():
        raise SiteFailed(names, "the Hessian of its inputs holds NaN or Inf")
    if not isinstance(step, CompensatePass):
        return _within(names, _choose(weights, fmt, step, hessian, None, elements), max_error)
    damping = step.damping
    while True:
        try:
            used = hessian.factorize(damping, step.act_order)
        except NotPositiveDefinite as error:
            raise SiteFailed(
                names, f"the Hessian of its inputs cannot be inverted ({error})"
            ) from error
        found = _choose(weights, fmt, step, hessian, used, elements)
        fits = all(row.error_after <= max_error for row in found)
        if fits or used >= LARGEST_DAMPING:
            return _within(names, found, max_error)
        damping = min(used * DAMPING_GROWTH, LARGEST_DAMPING)


def _within(names: Sequence[str], found: list[Quantized], max_error: float) -> list[Quantized]:
    """`found`, or SiteFailed where an error is too large (or not a number)."""
    for name, row in zip(names, found, strict=True):
        if not row.error_after <= max_error:
            tried = f", with damping up to {row.damping:g}" if row.damping is not None else ""
            raise SiteFailed(
                names,
                f"{name.rsplit('.', 1)[-1]} loses {row.error_after:.1%} of its output{tried} "
                f"(rounding to nearest: {row.error_before:.1%}); the bound is {max_error:.1%}",
            )
    return found


def _choose(
    weights: Sequence[Tensor],
    fmt: WeightFormat,
    step: Rounding,
    hessian: InputHessian,
    damping: float | None,
    elements: int,
) -> list[Quantized]:
    """Codes, scales and errors of all weights; damping: of the factorized Hessian, or None."""
    sizes = [len(weight) for weight in weights]
    words, scales, energies = _Rows(sum(sizes)), _Rows(sum(sizes)), _Rows(sum(sizes))
    for part in _parts(weights, elements):
        w = part.float()
        s = choose_scales(w, fmt, step.scales, hessian.second_moments)
        if damping is None:
            q = nearest_codes(w, s, fmt)
        else:
            assert isinstance(step, CompensatePass)
            q = compensate(w, s, fmt, hessian, block_size=step.block_size)
        energies.append(_energies(w, q, s, fmt, hessian))
        words.append(pack_int4(q))
        scales.append(s)
    found = []
    for w, s, rows in zip(
        words.all.split(sizes),
        scales.all.split(sizes),
        energies.all.double().split(sizes),
        strict=True,
    ):
        total, before, after = rows.sum(dim=0).tolist()
        # A linear whose output is always zero loses nothing.
        shares = [0.0 if total <= 0 else lost / total for lost in (before, after)]
        packed = PackedWeight(w, s, fmt)
        found.append(Quantized(packed, shares[0], shares[1], damping))
    return found


class _Rows:
    """An array [N, ...] that is filled from the top, allocated with the first rows at once.

    Many small arrays that stay, among temporaries that go, would leave the heap full of holes.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._filled = 0

    def append(self, part: Tensor) -> None:
        if not self._filled:
            self.all = part.new_empty(self._rows, *part.shape[1:])
        self.all[self._filled : self._filled + len(part)] = part
        self._filled += len(part)


def _energies(
    weight: Tensor, codes: Tensor, scales: Tensor, fmt: WeightFormat, hessian: InputHessian
) -> Tensor:
    """For each row, the energy of its output, and what rounding to nearest with absmax scales and
    what these codes lose of it: [N, 3].

    A few rows at a time: their temporaries, some of them int64, are several times their size.
    """
    step = max(1, ROUNDING_ELEMENTS // weight.shape[1])
    energies = []
    for w, q, s in zip(weight.split(step), codes.split(step), scales.split(step), strict=True):
        absmax = choose_scales(w, fmt, "absmax")
        rounded = effective_weight(nearest_codes(w, absmax, fmt), absmax, fmt)
        lost = w - effective_weight(q, s, fmt)
        energies.append(hessian.energy(torch.cat((w, w - rounded, lost))).view(3, -1).T)
    return torch.cat(energies)


def _parts(weights: Sequence[Tensor], elements: int) -> Iterator[Tensor]:
    """The rows of all weights in order: together where they are few, else some of one at a time."""
    if sum(weight.numel() for weight in weights) <= elements:
        yield torch.cat(list(weights))
        return
    for weight in weights:
        yield from weight.split(max(1, elements // weight.shape[1]))
