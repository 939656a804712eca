"""Scores to spans."""

import math

import pytest

from ghost_dist.errors import ConfigError
from ghost_dist.solver.criteria import best_span, least_influential
from ghost_dist.spans import Span

NAN = math.nan


def test_best_span_by_similarity_and_by_distance():
    scores = [0.5, 0.9, 0.2, 0.9]
    assert best_span(scores, 3, largest=True) == Span(1, 4)
    assert best_span(scores, 3, largest=False) == Span(2, 5)


def test_nan_and_protected_starts_are_no_candidates():
    assert best_span([NAN, -0.9, -0.5, NAN], 2, largest=True) == Span(2, 4)
    assert best_span([0.1, 0.2, 0.3, 0.4], 2, largest=False, protect=(1,)) == Span(2, 4)
    with pytest.raises(ConfigError, match="No span of 2 layers"):
        best_span([0.1, 0.2], 2, largest=True, protect=(1,))
    with pytest.raises(ConfigError, match="No span"):
        best_span([NAN, NAN], 2, largest=True)


def test_least_influential_layers_are_joined_into_spans():
    influences = [0.9, 0.1, 0.2, 0.8, 0.15, 0.7]
    assert least_influential(influences, 3) == (Span(1, 3), Span(4, 5))
    assert least_influential(influences, 2, protect=(1,)) == (Span(2, 3), Span(4, 5))
    assert least_influential([0.5] * 4, 2) == (Span(0, 2),)


def test_more_layers_than_can_go():
    with pytest.raises(ConfigError, match="3 layers cannot go: of the model's 3 layers 3"):
        least_influential([0.1, 0.2, 0.3], 3)
    with pytest.raises(ConfigError, match="2 are not protected"):
        least_influential([0.1, 0.2, 0.3, 0.4], 3, protect=(0, 1))
