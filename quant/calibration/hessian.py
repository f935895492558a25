"""The Hessian of a site's inputs, in one K x K matrix from the first token to the last code.

    H = X^T X / T,  X [T, K]          |X E^T|^2 / T = tr(E H E^T)  for an error E [N, K]

Compensation (`compensation.py`) needs a triangular factor of the damped H. K reaches 28,672, where
a matrix takes 3.3 GB, so nothing here is ever a second one. H is symmetric: its strictly upper
triangle and a vector for the diagonal are all of it. The lower triangle is where the factor goes,

    P (H + damping * mean(diag H) * I) P^T = L L^T,       L lower triangular

and the upper triangle stays what it was, so that errors can be weighed with the undamped H after
the factorization, and the factorization repeated with more damping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels import reference

# When the damped Hessian is still not positive definite: ten times more, at most up to the mean.
DAMPING_GROWTH = 10.0
LARGEST_DAMPING = 1.0
# Rows or columns of H that are handled together, and the block of the factorization; temporaries
# are K x STRIP. Of 128, 256, 512 and 1024 the first two are fastest at K = 4096 (one AVX-512 core).
STRIP = 256
# Rows of a panel of the factorization that are solved together.
PANEL_ROWS = 2048
# A pivot this small against its diagonal element is made of rounding errors alone.
PIVOT_NOISE = 2.0**-23
# Elements of the rows whose energy is taken at a time.
ENERGY_ELEMENTS = 1 << 20


class NotPositiveDefinite(ArithmeticError):
    """The Hessian is not positive definite even with the largest damping."""


class InputHessian:
    """H = X^T X / T of one site's inputs [T, K]: `add` batches, `finish` once, then the rest."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._matrix = torch.zeros(columns, columns, device=device)
        self._diagonal = torch.zeros(columns, device=device)
        self._order = torch.arange(columns, device=device)
        self._tokens = 0
        self._factorized = False

    def add(self, x: Tensor) -> None:
        """Accumulate x [t, K] FP32 whose values are BF16 numbers times a scale per token."""
        # Products of inputs rounded to BF16: the sum is the exact Hessian of those inputs. Strips
        # of the upper triangle are all that is needed, and half of the work.
        with reference.bf16_products():
            for start in range(0, x.shape[1], STRIP):
                strip = self._matrix[start : start + STRIP, start:]
                strip.addmm_(x[:, start : start + STRIP].T, x[:, start:])
        self._tokens += len(x)

    def finish(self) -> None:
        """Divide by the tokens; nothing is added after this."""
        for start in range(0, len(self._matrix), STRIP):
            self._matrix[start : start + STRIP, start:] /= self._tokens
        self._diagonal = self._matrix.diagonal().clone()

    def rescale(self, s: Tensor, noise: Tensor) -> None:
        """Become the Hessian of x / s, s [K], plus independent errors of variance noise [K]."""
        self._restore()
        self._permute(torch.arange(len(s), device=s.device))
        self._factorized = False
        for start in range(0, len(self._matrix), STRIP):
            strip = self._matrix[start : start + STRIP]
            strip.div_(s).div_(s[start : start + STRIP].unsqueeze(1))
        self._diagonal = self._diagonal / s.square() + noise
        self._matrix.diagonal().copy_(self._diagonal)

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def second_moments(self) -> Tensor:
        """mean(x[k]^2) [K], the diagonal of H, in the channels' natural order."""
        return self._diagonal

    @property
    def pivots(self) -> Tensor:
        """[K]: L[p, p]^2 of every channel, in natural order: what is left of its second moment when
        the channels that are rounded after it are known. Compensation pays this for an error."""
        found = torch.empty_like(self._diagonal)
        found[self._order] = self.factor.diagonal().square()
        return found

    @property
    def order(self) -> Tensor:
        """[K]: row and column p of the factor are channel order[p]; p = K - 1 is rounded first.

        In reverse, so that the factor which rounding needs is the ordinary lower one.
        """
        return self._order

    @property
    def factor(self) -> Tensor:
        """[K, K] whose lower triangle, diagonal included, is L. What lies above is not L's."""
        if not self._factorized:
            raise RuntimeError("the Hessian has no factor: factorize() was not called, or failed")
        return self._matrix

    def is_finite(self) -> bool:
        """Whether H has no NaN or Inf: |H[i, j]|^2 <= H[i, i] H[j, j], so the diagonal tells."""
        return bool(torch.isfinite(self._diagonal).all())

    def energy(self, rows: Tensor) -> Tensor:
        """e H e^T for every row e of rows [N, K] (natural order), with the undamped H: [N] FP32."""
        size = max(1, ENERGY_ELEMENTS // len(self._matrix))
        with reference.bf16_products(False):
            return torch.cat([self._energy(part.float()) for part in rows.split(size)])

    def _energy(self, rows: Tensor) -> Tensor:
        e = rows[:, self._order]
        total = (rows.square() * self._diagonal).sum(dim=1)
        for start in range(0, e.shape[1], STRIP):
            stop = min(start + STRIP, e.shape[1])
            here, strip = e[:, start:stop], self._matrix[start:stop]
            total += 2 * (here @ strip[:, start:stop].triu(1)).mul_(here).sum(dim=1)
            total += 2 * (here @ strip[:, stop:]).mul_(e[:, stop:]).sum(dim=1)
        return total

    def times(self, rows: Tensor) -> Tensor:
        """rows [N, K] FP32 (natural order) times the undamped H: [N, K] FP32."""
        size = max(1, ENERGY_ELEMENTS // len(self._matrix))
        with reference.bf16_products(False):
            return torch.cat([self._times(part) for part in rows.split(size)])

    def _times(self, rows: Tensor) -> Tensor:
        e = rows[:, self._order]
        product = e * self._diagonal[self._order]
        for start in range(0, e.shape[1], STRIP):
            stop = min(start + STRIP, e.shape[1])
            corner = self._matrix[start:stop, start:stop].triu(1)
            beside = self._matrix[start:stop, stop:]
            product[:, start:stop] += e[:, start:stop] @ (corner + corner.T)
            product[:, stop:] += e[:, start:stop] @ beside
            product[:, start:stop] += e[:, stop:] @ beside.T
        natural = torch.empty_like(product)
        natural[:, self._order] = product
        return natural

    def solve(self, rows: Tensor) -> Tensor:
        """rows [N, K] FP32 (natural order) times the inverse of the damped H: [N, K] FP32."""
        factor = self.factor
        ordered = rows[:, self._order].T
        with reference.bf16_products(False):
            half = torch.linalg.solve_triangular(factor, ordered, upper=False)
            solved = torch.linalg.solve_triangular(factor.T, half, upper=True).T
        natural = torch.empty_like(rows)
        natural[:, self._order] = solved
        return natural

    def factorize(self, damping: float, act_order: bool) -> float:
        """Put L into the lower triangle, in place; returns the damping that it took.

        damping: added to the diagonal, as a fraction of its mean; ten times more where it is too
        little. act_order: round columns by falling second moments, else in natural order. A channel
        that calibration never excites has only the damping. May be called again, as if for the
        first time. Raises NotPositiveDefinite.
        """
        self._factorized = False
        if not self.is_finite():
            raise NotPositiveDefinite("the Hessian holds NaN or Inf")
        mean = self._diagonal.mean()
        if float(mean) <= 0:
            mean = torch.ones_like(mean)
        self._restore()
        self._permute(self._rounding_order(act_order).flip(0))
        while True:
            self._matrix.diagonal().add_(damping * mean)
            if cholesky_lower_(self._matrix):
                self._factorized = True
                return damping
            if damping >= LARGEST_DAMPING:
                raise NotPositiveDefinite(f"not positive definite with damping {damping:g}")
            damping = min(max(damping, 1e-3) * DAMPING_GROWTH, LARGEST_DAMPING)
            self._restore()

    def _rounding_order(self, act_order: bool) -> Tensor:
        if act_order:
            return self._diagonal.argsort(descending=True, stable=True)
        return torch.arange(len(self._diagonal), device=self._diagonal.device)

    def _restore(self) -> None:
        """Make the matrix H again, out of its strictly upper triangle and the diagonal."""
        h = self._matrix
        for start in range(0, len(h), STRIP):
            stop = min(start + STRIP, len(h))
            corner = h[start:stop, start:stop].triu(1)
            h[start:stop, start:stop] = corner + corner.T
            h[stop:, start:stop] = h[start:stop, stop:].T
        h.diagonal().copy_(self._diagonal[self._order])

    def _permute(self, order: Tensor) -> None:
        """Bring rows and columns into another order of the channels; the matrix is H."""
        place = torch.empty_like(order)
        place[self._order] = torch.arange(len(order), device=order.device)
        source = place[order]
        scratch = torch.empty(len(order) * STRIP, device=order.device)
        for columns in self._matrix.split(STRIP, dim=1):
            moved = scratch[: columns.numel()].view(columns.shape)
            columns.copy_(torch.index_select(columns, 0, source, out=moved))
        for rows in self._matrix.split(STRIP):
            moved = scratch[: rows.numel()].view(rows.shape)
            rows.copy_(torch.index_select(rows, 1, source, out=moved))
        self._order = order


def cholesky_lower_(a: Tensor) -> bool:
    """A = L L^T for a [K, K]: L replaces the lower triangle. False: not positive definite in FP32.

    Reads the lower triangle only, and leaves what lies above the diagonal alone. LAPACK's clears
    it or takes a second matrix, and is slower: at K = 4096 on one AVX-512 core 0.42 s (0.44 s in
    place, by `out=`), against 0.32 s for these left-looking blocks and an eighth of a matrix.
    """
    with reference.bf16_products(False):
        for start in range(0, len(a), STRIP):
            stop = min(start + STRIP, len(a))
            known = a[start:stop, :start]
            corner = torch.addmm(a[start:stop, start:stop], known, known.T, alpha=-1)
            corner, failed = torch.linalg.cholesky_ex(corner)
            noise = a.diagonal()[start:stop] * PIVOT_NOISE
            if bool(failed.bool() | (corner.diagonal().square() <= noise).any()):
                return False
            a[start:stop, start:stop] = corner + a[start:stop, start:stop].triu(1)
            one = torch.eye(stop - start, device=a.device)
            inverse = torch.linalg.solve_triangular(corner, one, upper=False)
            for rows in a[stop:].split(PANEL_ROWS):
                panel = rows[:, start:stop]
                panel.addmm_(rows[:, :start], known.T, alpha=-1)
                panel.copy_(panel @ inverse.T)
    return True
