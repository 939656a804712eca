"""The demo's RUN is one like others: each process continues it, or does a stage again."""

import importlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from ghost_dist import cli
from ghost_dist.assets.stdlib_text import (
    CALIBRATION_TOPICS,
    DOCSTRING_MODULES,
    EVALUATION_TOPICS,
    docstring_text,
    reference_text,
)
from ghost_dist.demo import run_demo
from ghost_dist.real_models import REAL_MODELS

PROGRAM = """
from pathlib import Path
from ghost_dist.demo import run_demo
from ghost_dist.demo import run_demo
from ghost_dist.real_models import REAL_MODELS
REAL_MODELS["tiny"] = REAL_MODELS["smollm2"]
run_demo(Path("RUN"), "tiny")
"""


@pytest.fixture
def tiny(model_folder, tmp_path, monkeypatch):
    """The tiny Llama in the cache, as a model of the demo's, and a folder to run in."""
    shutil.copytree(model_folder, tmp_path / "cache" / "tiny")
    monkeypatch.setenv("GHOST_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(REAL_MODELS, "tiny", REAL_MODELS["smollm2"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def stages(run):
    """Names of the stages that each process began."""
    began = []
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "run-start":
            began.append([])
        elif event["event"] == "stage-start":
            began[-1].append(event["stage"])
    return began


def kill_after(stage, run):
    """Start a demo in RUN and kill it once that stage is done."""
    record = run / "stages" / f"{stage}.json"
    with (run.parent / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=log, stderr=log)
        try:
            while process.poll() is None and not record.exists():
                time.sleep(0.01)
        finally:
            process.kill()
    assert process.wait() == -signal.SIGKILL, (run.parent / "log.txt").read_text()


def test_a_killed_demo_is_continued(tiny, forked, tmp_path, capsys):
    run = tmp_path / "RUN"
    kill_after("select", run)
    texts = {path.name: path.stat().st_mtime_ns for path in (run / "texts").iterdir()}
    assert set(texts) == {"calibration.txt", "python-reference.txt", "docstrings.txt"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    solve = [forked.program, "-m", "ghost_dist", "solve", run]
    done = subprocess.run(solve, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_demo(Path("RUN"), "tiny")
    assert "gap closed" in capsys.readouterr().out
    assert "one source" not in (run / "events.jsonl").read_text()  # its texts are given
    _, solve, demo = stages(run)
    assert "select" not in solve
    assert "calibrate" in solve
    assert {"select", "calibrate", "solve"}.isdisjoint(demo)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "texts").iterdir()} == texts


def test_models_of_the_command():
    choices = get_args(get_type_hints(cli.demo)["model"])
    assert choices == ("pico", *REAL_MODELS)


def test_english_texts_are_disjoint_and_long_enough():
    calibration, evaluation = map(reference_text, (CALIBRATION_TOPICS, EVALUATION_TOPICS))
    docstrings = docstring_text(DOCSTRING_MODULES)
    assert len(calibration) > 5 * 36 * 256  # a token has four to five characters
    assert min(len(evaluation), len(docstrings)) > 5 * 8 * 256
    lines = [
        {line.strip() for line in text.splitlines() if len(line.strip()) > 40}
        for text in (calibration, evaluation, docstrings)
    ]
    assert not lines[0] & (lines[1] | lines[2])


@pytest.mark.parametrize("name", DOCSTRING_MODULES)
def test_docstrings_are_those_of_the_module(name):
    module = importlib.import_module(name)
    assert docstring_text([name]).startswith(inspect.cleandoc(module.__doc__))
