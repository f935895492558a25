"""Hessian compensation: round column by column, and let later columns repair earlier errors.

For a linear with weight W [N, K] and calibration inputs X [T, K], rounding to W^ costs

    |X (W - W^)^T|^2 = tr((W - W^) H (W - W^)^T),        H = X^T X / T

GPTQ (Frantar et al., 2022, eq. 2 and 3): with U the upper Cholesky factor of H^-1 and columns in
some order, rounding column j leaves the error e_j = (w_j - w^_j) / U[j, j], and the columns after
it take w_k -= e_j U[j, k].

Scales are fixed beforehand from the original weights in their natural groups (static groups), so
the order may follow the Hessian's diagonal (act-order) without any index array in the checkpoint.
Codes are the nearest on the format's true grid, so what is compensated is what the kernel
multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels.formats import (
    CODE_MIN,
    WeightFormat,
    midpoints,
    product_levels,
    split_scales,
)

# When the damped Hessian is still not positive definite: ten times more, at most up to the mean.
DAMPING_GROWTH = 10.0
LARGEST_DAMPING = 1.0


class NotPositiveDefinite(ArithmeticError):
    """The Hessian is not positive definite even with the largest damping."""


@dataclass(frozen=True)
class Compensated:
    """codes [N, K] int8, and the damping that the Cholesky factorization needed."""

    codes: Tensor
    damping: float


def compensate(
    weight: Tensor,
    scales: Tensor,
    fmt: WeightFormat,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> Compensated:
    """Codes for weight [N, K] with scales [N, G] fixed, under hessian [K, K] (symmetric, FP32).

    damping: added to the diagonal, as a fraction of its mean. Raises NotPositiveDefinite.
    """
    columns = weight.shape[1]
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=weight.device)
    )
    factor, used_damping = inverse_factor(hessian[order][:, order], damping)
    w = weight.float()[:, order].T.contiguous()  # [K, N]: a column of W is a row here
    t, c = split_scales(scales, fmt)
    levels = (product_levels(t, fmt) * c.unsqueeze(-1)).transpose(0, 1).contiguous()  # [G, N, 16]
    bounds = midpoints(levels)  # [G, N, 15]
    group_of = (order // (columns // levels.shape[0])).tolist()
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty(stop - start, w.shape[1], device=w.device)
        for j in range(start, stop):
            group = group_of[j]
            index = torch.searchsorted(bounds[group], w[j].unsqueeze(1))  # [N, 1]
            rounded = levels[group].gather(1, index).squeeze(1)
            codes[j] = index.squeeze(1) + CODE_MIN
            error = (w[j] - rounded) / factor[j, j]
            w[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
            errors[j - start] = error
        w[stop:] -= factor[start:stop, stop:].T @ errors
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Compensated(natural.T.contiguous(), used_damping)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of (H + damping * mean(diag H) * I)^-1, and the damping it took.

    A channel that calibration never excites has only the damping, and is rounded to nearest. Raises
    NotPositiveDefinite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NotPositiveDefinite("the Hessian holds NaN or Inf")
    mean = hessian.diagonal().mean()
    if float(mean) <= 0:
        mean = torch.ones_like(mean)
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper, damping
        if damping >= LARGEST_DAMPING:
            raise NotPositiveDefinite(f"not positive definite with damping {damping:g}")
        damping = min(max(damping, 1e-3) * DAMPING_GROWTH, LARGEST_DAMPING)


def relative_output_error(weight: Tensor, effective: Tensor, hessian: Tensor) -> float:
    """tr((W - W^) H (W - W^)^T) / tr(W H W^T): the share of the output's energy that is lost."""
    difference = weight.float() - effective
    lost = ((difference @ hessian) * difference).sum()
    total = ((weight.float() @ hessian) * weight.float()).sum()
    return float(lost / total) if float(total) > 0 else 0.0
