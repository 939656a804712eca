"""The streamed score against a direct formula on the whole list of hidden states."""

import math

import pytest
import torch

from ghost_dist.errors import NonFiniteActivationError
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


@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_the_score_is_that_of_the_published_call(order):
    hidden = streams()
    got = push(ScoreCollector(L, N, CPU), hidden, order)
    expected = [
        torch.stack([torch.cosine_similarity(hidden[s, w : w + 1], hidden[s + N, w : w + 1]).mean()
                     for w in range(WINDOWS)]).mean().item()
        for s in range(L - N + 1)
    ]  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_direction_of_a_token_is_not_looked_at():
    """Scaling channels turns every token's stream, and no channel's own series."""
    hidden = streams()[:1].expand(L + 1, -1, -1, -1).clone()
    hidden[3:] = hidden[3:] * torch.tensor([1.0, 100.0] * (C // 2))
    got = push(ScoreCollector(L, N, CPU), hidden, WINDOW_BY_WINDOW)
    assert got == pytest.approx([1.0] * (L - N + 1), rel=1e-5)


def test_non_finite_streams_are_named():
    hidden = streams()
    hidden[3, 2, 0, 0] = math.nan
    with pytest.raises(NonFiniteActivationError, match=r"layer 3 .* window 2"):
        push(ScoreCollector(L, N, CPU), hidden, WINDOW_BY_WINDOW)


def test_only_streams_in_flight_are_held():
    scores = ScoreCollector(L, N, CPU)
    hidden = streams()
    for boundary in range(L + 1):
        scores(boundary, 0, hidden[boundary, 0])
        assert len(scores._streams) <= N + 1
    assert not scores._streams
