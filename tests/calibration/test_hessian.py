"""The Hessian against float64, before and after the factor moves into its matrix."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.calibration import hessian as hessian_module
from quant.calibration.hessian import STRIP, InputHessian, NotPositiveDefinite, cholesky_lower_

# Below a strip, no multiple of one, several of them.
SIZES = [40, 300, 2 * STRIP, 600]


def inputs(columns: int, tokens: int | None = None, seed: int = 0) -> Tensor:
    """Correlated inputs [T, K] with uneven channels. BF16 numbers, so that products are exact."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens or 4 * columns, columns, generator=generator)
    x = x @ (mixing + 0.3 * torch.eye(columns))
    return (x * torch.rand(columns, generator=generator).mul(3).exp()).bfloat16().float()


def collected(x: Tensor, batch: int = 100) -> InputHessian:
    hessian = InputHessian(x.shape[1], x.device)
    for part in x.split(batch):
        hessian.add(part)
    hessian.finish()
    return hessian


def exact(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def holding(matrix: Tensor) -> InputHessian:
    """What no inputs give: any symmetric matrix."""
    hessian = InputHessian(len(matrix), matrix.device)
    hessian._matrix.copy_(matrix)
    hessian._tokens = 1
    hessian.finish()
    return hessian


def with_smallest_eigenvalue(share: float) -> Tensor:
    """A Hessian [64, 64] with ones on the diagonal's mean and one eigenvalue of -share."""
    basis, _ = torch.linalg.qr(
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    )
    values = torch.full((64,), (64 + share) / 63).double()
    values[0] = -share
    return ((basis * values) @ basis.T).float()


def product(hessian: InputHessian) -> Tensor:
    """L L^T in the channels' natural order, float64."""
    lower = hessian.factor.tril().double()
    natural = torch.empty(lower.shape, dtype=torch.float64)
    order = hessian.order
    natural[order.unsqueeze(1), order] = lower @ lower.T
    return natural


def symmetric(hessian: InputHessian) -> Tensor:
    """H in natural order, bit for bit as it is kept: above the diagonal, and on it."""
    upper = hessian._matrix.triu(1)
    natural = torch.empty_like(upper)
    natural[hessian.order.unsqueeze(1), hessian.order] = upper + upper.T
    natural.diagonal().copy_(hessian.second_moments)
    return natural


@pytest.mark.parametrize("columns", SIZES)
def test_batches_add_up_to_the_mean_of_products(columns):
    x = inputs(columns)
    hessian = collected(x, batch=77)
    assert hessian.tokens == len(x)
    assert torch.allclose(symmetric(hessian).double(), exact(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(hessian.second_moments.double(), x.double().square().mean(dim=0))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("act_order", [True, False])
def test_factor_is_that_of_the_damped_hessian_in_reversed_order(columns, act_order):
    x = inputs(columns)
    hessian = collected(x)
    assert hessian.factorize(0.01, act_order) == 0.01
    h = exact(x)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns)
    # FP32 Cholesky's backward error is a small multiple of K * 2^-24 relative to the diagonal.
    scale = damped.diagonal().sqrt()
    backward = (product(hessian) - damped).abs() / torch.outer(scale, scale)
    assert float(backward.max()) < columns * 2**-24
    first_to_last = hessian.order.flip(0)
    if act_order:
        falling = hessian.second_moments[first_to_last]
        assert bool((falling[1:] <= falling[:-1]).all())
    else:
        assert torch.equal(first_to_last, torch.arange(columns))


def test_equal_channels_keep_their_order():
    hessian = collected(torch.ones(8, 300))
    hessian.factorize(0.01, True)
    assert torch.equal(hessian.order.flip(0), torch.arange(300))


@pytest.mark.parametrize("columns", SIZES)
def test_energy_is_the_undamped_quadratic_form_whatever_was_factorized(columns, monkeypatch):
    # Chunks of a few rows, the last of them short.
    monkeypatch.setattr(hessian_module, "ENERGY_ELEMENTS", 5 * columns)
    x = inputs(columns)
    rows = torch.randn(23, columns, generator=torch.Generator().manual_seed(1))
    expected = (rows.double() @ exact(x) * rows.double()).sum(dim=1)
    hessian = collected(x)
    for step in (None, (0.01, True), (0.5, False), (0.5, True)):
        if step:
            hessian.factorize(*step)
        found = hessian.energy(rows)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, rtol=2e-5)
    assert torch.equal(hessian.energy(rows.bfloat16()), hessian.energy(rows.bfloat16().float()))
    assert torch.equal(hessian.energy(torch.zeros(2, columns)), torch.zeros(2))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("act_order", [True, False])
def test_factorizing_again_is_factorizing_for_the_first_time(columns, act_order):
    x = inputs(columns)
    hessian = collected(x)
    before, moments = symmetric(hessian), hessian.second_moments.clone()
    hessian.factorize(0.01, not act_order)
    hessian.factorize(0.02, act_order)
    hessian.factorize(0.3, act_order)
    assert torch.equal(symmetric(hessian), before)
    assert torch.equal(hessian.second_moments, moments)
    fresh = collected(x)
    fresh.factorize(0.3, act_order)
    assert torch.equal(hessian.order, fresh.order)
    assert torch.equal(hessian.factor, fresh.factor)


@pytest.mark.parametrize(
    ("share", "damping", "needed"), [(-0.5, 0.01, 0.01), (0.05, 0.01, 0.1), (0.6, 0.05, 1.0)]
)
def test_damping_grows_as_far_as_it_must_and_is_reported(share, damping, needed):
    matrix = with_smallest_eigenvalue(share)
    hessian = holding(matrix)
    used = hessian.factorize(damping, True)
    assert used == pytest.approx(needed)
    damped = matrix.double() + used * matrix.diagonal().mean().double() * torch.eye(64)
    assert torch.allclose(product(hessian), damped, atol=1e-5)
    asked = holding(matrix)
    asked.factorize(used, True)
    assert torch.equal(hessian.factor, asked.factor)


def test_fewer_tokens_than_channels_need_some_damping():
    hessian = collected(inputs(300, tokens=20))
    used = hessian.factorize(0.0, True)
    assert 0.0 < used <= 0.1


def test_channels_that_are_never_excited_have_only_the_damping():
    x = inputs(300)
    x[:, [7, 280]] = 0
    hessian = collected(x)
    hessian.factorize(0.01, True)
    assert set(hessian.order[:2].tolist()) == {7, 280}  # rounded last
    alone = torch.zeros(2, 300)
    pivot = (0.01 * hessian.second_moments.mean()).sqrt()
    alone[[0, 1], [0, 1]] = pivot
    assert torch.allclose(hessian.factor[:2].tril(), alone)
    assert bool((hessian.factor[2:, :2] == 0).all())


def test_hessian_of_zeros_is_damped_as_if_its_mean_were_one():
    hessian = collected(torch.zeros(8, 40))
    assert hessian.factorize(0.25, True) == 0.25
    assert torch.equal(hessian.factor.tril(), 0.5 * torch.eye(40))


def test_hopeless_hessians_are_refused_and_stay_what_they_were():
    matrix = with_smallest_eigenvalue(3.0)
    hessian = holding(matrix)
    assert hessian.factorize(4.0, True) == 4.0  # asked for, so allowed
    with pytest.raises(NotPositiveDefinite, match="with damping 1"):
        hessian.factorize(0.01, True)
    with pytest.raises(RuntimeError, match="no factor"):
        _ = hessian.factor
    assert torch.equal(symmetric(hessian).triu(), matrix.triu())


def test_no_factor_before_the_first_factorization():
    with pytest.raises(RuntimeError, match="no factor"):
        _ = collected(inputs(40)).factor


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_or_overflow_are_noticed(poison):
    x = inputs(300)
    assert collected(x).is_finite()
    x[5, 290] = poison
    hessian = collected(x)
    assert not hessian.is_finite()
    with pytest.raises(NotPositiveDefinite, match="NaN or Inf"):
        hessian.factorize(0.01, True)


@pytest.mark.parametrize("columns", SIZES)
def test_cholesky_leaves_the_upper_triangle_alone_and_does_not_read_it(columns):
    h = exact(inputs(columns)).float()
    poisoned = h.tril() + torch.full_like(h, 7e7).triu(1)
    assert cholesky_lower_(poisoned)
    assert bool((poisoned.triu(1) == torch.full_like(h, 7e7).triu(1)).all())
    lower = poisoned.tril().double()
    assert torch.allclose(lower @ lower.T, h.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 255, 256, 599])
def test_cholesky_finds_a_negative_pivot_wherever_it_is(place):
    h = torch.eye(600)
    h[place, place] = -1
    assert not cholesky_lower_(h)


@pytest.mark.parametrize("distance", [0.0, 2.0**-24])
def test_cholesky_refuses_a_pivot_that_is_only_rounding(distance):
    # Two equal channels, but for the last bit.
    h = torch.eye(300)
    h[298:, 298:] = 1.0
    h[298, 299] = h[299, 298] = 1.0 - distance
    assert not cholesky_lower_(h.clone())
    h[299, 299] = 1.0 + 2.0**-20
    assert cholesky_lower_(h)


MEASURE = """
import sys, torch
from quant.calibration.hessian import InputHessian

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

def extra(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / (4 * K * K)

def live(columns):
    global hessian
    hessian = InputHessian(columns, torch.device("cpu"))
    hessian.add(torch.randn(256, columns))
    hessian.finish()
    hessian.factorize(0.01, True)
    hessian.energy(torch.randn(64, columns))

K = 4096
live(600)  # what the libraries allocate once
print(extra(lambda: live(K)), extra(lambda: hessian.factorize(0.1, False)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_memory_is_one_matrix_and_strips():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    life, again = map(float, run.stdout.split())
    # At 4096 strips of 256 are a sixteenth of a matrix, and two or three are alive at a time.
    assert life < 1.4
    assert again < 0.3
