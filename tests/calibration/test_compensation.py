"""Hessian compensation against its definition, and what it promises about the result."""

import pytest
import torch
from torch import Tensor

from quant.calibration.compensation import (
    NotPositiveDefinite,
    compensate,
    inverse_factor,
    relative_output_error,
)
from quant.calibration.scales import choose_scales
from quant_kernels.formats import (
    WeightFormat,
    effective_weight,
    every_format,
    nearest_codes,
    product_levels,
    split_scales,
)

FORMATS = every_format()
LUT_32 = WeightFormat("w4afp8", 32, "lut")
CHANNEL = WeightFormat("w4a8", -1, "int8")

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K], correlated inputs [T, K] with uneven channels, and their Hessian [K, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, 1, generator=generator).mul(3).exp() * 0.01
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.3 * torch.eye(k)
    x = torch.randn(4 * k, k, generator=generator) @ mixing
    x *= torch.rand(k, generator=generator).mul(3).exp()
    return weight, x, x.T @ x / len(x)


def naive_obs(
    weight: Tensor, scales: Tensor, fmt: WeightFormat, hessian: Tensor, damping: float, order: list
) -> Tensor:
    """Optimal Brain Surgeon by its definition, in float64.

    Round one column; move the columns that remain by -(w_j - w^_j) [H_F^-1]_j / [H_F^-1]_jj, with
    the inverse over the remaining set F computed anew at every step.
    """
    w = weight.double()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    t, c = split_scales(scales, fmt)
    levels = (product_levels(t, fmt) * c.unsqueeze(-1)).double()  # [N, G, 16]
    size = weight.shape[1] // scales.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for step, j in enumerate(order):
        remaining = order[step:]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        choice = levels[:, j // size]
        index = (choice - w[:, j : j + 1]).abs().argmin(dim=1)
        codes[:, j] = (index - 8).to(torch.int8)
        error = w[:, j] - choice.gather(1, index.unsqueeze(1)).squeeze(1)
        w[:, remaining] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


@each_format
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_definition(fmt, act_order):
    k = 128
    weight, _, hessian = problem(6, k)
    scales = choose_scales(weight, fmt, "hessian", hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(k))
    expected = naive_obs(weight, scales, fmt, hessian, 0.01, order)
    # 40 divides nothing here: lazy updates cross group borders and end in a short block.
    found = compensate(
        weight, scales, fmt, hessian, damping=0.01, act_order=act_order, block_size=40
    )
    assert found.damping == 0.01
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.codes, expected)
    assert not torch.equal(found.codes, nearest_codes(weight, scales, fmt))


@each_format
@pytest.mark.parametrize("act_order", [True, False])
def test_diagonal_hessian_leaves_nothing_to_compensate(fmt, act_order):
    weight, _, hessian = problem(16, 256)
    diagonal = torch.diag(hessian.diagonal())
    scales = choose_scales(weight, fmt, "mse")
    codes = compensate(weight, scales, fmt, diagonal, act_order=act_order).codes
    assert torch.equal(codes, nearest_codes(weight, scales, fmt))


@each_format
def test_output_error_falls_on_correlated_inputs(fmt):
    weight, x, hessian = problem(48, 256)
    scales = choose_scales(weight, fmt, "mse")
    target = x @ weight.T

    def output_error(codes: Tensor) -> float:
        out = x @ effective_weight(codes, scales, fmt).T
        return float((out - target).square().sum() / target.square().sum())

    nearest = output_error(nearest_codes(weight, scales, fmt))
    natural = output_error(compensate(weight, scales, fmt, hessian, act_order=False).codes)
    ordered = output_error(compensate(weight, scales, fmt, hessian, act_order=True).codes)
    assert natural < 0.7 * nearest
    assert ordered < 0.7 * nearest
    assert ordered < natural  # these channels are uneven, which is what the order is for


def test_permuting_input_channels_permutes_the_codes():
    # One scale a row: any permutation of the channels is the same problem.
    weight, _, hessian = problem(16, 256)
    scales = choose_scales(weight, CHANNEL, "mse")
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    codes = compensate(weight, scales, CHANNEL, hessian).codes
    shuffled = compensate(weight[:, shuffle], scales, CHANNEL, hessian[shuffle][:, shuffle]).codes
    assert torch.equal(shuffled, codes[:, shuffle])


def test_permuting_groups_and_channels_inside_them_permutes_the_codes():
    weight, _, hessian = problem(16, 256)
    scales = choose_scales(weight, LUT_32, "mse")
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(8, generator=generator)
    inside = torch.stack([torch.randperm(32, generator=generator) for _ in range(8)])
    shuffle = (groups.unsqueeze(1) * 32 + inside).flatten()
    codes = compensate(weight, scales, LUT_32, hessian).codes
    shuffled = compensate(
        weight[:, shuffle], scales[:, groups], LUT_32, hessian[shuffle][:, shuffle]
    ).codes
    assert torch.equal(shuffled, codes[:, shuffle])


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_block_size_changes_the_speed_and_not_the_result(block_size):
    # Sums are taken in another order, so a value on a decision boundary may fall either way.
    weight, _, hessian = problem(16, 256)
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, hessian, block_size=128).codes
    other = compensate(weight, scales, LUT_32, hessian, block_size=block_size).codes
    assert (codes != other).float().mean() < 0.002


def test_rows_do_not_depend_on_each_other():
    weight, _, hessian = problem(16, 256)
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, hessian).codes
    for rows in (slice(0, 5), slice(5, 16)):
        alone = compensate(weight[rows], scales[rows], LUT_32, hessian).codes
        assert (alone != codes[rows]).float().mean() < 0.002


def test_arguments_are_left_alone():
    weight, _, hessian = problem(8, 128)
    scales = choose_scales(weight, LUT_32, "mse")
    before = weight.clone(), scales.clone(), hessian.clone()
    compensate(weight, scales, LUT_32, hessian)
    assert all(torch.equal(a, b) for a, b in zip((weight, scales, hessian), before, strict=True))


def test_channel_that_is_never_excited_is_rounded_to_nearest():
    weight, x, _ = problem(16, 256)
    x[:, 100] = 0
    hessian = x.T @ x / len(x)
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, hessian).codes
    assert torch.equal(codes[:, 100], nearest_codes(weight, scales, LUT_32)[:, 100])
    error = relative_output_error(weight, effective_weight(codes, scales, LUT_32), hessian)
    rounded = effective_weight(nearest_codes(weight, scales, LUT_32), scales, LUT_32)
    assert error < relative_output_error(weight, rounded, hessian)


def test_hessian_of_zeros_rounds_everything_to_nearest():
    weight, _, hessian = problem(4, 128)
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, torch.zeros_like(hessian)).codes
    assert torch.equal(codes, nearest_codes(weight, scales, LUT_32))


def test_fewer_tokens_than_channels_still_compensates():
    weight, x, _ = problem(16, 256)
    x = x[:64]
    hessian = x.T @ x / len(x)  # rank 64 of 256
    scales = choose_scales(weight, LUT_32, "mse")
    result = compensate(weight, scales, LUT_32, hessian)
    rounded = effective_weight(nearest_codes(weight, scales, LUT_32), scales, LUT_32)
    repaired = effective_weight(result.codes, scales, LUT_32)
    nearest = relative_output_error(weight, rounded, hessian)
    assert relative_output_error(weight, repaired, hessian) < 0.5 * nearest


def with_smallest_eigenvalue(share: float) -> Tensor:
    """A Hessian [64, 64] with ones on the diagonal's mean and one eigenvalue of -share."""
    basis, _ = torch.linalg.qr(
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    )
    values = torch.full((64,), (64 + share) / 63).double()
    values[0] = -share
    return ((basis * values) @ basis.T).float()


@pytest.mark.parametrize(
    ("share", "damping", "needed"), [(-0.5, 0.01, 0.01), (0.05, 0.01, 0.1), (0.5, 0.05, 1.0)]
)
def test_damping_grows_as_far_as_it_must_and_is_reported(share, damping, needed):
    hessian = with_smallest_eigenvalue(share)
    factor, used = inverse_factor(hessian, damping)
    assert used == pytest.approx(needed)
    damped = hessian.double() + used * hessian.diagonal().mean().double() * torch.eye(64)
    # U^T U = (H + damping)^-1
    product = factor.double().T @ factor.double() @ damped
    assert torch.allclose(product, torch.eye(64).double(), atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_reported_damping_is_the_one_that_was_used():
    weight, _, _ = problem(8, 64)
    scales = choose_scales(weight, CHANNEL, "mse")
    hessian = with_smallest_eigenvalue(0.05)
    grown = compensate(weight, scales, CHANNEL, hessian, damping=0.01)
    assert grown.damping == pytest.approx(0.1)
    asked = compensate(weight, scales, CHANNEL, hessian, damping=0.1)
    assert torch.equal(grown.codes, asked.codes)


def test_hopeless_hessians_are_refused():
    with pytest.raises(NotPositiveDefinite, match="with damping 1"):
        inverse_factor(with_smallest_eigenvalue(3.0), 0.01)
    for poison in (float("nan"), float("inf")):
        hessian = torch.eye(32)
        hessian[3, 4] = poison
        with pytest.raises(NotPositiveDefinite, match="NaN or Inf"):
            inverse_factor(hessian, 0.01)


def test_relative_output_error_is_the_share_of_the_outputs_energy():
    weight, x, hessian = problem(16, 128)
    effective = weight + 0.01 * torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    lost = (x.double() @ (weight - effective).double().T).square().sum()
    total = (x.double() @ weight.double().T).square().sum()
    found = relative_output_error(weight, effective, hessian)
    assert found == pytest.approx(float(lost / total), rel=1e-4)
    assert relative_output_error(weight, weight, hessian) == 0
    assert relative_output_error(torch.zeros(4, 128), torch.zeros(4, 128), hessian) == 0
