"""Streamed criteria against direct formulas on the whole list of hidden states."""

import math

import numpy as np
import pytest
import torch

from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.solver.criteria import paper_candidates
from ghost_dist.statistics.layer_scores import ScoreCollector

L, T, C, WINDOWS, N = 6, 17, 8, 4, 2
CPU = torch.device("cpu")


def streams(seed=0):
    """Hidden states (L + 1, WINDOWS, T, C) that drift, as a residual stream does."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(L + 1, WINDOWS, T, C, generator=generator)
    return steps.cumsum(0)


def push(collector, hidden, order):
    for window, boundary in order:
        collector(boundary, window, hidden[boundary, window])
    scores = collector.result()["scores"]
    assert scores.num_tokens == WINDOWS * T
    return scores.mean()


WINDOW_BY_WINDOW = [(w, b) for w in range(WINDOWS) for b in range(L + 1)]
LAYER_BY_LAYER = [(w, b) for b in range(L + 1) for w in reversed(range(WINDOWS))]


def cosine(a, b, axis):
    return (a * b).sum(axis) / np.linalg.norm(a, axis=axis) / np.linalg.norm(b, axis=axis)


@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_cosine_is_of_every_token_and_start(order):
    hidden = streams()
    got = push(ScoreCollector("cosine", L, N, CPU), hidden, order)
    states = hidden.double().numpy()
    expected = [cosine(states[s], states[s + N], -1).mean() for s in range(L - N + 1)]
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_angular_is_of_the_last_token(order):
    hidden = streams()
    got = push(ScoreCollector("angular", L, N, CPU), hidden, order)
    states = hidden.double().numpy()
    expected = [
        np.mean([math.acos(cosine(states[s, w, -1], states[s + N, w, -1], 0)) / math.pi
                 for w in range(WINDOWS)])
        for s in range(L - N + 1)
    ]  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_block_influence_is_of_every_token_and_layer(order):
    hidden = streams()
    got = push(ScoreCollector("block-influence", L, N, CPU), hidden, order)
    states = hidden.double().numpy()
    expected = [1 - cosine(states[layer], states[layer + 1], -1).mean() for layer in range(L)]
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_paper_is_the_published_call_and_range_of_starts(order):
    hidden = streams()
    got = paper_candidates(push(ScoreCollector("paper", L, N, CPU), hidden, order))
    expected = [
        torch.stack([torch.cosine_similarity(hidden[s, w : w + 1], hidden[s + N, w : w + 1]).mean()
                     for w in range(WINDOWS)]).mean().item()
        for s in range(1, L - N)
    ]  # fmt: skip
    assert got[1:-1] == pytest.approx(expected, rel=1e-5)
    assert math.isnan(got[0])
    assert math.isnan(got[-1])
    assert len(got) == L - N + 1


def test_paper_and_token_axis_disagree_where_they_should():
    """Scaling channels turns every token's stream, and no channel's own series."""
    hidden = streams()[:1].expand(L + 1, -1, -1, -1).clone()
    hidden[3:] = hidden[3:] * torch.tensor([1.0, 100.0] * (C // 2))
    got = push(ScoreCollector("paper", L, N, CPU), hidden, WINDOW_BY_WINDOW)
    assert got[1:-1] == pytest.approx([1.0] * (L - N - 1), rel=1e-5)
    influence = push(ScoreCollector("block-influence", L, N, CPU), hidden, WINDOW_BY_WINDOW)
    assert influence[2] > 0.05


@pytest.mark.parametrize("criterion", ["angular", "block-influence", "paper"])
def test_non_finite_streams_are_named(criterion):
    collector = ScoreCollector(criterion, L, N, CPU)
    hidden = streams()
    hidden[3, 2, 0, 0] = math.nan
    with pytest.raises(NonFiniteActivationError, match=r"layer 3 .* window 2"):
        push(collector, hidden, WINDOW_BY_WINDOW)


@pytest.mark.parametrize("criterion", ["angular", "paper"])
def test_only_streams_in_flight_are_held(criterion):
    scores = ScoreCollector(criterion, L, N, CPU)
    hidden = streams()
    for boundary in range(L + 1):
        scores(boundary, 0, hidden[boundary, 0])
        assert len(scores._streams) <= N + 1
    assert not scores._streams
