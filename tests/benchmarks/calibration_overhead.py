"""What calibration costs beyond the bare forward: time ratio in one process, and peak memory.

    python tests/benchmarks/calibration_overhead.py [--hidden 1024] [--layers 8] [--windows 8]

A random Llama is written to a temporary folder. The bare forward is transformers' own model with
the same layers over the same batches, its hidden state thrown away; the calibration run is our
engine, the moments of one span and their commit to the store. They alternate, so that a noisy
machine disturbs both alike, and the ratio of medians is reported. Memory is measured in a process
of its own, as the growth of its peak over what the imports take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_decoder
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines.resident import ResidentEngine, auto_batch
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import SpanCollector
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan

CPU = torch.device("cpu")


def write_model(folder: Path, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=8192,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_tokens(windows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8192, (windows, length), dtype=np.int32)


def calibrate(folder: Path, store_folder: Path, tokens: np.ndarray, engine: ResidentEngine) -> None:
    span = Span(engine.decoder.num_layers // 2, engine.decoder.num_layers)
    windows, length = tokens.shape
    halves = (tuple(range(windows // 2)), tuple(range(windows // 2, windows)))
    plan = StatisticsPlan(
        {"model": "benchmark"}, engine.hidden_size, ((span.start, span.stop),), halves, length
    )
    store = StatisticsStore(store_folder, plan)
    for range_id, ids in enumerate(halves):
        collector = SpanCollector([span], engine.hidden_size, engine.device)
        engine.run(tokens, ids, collector, lambda _: None)
        store.commit(range_id, collector.result())


def open_engine(folder: Path, length: int) -> ResidentEngine:
    architecture = inspect_architecture(open_checkpoint(folder))
    decoder = load_decoder(
        folder, architecture, num_layers=architecture.num_layers, dtype=torch.float32, device=CPU
    )
    return ResidentEngine(decoder, auto_batch(CPU, length, 8))


def compare_times(folder: Path, tokens: np.ndarray, repeats: int) -> dict[str, float]:
    length = tokens.shape[1]
    bare_model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    engine = open_engine(folder, length)
    batch = auto_batch(CPU, length, 8)
    times: dict[str, list[float]] = {"bare": [], "calibrate": []}
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(tokens), batch):
                ids = torch.from_numpy(tokens[first : first + batch]).long()
                bare_model(ids, use_cache=False)
        bare = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as store_folder:
            began = time.perf_counter()
            calibrate(folder, Path(store_folder) / "s.zarr", tokens, engine)
            ours = time.perf_counter() - began
        if repeat:  # the first round warms up
            times["bare"].append(bare)
            times["calibrate"].append(ours)
    return {name: statistics.median(values) for name, values in times.items()}


def status_bytes(field: str) -> int:
    """A memory figure of this process from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def measure_memory(folder: Path, windows: int, length: int) -> dict[str, float]:
    """Runs in its own process: peaks over what the imports take.

    ``anonymous`` is what the process needs; ``resident`` also counts pages of the checkpoint that
    are mapped while it is read, which the kernel may drop at any time.
    """
    before = {"anonymous": status_bytes("RssAnon"), "resident": status_bytes("VmRSS")}
    peak_anonymous = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak_anonymous
        while not done.wait(0.002):
            peak_anonymous = max(peak_anonymous, status_bytes("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    with tempfile.TemporaryDirectory() as store_folder:
        engine = open_engine(folder, length)
        calibrate(folder, Path(store_folder) / "s.zarr", make_tokens(windows, length), engine)
    done.set()
    sampler.join()
    hidden = engine.hidden_size
    return {
        "anonymous": peak_anonymous - before["anonymous"],
        "resident": status_bytes("VmHWM") - before["resident"],
        "moments": (2 * hidden**2 + 3 * hidden) * 8,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments.windows, arguments.length)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments.hidden, arguments.layers)
        model_bytes = sum(
            t.nbytes for t in open_checkpoint(folder).tensors.values() if "lm_head" not in t.name
        )
        command = [sys.executable, __file__, "--memory-of", name]
        command += ["--windows", str(arguments.windows), "--length", str(arguments.length)]
        memory = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        times = compare_times(
            folder, make_tokens(arguments.windows, arguments.length), arguments.repeats
        )
    limit = 1.2 * model_bytes + memory["moments"]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(
        f"C={arguments.hidden}, {arguments.layers} layers, {arguments.windows} windows of "
        f"{arguments.length} tokens, float32, {arguments.repeats} repeats"
    )
    print("| what | bare forward | calibration | ratio or limit |")
    print("|---|---|---|---|")
    print(
        f"| median time, s | {times['bare']:.2f} | {times['calibrate']:.2f} | "
        f"{times['calibrate'] / times['bare']:.3f} |"
    )
    print(
        f"| anonymous memory, MB | - | {memory['anonymous'] / 1e6:.0f} | at most model "
        f"{model_bytes / 1e6:.0f} + 20 % + moments {memory['moments'] / 1e6:.0f} = "
        f"{limit / 1e6:.0f} |"
    )
    print(
        f"| with mapped checkpoint pages, MB | - | {memory['resident'] / 1e6:.0f} | model + file |"
    )


if __name__ == "__main__":
    main()
