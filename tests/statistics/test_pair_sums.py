"""Pair statistics against direct products of the whole list of hidden states."""

import pytest
import torch

from ghost_dist.errors import ConfigError, NonFiniteActivationError
from ghost_dist.spans import Span
from ghost_dist.statistics import pair_sums
from ghost_dist.statistics.pair_sums import (
    PairCollector,
    PairMoments,
    candidate_spans,
    projection,
    start_key,
)
from ghost_dist.statistics.sums import ColumnBlock

L, T, C, WINDOWS, R = 5, 13, 8, 3, 16
CPU = torch.device("cpu")
SPANS = candidate_spans(L, 1, 3)


def streams(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(L + 1, WINDOWS, T, C, generator=generator).cumsum(0).to(dtype)


def collect(hidden, order, spans=SPANS):
    collector = PairCollector(spans, C, CPU, R)
    for window, boundary in order:
        collector(boundary, window, hidden[boundary, window])
    return collector


WINDOW_BY_WINDOW = [(w, b) for w in range(WINDOWS) for b in range(L + 1)]
LAYER_BY_LAYER = [(w, b) for b in range(L + 1) for w in reversed(range(WINDOWS))]


def test_candidates():
    assert candidate_spans(4, 2, 2) == (Span(0, 2), Span(1, 3), Span(2, 4))
    assert candidate_spans(5, 1, 3, protect=(0, 2)) == (
        Span(1, 2), Span(3, 4), Span(3, 5), Span(4, 5),
    )  # fmt: skip
    # One layer always stays, so a span of all of them is none.
    assert Span(0, 3) not in candidate_spans(3, 1, 3)
    assert len(candidate_spans(80, 1, 40)) == 80 * 40 - 40 * 39 // 2


def test_no_candidate_is_named():
    with pytest.raises(ConfigError, match="No span of 3 to 3 layers of the model's 5"):
        candidate_spans(5, 3, 3, protect=(2,))


def test_projection_is_fixed_and_of_unit_second_moment():
    r = projection(400, 100)
    assert torch.equal(r, projection(400, 100))
    product = r @ r.T
    torch.testing.assert_close(product.diagonal(), torch.ones(400, dtype=torch.float64))
    off = product - torch.diag(product.diagonal())
    # Mean of 100 products of signs: standard deviation 0.1, over 79800 pairs.
    assert abs(off.mean()) < 0.002
    assert off[off != 0].std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [WINDOW_BY_WINDOW, LAYER_BY_LAYER])
def test_sums_equal_direct_products(dtype, order):
    hidden = streams(dtype)
    collector = collect(hidden, order)
    result = collector.result()
    flat = hidden.double().flatten(1, 2)
    r = projection(C, R)
    assert collector.boundaries == tuple(range(L + 1))
    assert collector.stops == {
        0: (1, 2, 3), 1: (2, 3, 4), 2: (3, 4, 5), 3: (4, 5), 4: (5,),
    }  # fmt: skip
    for start, stops in collector.stops.items():
        moments, x = result[start_key(start)], flat[start]
        assert moments.num_tokens == WINDOWS * T
        torch.testing.assert_close(moments.gram_CC, x.T @ x)
        for pair, stop in enumerate(stops):
            y = flat[stop]
            torch.testing.assert_close(moments.cross_CPr[:, pair], x.T @ y @ r)
            torch.testing.assert_close(moments.sumsq_target_Pr[pair], (y @ r).square().sum(0))
            torch.testing.assert_close(moments.sumsq_y_P[pair], y.square().sum())
            torch.testing.assert_close(moments.sumsq_change_P[pair], (y - x).square().sum())


def test_without_a_projection_the_cross_is_whole():
    hidden = streams()
    collector = PairCollector(SPANS, C, CPU, None)
    for window, boundary in WINDOW_BY_WINDOW:
        collector(boundary, window, hidden[boundary, window])
    flat = hidden.double().flatten(1, 2)
    moments = collector.result()[start_key(1)]
    for pair, stop in enumerate((2, 3, 4)):
        torch.testing.assert_close(moments.cross_CPr[:, pair], flat[1].T @ flat[stop])
        torch.testing.assert_close(moments.sumsq_target_Pr[pair], flat[stop].square().sum(0))


def test_float32_products_where_float64_is_slow(monkeypatch):
    hidden = streams(torch.bfloat16)
    exact = collect(hidden, WINDOW_BY_WINDOW).result()
    monkeypatch.setattr(pair_sums, "has_full_rate_float64", lambda device: False)
    got = collect(hidden, WINDOW_BY_WINDOW).result()
    for start, moments in got.items():
        for name, array in moments.arrays().items():
            other = exact[start].arrays()[name]
            assert array.dtype == torch.float64
            # T float32 additions, the projection rounded before them.
            slack = 2 * T * 2**-24 * float(other.abs().max())
            torch.testing.assert_close(array, other, rtol=0, atol=slack)


def test_folds_add_and_subtract():
    hidden = streams()
    whole = collect(hidden, WINDOW_BY_WINDOW).result()
    first = collect(hidden, [(w, b) for w, b in WINDOW_BY_WINDOW if w == 0]).result()
    rest = collect(hidden, [(w, b) for w, b in WINDOW_BY_WINDOW if w > 0]).result()
    for start, moments in whole.items():
        total, left = first[start] + rest[start], moments - first[start]
        assert total.num_tokens == moments.num_tokens
        assert left.num_tokens == (WINDOWS - 1) * T
        for name, array in moments.arrays().items():
            torch.testing.assert_close(total.arrays()[name], array)
            torch.testing.assert_close(left.arrays()[name], rest[start].arrays()[name])
        assert PairMoments(moments.num_tokens, **moments.arrays()) == moments


def test_some_starts_only_are_the_same_sums():
    """Starts may be split over ranks or passes."""
    hidden = streams()
    whole = collect(hidden, WINDOW_BY_WINDOW).result()
    spans = [span for span in SPANS if span.start in (1, 3)]
    part = collect(hidden, WINDOW_BY_WINDOW, spans).result()
    assert part.keys() == {"start-1", "start-3"}
    for start, moments in part.items():
        for name, array in moments.arrays().items():
            assert torch.equal(array, whole[start].arrays()[name])


def test_column_blocks_join_to_the_whole():
    hidden = streams()
    whole = collect(hidden, WINDOW_BY_WINDOW).result()
    blocks = []
    for index in range(3):
        collector = PairCollector(SPANS, C, CPU, R, block=ColumnBlock(index, 3))
        for window, boundary in WINDOW_BY_WINDOW:
            collector(boundary, window, hidden[boundary, window])
        blocks.append(collector.result())
    for key, expected in whole.items():
        joined = PairMoments.join(expected.num_tokens, [block[key].arrays() for block in blocks])
        for name, array in expected.arrays().items():
            torch.testing.assert_close(joined.arrays()[name], array, rtol=1e-13, atol=0)
    assert blocks[0][start_key(0)].gram_CC.shape == (C, 2)


def test_streams_are_let_go():
    collector = PairCollector(SPANS, C, CPU, R)
    hidden = streams()
    for boundary in range(L + 1):
        collector(boundary, 0, hidden[boundary, 0])
        assert len(collector._pending) <= 4
    assert not collector._pending


def test_non_finite_streams_are_named():
    hidden = streams()
    hidden[2, 1, 3, 3] = float("inf")
    with pytest.raises(NonFiniteActivationError, match=r"layer 2 .* window 1"):
        collect(hidden, WINDOW_BY_WINDOW).result()
