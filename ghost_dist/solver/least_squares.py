"""Ridge regression towards a prior from moments, and the choice of the ridge on held-out moments.

Legend: T tokens (rows), Z regressors, C targets, K folds. Rows are tokens: ``Y_TC = Z_TZ @ B_ZC``.

The operators and the held-out residual without rows are derived in docs/theory.md:

    B = B0 + argmin_M ||(Y - Z B0) - Z M||^2 + tr(M' D M),   D = diag(penalty),

is ``M = (G + D)^-1 K`` with ``G = Z'Z`` and ``K = Z'(Y - Z B0)``. Fold f is fitted on total - fold.

Cost: R x K + 1 Cholesky factors and solves for R ridges on K folds, Z^3 / 3 + 2 Z^2 C FLOP each,
and for another ridge K + 1. Of more than 64 targets the whole grid is tried with 64 mixtures of
them, and with all only the ridges around the least of these. Memory beside the folds: total,
training sum and damped factor, 3 Z^2 float64 (32.6 GB at Z = 8192 + 28672).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ghost_dist.errors import ConfigError, SingularGramError
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge, Ridge
from ghost_dist.statistics.moments import Moments, retarget

MIXTURES = 64
"""Of more targets than these the grid of ridges is tried with so many random mixtures of them."""
RIDGE_GRID = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Ridges relative to the median diagonal entry of the Gram matrix.

The median, because a few massive channels move the mean by orders of magnitude."""


def on_grid(ridge: float) -> float:
    """The ridge of the grid that this one is but for rounding, or itself."""
    return next((one for one in RIDGE_GRID if math.isclose(one, ridge)), ridge)


_DENSE_COPIES_OF_SUMS = 3  # beside the folds: total, training sum, damped factor
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Fit:
    """How well one span's operator does on windows it was not fitted on."""

    # Absolute, in units of squared activations; of the first block where there are several
    ridge: float
    relative_ridge: float  # over the median diagonal entry of the block's Gram matrix
    residual: float  # held-out ||Y - Z B||^2 / ||Y - Z B0||^2: 1 is the plain cut, 0 is exact
    r2: float  # held-out 1 - ||Y - Z B||^2 / ||Y - mean(Y)||^2 over all channels
    r2_channel_quantiles: tuple[float, ...]  # QUANTILES of it over channels
    r2_channels: tuple[float, ...]  # in their order
    condition: float  # estimated, 2-norm, of Gram + ridge
    num_tokens: int
    # Over the number of regressors: C, C + F of joint, 2 C of stream+norm
    tokens_per_channel: float
    # (relative ridge, residual) of every ridge with a Cholesky factor. Far from the least one it is
    # estimated from mixtures of the targets, or that of the fit by which the ridge was chosen
    ridge_curve: tuple[tuple[float, float], ...]


FEW_TOKENS_PER_REGRESSOR = 4.0
"""With fewer the operator depends on the ridge more than on the text (``docs/theory.md``)."""


def more_windows(windows: int, tokens_per_regressor: float) -> int:
    """How many to advise instead: four times as many, or as often four times as is enough."""
    times = math.ceil(math.log(FEW_TOKENS_PER_REGRESSOR / tokens_per_regressor, 4))
    return int(windows * 4 ** max(1, times))


Detail = Literal["all", "residual", "map"]
"""What is wanted of a fit beside B: everything; no condition number; nothing but the ridge."""


def fit_least_squares(
    where: str,
    folds: Iterable[Moments],
    prior_ZC: Tensor,
    ridge: Ridge,
    *,
    blocks: Sequence[int] = (),
    judge: int | None = None,
    around: float | None = None,
    kept: dict[str, Regression] | None = None,
    detail: Detail = "all",
) -> tuple[Tensor, Fit]:
    """Fit B (Z, C) over the folds, with the ridge of least held-out residual or a given one.

    ``folds`` are moments of at least two sets of disjoint windows; ``prior_ZC`` is B0. ``blocks``
    are widths of blocks of regressors of different scale, such as (C, F) for [A, H]: a relative
    ridge is relative to the median diagonal entry of each. ``judge`` is the fold that alone judges
    and that B is not fitted on; None: each judges fits on the others, and B is fitted on all.
    ``around``: a relative ridge near which that of least residual is; of the grid it looks there,
    on until both neighbours are worse. ``kept``: empty, or what another fit of the same least
    squares left there; ``folds`` are not looked at then. ``detail``: what the fit tells; the rest
    is NaN, but a ridge that is not given is looked for all the same. All float64, on the moments'
    device.
    """
    kept = {} if kept is None else kept
    if not kept:
        kept["least squares"] = Regression(folds, prior_ZC, blocks, judge)
    of = kept["least squares"]
    seen, scale_Z = of.seen, of.scale_Z
    if isinstance(ridge, AbsoluteRidge):
        scale_Z = torch.ones_like(scale_Z)
    error_of, errors = of.judged_by(ridge, around, detail)
    if not error_of:
        raise singular(where, seen, _highest(ridge) * float(scale_Z[0]))
    best = min(errors or error_of, key=error_of.__getitem__)
    held_out = error_of[best]
    factor_ZZ, info = cholesky_factor(seen.gram_ZZ, best * scale_Z)
    if int(info):
        raise singular(where, seen, best * float(scale_Z[0]))
    map_ZC = prior_ZC + torch.cholesky_solve(seen.cross_ZC, factor_ZZ)
    tiny = torch.finfo(torch.float64).tiny
    errors_C = errors.get(best, torch.full_like(of.variance_C, math.nan))
    r2_C = 1 - errors_C / of.variance_C.clamp_min(tiny)
    sums = (of.judged.sumsq_y_C.sum(), of.variance_C.sum())
    cut, variance, scale, absolute = torch.stack((*sums, of.scale_Z[0], scale_Z[0])).tolist()
    relative = absolute / scale if scale > 0 else 0.0
    condition = math.nan
    if detail == "all":
        condition = condition_number(seen.gram_ZZ, best * scale_Z, factor_ZZ)
    fit = Fit(
        ridge=best * absolute,
        relative_ridge=best * relative,
        residual=held_out / cut if cut > 0 else 0.0,
        r2=1 - held_out / variance if variance > 0 else 0.0,
        r2_channel_quantiles=tuple(torch.quantile(r2_C, r2_C.new_tensor(QUANTILES)).tolist()),
        r2_channels=tuple(r2_C.tolist()),
        condition=condition,
        num_tokens=seen.num_tokens,
        tokens_per_channel=seen.num_tokens / seen.gram_ZZ.shape[0],
        ridge_curve=tuple(
            (candidate * relative, error / cut if cut > 0 else 0.0)
            for candidate, error in error_of.items()
        ),
    )
    return map_ZC, fit


class Regression:
    """What fits of one least squares at any number of ridges share; computed once."""

    def __init__(
        self,
        folds: Iterable[Moments],
        prior_ZC: Tensor,
        blocks: Sequence[int] = (),
        judge: int | None = None,
    ) -> None:
        originals = list(folds)
        parts = [retarget(fold, prior_ZC) for fold in originals]
        if len(parts) < 2:
            raise ConfigError(f"A held-out residual needs at least 2 folds, got {len(parts)}.")
        self.judging = parts if judge is None else [parts[judge]]
        self.total = add_all(parts)
        self.judged = self.total if judge is None else parts[judge]
        self.seen = self.total if judge is None else self.total - parts[judge]
        self.scale_Z = ridge_scale(self.seen.gram_ZZ, blocks)
        self.variance_C = _target_variance(originals if judge is None else [originals[judge]])
        self._errors_C: dict[float, Tensor] = {}  # by relative ridge, those with a factor
        # Of mixtures of the targets, summed; and what they are less than those of the targets.
        self._mixed: dict[float, float] = {}
        self._less: float | None = None

    def judged_by(
        self, ridge: Ridge, around: float | None, detail: Detail
    ) -> tuple[dict[float, float], dict[float, Tensor]]:
        """Held-out errors by ridge, those with a factor: estimated or not, and those of targets."""
        if ridge == "auto":
            around = self._about_least() if around is None else around
            errors = (
                self._held_out(RIDGE_GRID) if around is None else downhill(self._held_out, around)
            )
            error_of = _totals(errors)
            if not (error_of and self._mixed):
                return error_of, errors
            least = min(error_of, key=error_of.__getitem__)
            self._less = error_of[least] - self._mixed[least]
            return {r: e + self._less for r, e in self._mixed.items()} | error_of, errors
        given = _highest(ridge)
        if detail == "map":
            return {given: math.nan}, {}
        if isinstance(ridge, RelativeRidge):
            estimated = given in self._mixed and given not in self._errors_C
            if detail == "residual" and estimated and self._less is not None:
                return {given: self._mixed[given] + self._less}, {}
            errors = self._held_out([given])
        else:
            ones_Z = torch.ones_like(self.scale_Z)
            errors = held_out_errors(self.judging, self.total, ones_Z, [given])
        return _totals(errors), errors

    def _held_out(self, ridges: Sequence[float]) -> dict[float, Tensor]:
        """Errors by relative ridge, those with a factor; computed once."""
        unknown = [ridge for ridge in ridges if ridge not in self._errors_C]
        self._errors_C |= held_out_errors(self.judging, self.total, self.scale_Z, unknown)
        return {ridge: self._errors_C[ridge] for ridge in ridges if ridge in self._errors_C}

    def _about_least(self) -> float | None:
        """The ridge of the grid of least error of mixtures of the targets; None: of few targets."""
        if len(self.variance_C) <= MIXTURES:
            return None
        self._mixed = mixed_errors(self.judging, self.total, self.scale_Z)
        return min(self._mixed, key=self._mixed.__getitem__, default=None)


def mixtures(num_targets: int, columns: int = MIXTURES) -> Tensor:
    """(C, r) float64 on the CPU: independent signs over sqrt(r), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    signs_Cr = torch.randint(0, 2, (num_targets, columns), generator=generator) * 2 - 1
    return signs_Cr.double() / math.sqrt(columns)


def mixed_errors(folds: Sequence[Moments], total: Moments, scale_Z: Tensor) -> dict[float, float]:
    """Ridges of the grid to the held-out error of MIXTURES of the targets, summed.

    Much less work than that of all targets, and the same expectation, less the same for all ridges.
    All ridges see the same mixtures, so where the least is hardly depends on them.
    """
    mix_Cr = mixtures(total.cross_ZC.shape[1]).to(scale_Z.device)
    none_r = torch.zeros_like(mix_Cr[0])

    def mixed(moments: Moments) -> Moments:
        cross_Zr = moments.cross_ZC @ mix_Cr
        return replace(moments, cross_ZC=cross_Zr, sum_y_C=none_r, sumsq_y_C=none_r)

    of_folds = [mixed(fold) for fold in folds]
    return _totals(held_out_errors(of_folds, mixed(total), scale_Z, RIDGE_GRID))


def downhill(
    errors_at: Callable[[Sequence[float]], dict[float, Tensor]], around: float
) -> dict[float, Tensor]:
    """Errors at ridges of the grid around one, on to where both neighbours are worse."""
    first = min(range(len(RIDGE_GRID)), key=lambda i: abs(math.log(RIDGE_GRID[i] / around)))
    low, high, last = max(first - 1, 0), first + 1, len(RIDGE_GRID) - 1
    known: dict[float, Tensor] = {}
    asked: set[float] = set()
    while True:
        ridges = RIDGE_GRID[low : high + 1]
        known |= errors_at([ridge for ridge in ridges if ridge not in asked])
        asked.update(ridges)
        error_of = _totals(known)
        best = min(error_of, key=error_of.__getitem__, default=RIDGE_GRID[min(high, last)])
        if best == RIDGE_GRID[low] and low > 0:
            low -= 1
        elif high < last and best == RIDGE_GRID[high]:
            high += 1
        else:
            return known


def held_out_errors(
    folds: Sequence[Moments],
    total: Moments,
    scale_Z: Tensor,
    candidates: Sequence[float],
) -> dict[float, Tensor]:
    """Ridge to squared error per target, summed over folds of ``total``, each not fitted on.

    A ridge is left out if any fold's training Gram has no factor under it: its residual would not
    be over all windows, and not comparable. A device is waited for once, at the end.
    """
    errors: dict[float, Tensor] = {c: torch.zeros_like(total.sumsq_y_C) for c in candidates}
    failed = {c: torch.zeros((), dtype=torch.int32, device=scale_Z.device) for c in candidates}
    for fold in folds if errors else ():
        training = total - fold
        for candidate in candidates:
            factor_ZZ, info = cholesky_factor(training.gram_ZZ, candidate * scale_Z)
            map_ZC = torch.cholesky_solve(training.cross_ZC, factor_ZZ)
            errors[candidate] = errors[candidate] + map_error(fold, map_ZC)
            failed[candidate] = failed[candidate] + info
    failures = torch.stack(list(failed.values())).tolist() if failed else []
    return {c: errors[c] for c, failure in zip(candidates, failures, strict=True) if not failure}


def solve(where: str, moments: Moments, penalty_Z: Tensor) -> Tensor:
    """M = (G + diag(penalty))^-1 K, (Z, C); SingularGramError if there is no factor."""
    factor_ZZ, info = cholesky_factor(moments.gram_ZZ, penalty_Z)
    if int(info):
        raise singular(where, moments, float(penalty_Z[0]))
    return torch.cholesky_solve(moments.cross_ZC, factor_ZZ)


def map_error(moments: Moments, map_ZC: Tensor) -> Tensor:
    """Per target ``||Y - Z B||^2`` over the moments' rows, shape (C,)."""
    # (B'G B)_jj - 2 (B'K)_jj in one product: columns of B against columns of G B - 2 K.
    product_ZC = moments.gram_ZZ @ map_ZC - 2 * moments.cross_ZC
    return moments.sumsq_y_C + (map_ZC * product_ZC).sum(0)


def ridge_scale(gram_ZZ: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """What a relative ridge of 1 adds to each diagonal entry: its block's median; shape (Z,)."""
    diagonal_Z = gram_ZZ.diagonal()
    scale_Z = torch.empty_like(diagonal_Z)
    first = 0
    for width in blocks or (len(diagonal_Z),):
        scale_Z[first : first + width] = diagonal_Z[first : first + width].median()
        first += width
    assert first == len(diagonal_Z), "the blocks' widths do not add up to the regressors"
    return scale_Z


def cholesky_factor(gram_ZZ: Tensor, penalty_Z: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of ``gram + diag(penalty)``; not 0 beside it, not waited for: there is none."""
    damped_ZZ = gram_ZZ.clone()
    damped_ZZ.diagonal().add_(penalty_Z)
    return tuple(torch.linalg.cholesky_ex(damped_ZZ))


def condition_number(gram_ZZ: Tensor, penalty_Z: Tensor | float, factor_ZZ: Tensor) -> float:
    """Estimate of the 2-norm condition number of ``G + diag(penalty)`` by subspace iteration.

    O(16 Z^2) a step, against O(Z^3) for all eigenvalues. Both converge from inside, so it is a
    lower bound, in practice within a few per cent.
    """
    size = len(gram_ZZ)
    generator = torch.Generator().manual_seed(0)
    start_Zv = torch.randn(size, min(size, 16), generator=generator, dtype=torch.float64)
    penalty_Z1 = torch.as_tensor(penalty_Z, device=gram_ZZ.device).reshape(-1, 1)

    def largest(apply: Callable[[Tensor], Tensor]) -> Tensor:
        basis_Zv = start_Zv.to(gram_ZZ.device)
        for _ in range(8):
            basis_Zv = torch.linalg.qr(apply(basis_Zv))[0]
        norm: Tensor = torch.linalg.matrix_norm(apply(basis_Zv), 2)
        return norm

    of_matrix = largest(lambda v_Zv: gram_ZZ @ v_Zv + penalty_Z1 * v_Zv)
    of_inverse = largest(lambda v_Zv: torch.cholesky_solve(v_Zv, factor_ZZ))
    return float(of_matrix * of_inverse)


def add_all(folds: Sequence[Moments]) -> Moments:
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return total


def singular(where: str, moments: Moments, ridge: float) -> SingularGramError:
    """The error for a Gram matrix without a factor; eigenvalues are computed only to explain it."""
    eigenvalues_Z = torch.linalg.eigvalsh(moments.gram_ZZ)
    smallest = float(eigenvalues_Z[0])
    condition = float(eigenvalues_Z[-1]) / smallest if smallest > 0 else float("inf")
    return SingularGramError(where, ridge, condition, moments.num_tokens)


def _highest(ridge: Ridge) -> float:
    """The largest that is tried."""
    if isinstance(ridge, AbsoluteRidge):
        return ridge.absolute
    return ridge.relative if isinstance(ridge, RelativeRidge) else RIDGE_GRID[-1]


def _totals(errors: Mapping[float, Tensor]) -> dict[float, float]:
    """Errors over all targets, brought from the device in one go."""
    if not errors:
        return {}
    sums = torch.stack([error_C.sum() for error_C in errors.values()]).tolist()
    return dict(zip(errors, sums, strict=True))


def _target_variance(folds: Sequence[Moments]) -> Tensor:
    """``||Y - mean(Y)||^2`` per target."""
    names = ("sumsq_y_C", "sum_y_C")
    sumsq_C, sum_C = (torch.stack([getattr(f, name) for f in folds]).sum(0) for name in names)
    return sumsq_C - sum_C.square() / sum(fold.num_tokens for fold in folds)


def fit_bytes(sums_bytes: int, num_folds: int) -> int:
    """Bytes that a fit holds: all folds' sums, ``sums_bytes`` together, and what it makes."""
    return int(sums_bytes * (1 + _DENSE_COPIES_OF_SUMS / max(1, num_folds)))


def step_flops(num_regressors: int, num_targets: int) -> int:
    """One ridge on one fold: a Cholesky factor, two triangular solves, a product for the error."""
    z, n = num_regressors, num_targets
    return z**3 // 3 + 4 * z * z * n
