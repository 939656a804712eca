"""Intervals against the normal theory, and pairing."""

import numpy as np
import pytest

from ghost_dist.evaluation.bootstrap import interval, resampled_perplexities


def test_interval_is_that_of_the_mean_for_many_windows():
    generator = np.random.default_rng(1)
    tokens, windows = 100, 400
    nats = generator.normal(3.0 * tokens, 20.0, windows)
    [values] = resampled_perplexities({"dense": nats}, tokens).values()
    low, high = np.log(interval(values))
    mean, error = nats.mean() / tokens, nats.std() / tokens / windows**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_variants_are_drawn_with_the_same_windows():
    nats = np.random.default_rng(2).normal(300.0, 30.0, 50)
    drawn = resampled_perplexities({"a": nats, "b": nats + 10.0}, 100)
    # The same windows: the ratio is exp(10 / 100) in every draw, though both move.
    assert np.ptp(drawn["a"]) > 0.5
    assert drawn["b"] / drawn["a"] == pytest.approx(np.exp(0.1))


def test_draws_do_not_depend_on_when_they_are_made():
    nats = {"a": [100.0, 110.0, 120.0]}
    assert (resampled_perplexities(nats, 50)["a"] == resampled_perplexities(nats, 50)["a"]).all()


def test_nothing_is_claimed_where_there_is_nothing_to_draw_from():
    assert interval(resampled_perplexities({"a": [100.0]}, 50)["a"]) is None
    assert interval(resampled_perplexities({"a": [1e9, 100.0]}, 50)["a"]) is None  # infinite
    with pytest.raises(ValueError, match="same windows"):
        resampled_perplexities({"a": [1.0], "b": [1.0, 2.0]}, 50)
    with pytest.raises(ValueError, match="same windows"):
        resampled_perplexities({"a": []}, 50)
