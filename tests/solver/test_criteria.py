"""Scores to spans, sizes to numbers of layers."""

import math

import pytest

from ghost_dist.errors import ConfigError
from ghost_dist.solver.criteria import best_span, layers_of_size, least_influential
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


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 1), (100, 1), (100.001, 2), (250, 3), (300, 3), ((0.1 + 0.2) * 1000, 3)],
)
def test_least_number_of_layers_that_saves_a_size(size, expected):
    assert layers_of_size(size, [100] * 10) == expected


def test_fractions_need_no_extra_layer_for_rounding():
    for remove in range(1, 32):
        assert layers_of_size(remove / 32 * (32 * 4_735_891), [4_735_891] * 32) == remove


def test_layers_of_different_sizes_count_as_their_mean():
    assert layers_of_size(60, [10, 10, 50, 50], protect=(0,)) == 2  # mean 36.7


@pytest.mark.parametrize("size", [0, -1, 351, 400])
def test_sizes_that_cannot_be_saved(size):
    with pytest.raises(ConfigError, match="is not possible"):
        layers_of_size(size, [100] * 4, protect=(3,) if size == 351 else ())


def test_all_layers_protected():
    with pytest.raises(ConfigError, match="the 0 layers that may go"):
        layers_of_size(1, [10, 10], protect=(0, 1))
