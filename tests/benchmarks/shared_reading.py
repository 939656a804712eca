"""Streaming by one rank against several that share the windows and the reading, under Ray.

    python tests/benchmarks/shared_reading.py FOLDER [--ranks 2] [--layers 40]

FOLDER takes a checkpoint of random weights with layers in the shape of Llama 3.1 8B (0.44 GB each;
made if absent). For ``engine.data_parallel`` of 1 and of RANKS one run of ``calibrate`` in four
ranges, on a Ray cluster of this machine: one span, the page cache dropped before each. The first
range reads the disk; the later ones read the page cache where the checkpoint fits it twice.
"""

import argparse
import inspect
import json
import platform
import typing
from pathlib import Path

import torch
import transformers
from random_checkpoint import write_random_checkpoint
from streaming import drop_cache

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import load_config
from ghost_dist.devices import device_name
from ghost_dist.statistics.store import StatisticsStore

RANGES = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--windows", type=int, default=32, help="of a range")
    parser.add_argument("--length", type=int, default=2048)
    given = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = given.hidden // 128
    folder = write_random_checkpoint(
        given.folder / f"random-{given.layers}x{given.hidden}",
        dtype=dtype,
        device=device,
        num_hidden_layers=given.layers,
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    checkpoint = open_checkpoint(folder)
    text = given.folder / "text.txt"
    modules = (argparse, json, typing, inspect)
    text.write_text("\n".join(inspect.getsource(module) for module in modules) * 8)
    stop = inspect_architecture(checkpoint).num_layers - 1
    rows, sums = {}, {}
    for ranks in (1, given.ranks):
        run = given.folder / f"run-{ranks}"
        config = load_config(
            None,
            {
                "model.path": str(folder),
                "calibration.source": str(text),
                "calibration.windows": RANGES * given.windows,
                "calibration.window_length": given.length,
                "calibration.ranges": RANGES,
                "selection.spans": [[stop - 7, stop]],
                "operator.name": "ghost",
                "operator.features": "stream",
                "operator.choose": "residual",
                "engine.kind": "streaming",
                "engine.replicas": 1,
                "engine.data_parallel": ranks,
                "cluster.address": "local",
                "output.path": str(run),
            },
        )
        drop_cache(checkpoint)
        recover_on_cluster(config, again="calibrate")
        events = [json.loads(line) for line in (run / "events.jsonl").open()]
        ran = [event for event in events if event["event"] == "range-ran"]
        assert len(ran) == RANGES
        rows[ranks] = [(max(event["forward_s"]), max(event["sums_s"])) for event in ran]
        store = StatisticsStore.open(run / "statistics.zarr")
        sums[ranks] = next(iter(store.read(0).values())).arrays()
    print(
        f"{torch.cuda.device_count()} x {device_name(device)}, {platform.machine()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; "
        f"{checkpoint.nbytes / 1e9:.1f} GB in {given.layers} layers, "
        f"{given.windows * given.length} tokens a range\n"
    )
    print("| ranks | first range: forward s | later ranges: forward s | sums s | as 1 rank |")
    print("|---|---|---|---|---|")
    means = {}
    for ranks, of_ranges in rows.items():
        later = of_ranges[1:]
        means[ranks] = sum(forward for forward, _ in later) / len(later)
        of_sums = sum(seconds for _, seconds in later) / len(later)
        print(
            f"| {ranks} | {of_ranges[0][0]:.2f} | {means[ranks]:.2f} | {of_sums:.3f} | "
            f"{means[1] / means[ranks]:.2f} times |"
        )
    worst = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(sums[given.ranks].values(), sums[1].values(), strict=True)
    )
    print(f"\nlargest difference of the first range's sums: {worst:.1e}")


if __name__ == "__main__":
    main()
