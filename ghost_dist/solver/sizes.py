"""What a fit costs, from shapes alone. Legend: Z regressors, N targets, K folds."""

from __future__ import annotations

_DENSE_COPIES_OF_SUMS = 3  # beside the folds: total, training sum, damped factor


def fit_bytes(sums_bytes: int, num_folds: int) -> int:
    """Bytes that a fit holds: all folds' sums, ``sums_bytes`` together, and what it makes."""
    return int(sums_bytes * (1 + _DENSE_COPIES_OF_SUMS / max(1, num_folds)))


def step_flops(num_regressors: int, num_targets: int) -> int:
    """One ridge on one fold: a Cholesky factor, two triangular solves, a product for the error."""
    z, n = num_regressors, num_targets
    return z**3 // 3 + 4 * z * z * n


def num_steps(num_ridges: int, num_folds: int) -> int:
    """Steps of a fit: every ridge held out on every fold, and the final fit."""
    return num_ridges * num_folds + 1
