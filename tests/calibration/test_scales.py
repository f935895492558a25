"""The search for scales: never worse than no search, and worth doing on the true grid."""

import pytest
import torch
from torch import Tensor

from quant.calibration import scales as scales_module
from quant.calibration.grid import E4M3_MANTISSAS
from quant.calibration.scales import choose_scales
from quant.passes import SCALE_SEARCHES
from quant_kernels import cpu
from quant_kernels.formats import (
    WeightFormat,
    effective_weight,
    every_format,
    join_scales,
    midpoints,
    nearest_codes,
    on_grid,
    round_e4m3,
    round_row_unit,
)

FORMATS = every_format()
ANCHORED = [fmt for fmt in FORMATS if fmt.anchor is not None]
EXACT_128 = WeightFormat("w4afp8", 128, "exact")

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_anchored_format = pytest.mark.parametrize("fmt", ANCHORED, ids=str)


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(96, 384, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t with three degrees of freedom."""
    normal = torch.randn(4, 96, 384, generator=generator)
    return normal[0] / normal[1:].square().mean(dim=0).sqrt()


def uneven_columns(generator: torch.Generator) -> Tensor:
    """Groups whose sizes differ up to a thousandfold in a row, and rows that differ more."""
    columns = torch.rand(384, generator=generator).mul(7).exp()
    rows = torch.rand(96, 1, generator=generator).mul(12).exp() * 1e-3
    return torch.randn(96, 384, generator=generator) * columns.sort().values * rows


def on_an_int4_grid(generator: torch.Generator) -> Tensor:
    """What was once quantized to INT4 with absmax scales, as in a GGUF file: -8 .. 7 in steps."""
    codes = torch.randint(-7, 8, (96, 384), generator=generator).float()
    codes[:, ::32] = -8
    steps = torch.rand(96, 12, generator=generator).add(0.5).repeat_interleave(32, dim=1)
    return codes * steps


def one_outlier(generator: torch.Generator) -> Tensor:
    weight = torch.randn(96, 384, generator=generator)
    weight[torch.arange(96), torch.randint(384, (96,), generator=generator)] = 60.0
    return weight


WEIGHTS = (gaussian, heavy_tailed, uneven_columns, on_an_int4_grid, one_outlier)
each_weight = pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)


def example(make, seed: int = 0) -> tuple[Tensor, Tensor]:
    """weight [N, K], and second moments [K] that differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    return make(generator), torch.rand(384, generator=generator).mul(7).exp()


def row_errors(
    weight: Tensor, scales: Tensor, fmt: WeightFormat, importance: Tensor | None = None
) -> Tensor:
    """Squared error of every row on the true grid, weighted by importance [K]: [N] float64."""
    rounded = effective_weight(nearest_codes(weight, scales, fmt), scales, fmt)
    squared = (weight.double() - rounded.double()).square()
    return (squared * (1.0 if importance is None else importance.double())).sum(dim=1)


def damped(moments: Tensor) -> Tensor:
    """The search's own metric: no channel counts for less than a thousandth of the mean."""
    return moments + 1e-3 * moments.mean()


@each_format
@each_weight
def test_mse_search_is_never_worse_than_absmax(fmt, make):
    for seed in range(3):
        weight, _ = example(make, seed)
        searched = row_errors(weight, choose_scales(weight, fmt, "mse"), fmt)
        absmax = row_errors(weight, choose_scales(weight, fmt, "absmax"), fmt)
        assert bool((searched <= absmax * (1 + 1e-5)).all())


@each_format
@each_weight
def test_hessian_search_is_never_worse_than_absmax_in_its_own_metric(fmt, make):
    for seed in range(3):
        weight, moments = example(make, seed)
        h = damped(moments)
        searched = row_errors(weight, choose_scales(weight, fmt, "hessian", moments), fmt, h)
        absmax = row_errors(weight, choose_scales(weight, fmt, "absmax"), fmt, h)
        assert bool((searched <= absmax * (1 + 1e-5)).all())


@each_format
def test_searches_win_by_a_margin_where_there_is_something_to_win(fmt):
    weight, moments = example(heavy_tailed)
    absmax = choose_scales(weight, fmt, "absmax")
    mse = choose_scales(weight, fmt, "mse")
    hessian = choose_scales(weight, fmt, "hessian", moments)
    h = damped(moments)
    assert row_errors(weight, mse, fmt).sum() < 0.9 * row_errors(weight, absmax, fmt).sum()
    # Each search is the best in its own metric.
    assert row_errors(weight, hessian, fmt, h).sum() < row_errors(weight, mse, fmt, h).sum()
    assert row_errors(weight, mse, fmt).sum() < row_errors(weight, hessian, fmt).sum()


@each_format
def test_search_with_equal_moments_is_the_mse_search(fmt):
    weight, _ = example(gaussian)
    equal = choose_scales(weight, fmt, "hessian", torch.full((384,), 0.37))
    assert torch.equal(equal, choose_scales(weight, fmt, "mse"))


@each_anchored_format
@pytest.mark.parametrize("make", [gaussian, heavy_tailed, one_outlier])
def test_search_on_the_true_grid_beats_rounding_free_scales_onto_it(fmt, make):
    weight, _ = example(make)
    free = choose_scales(weight, WeightFormat("w4afp8", fmt.group_size, "exact"), "mse").float()
    c = round_row_unit(free.amax(dim=1, keepdim=True) / fmt.anchor)
    ratio = free / c
    t = round_e4m3(ratio.clamp(0.25, 56)) if fmt.numerics == "lut" else ratio.round().clamp(1, 16)
    t.scatter_(1, free.argmax(dim=1, keepdim=True), fmt.anchor)
    rounded = join_scales(t, c)
    assert on_grid(rounded, fmt)
    searched = choose_scales(weight, fmt, "mse")
    assert row_errors(weight, searched, fmt).sum() < row_errors(weight, rounded, fmt).sum()


@each_anchored_format
def test_grid_search_costs_little_against_free_scales(fmt):
    # On Gaussian weights the grid's published cost is 2-4% of the error (lut); the integer grid
    # of w4a8 has fewer mantissas near t = 16. A broken search costs tens of percent.
    weight, _ = example(gaussian)
    exact = WeightFormat("w4afp8", fmt.group_size, "exact")
    free = row_errors(weight, choose_scales(weight, exact, "mse"), exact).sum()
    grid = row_errors(weight, choose_scales(weight, fmt, "mse"), fmt).sum()
    assert grid < 1.08 * free


@each_format
def test_absmax_covers_the_range_but_for_half_a_step(fmt):
    # Per group, max|W| may lie half a step beyond a level's end; grids coarsen the scale by up to
    # 1/16 for the row unit and 1/16 for the group scale, so a step and a half bound all of them.
    weight, _ = example(gaussian)
    scales = choose_scales(weight, fmt, "absmax")
    rounded = effective_weight(nearest_codes(weight, scales, fmt), scales, fmt)
    step = scales.float().repeat_interleave(384 // fmt.groups(384), dim=1)
    assert bool(((weight - rounded).abs() <= 1.5 * step).all())


@each_format
@pytest.mark.parametrize("method", SCALE_SEARCHES)
def test_rows_are_chosen_independently(fmt, method):
    # Fused layers are quantized together; each row must come out as it would alone.
    weight, moments = example(uneven_columns)
    together = choose_scales(weight, fmt, method, moments)
    alone = torch.cat([choose_scales(row, fmt, method, moments) for row in weight.split(7)])
    assert torch.equal(together, alone)


def searched_squared_error(w: Tensor, h: Tensor, unit: Tensor, levels: Tensor) -> Tensor:
    """sum h (w - nearest level * unit)^2 by group, by a search of midpoints."""
    y = w / unit.unsqueeze(-1)
    nearest = levels[torch.bucketize(y, midpoints(levels))]
    return (y.sub_(nearest).square_().mul_(h)).sum(dim=-1) * unit.square()


def groups_with_ties(levels: Tensor, unit: Tensor) -> Tensor:
    """Weights [N, G, 128]: Gaussian; midpoints and their neighbours; and what lies far outside."""
    w = torch.randn(*unit.shape, 128, generator=torch.Generator().manual_seed(0)) * 6
    middle = midpoints(levels)
    up = torch.nextafter(middle, torch.tensor(torch.inf))
    down = torch.nextafter(middle, torch.tensor(-torch.inf))
    w[..., :45] = torch.cat([middle, up, down])
    w[..., 45:47] = torch.tensor([-40.0, 40.0])  # no further: they must not drown the rest
    return w * unit.unsqueeze(-1)


@pytest.mark.parametrize("mantissa", [None, *E4M3_MANTISSAS])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_errors_are_those_of_searching_the_midpoints(mantissa, in_one_pass, monkeypatch):
    codes = torch.arange(-8, 8).float()
    levels = codes if mantissa is None else round_e4m3(codes * mantissa)
    unit = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    unit[0] = 2.0**-5  # ties in w are ties in w / unit here
    w, h = groups_with_ties(levels, unit), torch.rand(3, 128)
    monkeypatch.setattr(cpu, "usable", lambda: in_one_pass)
    errors = scales_module._SquaredErrors(w, h)
    for size in (1.0, 0.37):  # scratch memory is used again
        expected = searched_squared_error(w, h, unit * size, levels)
        found = errors.of(unit * size, mantissa)
        if in_one_pass:  # the same numbers, added in another order
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        else:
            assert torch.equal(found, expected)


@each_format
@pytest.mark.parametrize("method", SCALE_SEARCHES)
@pytest.mark.parametrize("at_once", [1, 5 * 384, 40 * 384 + 7])
def test_scales_are_the_same_however_many_are_searched_at_once(fmt, method, at_once, monkeypatch):
    weight, moments = example(uneven_columns)
    expected = choose_scales(weight, fmt, method, moments)
    monkeypatch.setattr(scales_module, "WEIGHTS_AT_ONCE", at_once)
    assert torch.equal(choose_scales(weight, fmt, method, moments), expected)


@each_format
@pytest.mark.parametrize("method", SCALE_SEARCHES)
def test_scales_follow_a_power_of_two(fmt, method):
    weight, moments = example(gaussian)
    small = choose_scales(weight / 256, fmt, method, moments)
    assert torch.equal(small.float() * 256, choose_scales(weight, fmt, method, moments).float())


@pytest.mark.parametrize("fmt", [EXACT_128, WeightFormat("w4a8", 128, "int8")], ids=str)
def test_channels_that_calibration_never_excites_still_get_fitting_scales(fmt):
    weight, moments = example(gaussian)
    moments[128:256] = 0  # all of one group
    scales = choose_scales(weight, fmt, "hessian", moments)
    lost = row_errors(weight[:, 128:256], scales[:, 1:2], EXACT_128).sum()
    assert lost < 0.05 * weight[:, 128:256].square().sum()


def test_unknown_search_and_missing_moments_are_refused():
    weight, _ = example(gaussian)
    with pytest.raises(ValueError, match="'max' is unknown; known: absmax, mse, hessian"):
        choose_scales(weight, EXACT_128, "max")
    with pytest.raises(ValueError, match="second moments"):
        choose_scales(weight, EXACT_128, "hessian")
