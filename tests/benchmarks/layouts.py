"""Layouts of one machine side by side: replicas x tensor-parallel ranks, and what faults cost them.

    python tests/benchmarks/layouts.py FOLDER --layouts 1x8 2x4 4x2 8x1 [--all-reduce] [--faults 2]
        [--shape 8b|70b|small] [--layers N] [--fp8] [--set section.field=value ...]

A layout 1d8 is one replica of eight ranks that read layer by layer, each read once for all of them.
FOLDER takes a checkpoint of random weights (made if absent) and the RUN folders, which are removed
again. Every run is a fresh process of `ghost-dist recover` with two spans given, stopped by SIGTERM
once its operators are there. The first layout's operators are what the others are compared with.
On CPUs start Ray before, with as many as there are ranks, whatever the machine has:

    bash launch/local_cluster.sh start --nodes 1 --cpus 8 && source /tmp/ghost-dist-ray-$UID/env
    python tests/benchmarks/layouts.py FOLDER --shape small --set cluster.address=auto ...

Printed: seconds from the shell to the operators, of start and loading; tokens a second from the
first lease to the last commit, and of that time, times the replicas, the shares of forward and sums
(measured by the ranks in every range; the rest is writing that the next range does not hide,
leases, waiting for the last range); most bytes of weights of a rank; how many ranks fitted; the
relative difference of the operators (Frobenius norm). --all-reduce: each layout of several replicas
again, its sums all-reduced. --faults N: the last layout again, N times each with a rank killed, a
rank stopped, and the driver killed and run again, while ranges run; the operators must be those of
the undisturbed run, byte for byte.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from random_checkpoint import write_random_checkpoint
from safetensors.torch import load_file

from ghost_dist.assets.stdlib_text import CALIBRATION_MODULES, stdlib_text

HEADS_OF_8 = {"num_key_value_heads": 8}
SHAPES = {
    "small": HEADS_OF_8
    | {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 4096,
    },
    "8b": {},
    "70b": HEADS_OF_8
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
CHARACTERS_PER_TOKEN = 8  # at most, of all windows together
COLUMNS = ("whole s", "start s", "load s", "tokens/s", "forward", "sums", "weights GB", "ranks")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layouts", nargs="+", default=["1x8", "2x4", "4x2", "8x1"])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="where the disk is too small for all")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ranges", type=int, default=16)
    parser.add_argument("--all-reduce", action="store_true")
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    sizes = SHAPES[given.shape] | ({"num_hidden_layers": given.layers} if given.layers else {})
    cuda = torch.cuda.is_available()
    given.model = write_random_checkpoint(
        given.folder / f"random-{given.shape}-{given.layers or 'all'}{'-fp8' * given.fp8}",
        dtype=torch.bfloat16 if cuda else torch.float32,
        device="cuda:0" if cuda else "cpu",
        fp8=given.fp8,
        **sizes,
    )
    torch.cuda.empty_cache()
    text = stdlib_text(CALIBRATION_MODULES)
    times = given.windows * given.length * CHARACTERS_PER_TOKEN // len(text) + 1
    (given.folder / "text.txt").write_text(text * times)
    given.last = json.loads((given.model / "config.json").read_bytes())["num_hidden_layers"]
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    print(
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{given.shape}, {given.last} layers, {given.windows} x {given.length} tokens in "
        f"{given.ranges} ranges\n\n| replicas x ranks | {' | '.join(COLUMNS)} | differs by |\n"
        f"|{'---|' * (len(COLUMNS) + 2)}",
        flush=True,
    )
    first = undisturbed = None
    for layout in given.layouts:
        for reduction in ("ordered", *["all-reduce"] * (given.all_reduce and layout[0] != "1")):
            run = Run(given, layout, reduction)
            run.start()
            run.until_operators()
            found = run.operators()
            first = first or found
            undisturbed = found if reduction == "ordered" else undisturbed
            name = layout + (", all-reduce" if reduction == "all-reduce" else "")
            print(f"| {name} | {' | '.join(run.row())} | {worst(found, first):.1e} |", flush=True)
            shutil.rmtree(run.out)
    if given.faults:
        faults(given, undisturbed)


def faults(given, expected):
    print("\n| fault | in | whole s | lost | operators |\n|---|---|---|---|---|", flush=True)
    for fault in ("rank killed", "rank stopped", "driver killed") * given.faults:
        run = Run(given, given.layouts[-1])
        run.start()
        while not run.events("range-ran"):
            run.alive()
        if fault == "driver killed":
            run.process.kill()
            run.process.wait()
            before = run.began
            run.start()
            run.began = before
        else:
            how = signal.SIGKILL if fault == "rank killed" else signal.SIGSTOP
            os.kill(run.events("replica-ready")[-1]["pids"][-1], how)
        done = len(run.events("range-committed"))
        run.until_operators()
        lost = len(run.events("replica-lost"))
        same = all(torch.equal(run.operators()[name], expected[name]) for name in expected)
        print(
            f"| {fault} | range {done} | {run.seconds:.1f} | {lost} | "
            f"{'equal' if same else 'DIFFERENT'} |",
            flush=True,
        )
        shutil.rmtree(run.out)


class Run:
    """One `ghost-dist recover` in a RUN folder of its own."""

    def __init__(self, given, layout, reduction="ordered"):
        kind, degree = "tensor_parallel", "tensor_parallel"
        if "d" in layout:
            kind, degree = "streaming", "data_parallel"
        replicas, ranks = layout.replace("d", "x").split("x")
        self.given, self.out = given, given.folder / f"run-{layout}-{reduction}"
        shutil.rmtree(self.out, ignore_errors=True)
        middle = given.last // 2
        fields = {
            "calibration.source": given.folder.absolute() / "text.txt",
            "calibration.windows": given.windows,
            "calibration.window_length": given.length,
            "calibration.ranges": given.ranges,
            "cluster.address": "local",
            "engine.kind": kind,
            "engine.replicas": replicas,
            f"engine.{degree}": ranks,
            "engine.reduction": reduction,
            "operator.ridge": "{relative: 0.001}",
            "operator.choose": "residual",
            "operator.features": "stream",
            "operator.refit": "parallel",
        }
        self.command = [sys.executable, "-m", "ghost_dist", "recover", str(given.model.absolute())]
        spans = f"{middle - 2}:{middle},{given.last - 2}:{given.last - 1}"
        self.command += ["--spans", spans, "--operator", "ghost", "--out", str(self.out.absolute())]
        for field in (*(f"{key}={value}" for key, value in fields.items()), *given.set):
            self.command += ["--set", field]

    def start(self):
        self.began = time.monotonic()
        with (self.given.folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def alive(self):
        time.sleep(0.05)
        if self.process.poll() is not None:
            sys.exit((self.given.folder / "log.txt").read_text()[-4000:])

    def until_operators(self):
        while not (self.out / "stages" / "solve.json").exists():
            self.alive()
        self.seconds = time.monotonic() - self.began
        self.process.terminate()
        self.process.wait()

    def events(self, kind):
        file = self.out / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def operators(self):
        files = sorted((self.out / "operators").glob("*.safetensors"))
        return {f"{f.name} {key}": part for f in files for key, part in load_file(f).items()}

    def row(self):
        ready, ran = self.events("replica-ready"), self.events("range-ran")
        leased, committed = self.events("range-leased"), self.events("range-committed")
        busy = committed[-1]["time"] - leased[0]["time"]
        work = busy * sum(len(event["pids"]) for event in ready)
        yield f"{self.seconds:.1f}"
        yield f"{max(event['seconds'] for event in ready):.1f}"
        yield f"{max(event['load_s'] for event in ready):.1f}"
        yield f"{self.given.windows * self.given.length / busy:,.0f}"
        for key in ("forward_s", "sums_s"):
            yield f"{sum(sum(event[key]) for event in ran) / work:.0%}"
        yield f"{max(max(event['parameter_bytes']) for event in ready) / 1e9:.3g}"
        yield f"{len({(event['replica'], event['rank']) for event in self.events('span-fitted')})}"


def worst(found, expected):
    return max(
        float((found[name] - part).double().norm() / part.double().norm())
        for name, part in expected.items()
    )


if __name__ == "__main__":
    main()
