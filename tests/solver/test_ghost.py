"""The ghost solve against answers from the SVD, from rows, and by numpy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from ghost_dist.errors import ConfigError, SingularGramError
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.solver import least_squares
from ghost_dist.solver.ghost import fit_ghost
from ghost_dist.solver.least_squares import RIDGE_GRID, condition_number, map_error

SPAN = "[3, 5)"
T, C, FOLDS = 120, 10, 4


def planted(rows, noise=0.3, seed=0):
    """X with a massive channel, a non-symmetric W, and noise."""
    x = rows.normal(T, C, seed=seed)
    x[:, 2] *= 200
    w = torch.eye(C, dtype=torch.float64) + 0.3 * rows.normal(C, C, seed=seed + 1)
    return x, w, x @ w + noise * rows.normal(T, C, seed=seed + 2)


def test_planted_operator_is_found_exactly(rows):
    x, w, y = planted(rows, noise=0)
    repair, fit = fit_ghost(
        SPAN, rows.in_folds(rows.moments_of, FOLDS, x, y), AbsoluteRidge(absolute=0)
    )
    torch.testing.assert_close(repair.weight_CC, w, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(repair.weight_CC, w.T)
    assert fit.residual < 1e-12
    assert fit.r2 > 1 - 1e-12


def solved(rows, x, y, ridge):
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    return fit_ghost(SPAN, folds, AbsoluteRidge(absolute=ridge))[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0, 300.0])
def test_solution_built_from_the_svd(rows, ridge):
    x, _, y = planted(rows)
    # M = V diag(s / (s^2 + ridge)) U' (Y - X), from X = U diag(s) V'.
    u, s, vt = np.linalg.svd(x.numpy(), full_matrices=False)
    expected = np.eye(C) + vt.T @ ((s / (s**2 + ridge))[:, None] * (u.T @ (y - x).numpy()))
    repair = solved(rows, x, y, ridge)
    np.testing.assert_allclose(repair.weight_CC.numpy(), expected, rtol=1e-9, atol=1e-11)


def test_without_a_ridge_it_is_numpys_least_squares(rows):
    x, _, y = planted(rows)
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    repair = solved(rows, x, y, 0.0)
    np.testing.assert_allclose(repair.weight_CC.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_a_huge_ridge_is_the_plain_cut(rows):
    x, _, y = planted(rows)
    repair = solved(rows, x, y, 1e15)
    torch.testing.assert_close(
        repair.weight_CC, torch.eye(C, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_map_error_per_channel_against_rows(rows):
    x, w, y = planted(rows)
    held_out = rows.moments_of(x[::3], y[::3])
    expected = (y[::3] - x[::3] @ w).square().sum(0)
    # Differences of sums: absolute error of eps times the sums.
    slack = 1e-14 * float(held_out.sumsq_y_C.max())
    torch.testing.assert_close(map_error(held_out, w), expected, rtol=1e-10, atol=slack)
    cut = (y[::3] - x[::3]).square().sum(0)
    torch.testing.assert_close(
        map_error(held_out, torch.eye(C, dtype=torch.float64)), cut, rtol=1e-10, atol=slack
    )


def sklearn_held_out(x, y, ridge):
    """Held-out predictions of ``Y - X`` with the same folds, by scikit-learn."""
    model = Ridge(alpha=ridge, fit_intercept=False, solver="cholesky")
    split = PredefinedSplit(np.arange(T) % FOLDS)
    change = (y - x).numpy()
    return ((change - cross_val_predict(model, x.numpy(), change, cv=split)) ** 2).sum(0)


def test_held_out_residual_and_choice_against_scikit_learn(rows):
    x, _, y = planted(rows, noise=3.0)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    scale = float((x.T @ x).diagonal().median())
    expected = np.array([sklearn_held_out(x, y, r * scale).sum() for r in RIDGE_GRID])
    cut = float((y - x).square().sum())
    repair, fit = fit_ghost(SPAN, folds, "auto")
    assert [r for r, _ in fit.ridge_curve] == pytest.approx(RIDGE_GRID)
    assert [e for _, e in fit.ridge_curve] == pytest.approx(expected / cut, rel=1e-9)
    best = int(expected.argmin())
    assert 0 < best < len(RIDGE_GRID) - 1
    assert fit.relative_ridge == pytest.approx(RIDGE_GRID[best])
    assert fit.ridge == pytest.approx(RIDGE_GRID[best] * scale)
    assert fit.residual == pytest.approx(expected[best] / cut, rel=1e-9)
    whole = Ridge(alpha=fit.ridge, fit_intercept=False, solver="cholesky")
    whole.fit(x.numpy(), (y - x).numpy())
    np.testing.assert_allclose(
        repair.weight_CC.numpy(), np.eye(C) + whole.coef_.T, rtol=1e-8, atol=1e-10
    )
    # R2 against scikit-learn's residuals, channel by channel.
    errors = sklearn_held_out(x, y, fit.ridge)
    variance = y.numpy().var(0) * T
    assert fit.r2 == pytest.approx(1 - errors.sum() / variance.sum(), rel=1e-9)
    quantiles = np.quantile(1 - errors / variance, [0.05, 0.25, 0.5, 0.75, 0.95])
    assert fit.r2_channel_quantiles == pytest.approx(quantiles, rel=1e-7)


@pytest.mark.parametrize("around", [1e-9, 2e-6, 1e-2, 0.5, 1e3])
@pytest.mark.parametrize("noise", [0.01, 3.0, 100.0])
def test_ridge_looked_for_from_anywhere_is_that_of_the_whole_grid(rows, noise, around):
    x, _, y = planted(rows, noise=noise)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    whole, fit = fit_ghost(SPAN, folds, "auto")
    found, refit = fit_ghost(SPAN, folds, "auto", around=around)
    assert refit.relative_ridge == fit.relative_ridge
    assert torch.equal(found.weight_CC, whole.weight_CC)
    assert set(refit.ridge_curve) <= set(fit.ridge_curve)


@pytest.mark.parametrize("judge", [None, 1])
@pytest.mark.parametrize("noise", [0.01, 3.0, 100.0])
def test_the_ridge_of_many_targets_is_that_of_the_whole_grid(rows, monkeypatch, noise, judge):
    """Tried first with mixtures of them, of which estimates of the residuals are left."""
    x, _, y = planted(rows, noise=noise)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    whole, expected = fit_ghost(SPAN, folds, "auto", judge=judge)
    monkeypatch.setattr(least_squares, "MIXTURES", C - 1)
    kept, mixtures = {}, least_squares.mixtures
    monkeypatch.setattr(least_squares, "mixtures", lambda targets: mixtures(targets, 400))
    found, fit = fit_ghost(SPAN, folds, "auto", kept=kept, judge=judge)
    assert torch.equal(found.weight_CC, whole.weight_CC)
    assert (fit.relative_ridge, fit.residual) == (expected.relative_ridge, expected.residual)
    exact, estimated = dict(expected.ridge_curve), dict(fit.ridge_curve)
    assert exact.keys() == estimated.keys()
    assert estimated == pytest.approx(exact, rel=0.3)
    assert 1 < sum(exact[ridge] == estimated[ridge] for ridge in exact) < 7
    # A residual that is known well enough is not computed, one that is asked for is.
    given = RelativeRidge(relative=RIDGE_GRID[0])
    told = {"kept": kept, "judge": judge}
    _, known = fit_ghost(SPAN, folds, given, detail="residual", **told)
    assert known.residual == estimated[given.relative]
    _, asked = fit_ghost(SPAN, folds, given, **told)
    assert asked.residual == pytest.approx(exact[given.relative])


def test_fits_that_share_are_bitwise_those_that_do_not(rows):
    x, _, y = planted(rows, noise=3.0)
    folds, kept = rows.in_folds(rows.moments_of, FOLDS, x, y), {}
    for ridge in ("auto", RelativeRidge(relative=RIDGE_GRID[4]), AbsoluteRidge(absolute=2.0)):
        for relative in (ridge, RelativeRidge(relative=0.02)):
            shared, alone = (fit_ghost(SPAN, folds, relative, **o) for o in ({"kept": kept}, {}))
            assert torch.equal(shared[0].weight_CC, alone[0].weight_CC)
            assert shared[1] == alone[1]


@pytest.mark.parametrize("ratio", [1.5, 4, 16, 64])
def test_chosen_ridge_is_near_the_best_for_fresh_rows(rows, ratio):
    """Few rows per channel or many: never far above the best of the grid on rows never seen."""
    width = 48
    count = int(ratio * width)
    w = torch.eye(width, dtype=torch.float64) + 0.2 * rows.normal(width, width, seed=7)
    x, fresh = rows.normal(count, width, seed=8), rows.normal(4000, width, seed=9)
    y = x @ w + rows.normal(count, width, seed=10)
    fresh_y = fresh @ w + rows.normal(4000, width, seed=11)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    chosen, _ = fit_ghost(SPAN, folds, "auto")

    def error(repair):
        return float((fresh_y - fresh @ repair.weight_CC).square().sum())

    grid = [error(fit_ghost(SPAN, folds, RelativeRidge(relative=r))[0]) for r in RIDGE_GRID]
    assert error(chosen) <= 1.02 * min(grid)
    if ratio == 1.5:
        assert error(fit_ghost(SPAN, folds, AbsoluteRidge(absolute=1e-6))[0]) > 1.3 * min(grid)


def test_fold_order_and_number_of_ranges_do_not_matter(rows):
    x, _, y = planted(rows)
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    repair, fit = fit_ghost(SPAN, folds, "auto")
    again, refit = fit_ghost(SPAN, folds[::-1], "auto")
    torch.testing.assert_close(again.weight_CC, repair.weight_CC, rtol=1e-10, atol=1e-12)
    assert refit.residual == pytest.approx(fit.residual, rel=1e-10)
    # Other folds give the same operator at the same ridge, and another held-out residual.
    ridge = AbsoluteRidge(absolute=1.0)
    two, fit_2 = fit_ghost(SPAN, rows.in_folds(rows.moments_of, 2, x, y), ridge)
    four, fit_4 = fit_ghost(SPAN, folds, ridge)
    torch.testing.assert_close(two.weight_CC, four.weight_CC, rtol=1e-10, atol=1e-12)
    assert fit_2.residual != pytest.approx(fit_4.residual, rel=1e-6)


def test_singular_gram_is_an_error_that_explains(rows):
    x, _, y = planted(rows)
    x[:, 4] = x[:, 5]
    x[:, 6] = 0
    folds = rows.in_folds(rows.moments_of, FOLDS, x, y)
    with pytest.raises(SingularGramError) as caught:
        fit_ghost(SPAN, folds, AbsoluteRidge(absolute=0))
    assert caught.value.span == "[3, 5)"
    assert caught.value.num_tokens == T
    assert caught.value.condition > 1e15
    # The grid recovers, and says with what.
    _, fit = fit_ghost(SPAN, folds, "auto")
    assert fit.relative_ridge >= RIDGE_GRID[0]


def test_one_fold_is_refused(rows):
    x, _, y = planted(rows)
    with pytest.raises(ConfigError, match="at least 2 folds, got 1"):
        fit_ghost(SPAN, [rows.moments_of(x, y)], "auto")


@pytest.mark.parametrize("spread", [1, 3, 6])
@pytest.mark.parametrize("width", [6, 64])
def test_condition_number_within_five_per_cent(rows, spread, width):
    q, _ = torch.linalg.qr(rows.normal(width, width, seed=3))
    eigenvalues = torch.logspace(0, spread, width, dtype=torch.float64)
    gram = q @ torch.diag(eigenvalues) @ q.T
    for ridge in (0.0, 2.0):
        damped = gram + ridge * torch.eye(width, dtype=torch.float64)
        exact = float(torch.linalg.cond(damped))
        estimate = condition_number(gram, ridge, torch.linalg.cholesky(damped))
        assert 0.95 * exact <= estimate <= exact * (1 + 1e-9)
