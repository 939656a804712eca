"""Operators of a search from dense streams, against the rows themselves."""

from types import SimpleNamespace

import pytest
import torch

from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.pipeline import search_fits
from ghost_dist.pipeline.search_fits import DenseFits
from ghost_dist.spans import Span

CPU = torch.device("cpu")
L, WINDOWS, T, C = 4, 9, 40, 12
SOURCE_OF = [0, 1, 2] * 3
MODEL = SimpleNamespace(device=CPU, hidden_size=C, dtype=torch.float64, whole=True, num_layers=L)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams():
    """Layer 1 is nearly linear, the others are not; channel 5 is massive."""
    x = normal(WINDOWS, T, C, seed=0)
    x[..., 5] *= 50
    states = [x]
    for layer in range(L):
        change = x @ normal(C, C, seed=10 + layer)
        x = x + (0.1 * change if layer == 1 else torch.tanh(change))
        states.append(x)
    return states


def fitted(x_TC, y_TC, ridge, scale):
    eye_CC = torch.eye(C, dtype=torch.float64)
    return eye_CC + torch.linalg.solve(
        x_TC.T @ x_TC + ridge * scale * eye_CC, x_TC.T @ (y_TC - x_TC)
    )


def test_operators_of_a_start_are_those_of_rows_never_fitted_on():
    hidden, sources = streams(), torch.tensor(SOURCE_OF)
    dense, spans = DenseFits(hidden, SOURCE_OF, MODEL), [Span(1, stop) for stop in (2, 3, 4)]
    dense.fit([(span,) for span in spans])
    for span in spans:
        x_WTC, y_WTC = hidden[span.start], hidden[span.stop]
        scale = x_WTC.flatten(0, 1).square().sum(0).median()
        found = {}
        for ridge in search_fits._RIDGES:
            weights, residual = [], 0.0
            for source in range(3):
                x_TC, y_TC = (of[sources != source].flatten(0, 1) for of in (x_WTC, y_WTC))
                weights.append(fitted(x_TC, y_TC, ridge, scale))
                left = y_WTC[sources == source] - x_WTC[sources == source] @ weights[-1]
                residual += float(left.square().sum())
            found[ridge] = residual, weights
        best = min(found, key=lambda ridge: found[ridge][0])
        assert dense.ridges[span] == best
        for source, by_hand_CC in enumerate(found[best][1]):
            [variant] = dense.variants([(span,)], source)
            torch.testing.assert_close(variant.operators[span].weight_CC, by_hand_CC)


def test_where_no_map_is_better_than_none_it_is_the_plain_cut():
    hidden = [normal(WINDOWS, T, C, seed=0)]
    hidden += [hidden[0] + normal(WINDOWS, T, C, seed=1)]
    dense, span = DenseFits(hidden, SOURCE_OF, MODEL), Span(0, 1)
    dense.fit([(span,)])
    [variant] = dense.variants([(span,)], 0)
    assert torch.equal(variant.operators[span].weight_CC, torch.eye(C, dtype=torch.float64))


def test_a_stream_that_is_not_finite_is_named(monkeypatch):
    def sweep(model, variants, tokens, taps, **_):
        stream_BTC = torch.ones(2, T, C)
        taps[0].stream(0, slice(0, 2), stream_BTC)
        stream_BTC[1, 3, 4] = torch.nan
        taps[0].stream(3, slice(2, 4), stream_BTC)

    monkeypatch.setattr(search_fits, "sweep", sweep)
    model = SimpleNamespace(**vars(MODEL), bytes_at_once=lambda: 0)
    with pytest.raises(NonFiniteActivationError, match=r"layer 3 .* window 3"):
        search_fits.dense_streams(model, torch.zeros(4, T).numpy(), 2, lambda _: None, on_host=1)
