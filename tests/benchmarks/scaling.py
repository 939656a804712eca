"""Where the time of a cluster goes: forward, sums, writing, waiting; one replica and several.

    python tests/benchmarks/scaling.py --replicas 1 2

A Llama of random weights (hidden 1024, 6 layers) on CPU ranks of one thread, the same windows each
time, through ``recover`` on a Ray cluster of this machine. The ranks measure forward and sums
themselves, in every range, and the events of the run say so: of the time from the first lease
to the last commit, times the replicas, the rest is overhead.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import tempfile
import typing
from pathlib import Path

import ray
import torch
import transformers

from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import load_config
from ghost_dist.spans import Span

PICO = Path(__file__).parents[2] / "ghost_dist" / "assets" / "pico"
SPAN, LENGTH = Span(3, 5), 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ranges", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread a rank, torch {torch.__version__}, "
        f"ray {ray.__version__}; hidden {arguments.hidden}, {arguments.windows} x {LENGTH} tokens, "
        f"{arguments.ranges} ranges\n"
    )
    print("| replicas | tokens/s | speed-up | forward | sums | overhead |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "model", arguments.hidden)
        (folder / "text.txt").write_text(
            "\n".join(inspect.getsource(m) for m in (argparse, json, typing, inspect))
        )
        first = None
        for replicas in arguments.replicas:
            busy, forward, sums = run(folder, arguments, replicas)
            rate = arguments.windows * LENGTH / busy
            first = first or rate
            work = busy * replicas
            print(
                f"| {replicas} | {rate:,.0f} | {rate / first:.2f} | {forward / work:.1%} | "
                f"{sums / work:.1%} | {1 - (forward + sums) / work:.1%} |",
                flush=True,
            )


def configure(folder, arguments, run, **fields):
    given = {
        "model.path": str(folder / "model"),
        "calibration.source": str(folder / "text.txt"),
        "calibration.windows": arguments.windows,
        "calibration.window_length": LENGTH,
        "calibration.ranges": arguments.ranges,
        "selection.spans": [[SPAN.start, SPAN.stop]],
        "operator.name": "ghost",
        "operator.features": "stream",
        "operator.choose": "residual",
        "engine.device": "cpu",
        "output.path": str(folder / run),
    }
    return load_config(None, {**given, **{k.replace("__", "."): v for k, v in fields.items()}})


def run(folder, arguments, replicas):
    """Seconds from the first lease to the last commit, and of all ranks' forward and sums."""
    config = configure(
        folder,
        arguments,
        f"run{replicas}",
        engine__kind="tensor_parallel",
        engine__replicas=replicas,
    )
    recover_on_cluster(config, again="calibrate")
    events = [json.loads(line) for line in (folder / f"run{replicas}" / "events.jsonl").open()]
    leased = [event["time"] for event in events if event["event"] == "range-leased"]
    committed = [event for event in events if event["event"] == "range-committed"]
    ran = [event for event in events if event["event"] == "range-ran"]
    forward, sums = (sum(sum(e[key]) for e in ran) for key in ("forward_s", "sums_s"))
    return committed[-1]["time"] - leased[0], forward, sums


def make_checkpoint(folder, hidden):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=LENGTH,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(PICO).save_pretrained(folder)


if __name__ == "__main__":
    main()
