"""Hessian compensation against its definition, and what it promises about the result."""

import pytest
import torch
from torch import Tensor

from quant.calibration.compensation import compensate
from quant.calibration.hessian import InputHessian
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
    """weight [N, K], correlated inputs [T, K] with uneven channels, and their Hessian [K, K].

    The inputs are BF16 numbers, as `InputHessian.add` may take them for.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, 1, generator=generator).mul(3).exp() * 0.01
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.3 * torch.eye(k)
    x = torch.randn(4 * k, k, generator=generator) @ mixing
    x *= torch.rand(k, generator=generator).mul(3).exp()
    x = x.bfloat16().float()
    return weight, x, x.T @ x / len(x)


def factorized(x: Tensor, damping: float = 0.01, act_order: bool = True) -> InputHessian:
    """The Hessian of inputs [T, K], ready for compensation."""
    hessian = InputHessian(x.shape[1], x.device)
    for batch in x.split(100):
        hessian.add(batch)
    hessian.finish()
    assert hessian.factorize(damping, act_order) == damping
    return hessian


def output_error(weight: Tensor, codes: Tensor, scales: Tensor, fmt: WeightFormat, x: Tensor):
    """|X (W - W^)^T|^2 / |X W^T|^2, by the outputs themselves, in float64."""
    lost = weight.double() - effective_weight(codes, scales, fmt).double()
    outputs = x.double() @ weight.double().T
    return float((x.double() @ lost.T).square().sum() / outputs.square().sum())


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


def gptq(
    weight: Tensor, scales: Tensor, fmt: WeightFormat, hessian: Tensor, damping: float
) -> Tensor:
    """GPTQ as its paper writes it (algorithm 1, one column at a time), in float64: codes by falling
    diagonal of the Hessian."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w = weight.double()[:, order]
    t, c = split_scales(scales, fmt)
    levels = (product_levels(t, fmt) * c.unsqueeze(-1)).double()  # [N, G, 16]
    size = weight.shape[1] // scales.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for j, channel in enumerate(order.tolist()):
        choice = levels[:, channel // size]
        index = (choice - w[:, j : j + 1]).abs().argmin(dim=1, keepdim=True)
        codes[:, channel] = (index.squeeze(1) - 8).to(torch.int8)
        error = (w[:, j] - choice.gather(1, index).squeeze(1)) / upper[j, j]
        w[:, j:] -= torch.outer(error, upper[j, j:])
    return codes


@each_format
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_definition(fmt, act_order):
    k = 128
    weight, x, hessian = problem(6, k)
    scales = choose_scales(weight, fmt, "hessian", hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(k))
    expected = naive_obs(weight, scales, fmt, hessian, 0.01, order)
    # 40 divides nothing here: blocks cross group borders, and the last of them is short.
    found = compensate(weight, scales, fmt, factorized(x, 0.01, act_order), block_size=40)
    assert found.dtype == torch.int8
    assert found.is_contiguous()
    assert torch.equal(found, expected)
    assert not torch.equal(found, nearest_codes(weight, scales, fmt))


@each_format
def test_codes_are_those_of_gptq_where_float32_can_tell(fmt):
    # A value within FP32's error of a decision boundary may fall either way, and whatever follows
    # in its row is then another solution, as good as the first.
    weight, x, hessian = problem(48, 512)
    scales = choose_scales(weight, fmt, "mse")
    expected = gptq(weight, scales, fmt, hessian, 0.01)
    found = compensate(weight, scales, fmt, factorized(x))
    assert (found != expected).float().mean() < 1e-3
    error = output_error(weight, found, scales, fmt, x)
    assert error < output_error(weight, expected, scales, fmt, x) * (1 + 1e-4)


@each_format
@pytest.mark.parametrize("act_order", [True, False])
def test_diagonal_hessian_leaves_nothing_to_compensate(fmt, act_order):
    weight, _, hessian = problem(16, 256)
    uncorrelated = torch.diag(hessian.diagonal().sqrt().bfloat16().float())
    scales = choose_scales(weight, fmt, "mse")
    codes = compensate(weight, scales, fmt, factorized(uncorrelated, act_order=act_order))
    assert torch.equal(codes, nearest_codes(weight, scales, fmt))


@each_format
def test_output_error_falls_on_correlated_inputs(fmt):
    weight, x, _ = problem(48, 256)
    scales = choose_scales(weight, fmt, "mse")
    natural = compensate(weight, scales, fmt, factorized(x, act_order=False))
    ordered = compensate(weight, scales, fmt, factorized(x, act_order=True))
    nearest = output_error(weight, nearest_codes(weight, scales, fmt), scales, fmt, x)
    assert output_error(weight, natural, scales, fmt, x) < 0.7 * nearest
    assert output_error(weight, ordered, scales, fmt, x) < 0.7 * nearest
    # These channels are uneven, which is what the order is for.
    assert output_error(weight, ordered, scales, fmt, x) < output_error(
        weight, natural, scales, fmt, x
    )


def test_permuting_input_channels_permutes_the_codes():
    # One scale a row: any permutation of the channels is the same problem.
    weight, x, _ = problem(16, 256)
    scales = choose_scales(weight, CHANNEL, "mse")
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    codes = compensate(weight, scales, CHANNEL, factorized(x))
    shuffled = compensate(weight[:, shuffle], scales, CHANNEL, factorized(x[:, shuffle]))
    assert torch.equal(shuffled, codes[:, shuffle])


def test_permuting_groups_and_channels_inside_them_permutes_the_codes():
    weight, x, _ = problem(16, 256)
    scales = choose_scales(weight, LUT_32, "mse")
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(8, generator=generator)
    inside = torch.stack([torch.randperm(32, generator=generator) for _ in range(8)])
    shuffle = (groups.unsqueeze(1) * 32 + inside).flatten()
    codes = compensate(weight, scales, LUT_32, factorized(x))
    shuffled = compensate(weight[:, shuffle], scales[:, groups], LUT_32, factorized(x[:, shuffle]))
    assert torch.equal(shuffled, codes[:, shuffle])


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("fmt", [LUT_32, CHANNEL], ids=str)
def test_block_size_changes_the_speed_and_not_the_result(fmt, block_size):
    # Sums are taken in another order, so a value on a decision boundary may fall either way.
    weight, x, _ = problem(16, 256)
    scales = choose_scales(weight, fmt, "mse")
    hessian = factorized(x)
    codes = compensate(weight, scales, fmt, hessian, block_size=128)
    other = compensate(weight, scales, fmt, hessian, block_size=block_size)
    assert (codes != other).float().mean() < 0.002


@each_format
def test_rows_do_not_depend_on_each_other(fmt):
    # Not bit for bit: a matmul library may sum in another order for another number of rows.
    weight, x, _ = problem(16, 256)
    scales = choose_scales(weight, fmt, "mse")
    hessian = factorized(x)
    codes = compensate(weight, scales, fmt, hessian)
    for rows in (slice(0, 5), slice(5, 16), slice(15, 16)):
        alone = compensate(weight[rows], scales[rows], fmt, hessian)
        assert (alone != codes[rows]).float().mean() < 0.002


def test_arguments_are_left_alone():
    weight, x, _ = problem(8, 128)
    scales = choose_scales(weight, LUT_32, "mse")
    hessian = factorized(x)
    arguments = (weight, scales, hessian.factor, hessian.order, hessian.second_moments)
    before = [argument.clone() for argument in arguments]
    compensate(weight, scales, LUT_32, hessian)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_weights_may_be_stored_in_bf16():
    weight, x, _ = problem(8, 128)
    weight = weight.bfloat16()
    scales = choose_scales(weight, LUT_32, "mse")
    hessian = factorized(x)
    codes = compensate(weight, scales, LUT_32, hessian)
    assert torch.equal(codes, compensate(weight.float(), scales, LUT_32, hessian))


@pytest.mark.parametrize("act_order", [True, False])
def test_channel_that_is_never_excited_is_rounded_to_nearest(act_order):
    weight, x, _ = problem(16, 256)
    x[:, 100] = 0
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, factorized(x, act_order=act_order))
    nearest = nearest_codes(weight, scales, LUT_32)
    assert torch.equal(codes[:, 100], nearest[:, 100])
    error = output_error(weight, codes, scales, LUT_32, x)
    assert error < output_error(weight, nearest, scales, LUT_32, x)


def test_hessian_of_zeros_rounds_everything_to_nearest():
    weight, x, _ = problem(4, 128)
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, factorized(torch.zeros_like(x)))
    assert torch.equal(codes, nearest_codes(weight, scales, LUT_32))


def test_fewer_tokens_than_channels_still_compensates():
    weight, x, _ = problem(16, 256)
    x = x[:64]  # rank 64 of 256
    scales = choose_scales(weight, LUT_32, "mse")
    codes = compensate(weight, scales, LUT_32, factorized(x))
    nearest = nearest_codes(weight, scales, LUT_32)
    error = output_error(weight, codes, scales, LUT_32, x)
    assert error < 0.5 * output_error(weight, nearest, scales, LUT_32, x)


def test_hessian_without_a_factor_is_refused():
    weight, x, _ = problem(4, 128)
    hessian = InputHessian(128, x.device)
    hessian.add(x)
    hessian.finish()
    with pytest.raises(RuntimeError, match="no factor"):
        compensate(weight, choose_scales(weight, LUT_32, "mse"), LUT_32, hessian)
