"""Seconds of every stage of `ghost-dist recover`, from the shell, for one or several source trees.

    python tests/benchmarks/whole_run.py FOLDER [--tree NAME=FOLDER ...]
        [--settings default paper] [--shape 8b|tiny] [--remove 7] [--gpus 1]
        [--threads N] [--set section.field=value ...]
    python tests/benchmarks/whole_run.py FOLDER --shape 70b --fp8 --layers 48 --gpus 2 \
        --gpus-each 2 --settings paper --remove 8 --set engine.tensor_parallel=2
    python tests/benchmarks/whole_run.py FOLDER --shape 405b --fp8 --layers 12 --remove 2 \
        --settings paper --set engine.kind=streaming
    python tests/benchmarks/whole_run.py FOLDER --shape 405b --fp8 --distinct 2 --remove 8 \
        --settings paper --set engine.kind=streaming --until solve

With --distinct layers share their bytes on the disk (FOLDER is on btrfs or xfs); --until does not
export: `recover`, which stops where the checkpoint has no room, and the command of that stage.

FOLDER takes a checkpoint of random weights (8b: 16 GB, made if absent) and the RUN folders, which
are removed again. Each run is a fresh process with PYTHONPATH=FOLDER of its tree. With several GPUs
as many runs go at the same time, each on its own, in the order settings by trees: of two trees the
same settings begin together. Text: sources of the standard library, for calibration and evaluation.

Printed: seconds of the whole command, of every stage, and of what is shown inside stages; GPU idle
share as the run itself says it, and as nvidia-smi samples it, over the whole and from the first
pass of the model to the last fit (its samples are of 0.1 to 1 s: short gaps count as busy).
"""

import argparse
import itertools
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from random_checkpoint import write_random_checkpoint

from ghost_dist.assets.stdlib_text import CALIBRATION_MODULES, EVALUATION_MODULES, stdlib_text

SETTINGS = {
    "default": [],
    "paper": [
        *("--operator", "ghost", "--set", "selection.criterion=paper"),
        *("--set", "operator.ridge={absolute: 1e-6}", "--set", "operator.choose=residual"),
        *("--set", "operator.features=stream"),
    ],
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
SHAPES = {
    "8b": {},
    "tiny": TINY,
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}
WINDOWS = {"8b": (32, 2048), "tiny": (8, 128), "70b": (32, 2048), "405b": (32, 2048)}
STAGES = ("tokens", "select", "calibrate", "solve", "export", "evaluate")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tree", action="append", metavar="NAME=FOLDER")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "paper"])
    parser.add_argument("--shape", choices=WINDOWS, default="8b")
    parser.add_argument("--layers", type=int, help="where the disk is too small for all")
    parser.add_argument("--distinct", type=int, help="layers that are not copies of others")
    parser.add_argument("--until", choices=["calibrate", "solve"], help="no export")
    parser.add_argument("--fp8", action="store_true", help="block-scaled, half the bytes")
    parser.add_argument("--gpus-each", type=int, default=1, help="GPUs of one run")
    parser.add_argument("--remove", type=int, default=7)
    parser.add_argument("--gpus", type=int, default=min(1, torch.cuda.device_count()))
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of each run")
    parser.add_argument("--set", action="append", default=[], help="for all runs")
    given = parser.parse_args()
    trees = dict(tree.split("=", 1) for tree in given.tree or [f"this={Path(__file__).parents[2]}"])
    sizes = SHAPES[given.shape] | ({"num_hidden_layers": given.layers} if given.layers else {})
    began = time.monotonic()
    model = write_random_checkpoint(
        given.folder / f"random-{given.shape}-{given.layers or 'all'}{'-fp8' * given.fp8}",
        device="cuda:0" if given.gpus else "cpu",
        fp8=given.fp8,
        distinct=given.distinct,
        **sizes,
    )
    if given.gpus:
        torch.cuda.empty_cache()
    print(f"checkpoint: {time.monotonic() - began:.0f} s", flush=True)
    for name, modules in (("calibration", CALIBRATION_MODULES), ("evaluation", EVALUATION_MODULES)):
        (given.folder / f"{name}.txt").write_text(stdlib_text(modules))
    free, rows = queue.SimpleQueue(), {}
    for first in range(0, given.gpus, given.gpus_each):
        free.put(",".join(map(str, range(first, first + given.gpus_each))))
    if not given.gpus:
        free.put(None)
    threads = []
    for settings, tree in itertools.product(given.settings, trees):
        gpu = free.get()  # waits for a run to end

        def work(settings=settings, tree=tree, gpu=gpu):
            try:
                rows[tree, settings] = one_run(given, model, tree, trees[tree], settings, gpu)
            finally:
                free.put(gpu)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print_table(given, trees, rows)
    if len(rows) < len(threads):
        raise SystemExit("a run failed")


def one_run(given, model, name, tree, settings, gpu):
    """Seconds by stage of one run in a fresh process."""
    windows, length = WINDOWS[given.shape]
    out = given.folder / f"run-{name}-{settings}"
    shutil.rmtree(out, ignore_errors=True)
    search_path = os.pathsep.join([str(Path(tree).absolute()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search_path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    environment["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else str(gpu)
    if given.threads:
        environment["OMP_NUM_THREADS"] = str(given.threads)
    fields = {
        "calibration.source": given.folder.absolute() / "calibration.txt",
        "calibration.windows": windows,
        "calibration.window_length": length,
        "evaluation.corpora": f"{{text: {given.folder.absolute() / 'evaluation.txt'}}}",
        "evaluation.windows": windows // 4,
        "evaluation.window_length": length,
    }
    command = [sys.executable, "-m", "ghost_dist", "recover", str(model.absolute())]
    command += ["--remove", str(given.remove), "--out", str(out.absolute()), *SETTINGS[settings]]
    for field in (*(f"{key}={value}" for key, value in fields.items()), *given.set):
        command += ["--set", field]
    samples = given.folder / f"gpu-{name}-{settings}.txt"
    sampler = sample_gpu(gpu, samples)
    began, wall = time.monotonic(), time.time()
    # Elsewhere than in a tree, which would be imported from instead.
    how = {"env": environment, "cwd": given.folder, "capture_output": True, "text": True}
    done = subprocess.run(command, **how, check=False)
    if given.until and "Not enough disk space" in done.stderr:
        command = [sys.executable, "-m", "ghost_dist", given.until, str(out.absolute())]
        done = subprocess.run(command, **how, check=False)
    seconds = {"whole": time.monotonic() - began}
    busy = [] if sampler is None else busy_samples(sampler, samples)
    if done.returncode:
        raise RuntimeError(f"{name}, {settings}: exit {done.returncode}\n{done.stderr[-4000:]}")
    records = {file.stem: json.loads(file.read_bytes()) for file in (out / "stages").glob("*.json")}
    records = {stage: records[stage]["outputs"] for stage in STAGES if stage in records}
    result = {} if given.until else json.loads((out / "result.json").read_bytes())
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    seconds |= {stage: record["seconds"] for stage, record in records.items()}
    seconds["outside stages"] = seconds["whole"] - sum(seconds[stage] for stage in records)
    seconds["- start, imports"] = events[0]["time"] - wall
    seconds["- report, end"] = wall + seconds["whole"] - events[-1]["time"]
    shown = defaultdict(float)
    for event in events:
        if event["event"] == "stage-end":
            shown[f"- {event['stage']}"] += event["seconds"]
    seconds |= shown
    idle = {s: record["gpu_idle"] for s, record in records.items() if "gpu_idle" in record}
    idle |= result.get("gpu_idle") or {}
    seconds |= {f"GPU idle, {stage}": f"{share:.0%}" for stage, share in idle.items()}
    passes = [e["time"] for e in events if e.get("stage") in ("select", "calibrate")]
    fits = [e["time"] for e in events if (e["event"], e.get("stage")) == ("stage-end", "solve")]
    for what, first, last in (
        ("GPU idle by nvidia-smi", wall, wall + seconds["whole"]),
        ("the same, first pass to last fit", min(passes, default=0), max(fits, default=0)),
    ):
        within = [share for at, share in busy if first <= at <= last]
        if within:
            seconds[what] = f"{1 - sum(within) / len(within) / 100:.0%}"
    for corpus, found in (result.get("perplexity") or {}).items():
        seconds[f"perplexity, {corpus}"] = " / ".join(f"{value:.4g}" for value in found.values())
    seconds["removed"] = str(records["select"]["spans"])
    for what in ("device", "host"):
        most = max(record[f"peak_{what}_bytes"] for record in records.values())
        seconds[f"most memory, {what}, GB"] = most / 1e9
    shutil.rmtree(out)
    print(f"{name}, {settings}: {seconds['whole']:.1f} s", flush=True)
    return seconds


def sample_gpu(gpu, path):
    """A process that writes when, and how many per cent of the time, kernels ran on a GPU."""
    if gpu is None or not shutil.which("nvidia-smi"):
        return None
    query = ["--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits"]
    with path.open("w") as file:
        return subprocess.Popen(["nvidia-smi", *query, "-i", str(gpu), "-lms", "100"], stdout=file)


def busy_samples(sampler, path):
    """(seconds since 1970, per cent busy) of every sample."""
    sampler.terminate()
    sampler.wait()
    samples = []
    for line in path.read_text().splitlines():
        at, _, share = line.partition(", ")
        if share.strip().isdigit():
            whole, _, part = at.partition(".")
            at = time.mktime(time.strptime(whole, "%Y/%m/%d %H:%M:%S")) + float(f"0.{part or 0}")
            samples.append((at, int(share)))
    return samples


def print_table(given, trees, rows):
    """One column for each run."""
    device = torch.cuda.get_device_name() if given.gpus else f"{platform.machine()} CPU"
    windows, length = WINDOWS[given.shape]
    layers = f" with {given.layers} layers" if given.layers else ""
    print(
        f"\n{device}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{given.shape}{layers}, {windows} x {length} tokens, {given.remove} layers removed; "
        "seconds\n"
    )
    columns = [(t, s) for s in given.settings for t in trees if (t, s) in rows]
    print("| | " + " | ".join(f"{tree}, {settings}" for tree, settings in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for label in dict.fromkeys(label for column in columns for label in rows[column]):
        cells = [rows[column].get(label, "") for column in columns]
        cells = [f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells]
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
