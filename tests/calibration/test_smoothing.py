"""Smoothing scales: each method's formula, and that what is chosen loses less."""

import dataclasses

import pytest
import torch
from torch import Tensor

from quant.calibration.hessian import InputHessian
from quant.calibration.scales import choose_scales
from quant.calibration.smoothing import (
    THRESHOLDS,
    Site,
    SiteSample,
    activation_noise,
    choose_smoothing,
)
from quant.passes import SmoothPass
from quant_kernels import reference
from quant_kernels.formats import WeightFormat, effective_weight, nearest_codes

CPU = torch.device("cpu")
INT8 = WeightFormat("w4a8", 64, "int8")
LUT = WeightFormat("w4afp8", 64, "lut")


def hessian_of(x: Tensor) -> InputHessian:
    hessian = InputHessian(x.shape[1], CPU)
    hessian.add(x)
    hessian.finish()
    return hessian


def make_site(outliers: bool, fmt: WeightFormat = INT8, shared: int = 1) -> tuple[Site, Tensor]:
    """A site of two linears, 256 inputs, some of them 40 times the others; and its inputs."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(600, 256, generator=generator) * (0.5 + torch.rand(256, generator=generator))
    if outliers:
        x[:, [3, 70, 130]] *= 40
    x = x.to(torch.bfloat16).float()
    weights = [torch.randn(n, 256, generator=generator) for n in (48, 24)]
    site = Site(
        weights=weights,
        fmt=fmt,
        sample=SiteSample(x[:300], x.abs().amax(dim=0), torch.ones(300, 1)),
        hessian=hessian_of(x),
        function=lambda outputs: torch.cat(outputs, dim=1).tanh(),
        shared=shared,
        head_dim=32,
    )
    return site, x


def outputs_of(site: Site, x: Tensor, s: Tensor, method: str) -> Tensor:
    """What kernels give for x with weights rounded to nearest, in float64."""
    seen = reference.dequantize_activation(
        *reference.quantize_activation(x / s, site.fmt.activation)
    ).double()
    found = []
    for weight in site.weights:
        w = weight * s
        scales = choose_scales(w, site.fmt, method, x.square().mean(dim=0) / s.square())
        effective = effective_weight(nearest_codes(w, scales, site.fmt), scales, site.fmt)
        found.append(seen @ effective.double().T)
    return torch.cat(found, dim=1)


def error(site: Site, x: Tensor, s: Tensor, method: str) -> float:
    exact = x.double() @ torch.cat(list(site.weights)).double().T
    return float((outputs_of(site, x, s, method) - exact).square().sum() / exact.square().sum())


def test_adaptive_takes_the_threshold_of_least_error():
    site, _ = make_site(outliers=True)
    s, label = choose_smoothing(site, SmoothPass("adaptive"), 0.01)
    amax = site.sample.amax
    sigma = float((amax / s)[s > 1].max())
    assert label == f"sigma {sigma:.3g}"
    # Only channels beyond sigma shrink, and all of those to exactly sigma.
    assert torch.allclose(s, (amax / sigma).clamp_min(1), rtol=1e-5)
    tokens = site.sample.tokens
    exact = (tokens @ torch.cat(list(site.weights)).T).tanh()

    def lost(s: Tensor) -> float:
        return float((outputs_of(site, tokens, s, "absmax").tanh() - exact).square().sum())

    ratio = float(amax.median() / amax.amax() / 2)
    tried = [float(amax.amax()) * ratio ** (i / THRESHOLDS) for i in range(THRESHOLDS + 1)]
    least = min(lost((amax / sigma).clamp_min(1)) for sigma in tried)
    assert lost(s) == pytest.approx(least, rel=1e-3)
    assert lost(s) < 0.5 * lost(torch.ones_like(s))


def test_channel_makes_columns_alike():
    site, _ = make_site(outliers=False)
    uneven = [w * torch.logspace(-1, 1, 256) for w in site.weights]
    s, _ = choose_smoothing(dataclasses.replace(site, weights=uneven), SmoothPass("channel"), 0.01)
    columns = (torch.cat(uneven) * s).abs().mean(dim=0)
    assert torch.allclose(columns, columns.mean().expand(256), rtol=1e-4)
    assert float(s.log().mean()) == pytest.approx(0, abs=1e-4)
    half, _ = choose_smoothing(
        dataclasses.replace(site, weights=uneven), SmoothPass("channel", strength=0.5), 0.01
    )
    assert torch.allclose(half.square(), s, rtol=1e-3)


@pytest.mark.parametrize("fmt", [INT8, LUT], ids=["int8", "lut"])
@pytest.mark.parametrize("outliers", [True, False])
def test_search_loses_less_or_nothing(outliers, fmt):
    site, x = make_site(outliers, fmt)
    s, label = choose_smoothing(site, SmoothPass("search"), 0.01)
    before = error(site, x, torch.ones_like(s), "hessian")
    after = error(site, x, s, "hessian")
    # INT8 has one scale a token, and outliers take it all; FP8 hardly minds.
    if outliers and fmt is INT8:
        assert label != "none"
        assert after < 0.8 * before
    assert after < 1.03 * before


def test_search_sees_what_is_lost_by_the_activations():
    # Thresholds cost the weights something, so that exact activations would not ask for them.
    site, x = make_site(outliers=True)
    s = (site.sample.amax / site.sample.amax.quantile(0.97)).clamp_min(1)
    one = torch.ones(len(x), 1)
    noisy = activation_noise(x, INT8, one).sum()
    assert (activation_noise(x / s, INT8, one) * s.square()).sum() < 0.1 * noisy


def test_channels_of_one_row_share_their_scale():
    site, _ = make_site(outliers=True, shared=2)
    for method in ("adaptive", "channel", "search"):
        s, label = choose_smoothing(site, SmoothPass(method), 0.01)
        assert label != "none"
        grouped = s.view(4, 2, 32)
        assert torch.equal(grouped[:, 0], grouped[:, 1]), method
        assert len(grouped[:, 0].unique()) > 1, method


@pytest.mark.parametrize("factorized", [False, True])
def test_a_rescaled_hessian_is_that_of_the_smoothed_inputs(factorized):
    _, x = make_site(outliers=True)
    generator = torch.Generator().manual_seed(3)
    s = 0.3 + torch.rand(256, generator=generator) * 3
    noise = torch.rand(256, generator=generator)
    hessian = hessian_of(x)
    if factorized:
        hessian.factorize(0.01, act_order=True)
    hessian.rescale(s, noise)
    smoothed = (x / s).double()
    wanted = smoothed.T @ smoothed / len(x) + torch.diag(noise.double())
    identity = torch.eye(256)
    found = hessian.times(identity).double()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.allclose(hessian.second_moments.double(), wanted.diagonal(), rtol=1e-4)
    hessian.factorize(0.02, act_order=True)
    # A pivot is what is left of a channel when those rounded after it are known.
    last = int(hessian.order[0])
    damped = wanted + 0.02 * wanted.diagonal().mean() * identity
    assert float(hessian.pivots[last]) == pytest.approx(float(damped[last, last]), rel=1e-3)
    first = int(hessian.order[-1])
    inverse = torch.linalg.inv(damped)
    assert float(hessian.pivots[first]) == pytest.approx(1 / float(inverse[first, first]), rel=1e-3)
