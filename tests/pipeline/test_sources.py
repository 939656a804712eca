"""Several sources of calibration text: what is chosen is judged on those that were left out."""

import difflib
import inspect
import json
import math

import numpy as np
import pytest
from rich.console import Console

from ghost_dist.calibration.split import spread
from ghost_dist.calibration.windows import TokenWindows, build_windows, load_windows
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import CalibrationError, ConfigError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline import candidates
from ghost_dist.pipeline.candidates import FINE_SHIFTS, SHIFTS, Candidate
from ghost_dist.pipeline.inputs import open_causal_lm, open_inputs, with_absolute_paths
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.solving import Solver
from ghost_dist.pipeline.stages import Stages
from ghost_dist.pipeline.texts import unlike
from ghost_dist.progress import Reporter
from ghost_dist.report.verdict import sources_apart
from ghost_dist.ridge import RelativeRidge
from ghost_dist.run_folder import RunFolder

QUIET = Reporter(console=Console(quiet=True))
BY_KL = {"operator__choose": "kl", "operator__name": "auto"}


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(inspect.getsource(difflib))
    return path


@pytest.fixture
def mixed(make_config, text_file, other):
    """Function from fields to the configuration of a run on two sources."""

    def make(**fields):
        shares = {str(text_file): 0.625, str(other): 0.375}
        return make_config(**{"calibration__sources": shares, **BY_KL, **fields})

    return make


def test_windows_are_of_each_source_by_its_share(mixed, text_file, other, tmp_path):
    recover(mixed(), QUIET, again="select")
    tokens = load_windows(tmp_path / "run" / "tokens.safetensors")
    assert tokens.source_of == (0,) * 10 + (1,) * 6
    inputs = open_inputs(mixed(), QUIET)
    alone = [
        build_windows(
            str(path), inputs.tokenizer, windows=count, window_length=64, seed=0,
            special_tokens=False, window_bos=False, sampling="spread", vocab_size=1 << 20,
        ).tokens
        for path, count in ((text_file, 10), (other, 6))
    ]  # fmt: skip
    assert np.array_equal(tokens.tokens, np.concatenate(alone))


def test_what_is_far_behind_on_one_source_is_not_tried_on_others(mixed, monkeypatch, tmp_path):
    def rows(bound):
        monkeypatch.setattr(candidates, "FAR_BEHIND", bound)
        found = recover(mixed(output__path=str(tmp_path / str(bound))), QUIET)["candidates"]
        assert sum(row["chosen"] for row in found) == 1
        return found

    every, few = rows(math.inf), rows(1.001)
    assert not any("dropped" in row for row in every)
    dropped = [row for row in few if "dropped" in row]
    assert 0 < len(dropped) < len(few)
    coarse = few[: -len(FINE_SHIFTS)]
    least = min(row["left_out"][0]["kl"] for row in coarse)
    for row in coarse:
        behind = row["left_out"][0]["kl"] > 1.001 * least and row["operator"] != "none"
        assert ("dropped" in row) == behind
    for row in few:
        behind = "dropped" in row
        of_source = [one["kl"] for one in row["left_out"]]
        assert len(of_source) == (1 if behind else 2)
        assert row["kl"] == pytest.approx(np.mean(of_source), rel=1e-6)
        assert not (behind and row["chosen"])
    same = [row for row in few for other in every if row == {**other, "chosen": row["chosen"]}]
    assert len(same) >= len(few) - len(dropped) - 2  # the ridges around the best may be others


def test_a_candidate_is_judged_on_the_source_that_it_was_not_fitted_on(mixed, tmp_path):
    result = recover(mixed(), QUIET)
    inputs = open_inputs(mixed(output__path=str(tmp_path / "again")), QUIET)
    with RunFolder(inputs.config) as run:
        stages = Stages(inputs, run, QUIET)
        tokens = stages.tokens()
        run.begin()
        spans = stages.select(tokens)
        solver = Solver(inputs, spans, stages.calibrate(tokens, spans), tokens, QUIET)
    model = LayerwiseModel(open_causal_lm(inputs), inputs.architecture)
    cut = next(row for row in result["candidates"] if row["operator"] == "none")
    row = result["candidates"][0]
    least = Candidate(row["operator"], shift=SHIFTS[0])
    for source, windows in enumerate((range(10), range(10, 16))):
        folds = [fold for fold in range(4) if fold % 2 != source]
        fits = {}
        for span in spans:
            ridge = RelativeRidge(relative=solver.fit(least, span, [1, 3]).fit.relative_ridge)
            fits[span] = solver.fit(Candidate(row["operator"], ridge=ridge), span, folds)
        variants = [Variant(), Variant(spans, {s: f.repair for s, f in fits.items()})]
        dense, one = window_scores(model, variants, tokens.tokens[spread(windows, 8)], batch=4)
        assert row["left_out"][source]["kl"] == pytest.approx(float(one.kl.mean()), rel=1e-5)
        assert row["left_out"][source]["perplexity"] == pytest.approx(one.perplexity, rel=1e-5)
        assert row["left_out"][source]["dense"] == pytest.approx(dense.perplexity, rel=1e-5)
    assert [one["source"] for one in cut["left_out"]] == list(inputs.config.calibration.sources)
    for found in result["candidates"]:
        assert found["kl"] == pytest.approx(np.mean([one["kl"] for one in found["left_out"]]))
    [chosen] = [found for found in result["candidates"] if found["chosen"]]
    assert chosen["kl"] == min(found["kl"] for found in result["candidates"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The chosen one on what was left out of its fit" in page


def test_where_sources_part_it_is_said():
    def row(*kl):
        left_out = [{"source": f"s{n}", "kl": value} for n, value in enumerate(kl)]
        return [{"chosen": True, "left_out": left_out}]

    [said] = sources_apart(row(0.1, 0.3, None))
    assert "s1 (KL 0.300) than on s0 (0.100)" in said
    assert not sources_apart(row(0.1, 0.2))
    assert not sources_apart([{"chosen": True}])


def test_one_source_is_warned_of(make_config, tmp_path):
    for _ in range(2):  # once a RUN
        recover(make_config(**BY_KL), QUIET, again="select")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert sum("one source of calibration text" in e.get("message", "") for e in events) == 1


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ({"text": 0.5, "other": 0.6}, ConfigError, r"sum to 1\.1: give some that sum to 1"),
        (
            {"text": 1.5, "other": -0.5},
            ConfigError,
            r"other.txt: got -0.5, expected greater than 0",
        ),
        ({"text": 0.95, "other": 0.05}, ConfigError, r"share of .*other.* is 1 of 16 .*needs 2"),
        ({"text": 0.5, "no.txt": 0.5}, CalibrationError, r"One of calibration\.sources.*no\.txt"),
        (
            {"text": 0.5, "short": 0.5},
            CalibrationError,
            r"One of .*short.txt gives .*smaller share",
        ),
    ],
)
def test_what_cannot_be_mixed_is_named(make_config, text_file, other, sources, error, message):
    short = other.parent / "short.txt"
    short.write_text("Little. " * 20)
    names = {"text": str(text_file), "other": str(other), "short": str(short)}
    shares = {names.get(name, name): share for name, share in sources.items()}
    with pytest.raises(error, match=message):
        recover(make_config(calibration__sources=shares), QUIET)


def test_text_that_lacks_the_tokens_of_the_evaluation_is_told_before_the_work():
    def windows(*ids):
        return TokenWindows(np.array([ids], dtype=np.int32), "a")

    calibration = windows(1, 2, 2, 5)
    evaluation = {"like it": windows(2, 5, 1, 9), "other": windows(1, 7, 8, 8)}
    (said,) = unlike(calibration, evaluation)
    assert said.startswith("75% of the tokens of other are of kinds that never occur")
    assert "Raise calibration.windows, or give text like yours" in said
    assert unlike(windows(1, 7, 8, 9), evaluation)[0].startswith("50% of the tokens of like it")


def test_the_word_about_other_text_stands_before_any_pass(make_config, tmp_path):
    """Text of letters the model has never seen in calibration; said once, not when continued."""
    strange = tmp_path / "strange.txt"
    strange.write_text("ÄÖÜ 漢字かな ß€ " * 200)
    config = make_config(
        evaluation__corpora={"strange": str(strange)},
        evaluation__windows=1,
        evaluation__window_length=64,
    )
    recover(config, QUIET, again="select")
    recover(config, QUIET, again="select")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert sum("never occur" in event.get("message", "") for event in events) == 1


def test_sources_are_the_same_files_from_anywhere(make_config, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    config = make_config(calibration__sources={"a.txt": 0.5, "c4": 0.5})
    assert with_absolute_paths(config).calibration.sources == {
        str(tmp_path / "a.txt"): 0.5,
        "c4": 0.5,
    }
