"""The held-out residual of candidates, exact and projected, and the choice of spans."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghost_dist.errors import ConfigError
from ghost_dist.solver.least_squares import RIDGE_GRID, add_all, held_out_errors, ridge_scale
from ghost_dist.solver.span_selection import (
    HeldOut,
    _projected_change,
    choose_spans,
    cost_map,
    held_out_of_start,
    lost_log_energy,
    paper_span,
    relative_residual,
)
from ghost_dist.spans import Span
from ghost_dist.statistics.pair_sums import PairCollector, candidate_spans, projection, start_key

L, T, C, WINDOWS, FOLDS = 7, 60, 12, 8, 4
CPU = torch.device("cpu")


def streams(rows):
    """Seven layers; 2, 3 and 4 together are exactly linear, the others are not; channel 5 is
    massive."""
    x = 2 * rows.normal(WINDOWS, T, C, seed=0)
    x[..., 5] *= 50
    states = [x]
    for layer in range(L):
        if layer in (2, 3, 4):
            x = x + x @ (0.1 * rows.normal(C, C, seed=10 + layer))
        else:
            x = x + torch.tanh(x @ rows.normal(C, C, seed=10 + layer))
        states.append(x)
    return torch.stack(states)


def collect_folds(make, hidden):
    folds = []
    for f in range(FOLDS):
        collector = make()
        for window in range(f, WINDOWS, FOLDS):
            for boundary in collector.boundaries:
                collector(boundary, window, hidden[boundary, window])
        folds.append(collector.result())
    return folds


def held_out(hidden, spans, columns):
    make = lambda: PairCollector(spans, C, CPU, columns)  # noqa: E731
    folds = collect_folds(make, hidden)
    r = None if columns is None else projection(C, columns)
    found = {}
    for start, stops in make().stops.items():
        found |= held_out_of_start(start, stops, [fold[start_key(start)] for fold in folds], r)
    return found


def exact(hidden, spans):
    return held_out(hidden, spans, None)


def projected(hidden, spans, columns):
    return held_out(hidden, spans, columns)


def test_exact_is_the_residual_of_rows_never_fitted_on(rows):
    hidden = streams(rows)
    span = Span(1, 3)
    found = exact(hidden, [span])[span]
    x, y = hidden[1].reshape(-1, C), hidden[3].reshape(-1, C)
    fold = (torch.arange(WINDOWS) % FOLDS).repeat_interleave(T)
    ridge = found.relative_ridge * float((x.T @ x).diagonal().median())
    total = 0.0
    for f in range(FOLDS):
        x_t, y_t = x[fold != f], y[fold != f]
        gram = x_t.T @ x_t + ridge * torch.eye(C, dtype=torch.float64)
        m = torch.linalg.solve(gram, x_t.T @ (y_t - x_t))
        total += float((y[fold == f] - x[fold == f] - x[fold == f] @ m).square().sum())
    assert found.residual == pytest.approx(total, rel=1e-9)
    assert found.cut == pytest.approx(float((y - x).square().sum()), rel=1e-9)
    assert found.energy == pytest.approx(float(y.square().sum()), rel=1e-9)
    assert found.standard_error == 0


@pytest.mark.parametrize("around", [None, 1e-7, 1.0])
@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_of_many_columns_the_least_residual_of_all_ridges_is_found(rows, noise, around):
    width, tokens = 96, 70
    x = rows.normal(WINDOWS, tokens, width, seed=0) * torch.logspace(0, 2, width)
    w = torch.eye(width, dtype=torch.float64) + 0.05 * rows.normal(width, width, seed=1)
    hidden = torch.stack((x, x @ w + noise * rows.normal(WINDOWS, tokens, width, seed=2)))
    folds = collect_folds(lambda: PairCollector([Span(0, 1)], width, CPU, None), hidden)
    pairs = [fold["start-0"] for fold in folds]
    found = held_out_of_start(0, (1,), pairs, None, around)[Span(0, 1)]
    changes = [_projected_change(pair, None) for pair in pairs]
    total = add_all(changes)
    errors = held_out_errors(changes, total, ridge_scale(total.gram_ZZ), RIDGE_GRID)
    error_of = {ridge: float(error.sum()) for ridge, error in errors.items()}
    assert found.relative_ridge == min(error_of, key=error_of.get)
    assert found.residual == pytest.approx(min(error_of.values()), rel=1e-9)


def test_projected_estimates_agree_with_the_exact_ones_within_their_error(rows):
    hidden = streams(rows)
    spans = candidate_spans(L, 1, 4)
    truth, estimate = exact(hidden, spans), projected(hidden, spans, 256)
    assert estimate.keys() == truth.keys()
    scores = []
    for span in spans:
        t, e = truth[span], estimate[span]
        assert e.cut == pytest.approx(t.cut, rel=1e-9)
        assert e.energy == pytest.approx(t.energy, rel=1e-9)
        if t.residual > 1e-6 * t.cut:
            assert 0 < e.standard_error < 0.2 * e.residual
            scores.append((e.residual - t.residual) / e.standard_error)
    # All spans share one R, so the scores are no independent sample; none may be absurd.
    assert max(map(abs, scores)) < 4
    assert math.sqrt(sum(s * s for s in scores) / len(scores)) < 2


def test_standard_error_is_the_spread_over_projections(rows, monkeypatch):
    """Estimates under 60 independent projections scatter as the standard error says."""
    hidden = streams(rows)
    span = Span(0, 2)
    estimates, errors = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(100 + seed)
        signs = (torch.randint(0, 2, (C, 32), generator=generator) * 2 - 1).double() / 32**0.5
        monkeypatch.setattr(
            "ghost_dist.statistics.pair_sums.projection", lambda *_, signs=signs: signs
        )
        folds = collect_folds(lambda: PairCollector([span], C, CPU, 32), hidden)
        found = held_out_of_start(0, (2,), [fold["start-0"] for fold in folds], signs)[span]
        estimates.append(found.residual)
        errors.append(found.standard_error)
    truth = exact(hidden, [span])[span].residual
    estimates, errors = torch.tensor(estimates), torch.tensor(errors)
    # 60 samples: the standard deviation is known to 9 %, the mean to std / sqrt(60).
    assert float(errors.mean() / estimates.std()) == pytest.approx(1, abs=0.3)
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / 60**0.5


def test_uncorrelated_residuals_are_estimated_exactly(rows):
    """Signs square to 1: channels whose residuals are orthogonal add up exactly, massive or not."""
    x = torch.cat((torch.eye(C, dtype=torch.float64), -torch.eye(C, dtype=torch.float64))) * 5
    noise = torch.diag(torch.logspace(0, 4, C, dtype=torch.float64))
    hidden = torch.stack((x, x + torch.cat((noise, noise))))[:, None].expand(2, WINDOWS, -1, -1)
    estimate = projected(hidden, [Span(0, 1)], 4)[Span(0, 1)]
    truth = exact(hidden, [Span(0, 1)])[Span(0, 1)]
    assert estimate.residual == pytest.approx(truth.residual, rel=1e-6)


def test_the_linear_span_is_the_best_of_its_length(rows):
    hidden = streams(rows)
    for found in (
        exact(hidden, candidate_spans(L, 3, 3)),
        projected(hidden, candidate_spans(L, 3, 3), 16),
    ):
        cost = cost_map(L, found)
        assert choose_spans(cost, 3, 1) == (Span(2, 5),)
        assert cost[2, 5] < 1e-9
    protected = cost_map(L, exact(hidden, candidate_spans(L, 3, 3, protect=(4,))))
    assert choose_spans(protected, 3, 1)[0].stop <= 4


def test_ridge_is_chosen_for_each_pair(rows):
    found = projected(streams(rows), candidate_spans(L, 1, 4), 16)
    chosen = {h.relative_ridge for h in found.values()}
    assert chosen <= set(RIDGE_GRID)
    assert len(chosen) > 1


def test_cost_map_holds_nan_where_nothing_was_computed():
    found = {Span(1, 3): HeldOut(3.0, 0.0, 5.0, 12.0, 0.1)}
    cost = cost_map(4, found)
    assert cost.shape == (4, 5)
    assert cost[1, 3] == pytest.approx(math.log(4 / 3))
    assert cost.isnan().sum() == 19
    assert relative_residual(found[Span(1, 3)]) == pytest.approx(0.25)


def test_costs_stay_finite_and_not_negative():
    """Rounding below 0, and a span whose repair explains nothing, still have a place in the map."""
    assert relative_residual(HeldOut(-1e-9, 0.0, 5.0, 12.0, 0.1)) == 0
    assert lost_log_energy(HeldOut(-1e-9, 0.0, 5.0, 12.0, 0.1)) == 0
    assert 27 < lost_log_energy(HeldOut(13.0, 0.0, 15.0, 12.0, 0.1)) < 28


def test_costs_of_independent_losses_add():
    """Two spans that keep 0.9 and 0.8 of the energy cost as much as one that keeps 0.72."""
    first, second, both = (HeldOut(lost, 0.0, 1.0, 1.0, 0.1) for lost in (0.1, 0.2, 1 - 0.9 * 0.8))
    total = lost_log_energy(first) + lost_log_energy(second)
    assert total == pytest.approx(lost_log_energy(both))


def brute_force(cost, remove, max_spans, min_length, max_length, protect):
    """Least total cost over all subsets of layers, by their runs."""
    layers = len(cost)
    best = None
    for gone in itertools.combinations(range(layers), remove):
        if set(gone) & set(protect):
            continue
        runs = []
        for layer in gone:
            if runs and runs[-1][1] == layer:
                runs[-1][1] = layer + 1
            else:
                runs.append([layer, layer + 1])
        if len(runs) > max_spans or not all(min_length <= b - a <= max_length for a, b in runs):
            continue
        total = sum(cost[a][b] for a, b in runs)
        if math.isfinite(total) and (best is None or total < best):
            best = total
    return best


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(2, 9),
    remove=st.integers(1, 8),
    max_spans=st.integers(1, 4),
    min_length=st.integers(1, 3),
    max_length=st.integers(1, 6),
    protect=st.sets(st.integers(0, 8), max_size=2),
    missing=st.floats(0, 0.5),
    seed=st.integers(0, 2**16),
)
def test_choice_equals_brute_force(
    layers, remove, max_spans, min_length, max_length, protect, missing, seed
):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(layers, layers + 1, generator=generator, dtype=torch.float64)
    cost[torch.rand(layers, layers + 1, generator=generator) < missing] = math.nan
    expected = None
    if remove < layers:
        expected = brute_force(cost.tolist(), remove, max_spans, min_length, max_length, protect)
    for start, stop in itertools.product(range(layers), range(layers + 1)):
        if not min_length <= stop - start <= max_length or protect & set(range(start, stop)):
            cost[start, stop] = math.nan  # is no candidate
    if expected is None:
        with pytest.raises(ConfigError, match="No choice"):
            choose_spans(cost, remove, max_spans)
        return
    spans = choose_spans(cost, remove, max_spans)
    assert sum(float(cost[s.start, s.stop]) for s in spans) == pytest.approx(expected, rel=1e-12)
    assert sum(map(len, spans)) == remove
    assert len(spans) <= max_spans
    assert all(a.stop < b.start for a, b in itertools.pairwise(spans))
    assert all(min_length <= len(s) <= max_length for s in spans)


def test_planted_spans_and_equal_costs():
    cost = torch.ones(10, 11, dtype=torch.float64)
    cost[1, 3] = cost[6, 9] = 0.1
    assert choose_spans(cost, 5, 2) == (Span(1, 3), Span(6, 9))
    # Of equal costs: fewest spans first, then the earliest.
    assert choose_spans(torch.zeros(6, 7, dtype=torch.float64), 2, 2) == (Span(0, 2),)


def test_eighty_layers_take_no_time():
    cost = torch.rand(80, 81, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spans = choose_spans(cost, 24, 4)
    assert sum(map(len, spans)) == 24


def test_the_papers_span_is_of_the_largest_score_but_for_the_ends():
    assert paper_span([9.0, -0.9, -0.5, -0.5, 9.0], 2) == Span(2, 4)
    assert paper_span([0.1, 0.4, 0.2, 0.3, 0.5], 2, protect=(1,)) == Span(3, 5)
    for scores, protect in (([0.1, 0.2, 0.3, 0.4], (2,)), ([0.1, 0.2], ())):
        with pytest.raises(ConfigError, match="No span of 2 layers"):
            paper_span(scores, 2, protect)
