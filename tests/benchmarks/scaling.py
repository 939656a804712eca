"""Where the time of a cluster goes: forward, sums, writing, waiting; one replica and several.

    python tests/benchmarks/scaling.py --replicas 1 2

A Llama of random weights (hidden 1024, 6 layers) on CPU ranks of one thread, the same windows each
time, through ``recover`` on a Ray cluster of this machine. Forward and sums are timed in this
process, one thread too; the rest is what the events of the run say: from the first lease to the
last commit, what is neither forward nor sums is overhead.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import tempfile
import time
import typing
from pathlib import Path

import ray
import torch
import transformers

from ghost_dist.calibration.windows import load_windows
from ghost_dist.cluster.recover import recover_on_cluster
from ghost_dist.config import load_config
from ghost_dist.pipeline.collectors import SpanCollectors, passes_here, sums_of_range
from ghost_dist.pipeline.inputs import open_engine, open_inputs
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span
from ghost_dist.statistics.collect import SampleKind

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
            busy, tokens = run(folder, arguments, replicas)
            forward, sums = alone(folder, arguments)
            rate = tokens / busy
            first = first or rate
            work = busy * replicas
            print(
                f"| {replicas} | {rate:,.0f} | {rate / first:.2f} | {forward / work:.1%} | "
                f"{(sums - forward) / work:.1%} | {1 - sums / work:.1%} |",
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
    """Seconds from the first lease to the last commit, and the tokens of that time."""
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
    committed = [event["time"] for event in events if event["event"] == "range-committed"]
    return committed[-1] - leased[0], arguments.windows * LENGTH


def alone(folder, arguments):
    """Seconds of the forward, and of forward and sums, of all ranges, in this process."""
    inputs = open_inputs(configure(folder, arguments, "alone"), Reporter())
    engine = open_engine(inputs, SPAN.stop)
    tokens = load_windows(next(folder.glob("run*/tokens.safetensors"))).tokens
    passes = passes_here(
        SpanCollectors(((SPAN, SampleKind("stream")),), inputs.architecture), engine
    )
    of_range = list(range(arguments.windows // arguments.ranges))

    def forward():
        with torch.inference_mode():
            for first in range(0, len(of_range), inputs.batch):
                rows = tokens[of_range[first : first + inputs.batch]]
                engine._decoder(torch.from_numpy(rows).to(torch.int64))

    def sums():
        sums_of_range(engine, tokens, of_range, passes, lambda _: None)

    seconds = []
    for work in (forward, sums):
        work()
        began = time.monotonic()
        for _ in range(3):
            work()
        seconds.append((time.monotonic() - began) / 3 * arguments.ranges)
    return seconds


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
