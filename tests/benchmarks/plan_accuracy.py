"""What ``plan`` says against what ``recover`` takes, stage by stage.

    python tests/benchmarks/plan_accuracy.py FOLDER                     # the shipped pico model
    python tests/benchmarks/plan_accuracy.py FOLDER --model CHECKPOINT
    python tests/benchmarks/plan_accuracy.py FOLDER --shape 8b          # random weights, 16 GB

FOLDER takes the run, the texts and, with ``--shape``, the checkpoint (kept for the next time). The
machine is measured again, then the spans are given and everything is run; then, on its own, the
selection of as many layers. Further ``--set`` go to both. Exit status 1 if a stage that takes more
than ``--least`` seconds is off by more than ``--within``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import shutil
import sys
import time
import typing
from pathlib import Path

import torch
import transformers

from ghost_dist.config_file import load_config, parse_set
from ghost_dist.devices import device_name
from ghost_dist.pipeline.recover import recover
from ghost_dist.planning.plan import plan_run
from ghost_dist.report.terminal import print_plan

PICO = Path(__file__).parents[2] / "ghost_dist" / "assets" / "pico"
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=PICO)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--remove", type=int, default=None)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--without-select", action="store_true")
    parser.add_argument("--within", type=float, default=0.25)
    parser.add_argument("--least", type=float, default=1.0)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = arguments.model
    if arguments.shape:
        model = folder / f"model-{arguments.shape}"
        make_checkpoint(model, SHAPES[arguments.shape])
    raw = json.loads((model / "config.json").read_text())
    num_layers = raw["num_hidden_layers"]
    length = arguments.length or min(2048, raw["max_position_embeddings"])
    remove = arguments.remove or round(num_layers / 4.5)
    stop = num_layers - round(num_layers / 6)
    text = folder / "text.txt"
    modules = (argparse, json, typing, inspect, shutil, platform)
    text.write_text("\n".join(inspect.getsource(module) for module in modules) * 12)

    def configure(name, **fields):
        given = {
            "model.path": str(model),
            "calibration.source": str(text),
            "calibration.windows": arguments.windows,
            "calibration.window_length": length,
            "evaluation.corpora": {"text": str(text)},
            "evaluation.windows": 8,
            "evaluation.window_length": length,
            "engine.device": arguments.device,
            "output.path": str(folder / name),
            **{key.replace("__", "."): value for key, value in fields.items()},
        }
        return load_config(None, {**given, **dict(map(parse_set, arguments.assignments))})

    rows = []
    config = configure("run", selection__spans=[[stop - remove, stop]])
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.perf_counter()
    planned = plan_run(config, measure_again=True)
    took = time.perf_counter() - began
    print_plan(planned.tree())
    result = recover(config)
    rows += compare(planned, result["timings_s"])
    measured_peak = result["peak_bytes"]
    if not arguments.without_select:
        config = configure("select", selection__remove=remove)
        shutil.rmtree(folder / "select", ignore_errors=True)
        planned_select = plan_run(config, measure_again=True)
        recover(config, again="select")
        record = json.loads((folder / "select" / "stages" / "select.json").read_text())
        rows += compare(planned_select, {"select": record["outputs"]["seconds"]})
    print(
        f"\n{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, "
        f"{platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {model.name}, {planned.dtype}, batch {planned.batch}, "
        f"{arguments.windows} x {length} tokens, {remove} of {num_layers} layers; measuring the "
        f"machine {planned.rates.measured_s:.1f} s of {took:.1f} s for the plan\n"
    )
    print("| stage | predicted, s | measured, s | predicted / measured | most of it |")
    print("|---|---|---|---|---|")
    off = []
    for name, predicted, measured, part in rows:
        ratio = predicted / measured if measured else float("nan")
        print(f"| {name} | {predicted:.1f} | {measured:.1f} | {ratio:.2f} | {part} |")
        if measured > arguments.least and abs(ratio - 1) > arguments.within:
            off.append(name)
    device = max(stage.device_bytes for stage in planned.stages)
    print(
        f"\npeak on the device: planned {device / 1e9:.2f} GB, measured "
        f"{measured_peak['device'] / 1e9:.2f} GB; host (whole process) "
        f"{measured_peak['host'] / 1e9:.2f} GB"
    )
    if off:
        print(f"off by more than {arguments.within:.0%}: {', '.join(off)}")
    sys.exit(bool(off))


def compare(planned, timings):
    rows = []
    for stage in planned.stages:
        if stage.name in timings:
            longest = sorted(stage.parts.items(), key=lambda part: -part[1])[:3]
            part = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
            rows.append((stage.name, stage.seconds, timings[stage.name], part))
    known = {stage.name: stage.seconds for stage in planned.stages if stage.name in timings}
    if len(known) > 1:
        rows.append(("all", sum(known.values()), sum(timings[name] for name in known), ""))
    return rows


def make_checkpoint(folder, sizes):
    """Random weights in the shape of a Llama; written once."""
    if (folder / "config.json").exists():
        return
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=8192, rope_theta=500000.0, initializer_range=0.02
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(PICO).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
