"""Operators that refit a down_proj, against numpy on raw rows and planted weights."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from ghost_dist.checkpoint.repair import apply_repair
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.solver.down_proj import SingularOperatorError, fit_fold, fit_ghost_joint
from ghost_dist.solver.least_squares import fit_least_squares

T, C, F, FOLDS = 400, 8, 19, 4
NO_RIDGE = AbsoluteRidge(absolute=0)
SPAN = "[4, 6)"


@pytest.fixture
def problem(rows):
    """A, H, the original down_proj, and a Y that no operator fits exactly."""
    a = 3 * rows.normal(T, C, seed=0) + 1
    h = rows.normal(T, F, seed=1).relu() * 0.1
    down = rows.normal(F, C, seed=2)
    y = (a + h @ down) @ (torch.eye(C, dtype=torch.float64) + 0.2 * rows.normal(C, C, seed=3))
    y = y + 0.1 * torch.tanh(a) @ rows.normal(C, C, seed=4) + 0.05 * rows.normal(T, C, seed=5)
    return a, h, down, y


def folds_of(rows, a, h, y):
    return rows.in_folds(rows.moments_of, FOLDS, torch.cat((a, h), 1), y)


def recovered(repair, a, h):
    """What the recovered model hands to layer ``stop``: the new down_proj, then the operator."""
    return apply_repair(repair, a + h @ repair.down_FC)


def lstsq(z, y):
    return torch.from_numpy(np.linalg.lstsq(z.numpy(), y.numpy(), rcond=None)[0])


def test_fold_is_least_squares_on_rows(rows, problem):
    a, h, down, y = problem
    repair, _ = fit_fold(SPAN, folds_of(rows, a, h, y), NO_RIDGE, down_FC=down)
    torch.testing.assert_close(repair.down_FC, lstsq(h, y - a), rtol=1e-8, atol=1e-8)
    assert repair.weight_CC is None
    assert repair.added_parameters == 0


def test_joint_is_least_squares_over_both_and_reproduces_its_prediction(rows, problem):
    a, h, down, y = problem
    repair, _ = fit_ghost_joint(SPAN, folds_of(rows, a, h, y), NO_RIDGE, down_FC=down)
    z = torch.cat((a, h), 1)
    torch.testing.assert_close(recovered(repair, a, h), z @ lstsq(z, y), rtol=1e-7, atol=1e-7)


def test_joint_finds_a_planted_pair(rows, problem):
    a, h, down, _ = problem
    p = torch.eye(C, dtype=torch.float64) + 0.3 * rows.normal(C, C, seed=6)
    new_down = down + rows.normal(F, C, seed=7)
    y = (a + h @ new_down) @ p
    repair, fit = fit_ghost_joint(SPAN, folds_of(rows, a, h, y), NO_RIDGE, down_FC=down)
    torch.testing.assert_close(repair.weight_CC, p, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(repair.down_FC, new_down, rtol=1e-7, atol=1e-7)
    assert fit.residual < 1e-12


def test_classes_are_nested(rows, problem):
    """In-sample errors of fold >= joint, and ghost >= joint."""
    a, h, down, y = problem
    folds = folds_of(rows, a, h, y)

    def error(repair):
        return float((y - recovered(repair, a, h)).square().sum())

    fold = error(fit_fold(SPAN, folds, NO_RIDGE, down_FC=down)[0])
    joint = error(fit_ghost_joint(SPAN, folds, NO_RIDGE, down_FC=down)[0])
    x = a + h @ down
    ghost = float((y - x @ lstsq(x, y)).square().sum())
    assert joint < fold
    assert joint < ghost


@pytest.mark.parametrize("fit_operator", [fit_fold, fit_ghost_joint])
def test_a_huge_ridge_is_the_plain_cut(rows, problem, fit_operator):
    a, h, down, y = problem
    ridge = AbsoluteRidge(absolute=1e14)
    repair, fit = fit_operator(SPAN, folds_of(rows, a, h, y), ridge, down_FC=down)
    torch.testing.assert_close(repair.down_FC, down, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(recovered(repair, a, h), a + h @ down, rtol=1e-8, atol=1e-8)
    assert fit.residual == pytest.approx(1)


def test_fewer_rows_than_features_still_has_an_answer_near_the_original(rows, problem):
    a, h, down, y = problem
    few = folds_of(rows, a[:12], h[:12], y[:12])
    repair, _ = fit_fold(SPAN, few, RelativeRidge(relative=1.0), down_FC=down)
    unseen = slice(100, None)
    cut = float((y - a - h @ down)[unseen].square().sum())
    assert float((y - a - h @ repair.down_FC)[unseen].square().sum()) < 1.2 * cut


def test_relative_ridge_is_relative_to_each_block(rows, problem):
    """Scaling H by 1000 and down_proj by 1/1000 is the same model and gives the same operator."""
    a, h, down, y = problem
    ridge = RelativeRidge(relative=0.05)
    one, _ = fit_ghost_joint(SPAN, folds_of(rows, a, h, y), ridge, down_FC=down)
    two, _ = fit_ghost_joint(SPAN, folds_of(rows, a, 1000 * h, y), ridge, down_FC=down / 1000)
    torch.testing.assert_close(one.weight_CC, two.weight_CC, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(one.down_FC, 1000 * two.down_FC, rtol=1e-7, atol=1e-8)


def test_a_down_proj_alone_is_scikit_learns_ridge_around_the_original(rows, problem):
    a, h, down, y = problem
    folds = rows.in_folds(rows.moments_of, FOLDS, h, y - a)
    new_down, fit = fit_least_squares("layer 9", folds, down, AbsoluteRidge(absolute=0.7))
    oracle = Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
    oracle.fit(h.numpy(), (y - a - h @ down).numpy())
    expected = down + torch.from_numpy(oracle.coef_.T)
    torch.testing.assert_close(new_down, expected, rtol=1e-9, atol=1e-9)
    assert fit.residual < 1


@pytest.mark.parametrize("fit_operator", [fit_fold, fit_ghost_joint])
def test_fits_against_numpy(rows, problem, fit_operator):
    a, h, down, y = problem
    repair, fit = fit_operator(SPAN, folds_of(rows, a, h, y), NO_RIDGE, down_FC=down)
    z, target, rest = {
        "fit_fold": (h, y - a, a),
        "fit_ghost_joint": (torch.cat((a, h), 1), y, 0),
    }[fit_operator.__name__]
    expected = rest + z @ lstsq(z, target)
    torch.testing.assert_close(recovered(repair, a, h), expected, rtol=1e-6, atol=1e-6)
    # The held-out residual, fold by fold.
    held_out = 0.0
    for f in range(FOLDS):
        train = torch.arange(T) % FOLDS != f
        left = (target - z @ lstsq(z[train], target[train]))[~train]
        held_out += float(left.square().sum())
    cut = float((y - a - h @ down).square().sum())
    assert fit.residual == pytest.approx(held_out / cut, rel=1e-7)


def test_an_operator_that_cannot_be_divided_out_is_named(rows, problem):
    a, h, down, _ = problem
    p = torch.eye(C, dtype=torch.float64)
    p[:, 2] = p[:, 5]
    folds = folds_of(rows, a, h, a @ p + h @ down)
    with pytest.raises(SingularOperatorError, match=r"span \[4, 6\)") as caught:
        fit_ghost_joint(SPAN, folds, NO_RIDGE, down_FC=down)
    assert caught.value.condition > caught.value.limit
    assert pickle.loads(pickle.dumps(caught.value)).span == SPAN
