"""Smoothing: a scale for every input channel of a site, moved from its activations to its weights.

    y = W x = (W diag(s)) (x / s)

x / s costs nothing where what comes before can absorb it: a norm's weight (sites "qkv" and
"gate_up"), or the rows of v_proj and up_proj (sites "o" and "down"). A value head feeds the r query
heads that share it, so s has to be the same for all of them; statistics are taken over the r.

"adaptive" (QQQ, Zhang et al., 2024, section 3.2): only channels beyond a threshold sigma shrink,
to exactly sigma. sigma is searched for the least error of the site's own function f (attention for
q, k, v; silu(gate) * up for gate and up; else the linear), with weights rounded to nearest:

    s_k = max(1, max_t|x_k| / sigma)        sigma = argmin |f(Qa(x / s), Qw(W s)) - f(x, W)|^2

"channel" (FireQ, Baek et al., 2025): columns of W are made alike, so that a group of them shares a
scale without loss, and the activation's exponent takes the difference:

    s_k = c / mean_n|W[n, k]|^strength

FireQ tunes c, because the absolute level of W decides where its group scales fall among E4M3's
subnormals. Ours are relative to a row unit (`formats.py`), so that c cancels; it is what makes the
mean of log s zero.

"search": thresholds and columns as above, powers of the inputs' sizes, and no smoothing at all; the
least expected error of the linears' outputs is taken. With H + damping = L L^T the rounding of a
compensated column k costs L[k, k]^2 times its square (`compensation.py`), so

    J(s) = sum_k  L[k, k]^2 / s_k^2 |(W s - Qw(W s))_k|^2  +  E[(x / s - Qa(x / s))_k^2] |(W s)_k|^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.architectures import SITES
from quant.calibration.block import BlockWork
from quant.calibration.folding import fold, shared_by
from quant.calibration.hessian import InputHessian
from quant.calibration.inputs import SiteInputs
from quant.calibration.scales import choose_scales
from quant.passes import SmoothPass
from quant_kernels import reference
from quant_kernels.formats import (
    WeightFormat,
    effective_weight,
    kernel_operand,
    nearest_codes,
)
from quant_kernels.reference import ExpandedWeight

# The linears' outputs, [T, N] each in the order of the site -> what the site computes of them.
Function = Callable[[list[Tensor]], Tensor]

# Tokens that the search sees, in whole windows.
SEARCHED_TOKENS = 1024
THRESHOLDS = 16
# Rows of each linear that stand for all of them in the search, evenly spaced.
SEARCHED_ROWS = 256
SMALL = 1e-6
STRENGTHS = (0.25, 0.5)
QUANTILES = (0.9, 0.97, 0.99, 0.998)


@dataclass(frozen=True)
class SiteSample:
    """What the search sees of a site: tokens [T, K] FP32, max|x| over all tokens [K], and what the
    tokens weigh in the Hessian, [T, 1]."""

    tokens: Tensor
    amax: Tensor
    token_weights: Tensor


@dataclass(frozen=True)
class Site:
    """A site to smooth: weights [N_i, K], their format, and what is known of the inputs.

    shared: r where r neighbouring blocks of `head_dim` channels come from one producer (site "o"
    with grouped heads), else 1. function: see `Function`.
    """

    weights: Sequence[Tensor]
    fmt: WeightFormat
    sample: SiteSample
    hessian: InputHessian
    function: Function
    shared: int = 1
    head_dim: int = 1

    def tie(self, values: Tensor) -> Tensor:
        """The largest of channels [K] that come from one producer, for each of them."""
        if self.shared == 1:
            return values
        grouped = values.view(-1, self.shared, self.head_dim)
        return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


@dataclass(frozen=True)
class SiteWork:
    """A site of a block at work: the linears to quantize, by name inside the block, their format,
    and the inputs that wait, with their Hessian and max|x| [K].

    sampled: the batches that the search sees. token_weights: of a batch's tokens in the Hessian,
    [T, 1].
    """

    block: BlockWork
    site: str
    planned: Sequence[str]
    fmt: WeightFormat
    inputs: SiteInputs
    hessian: InputHessian
    amax: Tensor
    sampled: Sequence[int]
    token_weights: Callable[[int], Tensor]


def smooth_site(
    work: SiteWork, step: SmoothPass, damping: float, rope: tuple[Tensor, Tensor]
) -> str:
    """Choose a site's scales and fold them; inputs, Hessian and all weights follow.

    Returns what was chosen. damping: of the search's Hessian. rope: of the windows' positions.
    """
    cfg, block, names = work.block.cfg, work.block, SITES[work.site]
    device = work.amax.device
    windows = torch.cat([work.inputs.dense(i) for i in work.sampled])
    tokens, shape = windows.flatten(0, 1), tuple(windows.shape[:2])
    token_weights = torch.cat([work.token_weights(i) for i in work.sampled])
    weights = {name: block.tensors[f"{name}.weight"].to(device) for name in names}

    def function(outputs: list[Tensor]) -> Tensor:
        apart = [y.unflatten(0, shape) for y in outputs]
        return block.site_function(work.site, apart, names, rope)

    site = Site(
        weights=list(weights.values()),
        fmt=work.fmt,
        sample=SiteSample(tokens, work.amax, token_weights),
        hessian=work.hessian,
        function=function,
        shared=shared_by(cfg, work.site),
        head_dim=cfg.head_dim,
    )
    s, label = choose_smoothing(site, step, damping)
    if label == "none":
        s = torch.ones_like(s)
    else:
        s = fold(cfg, work.site, block.tensors, block.packed, s)
        for name, weight in weights.items():
            # What is to be quantized need not be rounded before.
            dtype = torch.float32 if name in work.planned else weight.dtype
            block.tensors[f"{name}.weight"] = (weight.float() * s).to(dtype)
        work.inputs.divisor = s
    work.hessian.rescale(s, activation_noise(tokens / s, work.fmt, token_weights))
    return label


def choose_smoothing(site: Site, step: SmoothPass, damping: float) -> tuple[Tensor, str]:
    """s [K] FP32, above 0, and what was chosen, for the report. Factorizes the Hessian (search)."""
    if step.method == "channel":
        s = _homogeneous(site, step.strength)
        return (s, f"channel^{step.strength:g}") if _usable(s) else (torch.ones_like(s), "none")
    if step.method == "adaptive":
        return _adaptive(site)
    return _search(site, damping)


def _homogeneous(site: Site, strength: float) -> Tensor:
    total = torch.zeros_like(site.sample.amax)
    for weight in site.weights:
        total += weight.float().abs().sum(dim=0)
    rows = sum(len(weight) for weight in site.weights)
    return _centred(site.tie((total / rows).clamp_min(SMALL)) ** -strength)


def _adaptive(site: Site) -> tuple[Tensor, str]:
    amax = site.tie(site.sample.amax).clamp_min(SMALL)
    exact = site.function([site.sample.tokens @ w.float().T for w in site.weights])
    largest, typical = amax.amax(), amax.median()
    best, best_s, best_label = torch.inf, torch.ones_like(amax), "none"
    for i in range(THRESHOLDS + 1):
        # From no smoothing at all down to half of a typical channel's range.
        sigma = largest * (typical / largest / 2) ** (i / THRESHOLDS)
        s = (amax / sigma).clamp_min(1)
        outputs = _quantized_outputs(site, s)
        error = float((site.function(outputs) - exact).square().sum())
        if error < best:
            best, best_s = error, s
            best_label = f"sigma {float(sigma):.3g}" if i else "none"
    return best_s, best_label


def _quantized_outputs(site: Site, s: Tensor) -> list[Tensor]:
    """Of the site's linears, rounded to nearest with absmax scales, on Qa(x / s)."""
    codes, scale = reference.quantize_activation(site.sample.tokens / s, site.fmt.activation)
    outputs = []
    for weight in site.weights:
        w = weight.float() * s
        scales = choose_scales(w, site.fmt, "absmax")
        operand, c = kernel_operand(nearest_codes(w, scales, site.fmt), scales, site.fmt)
        kind = torch.int8 if site.fmt.activation == "int8" else torch.float32
        expanded = ExpandedWeight(operand.to(kind), c, site.fmt)
        outputs.append(reference.gemm(codes, scale, expanded, None, torch.float32))
    return outputs


def _search(site: Site, damping: float) -> tuple[Tensor, str]:
    site.hessian.factorize(damping, act_order=True)
    pivots = site.hessian.pivots
    rows = [w[:: max(1, len(w) // SEARCHED_ROWS)].float() for w in site.weights]
    share = sum(map(len, rows)) / sum(map(len, site.weights))
    weights = torch.cat(rows)
    energy = weights.square().sum(dim=0)
    best, best_s, best_label = torch.inf, torch.ones_like(pivots), "none"
    for label, s in _candidates(site):
        if not _usable(s):
            continue
        x = site.sample.tokens / s
        noise = activation_noise(x, site.fmt, site.sample.token_weights)
        w, importance = weights * s, pivots / s.square()
        scales = choose_scales(w, site.fmt, "hessian", importance)
        lost = w - effective_weight(nearest_codes(w, scales, site.fmt), scales, site.fmt)
        cost = float((lost.square() * importance).sum() + (noise * energy * s.square()).sum())
        if cost / share < best:
            best, best_s, best_label = cost / share, s, label
    return best_s, best_label


def _candidates(site: Site) -> Iterator[tuple[str, Tensor]]:
    """(label, s [K]) worth trying."""
    x_max = site.tie(site.sample.amax).clamp_min(SMALL)
    moments = site.tie(site.hessian.second_moments).clamp_min(SMALL**2).sqrt()
    yield "none", torch.ones_like(x_max)
    # A power of the input's size (AWQ, Lin et al., 2023, eq. 5).
    for a in STRENGTHS:
        yield f"rms^{a:g}", _centred(moments**a)
    yield "channel^0.5", _homogeneous(site, 0.5)
    for q in QUANTILES:
        yield f"threshold {q:.0%}", (x_max / x_max.quantile(q)).clamp_min(1)


def activation_noise(x: Tensor, fmt: WeightFormat, token_weights: Tensor) -> Tensor:
    """mean_t (w_t (Qa(x) - x))^2 [K] for x [T, K] and weights w [T, 1]."""
    seen = reference.dequantize_activation(*reference.quantize_activation(x, fmt.activation))
    return (token_weights * (seen - x)).square().mean(dim=0)


def _usable(s: Tensor) -> bool:
    """Not where sums over huge weights have overflowed; rounding then says what is wrong."""
    return bool((torch.isfinite(s) & (s > 0)).all())


def _centred(s: Tensor) -> Tensor:
    """s with its geometric mean at 1: what a token's scale takes up anyway."""
    return s / s.log().mean().exp()
