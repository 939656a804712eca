"""``selection.criterion=search`` through the whole stage: what it finds, stopped and streamed."""

import contextlib
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from all_removals import exhaustive
from rich.console import Console

from ghost_dist.calibration.windows import load_windows
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.errors import ConfigError, RunMismatchError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline import search_effort, search_fits, searching
from ghost_dist.pipeline.compare import compare
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.layer_times import Seconds
from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.planning.plan import plan_run
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.removals import Rules
from ghost_dist.spans import Span

QUIET = Reporter(console=Console(quiet=True))
SEARCH = {"selection__spans": None, "selection__criterion": "search", "selection__remove": 2}


@pytest.fixture
def searched(make_config, tmp_path):
    """Function from a folder's name and overrides to spans and record of a search in it."""

    def search(name, **overrides):
        config = make_config(**{**SEARCH, "output__path": str(tmp_path / name), **overrides})
        spans = recover(config, QUIET, again="select")["spans"]
        record = json.loads((tmp_path / name / "stages" / "select.json").read_text())["outputs"]
        assert record["spans"] == spans
        return spans, record["search"]

    return search


def test_it_finds_about_the_best_of_all_removals(searched, make_config, tmp_path):
    spans, found = searched("a")
    inputs = open_inputs(make_config(**SEARCH), QUIET)
    tokens = load_windows(tmp_path / "a" / "tokens.safetensors")
    windows = searching.Windows.of(inputs, tokens)
    with searching.scoring(inputs, windows, QUIET) as score:
        table = exhaustive(Rules(8, 2), score, windows.judges.windows)
        kl = []
        first, second = removed = Span(2, 3), Span(5, 6)
        for part in (0, 1):
            [variant] = score.sequential.variants([removed], part)
            pieces = range(part, windows.judges.sources, 2)
            judged = windows.judged[[w for w in windows.judges.windows if w % 4 in pieces]]
            _, recovered = window_scores(score.model, [Variant(), variant], judged, batch=1)
            kl += recovered.sure_kl.tolist()
            others = np.asarray(windows.source_of) % 2 != part
            dense = [stream_WTC[others] for stream_WTC in score.dense.streams]
            stream_WTC = dense[first.start]
            for span in removed:
                ridge = 1.5 * ridge_of_least_residual(score.dense.streams, windows.source_of, span)
                by_hand_CC = fitted(stream_WTC, dense[span.stop], ridge).float()
                torch.testing.assert_close(variant.operators[span].weight_CC, by_hand_CC)
                stream_WTC = stream_WTC @ by_hand_CC
                for layer in (3, 4) if span == first else ():
                    with (
                        score.model.through([layer]) as at_hand,
                        score.model.running(*at_hand) as run,
                    ):
                        stream_WTC = run(stream_WTC)
            assert second.start == 5
            seen = {row.tobytes() for row in windows.fitted[others]}
            assert judged.shape[1] == windows.fitted.shape[1]
            assert not {row.tobytes() for row in judged} & seen
        # Where memory is short, what a removal begins with is forgotten before its last operator.
        del score.sequential._fitted[removed[:1]]
        score.sequential.fit([removed])
        [again] = score.sequential.variants([removed], 1)
        for span in removed:
            assert again.operators[span].weight_CC.equal(variant.operators[span].weight_CC)
    kl_of = {removal: kl for kl, removal in table}
    assert np.mean(kl) == pytest.approx(kl_of[2, 5], rel=1e-9)
    assert found["kl"] <= 1.02 * table[0][0]
    assert table[0][0] < 0.9 * table[len(table) // 2][0]  # it is no matter of course
    assert found["kl"] == kl_of[tuple(layers_of(spans))]
    assert found["evaluations"] < len(table) * 2 * len(windows.judged)  # roughly, and closely
    assert np.mean(found["kl_left_out"]) == pytest.approx(found["kl"])


def fitted(x_WTC, y_WTC, ridge):
    """W towards the identity, with a relative ridge."""
    x_TC, y_TC = x_WTC.flatten(0, 1).double(), y_WTC.flatten(0, 1).double()
    gram_CC = x_TC.T @ x_TC
    damped_CC = gram_CC + ridge * gram_CC.diagonal().median() * torch.eye(len(gram_CC))
    return torch.eye(len(gram_CC)) + torch.linalg.solve(damped_CC, x_TC.T @ (y_TC - x_TC))


def ridge_of_least_residual(streams, source_of, span):
    """Of the search's ridges, over all sources left out."""
    x_WTC, y_WTC = streams[span.start].double(), streams[span.stop].double()
    sources = np.asarray(source_of)

    def residual(ridge):
        out = [sources == source for source in sorted(set(source_of))]
        left = [(x_WTC[o] @ fitted(x_WTC[~o], y_WTC[~o], ridge) - y_WTC[o]).square() for o in out]
        return float(sum(one.sum() for one in left))

    return min(search_fits._RIDGES, key=residual)


def layers_of(spans):
    return [layer for span in spans for layer in range(*span)]


def test_without_an_operator_plain_cuts_are_judged(searched, make_config, tmp_path):
    """The table of all plain cuts has the removal first that the search finds."""
    spans, found = searched("cut", operator__name="none", selection__effort="thorough")
    assert found["fitted_tokens"] == 0
    inputs = open_inputs(make_config(**SEARCH, operator__name="none"), QUIET)
    tokens = load_windows(tmp_path / "cut" / "tokens.safetensors")
    windows = searching.Windows.of(inputs, tokens)
    with searching.scoring(inputs, windows, QUIET) as score:
        table = exhaustive(Rules(8, 2), score, windows.judges.windows)
        judged = windows.judged
        cut = Variant((Span(3, 4), Span(6, 7)))
        _, scores = window_scores(score.model, [Variant(), cut], judged, batch=1)
    [kl] = [kl for kl, removal in table if removal == (3, 6)]
    assert kl == pytest.approx(scores.sure_kl.mean(), rel=1e-5)
    removed = tuple(layer for start, stop in spans for layer in range(start, stop))
    assert removed in [removal for _, removal in table[:2]]


def test_a_run_that_loses_its_operator_keeps_its_layers(searched, make_config, tmp_path):
    """Until they are selected again: then plain cuts are judged, as in a run without operators."""
    spans, _ = searched("run")
    folder = tmp_path / "run"
    before = (folder / "stages" / "select.json").read_bytes()
    run_stage_again(folder, "calibrate", [], QUIET)
    assert run_stage_again(folder, "solve", ["operator.name=none"], QUIET)["operator"] == "none"
    assert recover(RunFolder.stored_config(folder), QUIET)["spans"] == spans
    run_stage_again(folder, "solve", ["operator.name=ghost"], QUIET)
    assert recover(RunFolder.stored_config(folder), QUIET)["spans"] == spans
    assert (folder / "stages" / "select.json").read_bytes() == before
    run_stage_again(folder, "solve", ["operator.name=none"], QUIET)
    again = run_stage_again(folder, "select", [], QUIET)["spans"]
    plain, found = searched("fresh", operator__name="none")
    record = json.loads((folder / "stages" / "select.json").read_text())["outputs"]
    assert (again, record["search"]) == (plain, found)


def test_a_search_says_which_size_it_is_about_and_what_is_new(make_config, capsys):
    config = make_config(**SEARCH, selection__pareto="3", selection__effort="quick")
    recover(config, Reporter(), again="select")
    first = capsys.readouterr().err
    for layers in (2, 3):
        assert f"search for {layers} layers: best so far " in first
        assert re.search(rf"search for {layers} layers: chosen of \d+ that were tried: \[", first)
        assert re.search(rf" search for {layers}: [\d,]+ evaluations in ", first)
    recover(config, Reporter(), again="select")
    again = capsys.readouterr().err
    assert "removing layers" in again
    assert "KL" not in again


def test_it_says_why_the_least_is_not_taken(make_config, monkeypatch, capsys):
    """A single span is taken, as nothing is better by so many standard errors."""
    monkeypatch.setattr("ghost_dist.solver.search._ERRORS", 1e9)
    config = make_config(**SEARCH, selection__protect=[6], selection__effort="quick")
    [span] = recover(config, Reporter(), again="select")["spans"]
    told = capsys.readouterr().err
    [reason] = [line for line in told.splitlines() if "chosen of" in line]
    least = min(float(kl) for kl in re.findall(r"best so far .* ([\d.]+) nats", told))
    assert f"that were tried: [{span[0]}, {span[1]}), KL of the search" in reason
    assert float(re.search(r"search ([\d.]+) nats", reason)[1]) > least
    assert reason.endswith(f"; the least found, {least:.4f}, is within the standard error of it")


def test_evaluations_are_counted_as_they_come(make_config, monkeypatch):
    """Not only once a generation is through; what is fitted before is said."""
    told, stage = [], Reporter.stage

    @contextlib.contextmanager
    def watched(self, name, *arguments):
        with stage(self, name, *arguments) as advance:
            yield lambda amount: (told.append((name, amount)), advance(amount))

    monkeypatch.setattr(Reporter, "stage", watched)
    monkeypatch.setattr(Reporter, "doing", lambda _, what: told.append((what, 0)))
    generation = ("generation", 0)
    finish = RunFolder.finish
    monkeypatch.setattr(
        RunFolder,
        "finish",
        lambda self, stage, *a: (
            told.append(generation) if stage == "search" else None,
            finish(self, stage, *a),
        ),
    )
    config = make_config(**SEARCH)
    recover(config, QUIET, again="select")
    record = json.loads(Path(config.output.path, "stages", "select.json").read_text())
    assert told[told.index(("fit 1/8", 0)) :][:8] == [
        (f"fit {number}/8", 0) for number in range(1, 9)
    ]
    counts = [amount for name, amount in told if name == "search"]
    first = [amount for name, amount in told[: told.index(generation)] if name == "search"]
    assert len(list(filter(None, first))) > 4
    assert min(counts) >= 0
    assert sum(counts) == record["outputs"]["search"]["evaluations"]


def test_stopped_after_each_generation_it_goes_on_to_the_same(
    searched, make_config, tmp_path, monkeypatch, capsys
):
    whole = searched("whole", selection__remove=3)
    config = make_config(**{**SEARCH, "selection__remove": 3})
    finish, left = RunFolder.finish, 0

    def stop(self, stage, inputs, outputs):
        nonlocal left
        finish(self, stage, inputs, outputs)
        left -= stage == "search"
        if left == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", stop)
        for number in range(1, 1 + len(whole[1]["generations"])):
            left = number
            with pytest.raises(KeyboardInterrupt):
                recover(config, QUIET)
    scored = []
    scoring = searching.window_scores
    monkeypatch.setattr(
        searching, "window_scores", lambda *a, **k: scored.append(a) or scoring(*a, **k)
    )
    capsys.readouterr()
    recover(config, Reporter(), again="calibrate")
    there = f"search ({whole[1]['evaluations']:,} evaluations)"
    assert f"taken from RUN: calibration text, {there}\n" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "stages" / "select.json").read_text())["outputs"]
    assert (record["spans"], record["search"]) == whole
    assert not scored


def test_every_amount_is_what_a_search_for_it_alone_finds(make_config, tmp_path, monkeypatch):
    """And another one is exported from the same RUN, without a search or a measurement."""
    seconds = Seconds((1.0,) * 8, 10.0, 0.05)
    measured = []

    def measure(*_):
        measured.append(1)
        return dict.fromkeys(("", "prefill", "decode"), seconds)

    monkeypatch.setattr("ghost_dist.pipeline.recover.request_seconds", measure)
    scored = []
    scoring, streams = searching.window_scores, searching.dense_streams
    for name in ("window_scores", "dense_streams"):
        of = {"window_scores": scoring, "dense_streams": streams}[name]
        monkeypatch.setattr(searching, name, lambda *a, of=of, **k: scored.append(1) or of(*a, **k))

    def run(folder, **amount):
        fields = {**SEARCH, "selection__remove": None, "output__path": str(tmp_path / folder)}
        return recover(make_config(**{**fields, **amount}), QUIET)

    pareto = {"selection__pareto": ["kv 75%", 1, "speedup 1.4"]}
    asked = ["target", "speedup 1.4"], ["remove", 2]
    alone, together = [], []
    for number, (field, value) in enumerate(asked):
        alone.append(run(f"alone-{number}", **{f"selection__{field}": value}))
    measured.clear()
    for field, value in reversed(asked):
        together.insert(0, run("run", **pareto, **{f"selection__{field}": value}))
        if value == 2:
            assert len(scored) > 0
            scored.clear()
        page = (tmp_path / "run" / "report.html").read_text()
        assert "Quality against speed" in page
        exported = open_checkpoint(tmp_path / "run" / "checkpoint").config["num_hidden_layers"]
        gone = sum(stop - start for start, stop in together[0]["spans"])
        assert exported == 8 - gone
    assert (scored, measured) == ([], [1])
    config = make_config(**{**SEARCH, **pareto})
    planned = searching.search_shape(open_inputs(config, QUIET, measure=measure)).evaluations
    table = json.loads((tmp_path / "run" / "stages" / "search.json").read_text())["outputs"][
        "table"
    ]
    assert 0.5 < sum(map(len, table.values())) / planned <= 1
    for one, same in zip(alone, together, strict=True):
        for figure in ("spans", "fit", "target", "parameters", "bytes"):
            assert one[figure] == same[figure]
        assert one["selection"]["search"] == same["selection"]["search"]
        rows = {row["wanted"]: row for row in same["selection"]["pareto"]}
        row = rows[same["target"]["target"] if same["target"] else "2, kv 75%"]
        assert (row["spans"], row["kl"]) == (one["spans"], one["selection"]["search"]["kl"])
        gaps = len(row["spans"])
        assert row["bytes"] >= one["bytes"]["after"] > row["bytes"] - gaps * 2 * 48 * 48 * 4
        left = one["parameters"]["after"] / one["parameters"]["before"]
        assert 0 <= 1 - left - row["removed"] < 0.02 * gaps
    assert list(rows) == ["1", "2, kv 75%", "speedup 1.4"]
    for gone, row in zip((1, 2, 3), rows.values(), strict=True):
        assert sum(stop - start for start, stop in row["spans"]) == gone
        assert row["speedup"] == pytest.approx(10 / (10 - gone + 0.05 * len(row["spans"])))
        assert row["kv"] == 1 - gone / 8
    with pytest.raises(RunMismatchError, match="selection.pareto: .* in RUN"):
        run("run", selection__remove=2)
    with pytest.raises(ConfigError, match="'kv 3' is no size or target"):
        run("other", selection__remove=2, selection__pareto="2,kv 3")
    with pytest.raises(ConfigError, match="pareto needs criterion=search"):
        run("other", selection__remove=2, selection__pareto="2", selection__criterion="paper")


def test_streamed_and_in_parts_it_is_the_same(searched, monkeypatch):
    resident = searched("resident")
    monkeypatch.setattr(searching, "_MOST_VARIANTS", 3)
    walk = search_fits.SequentialFits._walk

    def one_by_one(self, removals):
        for removal in removals:
            walk(self, [removal])

    monkeypatch.setattr(search_fits.SequentialFits, "_walk", one_by_one)
    assert searched("streamed", engine__kind="streaming") == resident


def test_bounds_are_kept_and_the_seed_is_calibration_s(searched):
    spans, _ = searched("a", selection__remove=3, selection__protect=[5, 6], selection__max_spans=1)
    assert len(spans) == 1
    assert not {5, 6} & set(layers_of(spans))


def test_the_result_says_what_was_searched(make_config, tmp_path):
    result = recover(make_config(**SEARCH), QUIET)
    search = result["selection"]["search"]
    assert search["generations"][-1]["evaluations"] == search["evaluations"]
    assert min(g["score"] for g in search["generations"] if len(g["removed"]) == 2) == search["kl"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "recovered models were compared with the dense one" in page


def test_what_is_planned_is_the_most_that_is_done(searched, make_config, monkeypatch):
    monkeypatch.setattr(search_effort, "_LONGEST", 32)  # two pieces of a window
    _, found = searched("a")
    planned = plan_run(make_config(**SEARCH), QUIET)
    inputs = open_inputs(make_config(**SEARCH), QUIET)
    search = searching.search_shape(inputs)
    assert search.length == 32
    assert search.fitted_tokens == found["fitted_tokens"]
    assert found["judged_tokens"] == 16 * 64
    assert 0.5 < found["evaluations"] / search.evaluations <= 1
    [select] = [stage for stage in planned.stages if stage.name == "select"]
    layer = 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96)
    assert select.flops > search.evaluations * 32 * 7 * layer
    assert any("all of its budget" in note for note in planned.notes)


def test_compare_has_it_too(searched, make_config, text_file, tmp_path):
    spans, _ = searched("single")
    config = make_config(
        **SEARCH,
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=1,
        evaluation__window_length=64,
    )
    unrepaired = "search-unrepaired"
    rows = compare(config, [2], ["none"], ["search", "paper", unrepaired], QUIET)["rows"]
    assert [row["selection"] for row in rows] == ["search", "paper", unrepaired]
    assert rows[0]["spans"] == spans != rows[1]["spans"]
    plain, _ = searched("plain", operator__name="none")
    assert rows[2]["spans"] == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection__effort": 3}, "budget of 3 evaluations is too small.*Raise selection.effort"),
        ({"selection__effort": 600, "selection__pareto": "2,2,5"}, "to remove 5 of 8 layers one"),
        ({"selection__remove": 8}, "selection.remove=8, .* give 1 to 7"),
        ({"selection__pareto": "0"}, "selection.pareto=0, .* give 1 to 7"),
        (
            {"selection__pareto": "1,6", "selection__protect": [0, 1, 2]},
            "selection.pareto=6, .* 3 of them protected, .* give 1 to 5",
        ),
        (
            {"selection__remove": 6, "selection__protect": [4], "selection__max_spans": 1},
            "No removal of 6 of 8 layers keeps",
        ),
        ({"selection__effort": "much"}, "selection.effort"),
    ],
)
def test_what_cannot_be_searched_is_named(make_config, tmp_path, fields, message):
    for refuses in (recover, plan_run):
        with pytest.raises(ConfigError, match=message):
            refuses(make_config(**{**SEARCH, **fields}), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("room", "on_host"), [(0.99, 1), (3.99, 4), (4.01, 4)])
def test_streams_that_fit_nowhere_are_named(room, on_host, make_config, monkeypatch):
    """Ranks of one host do not see what the others are about to keep there."""
    nbytes = 1024 * 9 * 48 * 4  # tokens, boundaries, channels, float32
    free = int(room * nbytes / search_fits.SHARE_OF_MEMORY)
    monkeypatch.setattr(search_fits, "free_bytes", lambda _: free)
    monkeypatch.setattr(searching, "scoring", partial(searching.scoring, on_host=on_host))
    if room > on_host:
        recover(make_config(**SEARCH), QUIET, again="select")
        return
    with pytest.raises(ConfigError, match=r"keeps the streams of 1,024 tokens at 9 boundaries"):
        recover(make_config(**SEARCH), QUIET)
