"""What rounding loses, by the C++ kernel and by a search of every level in FP64."""

from __future__ import annotations

import ctypes
import math
from struct import pack

import pytest
import torch
from torch import Tensor

from quant_kernels import cpu
from quant_kernels.cpu_rounding import group_errors
from quant_kernels.formats import round_e4m3

pytestmark = pytest.mark.usefixtures("isa")

MANTISSAS = (None, 1.0, 1.125, 1.375, 1.75, 1.875)
# Rows, groups, columns of a group: of a lane, of a vector and some, of one group a row.
SHAPES = [(1, 1, 1), (3, 2, 7), (5, 3, 32), (4, 5, 24), (70, 9, 64), (2, 1, 1003)]


def product_sizes(mantissa: float | None) -> Tensor | None:
    return None if mantissa is None else round_e4m3(mantissa * torch.arange(9.0))


def every_level(mantissa: float | None) -> Tensor:
    q = torch.arange(-8.0, 8)
    return q if mantissa is None else round_e4m3(mantissa * q)


def example(shape: tuple[int, int, int], mantissa: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """w, h, units: weights on levels, between them, and beyond the last on either side."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, groups, size = shape
    units = torch.rand(rows, groups, generator=generator) * 4 + 0.01
    levels = every_level(mantissa)
    w = torch.randn(shape, generator=generator) * 0.6 * levels.abs().amax()
    exact = torch.rand(shape, generator=generator) < 0.2
    chosen = levels[torch.randint(16, shape, generator=generator)]
    w = torch.where(exact, chosen, w) * units.unsqueeze(-1)
    return w, torch.rand(groups, size, generator=generator), units


def defined(w: Tensor, h: Tensor, units: Tensor, mantissa: float | None) -> Tensor:
    w, h, units, levels = (x.double() for x in (w, h, units, every_level(mantissa)))
    distance = (w.unsqueeze(-1) / units[..., None, None] - levels).abs().amin(dim=-1)
    return (distance.square() * h).sum(dim=-1) * units.square()


@pytest.mark.parametrize("mantissa", MANTISSAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_to_the_nearest_of_all_levels(shape, mantissa):
    w, h, units = example(shape, mantissa)
    found = group_errors(w, h, units, product_sizes(mantissa))
    # y has an error of 2^-23 of itself, and |y| is below 64.
    slack = h.sum(dim=-1) * 64 * 2.0**-22 * units.square()
    difference = (found.double() - defined(w, h, units, mantissa)).abs()
    assert bool((difference <= 1e-5 * found + slack).all())


def test_rows_columns_and_groups_are_told_apart():
    w, h, units = example((4, 3, 32), None)
    w[:, 1, 0] = 0.3 * units[:, 1]  # on no level
    before = group_errors(w, h, units)
    for changed, where in ((w, (2, 1, 31)), (h, (1, 0)), (units, (3, 2))):
        old = float(changed[where])
        changed[where] = old * 1.5 + 0.1
        moved = group_errors(w, h, units) != before
        changed[where] = old
        rows = [where[0]] if changed is not h else range(4)
        group = where[0] if changed is h else where[1]
        assert moved.nonzero().tolist() == [[row, group] for row in rows]


def test_a_nan_stays_in_its_group():
    w, h, units = example((2, 3, 40), None)
    w[1, 2, 39] = math.nan
    for levels in (None, product_sizes(1.25)):
        found = group_errors(w, h, units, levels).isnan()
        assert found.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("count", [2, 3, 16])
def test_threads_do_not_change_a_bit(count, threads):
    w, h, units = example((300, 4, 128), 1.5)
    levels = product_sizes(1.5)
    threads(1)
    alone = group_errors(w, h, units, levels)
    threads(count)
    assert torch.equal(group_errors(w, h, units, levels), alone)


def test_strides_do_not_matter():
    w, h, units = example((6, 4, 48), 1.25)
    expected = group_errors(w, h, units, product_sizes(1.25))
    found = group_errors(
        w.transpose(0, 2).contiguous().transpose(0, 2), h.T.contiguous().T, units.T.contiguous().T,
        product_sizes(1.25),
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_wrong_arguments_are_refused_by_name():
    w, h, units = example((4, 3, 32), None)
    with pytest.raises(ValueError, match=r"w must be \[N, G, g\], not \[4, 96\]"):
        group_errors(w.flatten(1), h, units)
    with pytest.raises(ValueError, match=r"h must be FP32 \[3, 32\].* not torch.float32 \[32, 3\]"):
        group_errors(w, h.T, units)
    with pytest.raises(ValueError, match=r"units must be FP32 .* not torch.float64"):
        group_errors(w, h, units.double())
    with pytest.raises(ValueError, match=r"levels must be FP32 \[9\]"):
        group_errors(w, h, units, every_level(1.0))
    assert group_errors(w[:0], h, units[:0]).shape == (0, 3)


def test_the_c_function_checks_what_it_is_given():
    function = cpu.library().quant_cpu_group_errors
    function.argtypes = [ctypes.c_char_p]

    def status(*call: int) -> str:
        return cpu.library().quant_cpu_error_string(function(pack("@PPPPPqqqq", *call))).decode()

    w, h, units = example((4, 3, 32), None)
    errors = torch.empty(4, 3)
    pointers = [x.data_ptr() for x in (w, h, units)]
    assert "group" in status(*pointers, 0, errors.data_ptr(), 4, 96, 5, 1)
    assert "negative" in status(*pointers, 0, errors.data_ptr(), -1, 96, 3, 1)
    assert "null" in status(*pointers, 0, 0, 4, 96, 3, 1)
    assert "null" in cpu.library().quant_cpu_error_string(function(None)).decode()
