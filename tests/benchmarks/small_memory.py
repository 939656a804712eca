"""Recover a checkpoint that is larger than the memory it may use, on a CPU, with kills in between.

    python tests/benchmarks/small_memory.py FOLDER [--gib 2] [--layers 48] [--cgroup FOLDER]

FOLDER takes a random checkpoint (48 layers of 122 MB in bfloat16: 6 GB; made if absent). `recover`
runs by layer streaming, once undisturbed, and once killed at several layers and continued, in a
control group whose memory is limited (page cache counts too, and is given back); without one it
gets RLIMIT_DATA, which also counts what allocators and threads reserve and never use.

Printed: peak resident memory, bytes of the checkpoint, whether the operators
are equal bit by bit, and what each resume repeated.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from random_checkpoint import write_random_checkpoint

from ghost_dist.checkpoint.reader import open_checkpoint

KILL_AT = (4, 13, 22)
"""Layers after which a run is killed."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--cgroup", type=Path, help="an empty control group (version 1 or 2)")
    given = parser.parse_args()
    model = write_random_checkpoint(
        given.folder / f"random-{given.layers}x2048",
        num_hidden_layers=given.layers,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    text = given.folder / "text.txt"
    text.write_text("\n".join(Path(module).read_text() for module in (argparse.__file__, __file__)))
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; checkpoint {size / 1e9:.2f} GB, limit {given.gib:g} GiB "
        f"({'control group' if given.cgroup else 'RLIMIT_DATA'})\n"
    )
    stop = given.layers * 2 // 3
    command = [
        sys.executable,
        *("-m", "ghost_dist", "recover", str(model), "--spans", f"{stop - 6}:{stop}"),
        *("--operator", "ghost", "--set", "operator.features=stream"),
        *("--set", "operator.choose=residual", "--set", "engine.kind=streaming"),
        *("--set", f"calibration.source={text}", "--set", "calibration.windows=8"),
        *("--set", "calibration.window_length=64", "--set", "engine.device=cpu"),
    ]
    calm, disturbed = given.folder / "calm", given.folder / "disturbed"
    for run in (calm, disturbed):
        shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    peak = finish([*command, "--out", str(calm)], given)
    whole = time.monotonic() - began
    print(f"undisturbed: {whole:.0f} s, peak resident memory {peak / 2**30:.2f} GiB")
    for layer in KILL_AT:
        kill_after(layer, [*command, "--out", str(disturbed)], given, disturbed)
    peak = finish([*command, "--out", str(disturbed)], given)
    print(f"killed {len(KILL_AT)} times and continued: peak {peak / 2**30:.2f} GiB")
    equal = [
        (calm / "operators" / path.name).read_bytes() == path.read_bytes()
        for path in (disturbed / "operators").iterdir()
    ]
    print(f"operators equal bit by bit: {bool(equal) and all(equal)}")
    exported = open_checkpoint(calm / "checkpoint")
    difference = json.loads((calm / "result.json").read_text())["reload_max_abs_difference"]
    print(f"exported: {exported.nbytes / 1e9:.2f} GB, logits differ by {difference:.1e}")
    if not (equal and all(equal)):
        sys.exit(1)


def start(command, given):
    limit = int(given.gib * 2**30)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if given.cgroup is None:
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        return process
    for name in ("memory.limit_in_bytes", "memory.max"):
        if (given.cgroup / name).exists():
            (given.cgroup / name).write_text(str(limit))
    (given.cgroup / "cgroup.procs").write_text(str(process.pid))
    return process


def finish(command, given):
    process = start(command, given)
    lines = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"status {status}:\n{lines[-3000:]}")
    return usage.ru_maxrss * 1024


def kill_after(layer, command, given, run):
    """Kill it once the saved state is at this layer or above."""
    state = run / "streams-calibrate" / "state.json"

    def boundary():
        try:
            return json.loads(state.read_text())["boundary"]
        except (OSError, ValueError):
            return 0

    resumed_at = boundary()
    process = start(command, given)
    while boundary() < layer:
        if process.poll() is not None:
            sys.exit(f"it ended by itself:\n{process.stderr.read()[-3000:]}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed with layers below {boundary()} saved (this one had gone on at {resumed_at})")


if __name__ == "__main__":
    main()
