"""What is damaged of a finished run is found and made again; only what is needed is read."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
from disk_steps import watched
from rich.console import Console
from run_files import flip

from ghost_dist.calibration.windows import load_windows
from ghost_dist.cli import main
from ghost_dist.durable import read_sealed
from ghost_dist.errors import CalibrationError, RunMismatchError
from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder

QUIET = Reporter(console=Console(quiet=True))


@pytest.fixture(scope="module")
def finished(config_at, model_folder, text_file, tmp_path_factory):
    """A run with refinement and evaluation, and texts of its own that it names from their folder;
    a copy of all, and the original's place."""
    root = tmp_path_factory.mktemp("finished")
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copy(text_file, root / name)
    config = config_at(
        root / "run",
        model__path=os.path.relpath(model_folder, root),
        calibration__source="calibration.txt",
        calibration__windows=9,
        calibration__window_length=32,
        operator__folds=3,
        refine__steps=2,
        refine__batch=2,
        refine__every=1,
        refine__learning_rate=0.01,
        evaluation__corpora={"text": "evaluation.txt"},
        evaluation__windows=2,
        evaluation__window_length=32,
    )
    with contextlib.chdir(root):
        recover(config, QUIET)
    return root.rename(root.with_name("copy")), root


@pytest.fixture
def run(finished):
    """The run, and its texts in the folder above it."""
    copy, root = finished
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(copy, root)
    return root / "run"


def continued(run):
    return recover(RunFolder.stored_config(run), QUIET)


def one(run, pattern):
    return next(path for path in sorted(run.glob(pattern)) if path.is_file())


def kept(run):
    """Files that a continued run leaves, or makes again, as they were."""
    paths = [run / "statistics.zarr/ledger/plan.json", *run.glob("operators/**/*.safetensors")]
    files = {str(path.relative_to(run)): path.read_bytes() for path in paths}
    return {**files, "tokens": load_windows(run / "tokens.safetensors").fingerprint}


ARTEFACTS = [
    "tokens.safetensors",
    "statistics.zarr/ledger/plan.json",
    "statistics.zarr/ledger/00001.json",
    "statistics.zarr/ranges/00001/*/0/packed/c/0",
    "operators/3-5.safetensors",
    "operators/refined/3-5.safetensors",
    "stages/tokens.json",
    "stages/select.json",
    "stages/calibrate.json",
    "stages/solve.json",
    "stages/refine.json",
    "stages/evaluate.json",
    "result.json",
]


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()], ids=["flipped", "lost"])
def test_what_is_damaged_is_made_again(run, damage):
    """All at once: each is found by whoever loads it, whatever else is wrong."""
    before, result = kept(run), json.loads((run / "result.json").read_text())
    checkpoint = (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert (run / "operators" / "refined" / "3-5.safetensors").exists()
    for pattern in ARTEFACTS:
        damage(one(run, pattern))
    again = continued(run)
    assert kept(run) == before
    for key in ("spans", "operator", "fit", "refine", "perplexity", "fingerprint"):
        assert again[key] == result[key], key
    # Its operators have come back with the same bits, so there was nothing to export.
    assert (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns == checkpoint
    assert read_sealed(run / "stages" / "refine.json") is not None


def test_a_damaged_refined_operator_is_refined_again(run):
    path, before = run / "operators" / "refined" / "3-5.safetensors", kept(run)
    flip(path)
    continued(run)
    assert kept(run) == before
    assert "3-5.safetensors is not the one that was solved" in (run / "events.jsonl").read_text()


def test_a_checkpoint_that_is_not_whole_is_exported_again(run):
    path = run / "checkpoint" / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-10])
    continued(run)
    assert path.read_bytes() == before


def test_text_that_has_changed_does_not_take_the_place_of_lost_tokens(run):
    (run / "tokens.safetensors").unlink()
    text = run.parent / "calibration.txt"
    text.write_text(text.read_text().upper())
    with pytest.raises(RunMismatchError, match="tokens: "):
        continued(run)


def test_refinement_that_was_taken_back_is_not_in_the_result(run):
    run_stage_again(run, "solve", ["refine.steps=0"], QUIET)
    assert continued(run)["refine"] is None


def test_evaluation_reads_no_statistics(run):
    chunk = one(run, "statistics.zarr/ranges/00001/*/0/packed/c/0")
    flip(chunk)
    (run.parent / "calibration.txt").unlink()
    with watched(run / "statistics.zarr", 1) as watcher:
        run_stage_again(run, "evaluate", ["evaluation.windows=1"], QUIET)
    assert watcher.steps == []
    shutil.rmtree(run / "statistics.zarr")
    result = run_stage_again(run, "evaluate", ["evaluation.windows=2"], QUIET)
    assert set(result["perplexity"]["text"]) == {"dense", "pruned", "recovered"}
    assert not (run / "statistics.zarr").exists()


@pytest.mark.parametrize("stage", ["select", "calibrate", "solve"])
def test_stages_before_the_evaluation_open_none_of_its_texts(run, stage):
    (run.parent / "evaluation.txt").unlink()
    assert run_stage_again(run, stage, [], QUIET)
    with pytest.raises(CalibrationError, match=r"evaluation\.txt"):
        run_stage_again(run, "evaluate", [], QUIET)


def test_a_run_that_names_files_from_its_folder_is_continued_from_another(run, forked):
    (run / "events.jsonl").unlink()
    again = [forked.program, "-m", "ghost_dist", "evaluate", run, "--set", "evaluation.windows=1"]
    done = subprocess.run(again, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "calibration text" not in (run / "events.jsonl").read_text()


def test_verify_writes_nothing(run, capsys):
    with watched(run, 1) as watcher, pytest.raises(SystemExit) as stopped:
        main(["verify", str(run)])
    assert (watcher.steps, stopped.value.code or 0) == ([], 0)
    assert "3 of 3 ranges are sound" in capsys.readouterr().out
