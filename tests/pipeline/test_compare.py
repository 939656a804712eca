"""The comparison: its figures are those of single runs, and it never does a row twice."""

import json
import math

import numpy as np
import pytest

from ghost_dist.errors import ConfigError
from ghost_dist.pipeline import compare as module
from ghost_dist.pipeline.compare import compare
from ghost_dist.pipeline.recover import recover


@pytest.fixture
def make_shared(make_config, text_file):
    def make(**fields):
        return make_config(
            **{
                "selection__spans": None,
                "selection__remove": 2,
                "selection__protect": [0],
                "evaluation__corpora": {"text": str(text_file)},
                "evaluation__windows": 4,
                "evaluation__window_length": 64,
                **fields,
            }
        )

    return make


def test_rows_are_the_figures_of_single_runs(make_shared, tmp_path):
    rows = ["none", "fold", "ghost", "ghost-joint"]
    result = compare(make_shared(), [2, 3], rows, ["paper", "search"])
    assert len(result["rows"]) == 2 * 2 * 4
    for row in result["rows"]:
        plain = row["selection"] == "paper" and row["remove"] == 2
        if not plain and row["operator"] != "ghost":
            continue
        single = recover(
            make_shared(
                selection__criterion=row["selection"],
                selection__remove=row["remove"],
                operator__name=row["operator"],
                output__path=str(
                    tmp_path / f"{row['selection']}-{row['remove']}-{row['operator']}"
                ),
            )
        )
        assert row["spans"] == single["spans"]
        assert row["perplexity"]["text"] == pytest.approx(
            single["perplexity"]["text"]["recovered"], rel=1e-5
        )
        assert result["dense"]["text"] == pytest.approx(single["perplexity"]["text"]["dense"])
        assert row["parameters"] == single["parameters"]["after"]
    text = (tmp_path / "run" / "compare.md").read_text()
    assert text.count("| paper |") == 8
    page = (tmp_path / "run" / "compare.html").read_text()
    rows, _, drawn = page.partition("Perplexity of the methods drawn")
    assert rows.count('<tr>\n<th scope="row">') == len(result["rows"])
    assert drawn.count('<tr>\n<th scope="row">') > 8
    assert "Lowest perplexity on text: without 2 layers " in page
    assert json.loads((tmp_path / "run" / "compare.json").read_text())["rows"] == result["rows"]


def test_layer_by_layer_it_is_the_same_table(make_shared, tmp_path):
    tables = {
        kind: compare(
            make_shared(engine__kind=kind, output__path=str(tmp_path / kind)),
            [2],
            ["none", "ghost"],
            ["paper"],
        )
        for kind in ("resident", "streaming")
    }
    expected, got = tables["resident"], tables["streaming"]
    assert got["dense"] == pytest.approx(expected["dense"], rel=1e-5)
    for old, new in zip(expected["rows"], got["rows"], strict=True):
        assert new["perplexity"] == pytest.approx(old["perplexity"], rel=1e-5)
        assert {**new, "perplexity": 0, "kl": 0} == {**old, "perplexity": 0, "kl": 0}
    with pytest.raises(ConfigError, match="the row refine trains"):
        compare(make_shared(engine__kind="streaming"), [2], ["refine"], ["paper"])


def test_rows_have_paired_intervals(make_shared):
    rows = compare(make_shared(), [2], ["none", "ghost", "fold"], ["paper"])["rows"]
    best = min(rows, key=lambda row: row["perplexity"]["text"])
    for row in rows:
        low, high = row["intervals"]["text"]["perplexity"]
        assert low < row["perplexity"]["text"] < high
        low, high = row["intervals"]["text"]["of_best"]
        assert low <= row["perplexity"]["text"] / best["perplexity"]["text"] <= high
    assert best["intervals"]["text"]["of_best"] == [1, 1]


def test_a_ratio_is_known_where_windows_differ_alike():
    """Windows of 2 to 6 nats, 0.1 more in the second row: the ratio is exp(0.1), the first's open.

    A row with fewer layers removed is no reference.
    """
    nats = np.linspace(2, 6, 16)
    noise = np.resize([1e-3, -1e-3], 16)
    rows = [
        {"remove": remove, "perplexity": {"a": math.exp(n.mean())}, "nats": {"a": n.tolist()}}
        for remove, n in ((7, nats), (7, nats + 0.1 + noise), (5, nats - 1))
    ]
    module._add_intervals(rows)
    low, high = rows[0]["intervals"]["a"]["perplexity"]
    assert high / low > 2
    assert rows[1]["intervals"]["a"]["of_best"] == pytest.approx([math.exp(0.1)] * 2, rel=1e-3)
    assert [rows[0]["intervals"]["a"]["of_best"], rows[2]["intervals"]["a"]["of_best"]] == [
        [1, 1],
        [1, 1],
    ]


def test_a_row_that_cannot_be_fitted_leaves_the_others(make_shared):
    """32 tokens for 48 channels and no ridge: the Gram matrix is singular."""
    result = compare(
        make_shared(
            calibration__windows=4, calibration__window_length=8, operator__ridge={"absolute": 0}
        ),
        [2],
        ["ghost", "none"],
        ["paper"],
    )
    failed, plain = result["rows"]
    assert "ridge" in failed["refused"]
    assert plain["perplexity"]["text"] > 1


def test_only_what_is_new_is_computed(make_shared, monkeypatch):
    solved = []
    solve = module.Solver.solve

    def counting(self):
        solved.append(self._inputs.config.operator.name)
        return solve(self)

    monkeypatch.setattr(module.Solver, "solve", counting)
    config = make_shared()
    first = compare(config, [2], ["none", "ghost"], ["paper"])
    assert solved == ["none", "ghost"]
    second = compare(config, [2], ["none", "ghost", "fold"], ["paper"])
    assert solved == ["none", "ghost", "fold"]
    for old, new in zip(first["rows"], second["rows"], strict=False):
        assert {**new, "intervals": {}} == {**old, "intervals": {}}


def test_a_stopped_comparison_continues(make_shared, monkeypatch):
    solve, calls = module.Solver.solve, []

    def stop_at_the_second(self):
        calls.append(self._inputs.config.operator.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self)

    monkeypatch.setattr(module.Solver, "solve", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare(make_shared(), [2], ["none", "ghost", "fold"], ["paper"])
    result = compare(make_shared(), [2], ["none", "ghost", "fold"], ["paper"])
    assert calls == ["none", "ghost", "ghost", "fold"]
    assert [row["operator"] for row in result["rows"]] == ["none", "ghost", "fold"]


def test_what_a_cut_does_not_allow_is_a_row_that_says_so(make_shared):
    """Seven of eight layers: the span begins at 0, so nothing can be folded before it."""
    result = compare(make_shared(selection__protect=[7]), [7], ["fold", "ghost"], ["search"])
    assert result["rows"][0]["spans"] == [[0, 7]]
    assert "needs a layer before" in result["rows"][0]["refused"]
    assert result["rows"][1]["perplexity"]["text"] > 1


def test_a_comparison_needs_a_text_and_possible_sizes(make_shared):
    with pytest.raises(ConfigError, match="needs a text"):
        compare(make_shared(evaluation__corpora={}), [2], ["ghost"], ["paper"])
    with pytest.raises(ConfigError, match="selection.remove=8"):
        compare(make_shared(), [8], ["ghost"], ["paper"])
