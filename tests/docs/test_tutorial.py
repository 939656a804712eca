"""The commands of docs/tutorial.md, run as they stand in a checkout of their own.

Only what the install would do is already there: a virtual environment whose programs are those of
the tests. launch/environment.sh finds it up to date and goes on. The demo has an eighth of its
tokens: all of them take two cores for minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from markdown_blocks import ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorial.md"
PROGRAM = """
from ghost_dist import cli, demo
demo._PICO_WINDOWS = (16, 256, 4)
cli.main()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, forked):
    """A checkout with an environment that is installed."""
    folder = tmp_path_factory.mktemp("tutorial") / "ghost_dist"
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "ghost_dist").symlink_to(ROOT / "ghost_dist")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "program.py").write_text(PROGRAM)
    for name, command in {
        "python": f'exec {sys.executable} "$@"',
        "ghost-dist": f'exec {forked.program} {programs / "program.py"} "$@"',
        "activate": f'export PATH="{programs}:$PATH" PYTHONPATH="{folder}"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    stamp = 'echo "$(cksum <pyproject.toml) $PWD" >.venv/.ghost-dist-installed'
    subprocess.run(["bash", "-c", stamp], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def printed(checkout):
    """What the tutorial's commands print."""
    script = ["set -euo pipefail"]
    for block in blocks(TUTORIAL, "bash", "python"):
        if title := re.search(r'title="(.*?)"', block.rest):
            (checkout / title[1]).write_text(block.text)
        elif not block.text.startswith("# needs "):
            script.append(block.text)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(checkout / "modules"),
        "COLUMNS": "120",
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing" not in done.stdout
    return done.stdout


pytestmark = [pytest.mark.model, pytest.mark.timeout(1500)]


def test_demo_closes_part_of_the_gap(checkout, printed):
    assert "python-stdlib" in printed
    assert "gap closed" in printed
    result = json.loads((checkout / "RUN" / "result.json").read_text())
    value = result["perplexity"]["python-stdlib"]
    assert sum(stop - start for start, stop in result["spans"]) == 5  # a quarter of 20
    assert value["dense"] < value["recovered"] < value["pruned"]
    assert (value["pruned"] - value["recovered"]) / (value["pruned"] - value["dense"]) > 0.3


def test_what_the_page_says_is_printed(checkout, printed):
    page = TUTORIAL.read_text(encoding="utf-8")
    said = "4 of 4 ranges are sound."
    assert said in page
    assert said in printed
    result = json.loads((checkout / "RUN" / "result.json").read_text())
    spans = ", ".join(f"[{start}, {stop})" for start, stop in result["spans"])
    assert f"{result['parameters']['before']:,} -> " in page
    assert printed.count(f"removed layers {spans}") >= 2  # demo, again
    assert printed.count("removed layers [5, 10)") >= 1  # own choice
    assert (checkout / "RUN" / "report.html").exists()


def test_stages_have_their_names_on_the_terminal(checkout, printed):
    lines = (checkout / "RUN" / "events.jsonl").read_text().splitlines()
    begun = {event["stage"] for event in map(json.loads, lines) if event["event"] == "stage-start"}
    said = set(re.findall(r"`\d/6 ([a-z ]+)`", TUTORIAL.read_text(encoding="utf-8")))
    # So few tokens are not enough for a refit.
    assert begun <= said <= begun | {"refit", "compare refit"}


def test_the_second_time_nothing_is_computed(checkout, printed):
    lines = (checkout / "RUN" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    _, first, second = "".join(f"{event} " for event in events).split("run-start ")
    assert "stage-start" in first
    # A wait is for what opens the model and the texts.
    assert [event for event in second.split() if event != "waited"] == ["run-end"]


def test_a_text_is_generated(printed):
    assert re.search(r"^def main", printed, re.MULTILINE)


def test_own_choice(checkout, printed):
    result = json.loads((checkout / "RUN2" / "result.json").read_text())
    assert (result["operator"], result["spans"]) == ("ghost", [[5, 10]])
    comparison = (checkout / "comparison.html").read_text()
    assert "RUN2" in comparison
