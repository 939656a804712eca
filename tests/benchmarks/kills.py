"""What a SIGKILL costs: a run killed at a random moment and continued, against one undisturbed.

    python tests/benchmarks/kills.py MODEL FOLDER [--kills 6] [--remove 7] [--set field=value ...]

Each run is a fresh process of `ghost-dist recover` on a RUN of its own in FOLDER. A kill may cost a
tenth of the time that the run has had so far, and 30 s, in which a process starts and loads.
Printed: in which stage and when it was killed, what the second process took, the cost over an
undisturbed run (median of one before, one in the middle and one behind), and whether the operators
are those of that run, byte for byte.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--remove", default="7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    draw, rows, alone = random.Random(given.seed), [], []

    def start(name):
        command = [sys.executable, "-m", "ghost_dist", "recover", given.model]
        command += ["--remove", given.remove, "--out", str(given.folder / name)]
        command += [part for one in given.set for part in ("--set", one)]
        with (given.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log), time.monotonic()

    def finished(name):
        process, began = start(name)
        if process.wait():
            sys.exit((given.folder / f"{name}.log").read_text()[-3000:])
        return time.monotonic() - began

    def undisturbed():
        alone.append(finished(f"alone{len(alone)}"))
        print(f"undisturbed: {alone[-1]:.1f} s", flush=True)

    undisturbed()
    for number in range(given.kills):
        if number == given.kills // 2:
            undisturbed()
        name = f"killed{number}"
        process, began = start(name)
        # Spread over the run, at a random moment of each part of it.
        time.sleep(alone[0] * (number + draw.random()) / given.kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        ran, where = time.monotonic() - began, stage_of(given.folder / name)
        rows.append((name, where, ran, finished(name)))
        print(f"{name}: killed in {where} after {ran:.1f} s, then {rows[-1][3]:.1f} s", flush=True)
    undisturbed()
    typical, expected = statistics.median(alone), operators(given.folder / "alone0")
    columns = ("killed in", "after, s", "then, s", "cost, s", "allowed, s", "operators")
    print(*(f"| {column} " for column in columns), "|", sep="")
    print("|---" * len(columns) + "|")
    for name, where, ran, then in rows:
        seconds = (ran, then, ran + then - typical, ran / 10 + 30)
        same = "equal" if operators(given.folder / name) == expected else "DIFFERENT"
        print("|", where, *(f"| {second:.1f}" for second in seconds), "|", same, "|")


def stage_of(run):
    """The stage that a run was in, by its last event."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return "start"
    begun = [e["stage"] for e in map(json.loads, lines) if e["event"] == "stage-start"]
    return begun[-1] if begun else "start"


def operators(run):
    return {file.name: file.read_bytes() for file in (run / "operators").glob("*.safetensors")}


if __name__ == "__main__":
    main()
