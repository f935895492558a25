"""A site's linears together: the same codes however the rows are split, and failures with names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.calibration.hessian import InputHessian
from quant.calibration.scales import choose_scales
from quant.calibration.site import (
    PART_ELEMENTS,
    PART_OF_BLOCK,
    SiteFailed,
    part_elements,
    quantize_site,
)
from quant.passes import CompensatePass, RoundPass
from quant_kernels.formats import WeightFormat, effective_weight, nearest_codes
from quant_kernels.packing import unpack_int4

K = 128
NAMES = ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")
FORMATS = [WeightFormat("w4afp8", 64, "lut"), WeightFormat("w4a8", 32, "int8")]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor) -> InputHessian:
    hessian = InputHessian(x.shape[1], torch.device("cpu"))
    hessian.add(x)
    hessian.finish()
    return hessian


@pytest.fixture
def inputs() -> Tensor:
    """[tokens, K], BF16 values, channels of different strengths and not independent."""
    mixed = random(3 * K, K, seed=1) @ (torch.eye(K) + 0.3 * random(K, K, seed=2) / K**0.5)
    return (mixed * torch.linspace(0.3, 3, K)).bfloat16().float()


@pytest.fixture
def weights() -> list[Tensor]:
    return [(0.37 * random(n, K, seed=n)).bfloat16() for n in (16, 24)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("step", [CompensatePass(), CompensatePass("mse", 0.1, False), RoundPass()])
def test_parts_do_not_change_the_codes(
    fmt: WeightFormat, step: Any, inputs: Tensor, weights: list[Tensor]
) -> None:
    whole = quantize_site(NAMES, weights, fmt, step, hessian_of(inputs))
    for elements in (1, 7 * K, 16 * K, 40 * K - 1):
        parts = quantize_site(NAMES, weights, fmt, step, hessian_of(inputs), elements=elements)
        for one, other, weight in zip(whole, parts, weights, strict=True):
            assert other.weight.words.shape == (len(weight), K // 8)
            # A matmul of fewer rows may add up in another order: at most a tie falls differently.
            same = unpack_int4(one.weight.words) == unpack_int4(other.weight.words)
            assert same.float().mean() > 0.999
            assert torch.equal(one.weight.scales, other.weight.scales)
            assert other.error_before == pytest.approx(one.error_before, rel=1e-5)
            assert other.error_after == pytest.approx(one.error_after, rel=1e-2)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_errors_are_the_shares_of_the_outputs_energy(
    fmt: WeightFormat, inputs: Tensor, weights: list[Tensor]
) -> None:
    for row, weight in zip(
        quantize_site(NAMES, weights, fmt, CompensatePass(), hessian_of(inputs)),
        weights,
        strict=True,
    ):
        used = effective_weight(unpack_int4(row.weight.words), row.weight.scales, fmt).double()
        x, w = inputs.double(), weight.double()
        lost = float((x @ (w - used).T).square().sum() / (x @ w.T).square().sum())
        assert row.error_after == pytest.approx(lost, rel=1e-3)
        absmax = choose_scales(weight.float(), fmt, "absmax")
        nearest = effective_weight(nearest_codes(weight.float(), absmax, fmt), absmax, fmt)
        lost = float((x @ (w - nearest).T).square().sum() / (x @ w.T).square().sum())
        assert row.error_before == pytest.approx(lost, rel=1e-3)
        assert row.error_after < row.error_before < 0.1
        assert row.damping == 0.01


def test_linear_whose_output_is_always_zero_loses_nothing(inputs: Tensor) -> None:
    x = inputs.clone()
    x[:, :64] = 0
    weight = random(8, K, seed=5)
    weight[:, 64:] = 0
    zero, other = quantize_site(
        NAMES, [weight, random(8, K, seed=6)], FORMATS[0], CompensatePass(), hessian_of(x)
    )
    assert (zero.error_before, zero.error_after) == (0, 0)
    assert other.error_after > 0


def test_more_damping_is_tried_until_the_error_fits(
    inputs: Tensor, weights: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def factorize(self: InputHessian, damping: float, act_order: bool) -> float:
        tried.append(damping)
        return original(self, damping, act_order)

    tried: list[float] = []
    original = InputHessian.factorize
    monkeypatch.setattr(InputHessian, "factorize", factorize)
    step = CompensatePass(damping=0.003)
    fmt, hessian = FORMATS[0], hessian_of(inputs)
    good = quantize_site(NAMES, weights, fmt, step, hessian)
    assert tried == [0.003]
    tried.clear()
    worst = max(row.error_after for row in good)
    with pytest.raises(SiteFailed) as caught:
        quantize_site(NAMES, weights, fmt, step, hessian, max_error=0.1 * worst)
    assert tried == pytest.approx([0.003, 0.03, 0.3, 1])
    assert caught.value.names == NAMES
    assert "damping up to 1" in caught.value.reason
    assert "rounding to nearest" in caught.value.reason
    assert str(caught.value).startswith(f"{NAMES[0]} (and 1 more): ")


def test_the_hessian_may_take_more_damping_and_that_counts(
    inputs: Tensor, weights: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def factorize(self: InputHessian, damping: float, act_order: bool) -> float:
        tried.append(damping)
        return original(self, max(damping, 0.1), act_order)

    tried: list[float] = []
    original = InputHessian.factorize
    monkeypatch.setattr(InputHessian, "factorize", factorize)
    fmt, hessian = FORMATS[0], hessian_of(inputs)
    rows = quantize_site(NAMES, weights, fmt, CompensatePass(), hessian)
    assert {row.damping for row in rows} == {0.1}
    tried.clear()
    with pytest.raises(SiteFailed, match="damping up to 1 "):
        quantize_site(NAMES, weights, fmt, CompensatePass(), hessian, max_error=1e-6)
    assert tried == [0.01, 1.0]


def test_bound_holds_for_rounding_too(inputs: Tensor, weights: list[Tensor]) -> None:
    fmt, hessian = FORMATS[0], hessian_of(inputs)
    rows = quantize_site(NAMES, weights, fmt, RoundPass(), hessian, max_error=0.1)
    assert {row.damping for row in rows} == {None}
    low, high = sorted(row.error_after for row in rows)
    quantize_site(NAMES, weights, fmt, RoundPass(), hessian, max_error=high)  # not more than it
    with pytest.raises(SiteFailed, match=r"(gate|up)_proj loses") as caught:
        quantize_site(NAMES, weights, fmt, RoundPass(), hessian, max_error=(low + high) / 2)
    assert "damping" not in caught.value.reason
    worse = NAMES[[row.error_after for row in rows].index(high)].rsplit(".", 1)[-1]
    assert caught.value.reason.startswith(worse)


@pytest.mark.parametrize("step", [CompensatePass(), RoundPass()])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_fail(
    step: Any, poison: float, inputs: Tensor, weights: list[Tensor]
) -> None:
    inputs[5, 7] = poison
    with pytest.raises(SiteFailed, match="holds NaN or Inf") as caught:
        quantize_site(NAMES, weights, FORMATS[0], step, hessian_of(inputs))
    assert caught.value.names == NAMES


def test_weight_that_is_not_finite_fails(inputs: Tensor, weights: list[Tensor]) -> None:
    weights[1][3, 4] = float("nan")
    with pytest.raises(SiteFailed, match=r"up_proj loses nan"):
        quantize_site(NAMES, weights, FORMATS[0], RoundPass(), hessian_of(inputs))


def test_parts_are_a_share_of_the_block_within_bounds() -> None:
    smallest, largest = PART_ELEMENTS
    assert smallest < largest
    assert part_elements(1) == smallest
    assert part_elements(2**40) == largest
    between = int((smallest * largest) ** 0.5)
    assert part_elements(int(between / PART_OF_BLOCK)) == pytest.approx(between, rel=1e-3)
