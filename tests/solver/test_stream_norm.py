"""`stream+norm` and `norm-linear` against planted maps."""

import pytest
import torch

from ghost_dist.checkpoint.repair import apply_repair
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.solver.ghost import fit_ghost, fit_norm_linear
from ghost_dist.statistics.moments import norm_features

T, C, FOLDS, EPS = 300, 9, 4, 1e-5


@pytest.fixture
def stream(rows):
    """Rows of very different norms: otherwise x and rmsnorm(x) are one regressor."""
    return rows.normal(T, C, seed=0) * rows.normal(T, 1, seed=1).exp() * 5


def features(x, eps=EPS):
    return torch.cat(norm_features(x, eps), 1)


def test_planted_pair_is_found_and_applied(rows, stream):
    w = torch.eye(C, dtype=torch.float64) + 0.2 * rows.normal(C, C, seed=2)
    n = 3 * rows.normal(C, C, seed=3)
    z = features(stream)
    y = z @ torch.cat((w, n))
    folds = rows.in_folds(rows.moments_of, FOLDS, z, y)
    repair, fit = fit_ghost("[1, 2)", folds, AbsoluteRidge(absolute=0), norm_eps=EPS)
    # rmsnorm's features are float32: its rounding enters the design only, not the targets.
    torch.testing.assert_close(repair.weight_CC, w, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(repair.norm_weight_CC, n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apply_repair(repair, stream), y, rtol=1e-5, atol=1e-5)
    assert fit.residual < 1e-10
    assert repair.added_parameters == 2 * C * C


def test_the_norm_explains_what_the_stream_cannot(rows, stream):
    y = stream + 4 * torch.tanh(features(stream)[:, C:] @ rows.normal(C, C, seed=4))
    z = features(stream)
    folds = rows.in_folds(rows.moments_of, FOLDS, z, y)
    _, both = fit_ghost("[1, 2)", folds, "auto", norm_eps=EPS)
    _, one = fit_ghost("[1, 2)", rows.in_folds(rows.moments_of, FOLDS, stream, y), "auto")
    assert both.residual < 0.6 * one.residual


def test_a_huge_ridge_is_the_plain_cut(rows, stream):
    folds = rows.in_folds(rows.moments_of, FOLDS, features(stream), rows.normal(T, C, seed=5))
    repair, _ = fit_ghost("[1, 2)", folds, RelativeRidge(relative=1e12), norm_eps=EPS)
    torch.testing.assert_close(apply_repair(repair, stream), stream, rtol=1e-6, atol=1e-6)


def test_ridge_scales_with_each_block(rows, stream):
    """x a thousand times larger, with the same normed features, is the same fit."""
    y = rows.normal(T, C, seed=6)
    ridge = RelativeRidge(relative=0.1)
    change = rows.in_folds(rows.moments_of, FOLDS, features(stream, 0), y + stream)
    large = rows.in_folds(rows.moments_of, FOLDS, features(1000 * stream, 0), y + 1000 * stream)
    one, _ = fit_ghost("[1, 2)", change, ridge, norm_eps=0)
    two, _ = fit_ghost("[1, 2)", large, ridge, norm_eps=0)
    eye = torch.eye(C, dtype=torch.float64)
    torch.testing.assert_close(one.weight_CC - eye, 1000 * (two.weight_CC - eye),
                               rtol=1e-4, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(one.norm_weight_CC, two.norm_weight_CC, rtol=1e-4, atol=1e-6)


def test_norm_linear_is_ridge_regression_of_the_change_on_the_normed_stream(rows, stream):
    y = rows.normal(T, C, seed=7)
    folds = rows.in_folds(rows.moments_of, FOLDS, features(stream), y)
    repair, fit = fit_norm_linear("[1, 2)", folds, AbsoluteRidge(absolute=3), norm_eps=EPS)
    normed = features(stream)[:, C:].double()
    rows_of_ridge = 3**0.5 * torch.eye(C, dtype=torch.float64)
    design = torch.cat((normed, rows_of_ridge))
    target = torch.cat((y - stream, torch.zeros(C, C, dtype=torch.float64)))
    n = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(repair.norm_weight_CC, n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apply_repair(repair, stream), stream + normed @ n,
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    held_out = 0.0
    for fold in range(FOLDS):
        kept = torch.arange(T) % FOLDS != fold
        part = torch.cat((normed[kept], rows_of_ridge)), torch.cat((target[:T][kept], target[T:]))
        left = target[:T][~kept] - normed[~kept] @ torch.linalg.lstsq(*part).solution
        held_out += float(left.square().sum())
    assert fit.residual == pytest.approx(held_out / float((y - stream).square().sum()), rel=1e-6)
    assert repair.added_parameters == C * C
