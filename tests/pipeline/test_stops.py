"""A kill or a full disk at any step of a command: the same command goes on, with the same bits."""

import shutil

import pytest
from disk_steps import stop_at_every_kind
from rich.console import Console

from ghost_dist.pipeline import exporting, solving
from ghost_dist.pipeline.evaluating import Evaluation
from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import read_record

QUIET = Reporter(console=Console(quiet=True))


def operators(run):
    files = (run / "operators").rglob("*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


@pytest.fixture
def small(make_config):
    """A run with a selection, in a second."""

    def make(run, **overrides):
        return make_config(
            calibration__windows=4,
            calibration__window_length=32,
            selection__spans=None,
            selection__remove=2,
            selection__criterion="paper",
            operator__folds=2,
            output__path=str(run),
            **overrides,
        )

    return make


@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_a_new_run_goes_on_from_every_step(small, tmp_path, full):
    calm, run = tmp_path / "calm", tmp_path / "run"
    recover(small(calm), QUIET, again="solve")
    known = stop_at_every_kind(run, lambda: recover(small(run), QUIET, again="solve"), full=full)
    assert len(known) > (30 if full else 60)
    assert operators(run) == operators(calm)
    left = [path for path in run.rglob("*") if "partial" in path.name]
    assert left == []


@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_a_stage_done_again_goes_on_from_every_step(small, tmp_path, full):
    calm, run = tmp_path / "calm", tmp_path / "run"
    recover(small(calm), QUIET, again="solve")
    shutil.copytree(calm, run)

    def other_statistics(path):
        run_stage_again(path, "calibrate", ["operator.name=ghost-joint"], QUIET)

    other_statistics(calm)
    run_stage_again(calm, "solve", [], QUIET)
    assert len(stop_at_every_kind(run, lambda: other_statistics(run), full=full)) > 15
    run_stage_again(run, "solve", [], QUIET)
    assert operators(run) == operators(calm)


def test_a_stopped_solve_goes_on_at_its_comparison(make_config, tmp_path, monkeypatch, capsys):
    """The same operators as without the stop, bit by bit, and no comparison made twice."""
    settings = {"operator__choose": "kl", "operator__name": "auto"}
    calm = make_config(**settings, output__path=str(tmp_path / "calm"))
    recover(calm, QUIET, again="solve")
    scores, made = solving.window_scores, []

    def stopped_at_the_third(*arguments, **named):
        if len(made) == 2:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(1)
        return scores(*arguments, **named)

    monkeypatch.setattr(solving, "window_scores", stopped_at_the_third)
    config = make_config(**settings)
    with pytest.raises(KeyboardInterrupt):
        recover(config, QUIET, again="solve")
    made.clear()
    monkeypatch.setattr(solving, "window_scores", lambda *a, **k: made.append(1) or scores(*a, **k))
    recover(config, again="solve")
    sums = f"sums of {config.folds} of {config.folds} ranges"
    taken = f"taken from RUN: calibration text, {sums}, comparisons of candidates: 2\n"
    told = capsys.readouterr().err
    assert taken in told
    assert "compare 3/4: " in told
    assert "compare ridges 1/4: " in told
    assert len(made) == 2 * config.folds - 2  # candidates, and the ridges around the best
    assert operators(tmp_path / "calm") == operators(tmp_path / "run") != {}
    rows = [read_record(tmp_path / n, "solve")["outputs"]["candidates"] for n in ("calm", "run")]
    assert rows[0] == rows[1]
    assert not read_record(tmp_path / "run", "solve-scores")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_stop_in_the_evaluation_keeps_a_checkpoint_that_was_loaded(
    make_config, text_file, tmp_path, monkeypatch, loaded
):
    """The evaluation goes on beside the process that checks the export."""
    corpora = {"evaluation__corpora": {"a": str(text_file)}, "evaluation__window_length": 64}
    config, begun = make_config(**corpora), []
    original = exporting.Export.__enter__

    def enter(self):
        begun.append(original(self).process.process)
        return self

    def stopped(_):
        if loaded:
            assert begun[0].wait(120) == 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(exporting.Export, "__enter__", enter)
        patched.setattr(Evaluation, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            recover(config)
    run = tmp_path / "run"
    assert (run / "checkpoint").exists() == loaded
    assert not (run / "checkpoint.unverified").exists()
    assert bool(read_record(run, "export")) == loaded
    before = (run / "events.jsonl").read_text().count('"stage": "export"')
    assert recover(config)["perplexity"]
    again = (run / "events.jsonl").read_text().count('"stage": "export"') - before
    assert (again == 0) == loaded
