"""A kill or a full disk at any step of a command: the same command goes on, with the same bits."""

import shutil

import pytest
from disk_steps import stop_at_every_kind
from rich.console import Console

from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.progress import Reporter

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
            selection__criterion="cosine",
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
        run_stage_again(path, "calibrate", ["operator.name=linear-patch"], QUIET)

    other_statistics(calm)
    run_stage_again(calm, "solve", [], QUIET)
    assert len(stop_at_every_kind(run, lambda: other_statistics(run), full=full)) > 15
    run_stage_again(run, "solve", [], QUIET)
    assert operators(run) == operators(calm)
