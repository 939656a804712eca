"""The streaming engine against the limits of the machine: reading the files, and multiplying.

    python tests/benchmarks/streaming.py FOLDER [--layers 72] [--device-memory 7e9]

FOLDER takes a checkpoint of random weights with layers in the shape of Llama 3.1 8B (0.44 GB each;
made if absent). In one run: the rate at which the reader alone reads the files (cold), the rate of
plain bf16 matrix products of the layer's shapes, then ``calibrate`` of one span by layer streaming.
The roofline is the larger of bytes / read rate and FLOPs / product rate.
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from random_checkpoint import write_random_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.weight_reader import WeightReader
from ghost_dist.devices import device_name, open_device, peak_bytes, reset_peak, synchronize
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import SpanCollector
from ghost_dist.statistics.stream_state import StreamState


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=72)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device-memory", type=float, default=7e9)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    device = open_device("auto")
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
    checkpoint = open_checkpoint(folder)
    architecture = inspect_architecture(checkpoint)
    last = given.layers - 1
    span = Span(last - 7, last)
    rng = np.random.default_rng(0)
    shape = (given.windows, given.length)
    tokens = rng.integers(0, architecture.vocab_size, shape, dtype=np.int32)

    print(
        f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"{checkpoint.nbytes / 1e9:.1f} GB in {given.layers} layers, {tokens.size} tokens, "
        f"{str(dtype).removeprefix('torch.')}, batch {given.batch}\n"
    )
    if device.type == "cuda":
        share = given.device_memory / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(share, device)
    prove_offloaded(checkpoint.path, device)
    drop_cache(checkpoint)
    read_rate = measure_read_rate(checkpoint, device, range(last))
    product_rate = measure_products(given, device, dtype)
    flops = layer_flops(given) * last
    rows = {}
    if given.compile:  # the first time takes seconds
        engine = OffloadedEngine(
            OffloadedModel(
                checkpoint, architecture, num_layers=2, dtype=dtype, device=device, compiled=True
            ),
            given.batch,
        )
        engine.sweep(tokens, range(given.batch), (2,), (), lambda _: None)
        engine.model.close()
    for name in ("streams not saved", "streams saved"):
        drop_cache(checkpoint)
        reset_peak(device)
        engine = OffloadedEngine(
            OffloadedModel(
                checkpoint,
                architecture,
                num_layers=span.stop,
                dtype=dtype,
                device=device,
                compiled=given.compile,
            ),
            given.batch,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(engine.model.close)
            state = None
            if "not" not in name:
                place = stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder))
                state = StreamState(Path(place) / "state", "benchmark", range(given.windows))
                stack.callback(state.close)
            began = time.monotonic()
            boundaries = (span.start, span.stop)
            kept = engine.sweep(tokens, range(given.windows), boundaries, (), lambda _: None, state)
            synchronize(device)
            swept = time.monotonic() - began
            collector = SpanCollector([(span, "stream")], given.hidden, device)
            kept.feed(range(given.windows), collector, device)
            collector.result()
            synchronize(device)
            rows[name] = (
                swept,
                time.monotonic() - began,
                engine.model.bytes_read,
                peak_bytes(device),
            )
            del kept, collector
    needed = rows["streams not saved"][2]
    limits = {"reading": needed / read_rate, "computing": flops / product_rate}
    bound = max(limits, key=limits.get)
    print(f"read rate of the reader alone, cold: {read_rate / 1e9:.2f} GB/s")
    print(f"products of the layer's shapes: {product_rate / 1e12:.1f} TFLOP/s")
    print(
        f"roofline: reading {limits['reading']:.2f} s, computing {limits['computing']:.2f} s; "
        f"bound by {bound}\n"
    )
    print("| | sweep s | with sums s | of the roofline | bytes read / needed | peak device GB |")
    print("|---|---|---|---|---|---|")
    layers_bytes = layer_bytes(checkpoint, architecture, span.stop)
    for name, (swept, whole, read, memory) in rows.items():
        print(
            f"| {name} | {swept:.2f} | {whole:.2f} | {limits[bound] / whole:.1%} | "
            f"{read / layers_bytes:.4f} | {memory / 1e9:.2f} |"
        )
    compare(checkpoint, architecture, given, tokens, device, dtype)


def compare(checkpoint, architecture, given, tokens, device, dtype):
    """The same sums by both engines, over as many layers as fit."""
    few = Span(1, 4)
    windows = range(min(8, given.windows))
    found = []
    for kind in ("streaming", "resident"):
        if kind == "streaming":
            engine = OffloadedEngine(
                OffloadedModel(
                    checkpoint, architecture, num_layers=few.stop, dtype=dtype, device=device
                ),
                given.batch,
            )
        else:
            decoder = load_decoder(
                checkpoint.path, architecture, num_layers=few.stop, dtype=dtype, device=device
            )
            engine = ResidentEngine(decoder, given.batch)
        collector = SpanCollector([(few, "stream")], given.hidden, device)
        engine.run(tokens, windows, collector, lambda _: None)
        found.append(next(iter(collector.result().values())).arrays())
    worst = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found[0].values(), found[1].values(), strict=True)
    )
    print(f"\nlargest difference of the sums of {few} from the resident engine's: {worst:.1e}")


def measure_read_rate(checkpoint, device, layers):
    names = {layer: [n for n in checkpoint.tensors if f".layers.{layer}." in n] for layer in layers}
    half = list(layers)[: max(2, len(layers) // 2)]
    with contextlib.closing(WeightReader(checkpoint, device)) as reader:
        reader.start(names[half[0]]).wait()
        synchronize(device)
        began, before = time.monotonic(), reader.bytes_read
        ahead = reader.start(names[half[1]])
        for layer in half[2:]:
            following = reader.start(names[layer])
            ahead.wait()
            ahead = following
        ahead.wait()
        synchronize(device)
        return (reader.bytes_read - before) / (time.monotonic() - began)


def measure_products(given, device, dtype):
    rows = given.batch * given.length
    a = torch.randn(rows, given.hidden, device=device, dtype=dtype)
    b = torch.randn(given.hidden, given.inner, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    synchronize(device)
    began, times = time.monotonic(), 20 if device.type == "cuda" else 3
    for _ in range(times):
        a @ b
    synchronize(device)
    return times * 2 * rows * given.hidden * given.inner / (time.monotonic() - began)


def layer_flops(given):
    """Of the model's own products; attention counted causally, as half of the square."""
    tokens, c, f = given.windows * given.length, given.hidden, given.inner
    heads = c // 128
    kv = max(1, heads // 4) * 128
    dense = 2 * tokens * (2 * c * c + 2 * c * kv + 3 * c * f)
    return dense + 2 * 2 * tokens * given.length * c // 2


def layer_bytes(checkpoint, architecture, stop):
    """Of the layers below ``stop`` and the embeddings."""
    return sum(
        tensor.nbytes
        for name, tensor in checkpoint.tensors.items()
        if "embed" in name or any(f".layers.{layer}." in name for layer in range(stop))
    )


def drop_cache(checkpoint):
    for file in checkpoint.headers:
        descriptor = os.open(checkpoint.path / file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
