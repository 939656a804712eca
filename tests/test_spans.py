"""Spans: parsing, checking, merging and the renumbering that export and surgery stand on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghost_dist.errors import ConfigError
from ghost_dist.spans import (
    Span,
    check_spans,
    check_units,
    kept_layers,
    operator_positions,
    parse_spans,
    parse_sublayers,
)


def test_parse_is_half_open_and_takes_several():
    assert parse_spans("11:18") == (Span(11, 18),)
    assert parse_spans("3:5, 11:18") == (Span(3, 5), Span(11, 18))


@pytest.mark.parametrize("text", ["", "11", "11-18", "a:b", "-1:3", "3:5,", "1:2:3"])
def test_parse_says_what_the_form_is(text):
    with pytest.raises(ConfigError, match="start:stop"):
        parse_spans(text)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(3, 3)], "empty"),
        ([Span(5, 3)], "empty"),
        ([Span(3, 9)], "out of range.*layers 0 to 7"),
        ([Span(1, 4), Span(3, 6)], "overlap"),
        ([Span(0, 8)], "all 8 layers"),
        ([Span(0, 4), Span(4, 8)], "all 8 layers"),
    ],
)
def test_impossible_spans_are_refused(spans, message):
    with pytest.raises(ConfigError, match=message):
        check_spans(spans, num_layers=8)


def test_adjacent_spans_are_one_cut_with_one_operator():
    assert check_spans([Span(5, 6), Span(2, 5)], 8) == (Span(2, 6),)


def test_spans_may_touch_both_ends():
    assert check_spans([Span(0, 1), Span(7, 8)], 8) == (Span(0, 1), Span(7, 8))


@given(st.sets(st.integers(0, 11), min_size=1, max_size=11))
def test_positions_agree_with_the_layers_that_stay(removed):
    spans = check_spans([Span(i, i + 1) for i in removed], 12)
    kept = kept_layers(spans, 12)
    assert sorted({*kept, *removed}) == list(range(12))
    for span, position in operator_positions(spans).items():
        # The new layer at that position is the one whose input the span produced.
        assert (kept[position] if position < len(kept) else 12) == span.stop


def test_halves_of_layers():
    found = check_units([Span(3, 4)], parse_sublayers("mlp:4, attention:6,attention:4,mlp:1"), 8)
    assert found == ((Span(3, 5),), parse_sublayers("mlp:1,attention:6"))
    assert [str(one) for one in found[1]] == ["mlp:1", "attention:6"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp:8", "mlp:8 is out of range: the model has layers 0 to 7"),
        ("mlp:1,mlp:1", "mlp:1 is given twice"),
        ("attention:3", "attention:3 is of a layer that goes as a whole"),
        ("norm:1", "'norm:1' is not of the form attention:LAYER"),
    ],
)
def test_wrong_halves(text, message):
    with pytest.raises(ConfigError, match=message):
        check_units([Span(3, 4)], parse_sublayers(text), 8)
