"""Reduced-rank regression against the textbook construction on raw rows, and planted ranks."""

import numpy as np
import pytest
import torch

from ghost_dist.checkpoint.repair import apply_repair
from ghost_dist.errors import ConfigError
from ghost_dist.ridge import AbsoluteRidge
from ghost_dist.solver.ghost import fit_ghost
from ghost_dist.solver.low_rank import fit_low_rank

T, C, FOLDS = 240, 12, 4
NO_RIDGE = AbsoluteRidge(absolute=0)


def problem(rows, rank, noise):
    x = rows.normal(T, C, seed=0) @ rows.normal(C, C, seed=1)
    change = rows.normal(C, rank, seed=2) @ rows.normal(rank, C, seed=3)
    return x, x + x @ change + noise * rows.normal(T, C, seed=4)


def textbook(x, change, rank):
    """OLS fitted values, cut to their leading right singular directions (Izenman 1975)."""
    m = np.linalg.lstsq(x, change, rcond=None)[0]
    _, _, vt = np.linalg.svd(x @ m, full_matrices=False)
    return m @ vt[:rank].T @ vt[:rank]


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_equals_the_textbook_construction(rows, rank):
    x, y = problem(rows, 5, noise=1.0)
    repair, _ = fit_low_rank(
        "[1, 3)", rows.in_folds(rows.moments_of, FOLDS, x, y), NO_RIDGE, rank=rank
    )
    u, v = repair.low_rank
    assert u.shape == (C, rank)
    assert v.shape == (rank, C)
    expected = textbook(x.numpy(), (y - x).numpy(), rank)
    np.testing.assert_allclose((u @ v).numpy(), expected, rtol=1e-7, atol=1e-8)


def test_ridge_enters_as_extra_rows(rows):
    """A ridge is least squares with sqrt(ridge) I below X and zeros below Y - X."""
    x, y = problem(rows, 5, noise=1.0)
    repair, _ = fit_low_rank(
        "[1, 3)", rows.in_folds(rows.moments_of, FOLDS, x, y), AbsoluteRidge(absolute=9.0), rank=2
    )
    x_more = np.vstack((x.numpy(), 3.0 * np.eye(C)))
    change = np.vstack(((y - x).numpy(), np.zeros((C, C))))
    u, v = repair.low_rank
    np.testing.assert_allclose((u @ v).numpy(), textbook(x_more, change, 2), rtol=1e-7, atol=1e-8)


def test_beats_cutting_the_singular_values_of_the_matrix(rows):
    x, y = problem(rows, 8, noise=1.0)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    repair, _ = fit_low_rank("[1, 3)", folds, NO_RIDGE, rank=2)
    m = torch.linalg.lstsq(x, y - x).solution
    u, s, vt = torch.linalg.svd(m)
    naive = x + x @ (u[:, :2] * s[:2]) @ vt[:2]
    ours = apply_repair(repair, x)
    assert (y - ours).square().sum() < 0.99 * (y - naive).square().sum()


def test_planted_rank_is_chosen(rows):
    x, y = problem(rows, 3, noise=0.05)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    repair, _ = fit_low_rank("[1, 3)", folds, "auto")
    assert repair.low_rank[0].shape == (C, 3)
    assert repair.added_parameters == 2 * C * 3
    two, three = (fit_low_rank("[1, 3)", folds, "auto", rank=rank)[1] for rank in (2, 3))
    assert 1 > two.residual > 5 * three.residual


def test_held_out_residuals_of_every_rank_against_rows(rows):
    x, y = problem(rows, 4, noise=1.0)
    x, y = x + 2, y - 7
    change = y - x
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    repair, chosen = fit_low_rank("[1, 3)", folds, NO_RIDGE)
    for rank in (1, 2, C):
        total = 0.0
        for f in range(FOLDS):
            train = torch.arange(T) % FOLDS != f
            x_t, c_t = x[train].numpy(), change[train].numpy()
            m = textbook(x_t, c_t, rank)
            total += ((change[~train].numpy() - x[~train].numpy() @ m) ** 2).sum()
        cut = float(change.square().sum())
        _, fit = fit_low_rank("[1, 3)", folds, NO_RIDGE, rank=rank)
        assert fit.residual == pytest.approx(total / cut, rel=1e-7)
    _, full = fit_ghost("[1, 3)", folds, NO_RIDGE)
    assert fit.residual == pytest.approx(full.residual, rel=1e-8)
    # What is reported is the operator of the rank that was taken.
    rank = repair.low_rank[0].shape[1]
    assert 0 < rank < C
    assert chosen == fit_low_rank("[1, 3)", folds, NO_RIDGE, rank=rank)[1]
    assert chosen.residual != full.residual
    variance = float((y - y.mean(0)).square().sum())
    assert chosen.r2 == pytest.approx(1 - chosen.residual * cut / variance, rel=1e-8)


@pytest.mark.parametrize("rank", [0, C + 1])
def test_an_impossible_rank_is_named(rows, rank):
    x, y = problem(rows, 3, noise=0.5)
    with pytest.raises(ConfigError, match=rf"rank={rank} .* 1 to {C}"):
        fit_low_rank("[1, 3)", rows.in_folds(rows.moments_of, FOLDS, x, y), NO_RIDGE, rank=rank)
