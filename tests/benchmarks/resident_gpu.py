"""The calibration pass of an 8B-shaped model on one GPU: rates, memory, a plain reference.

    python tests/benchmarks/resident_gpu.py FOLDER

FOLDER takes a checkpoint of random weights in the shape of Llama 3.1 8B (16 GB, made if absent).
32 x 2048 tokens. In one run: plain bf16 matrix products, the bare forward (as it is, and with
layers compiled), the pass for one span, the pass for the paper's scores, and a reference
that does what the published code does: one pass that keeps the hidden states of all layers, a copy
of the model, and for each removed layer a pass of both models that keeps all activations, whose
moments are then computed in float64 on the device.
"""

import argparse
import contextlib
import copy
import resource
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from random_checkpoint import write_random_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.pipeline.collectors import SpanCollectors, sums_of_range
from ghost_dist.pipeline.selecting import PaperScores
from ghost_dist.spans import Span

WINDOWS, LENGTH, REMOVE = 32, 2048, 7
SPAN = Span(22, 29)
SCATTERED = (3, 7, 11, 15, 19, 23, 27)
"""Layers that are not neighbours, for the reference."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--without-reference", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda:0")
    folder = write_random_checkpoint(given.folder / "llama-8b", device=device)
    checkpoint = open_checkpoint(folder)
    architecture = inspect_architecture(checkpoint)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, architecture.vocab_size, (WINDOWS, LENGTH), dtype=np.int32)
    rate = products()
    anonymous = AnonymousPages()
    rows = []

    def note(name, seconds, layers):
        done = model_flops(checkpoint, layers, tokens.size)
        rows.append((name, seconds, done / seconds, torch.cuda.max_memory_allocated(device)))

    decoder = load_decoder(folder, architecture, num_layers=32, dtype=torch.bfloat16, device=device)
    model_bytes = torch.cuda.memory_allocated(device)
    engine = ResidentEngine(decoder, given.batch)
    one = SpanCollectors(((SPAN, "stream"),), architecture)
    joint = SpanCollectors(((SPAN, "joint"),), architecture)
    scattered = SpanCollectors(
        tuple((Span(la, la + 1), "stream") for la in SCATTERED), architecture
    )
    every = PaperScores(REMOVE, (), architecture)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def forward(last):
        with torch.inference_mode():
            for first in range(0, WINDOWS, given.batch):
                ids = torch.from_numpy(tokens[first : first + given.batch]).to(device, torch.int64)
                hook = None
                if last < 32:
                    hook = decoder.layers[last].register_forward_pre_hook(stop)
                with contextlib.suppress(Stopped):
                    decoder.model(ids, use_cache=False)
                if hook:
                    hook.remove()

    def collect(collectors):
        sums_of_range(engine, tokens, range(WINDOWS), collectors, lambda _: None)

    note("bare forward to layer 29", timed(lambda: forward(29)), 29)
    note("one span [22, 29), ghost", timed(lambda: collect(one)), 29)
    note("one span [22, 29), ghost-joint", timed(lambda: collect(joint)), 29)
    note("7 single layers, ghost", timed(lambda: collect(scattered)), 28)
    note("bare forward to the end", timed(lambda: forward(32)), 32)
    note(f"the paper's scores of {REMOVE} layers", timed(lambda: collect(every)), 32)
    began = time.monotonic()
    engine = ResidentEngine(decoder, given.batch, compiled=True)
    forward(29)
    torch.cuda.synchronize()
    compiling = time.monotonic() - began
    note("compiled: bare forward to layer 29", timed(lambda: forward(29)), 29)
    note("compiled: one span [22, 29), ghost", timed(lambda: collect(one)), 29)
    note("compiled: the paper's scores", timed(lambda: collect(every)), 32)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, most = anonymous.stop()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {tokens.size} tokens, batch {given.batch}\n"
        f"plain bf16 products: {rate / 1e12:.0f} TFLOP/s; model {model_bytes / 1e9:.2f} GB on the "
        f"device; compiling took {compiling:.1f} s; peak of the host process {host / 1e9:.2f} GB "
        f"with the pages of mapped files, {most / 2**30:.2f} GiB without them "
        f"({before / 2**30:.2f} GiB before the model)\n"
    )
    print("| | s | model's TFLOP/s | of the products | peak above the model, GiB |")
    print("|---|---|---|---|---|")
    for name, seconds, flops, memory in rows:
        above = (memory - model_bytes) / 2**30
        print(f"| {name} | {seconds:.3f} | {flops / 1e12:.0f} | {flops / rate:.1%} | {above:.2f} |")
    if given.without_reference:
        return
    alone = {name: seconds for name, seconds, _, _ in rows}
    print("\n| reference | s | times ours |\n|---|---|---|")
    for name, layers, ours in (
        ("one span of 7 layers", [22], "one span [22, 29), ghost"),
        ("7 layers that are not neighbours", list(SCATTERED), "7 single layers, ghost"),
    ):
        length = 7 if len(layers) == 1 else 1
        seconds = reference(folder, tokens, layers, length, device)
        print(f"| {name} | {seconds:.2f} | {seconds / alone[ours]:.1f} |")


class AnonymousPages:
    """The most host memory that is no page of a mapped file: what the kernel cannot drop."""

    def __init__(self):
        self._before = self._most = self._now()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self):
        """Bytes at the beginning, and the most since then, looked at every 20 ms."""
        self._stopped.set()
        self._thread.join()
        return self._before, self._most

    def _watch(self):
        while not self._stopped.wait(0.02):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now():
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


class Stopped(Exception):  # noqa: N818 - no error: it ends a forward early
    """The last layer that is wanted has run."""


def stop(*_):
    raise Stopped


def reference(folder, tokens, layers, length, device):
    """What the published code does, written plainly."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}
    )
    torch.cuda.synchronize()
    began = time.monotonic()
    with torch.inference_mode():
        similar = torch.zeros(33)
        for window in tokens:  # which layers: hidden states of all layers, window by window
            states = run(model, window, device).hidden_states
            for layer in range(33 - length):
                a, b = states[layer].float(), states[layer + length].float()
                similar[layer] += torch.cosine_similarity(a, b, dim=-1).mean().cpu()
        cut = copy.deepcopy(model)
        for layer in layers:
            kept_x, kept_y = [], []
            for window in tokens:
                kept_x.append(run(cut, window, device).hidden_states[layer][0].cpu())
                kept_y.append(run(model, window, device).hidden_states[layer + length][0].cpu())
            x = torch.cat(kept_x).to(device).double()
            y = torch.cat(kept_y).to(device).double()
            gram = x.T @ x
            gram.diagonal().add_(1e-6)
            torch.linalg.solve(gram, x.T @ (y - x))
            del x, y, gram
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    del model, cut
    torch.cuda.empty_cache()
    return seconds


def run(model, window, device):
    ids = torch.from_numpy(window.astype(np.int64))[None].to(device)
    return model.model(input_ids=ids, use_cache=False, output_hidden_states=True)


def timed(work):
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        began = time.monotonic()
        work()
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return min(times)


def products(size=8192):
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = 20
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(times):
        a @ b
    torch.cuda.synchronize()
    return times * 2 * a.shape[0] ** 3 / (time.monotonic() - began)


def model_flops(checkpoint, layers, tokens):
    """Products of the model's own layers; attention counted causally, as half of the square."""
    matrices = sum(
        tensor.shape[0] * tensor.shape[1]
        for name, tensor in checkpoint.tensors.items()
        if any(f".layers.{layer}." in name for layer in range(layers)) and len(tensor.shape) == 2
    )
    attention = layers * 2 * 2 * LENGTH * 4096 // 2
    return tokens * (2 * matrices + attention)


if __name__ == "__main__":
    main()
