"""Hessian compensation: round column by column, and let later columns repair earlier errors.

For a linear with weight W [N, K] and calibration inputs X [T, K], rounding to W^ costs

    |X (W - W^)^T|^2 = tr((W - W^) H (W - W^)^T),        H = X^T X / T

GPTQ (Frantar et al., 2022, eq. 2 and 3) rounds the columns in some order and moves those that
remain by the error of the last one. LDLQ is the same rounding with the errors kept apart (QuIP,
Chee et al., 2023, eq. 2 and theorem 6): with the columns in that order, H = R R^T, R upper
triangular,

    w^_k = Q(w_k + sum_{j < k} (w_j - w^_j) R[j, k] / R[k, k])

Proof: GPTQ's factor is U = R^-1, from H^-1 = U^T U. Its errors e_j = (w'_j - w^_j) / U[j, j] obey
w - w^ = e U, so e = (w - w^) R; column k of that, divided by R[k, k], is the line above. Nothing is
inverted, which is a quarter of the work. `InputHessian` keeps the columns in reverse, where R is
the ordinary lower Cholesky factor L: R[j, k] = L[K-1-j, K-1-k].

Scales are fixed beforehand from the original weights in their natural groups (static groups), so
the order may follow the Hessian's diagonal (act-order) without any index array in the checkpoint.
Codes are the nearest on the format's true grid, so what is compensated is what the kernel
multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.calibration.grid import EvenGrid, ProductGrid, true_grid
from quant.calibration.hessian import InputHessian
from quant_kernels import reference
from quant_kernels.formats import WeightFormat

# Columns whose errors enter the next ones singly. Errors from further back come by matmuls.
COLUMNS_AT_ONCE = 16


def compensate(
    weight: Tensor,
    scales: Tensor,
    fmt: WeightFormat,
    hessian: InputHessian,
    *,
    block_size: int = 128,
) -> Tensor:
    """Codes [N, K] int8 for weight [N, K] (float) with scales [N, G] fixed.

    scales: above 0 and on fmt's grid. hessian: of K columns, factorized. Rows do not depend on each
    other, except that a matmul may add in another order for another N. Takes memory for about three
    FP32 arrays [N, K].
    """
    columns = weight.shape[1]
    factor, order = hessian.factor, hessian.order
    grid = true_grid(scales, fmt)
    group_of = (order // (columns // scales.shape[1])).tolist()
    # A column of W is a row here, in the factor's order: [K, N]. Once rounded it is w - w^.
    w = weight.float().T.index_select(0, order)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    with reference.bf16_products(False):
        for stop in range(columns, 0, -block_size):
            start = max(stop - block_size, 0)
            pivots = factor.diagonal()[start:stop].unsqueeze(1)
            feedback = factor[start:stop, start:stop].T / pivots  # R[j, k] / R[k, k], by k
            wish = w[start:stop] + (factor[stop:, start:stop].T @ w[stop:]) / pivots
            _round_block(
                wish, w[start:stop], codes[start:stop], feedback, group_of[start:stop], grid
            )
    natural = torch.empty_like(codes)
    natural[order] = codes
    return natural.T.contiguous()


def _round_block(
    wish: Tensor,
    w: Tensor,
    codes: Tensor,
    feedback: Tensor,
    group_of: list[int],
    grid: EvenGrid | ProductGrid,
) -> None:
    """Round the columns of one block [b, N], the last first: w becomes w - w^, codes are written.

    wish: w plus what the errors of earlier blocks ask for. feedback [b, b]: its row k weighs the
    errors of the columns above k.
    """
    for stop in range(len(w), 0, -COLUMNS_AT_ONCE):
        start = max(stop - COLUMNS_AT_ONCE, 0)
        wish[start:stop].addmm_(feedback[start:stop, stop:], w[stop:])
        for k in range(stop - 1, start - 1, -1):
            wish[k].addmv_(w[k + 1 : stop].T, feedback[k, k + 1 : stop])
            w[k] -= grid.round(wish[k], group_of[k], codes[k])
