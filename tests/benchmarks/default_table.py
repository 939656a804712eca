"""The default against the paper's settings and plain cuts, every cell a ``recover`` of its own.

    python tests/benchmarks/default_table.py smollm2:4,7,10,12 gemma3-270m:2,4,6,7 FOLDER:8,11 \
        --calibration natural.txt --text wikitext2=wikitext2-test.txt --text ptb=ptb-test.txt \
        --out OUT --gpus 2 --at-once 4

A model is a checkpoint folder or a name of ghost_dist.real_models, with the numbers of layers to
remove. Rows go into OUT/table.md as runs end, so a stopped table keeps what it has; the same
command continues. ``unrepaired`` is a search of plain cuts (EvoPress-style). Intervals: 95 % of
resampled windows; in OUT/ratios.md those of each perplexity over the default's, windows drawn
alike. More than four runs at once on a GPU hardly gain. Without a GPU: --gpus 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np

from ghost_dist.evaluation.bootstrap import interval
from ghost_dist.real_models import REAL_MODELS, real_model
from ghost_dist.report.record import RunRecord

PAPER = (
    *("--operator", "ghost", "--set", "selection.criterion=paper"),
    *("--set", "operator.ridge={absolute: 1e-6}", "--set", "operator.choose=residual"),
    *("--set", "operator.features=stream"),
)
SETTINGS = {"default": (), "paper": PAPER, "unrepaired": ("--operator", "none")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL:LAYERS,LAYERS")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4, help="runs of a GPU")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    places: SimpleQueue[str] = SimpleQueue()
    number = max(1, given.gpus) * given.at_once
    for place in range(number):
        places.put(str(place % given.gpus) if given.gpus else "")
    table, lock = given.out / "table.md", Lock()

    def cell(job: tuple[str, str, str]) -> None:
        gpu = places.get()
        began = time.monotonic()
        try:
            row = measured(*job, gpu, given)
        finally:
            places.put(gpu)
        with lock, table.open("a") as file:
            print(row, f"{time.monotonic() - began:.0f} s |", file=file, flush=True)
            print(row, flush=True)

    jobs = []
    for text in given.models:
        model, _, removes = text.rpartition(":")
        jobs += [(model, n, name) for n in removes.split(",") for name in given.settings]
    with ThreadPoolExecutor(number) as threads:
        list(threads.map(cell, jobs))
    ratios = "".join(of_default(*job, given) for job in jobs if job[2] != "default")
    (given.out / "ratios.md").write_text(ratios)
    print(ratios, end="")


def folders(model: str, remove: str, name: str, out: Path) -> tuple[Path, Path]:
    """Of the model, and of a run."""
    folder = real_model(model) if model in REAL_MODELS else Path(model)
    return folder, out / f"{folder.name}-{remove}-{name}"


def of_default(model: str, remove: str, name: str, given: argparse.Namespace) -> str:
    """A row of ratios, where both runs have ended."""
    folder, run = folders(model, remove, name, given.out)
    _, default = folders(model, remove, "default", given.out)
    if not all((one / "result.json").exists() for one in (run, default)):
        return ""
    mine, reference = RunRecord(run), RunRecord(default)
    cells = []
    for corpus, variants in mine.perplexity.items():
        ratio = variants["recovered"] / reference.perplexity[corpus]["recovered"]
        drawn = (one.resampled[corpus]["recovered"] for one in (mine, reference))
        between = interval(np.divide(*drawn))
        cells.append(f"{ratio:.3f} {shown(between, 3)}")
    return f"| {folder.name} | {remove} | {name} | {' / '.join(cells)} |\n"


def shown(between: tuple[float, float] | None, digits: int) -> str:
    return "" if between is None else f"({between[0]:.{digits}f} to {between[1]:.{digits}f})"


def measured(model: str, remove: str, name: str, gpu: str, given: argparse.Namespace) -> str:
    """A row of the table; of a run that fails the end of what it said."""
    folder, run = folders(model, remove, name, given.out)
    corpora = ", ".join(text.replace("=", ": ", 1) for text in given.text)
    fields = {
        "model.dtype": "float32",
        "calibration.source": given.calibration,
        "calibration.windows": given.windows,
        "calibration.window_length": 1024,
        "evaluation.corpora": f"{{{corpora}}}",
        "evaluation.windows": 32,
        "evaluation.window_length": 1024,
    }
    sets = [f"{field}={value}" for field, value in fields.items()] + given.set
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ghost_dist", "recover", str(folder)),
            *("--remove", remove, "--out", str(run), *SETTINGS[name]),
            *(part for one in sets for part in ("--set", one)),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
        capture_output=True,
        text=True,
        check=False,
    )
    title = f"| {folder.name} | {remove} | {name} |"
    if done.returncode:
        return f"{title} failed: {done.stderr.strip()[-300:]} |"
    result, record = json.loads((run / "result.json").read_text()), RunRecord(run)
    values = " / ".join(
        f"{of['recovered']:.2f} {shown(record.intervals[corpus]['recovered'], 2)}"
        for corpus, of in result["perplexity"].items()
    )
    spans = ", ".join(f"[{start}, {stop})" for start, stop in result["spans"])
    return f"{title} {values} | {spans} | {result['operator']} |"


if __name__ == "__main__":
    main()
