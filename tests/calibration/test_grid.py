"""Rounding by quotients and tables, against the search of midpoints that defines nearest codes."""

import pytest
import torch
from torch import Tensor

from quant.calibration.grid import E4M3_MANTISSAS, true_grid
from quant_kernels.formats import (
    WeightFormat,
    effective_weight,
    every_format,
    join_scales,
    midpoints,
    nearest_codes,
    on_grid,
    product_levels,
    split_scales,
)

GROUPS = 24  # of 128 columns, where a weight of the format is needed

each_format = pytest.mark.parametrize("fmt", every_format(), ids=str)


def scales_with_every_group_scale(fmt: WeightFormat) -> Tensor:
    """Stored scales on the grid [32, G] of all mantissas, exponents and row units."""
    generator = torch.Generator().manual_seed(0)
    if fmt.per_channel:
        return torch.rand(32, 1, generator=generator).mul(9).exp().bfloat16()
    if fmt.anchor is None:
        return torch.rand(32, GROUPS, generator=generator).mul(9).exp().bfloat16()
    units = 2.0 ** torch.randint(-9, 3, (32, 1), generator=generator)
    units *= torch.randint(8, 16, (32, 1), generator=generator)
    if fmt.numerics == "lut":
        every = [m * 2.0**e for e in range(-2, 6) for m in E4M3_MANTISSAS if m * 2.0**e <= 56]
    else:
        every = [float(t) for t in range(1, 17)]
    chosen = torch.randint(len(every), (32, GROUPS), generator=generator)
    t = torch.tensor(every)[chosen]
    t[:, 3] = fmt.anchor
    scales = join_scales(t, units)
    assert on_grid(scales, fmt)
    return scales


def rounded(weight: Tensor, scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Codes and levels [N, K] of weight [N, K], column by column; poisoned before they are written.

    K may be anything that the scales' groups divide.
    """
    grid = true_grid(scales, fmt)
    size = weight.shape[1] // scales.shape[1]
    codes = torch.full((weight.shape[1], len(weight)), 99, dtype=torch.int8)
    columns = enumerate(weight.T)
    levels = [grid.round(w.contiguous(), k // size, codes[k]).clone() for k, w in columns]
    return codes.T, torch.stack(levels, dim=1)


def boundaries(scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Every midpoint and level of every group, what lies next to them in FP32, and far out.

    [N, G, m], m the same for all groups.
    """
    t, c = split_scales(scales, fmt)
    levels = product_levels(t, fmt) * c.unsqueeze(-1)
    exact = torch.cat([midpoints(levels), levels], dim=-1)
    up = torch.nextafter(exact, torch.tensor(torch.inf))
    down = torch.nextafter(exact, torch.tensor(-torch.inf))
    far = levels[..., [0, -1]] * 1e6
    tiny = torch.full_like(far, 1e-30) * torch.tensor([-1.0, 1.0])
    return torch.cat([exact, up, down, far, tiny], dim=-1)


def expected(weight: Tensor, scales: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Codes by searching midpoints, and the levels of those codes; weight [N, G, m]."""
    t, c = split_scales(scales, fmt)
    levels = product_levels(t, fmt) * c.unsqueeze(-1)
    index = torch.searchsorted(midpoints(levels), weight.contiguous())
    return (index - 8).to(torch.int8).flatten(1), levels.gather(-1, index).flatten(1)


@each_format
def test_ties_and_their_neighbours_in_float32_fall_as_the_definition_says(fmt):
    scales = scales_with_every_group_scale(fmt)
    weight = boundaries(scales, fmt)
    codes, levels = rounded(weight.flatten(1), scales, fmt)
    expected_codes, expected_levels = expected(weight, scales, fmt)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(levels, expected_levels)
    assert set(codes.unique().tolist()) == set(range(-8, 8))


@each_format
def test_random_weights_get_the_nearest_codes_and_their_effective_weights(fmt):
    scales = scales_with_every_group_scale(fmt)
    columns = GROUPS * 128
    step = scales.float().repeat_interleave(columns // scales.shape[1], dim=1)
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(1)) * 4 * step
    codes, levels = rounded(weight, scales, fmt)
    at_any_size = WeightFormat(fmt.scheme, fmt.group_size if fmt.per_channel else 128, fmt.numerics)
    assert torch.equal(codes, nearest_codes(weight, scales, at_any_size))
    assert torch.equal(levels, effective_weight(codes, scales, at_any_size))
