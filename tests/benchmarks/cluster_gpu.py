"""A Ray actor with a DeepSpeed engine on a GPU, against the bare forward, on an 8B-shaped model.

    python tests/benchmarks/cluster_gpu.py FOLDER [--tensor-parallel 2] [--replicas 2]

FOLDER takes a checkpoint of random weights in the shape of Llama 3.1 8B (16 GB, made if absent).
One run: ``recover`` up to its statistics on a Ray cluster of this machine (one replica of tensor-
parallel degree 1 if not said otherwise, through the code that runs on many nodes), then in this
process, on one GPU, the resident engine with the same collectors, and the bare forward of the same
layers, batch and windows. Rates of several GPUs are those of all together.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import time
import typing
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from ghost_dist.calibration.windows import load_windows
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import load_config
from ghost_dist.pipeline.collectors import SpanCollectors, sums_of_range
from ghost_dist.pipeline.inputs import open_engine, open_inputs
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span

PICO = Path(__file__).parents[2] / "ghost_dist" / "assets" / "pico"
SPAN, WINDOWS, LENGTH, RANGES = Span(20, 27), 128, 2048, 8  # windows and ranges: of a replica


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    folder, replicas = arguments.folder, arguments.replicas
    run = folder / f"run-{replicas}x{arguments.tensor_parallel}"
    make_checkpoint(folder / "model")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(inspect.getsource(m) for m in (argparse, json, typing, inspect)) * 8 * replicas
    )

    def configure(**fields):
        given = {
            "model.path": str(folder / "model"),
            "calibration.source": str(text),
            "calibration.windows": WINDOWS * replicas,
            "calibration.window_length": LENGTH,
            "calibration.ranges": RANGES * replicas,
            "selection.spans": [[SPAN.start, SPAN.stop]],
            "operator.name": "ghost",
            "operator.features": "stream",
            "operator.choose": "residual",
            "output.path": str(run),
        }
        return load_config(None, {**given, **{k.replace("__", "."): v for k, v in fields.items()}})

    began = time.monotonic()
    on_cluster = configure(
        engine__kind="tensor_parallel",
        engine__tensor_parallel=arguments.tensor_parallel,
        engine__replicas=replicas,
    )
    recover_on_cluster(on_cluster, again="calibrate")
    whole = time.monotonic() - began
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    ready = next(event for event in events if event["event"] == "replica-ready")
    committed = [e for e in events if e["event"] == "range-committed"]
    # The first range of a replica warms it up: counted is what comes after the last of those.
    warm = max(min(e["time"] for e in committed if e["replica"] == r["replica"]) for r in committed)
    after = [e["time"] for e in committed if e["time"] > warm]

    inputs = open_inputs(configure(output__path=str(folder / "alone")), Reporter())
    engine = open_engine(inputs, SPAN.stop)
    tokens = load_windows(run / "tokens.safetensors").tokens
    collectors = SpanCollectors(((SPAN, "stream"),), inputs.architecture)
    of_range = list(range(WINDOWS // RANGES))

    def timed(work):
        work()
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(RANGES - 1):
            work()
        torch.cuda.synchronize()
        return (time.monotonic() - began) / (RANGES - 1)

    def forward():
        with torch.inference_mode():
            for first in range(0, len(of_range), inputs.batch):
                rows = tokens[of_range[first : first + inputs.batch]]
                ids = torch.from_numpy(rows).to(engine.device, torch.int64)
                engine.decoder.model(ids, use_cache=False)

    rows = {
        "bare forward": timed(forward),
        "resident engine, sums": timed(
            lambda: sums_of_range(engine, tokens, of_range, collectors, lambda _: None)
        ),
        f"Ray, DeepSpeed, {replicas} x tp {arguments.tensor_parallel}, sums, written and "
        "committed": (after[-1] - warm) / len(after),
    }
    print(
        f"{torch.cuda.get_device_name()}, {platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, deepspeed {version('deepspeed')}, ray "
        f"{version('ray')}; {inputs.dtype}, layers 0 to {SPAN.stop - 1}, batch {inputs.batch}\n"
    )
    print("| | tokens/s | of the bare forward |")
    print("|---|---|---|")
    size = len(of_range) * LENGTH
    for name, duration in rows.items():
        print(f"| {name} | {size / duration:,.0f} | {rows['bare forward'] / duration:.1%} |")
    print(f"\n{len(after)} of {len(committed)} ranges after every replica's first")
    print(
        f"replica ready after {ready['seconds']:.1f} s; {ready['parameter_bytes'][0] / 1e9:.2f} "
        f"GB of weights, conformance {ready['conformance'][0]:.1e}; the whole stage {whole:.1f} s"
    )


def make_checkpoint(folder):
    if (folder / "config.json").exists():
        return
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        initializer_range=0.02,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(PICO).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
