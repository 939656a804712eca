"""Routed experts held in parts against whole layers: time, device memory and the streams.

    python tests/benchmarks/experts.py FOLDER [--layers 3] [--experts 128]

FOLDER takes a mixture of random weights (made if absent; 4.8 GB a layer by default). It is read
from the page cache, so the table shows what the parts cost beside the computing, not the disk.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.devices import device_name, open_device
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    device = open_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checkpoint = open_checkpoint(write(given, device, dtype))
    architecture = inspect_architecture(checkpoint)
    shape = (given.windows, given.length)
    tokens = np.random.default_rng(0).integers(0, architecture.vocab_size, shape, dtype=np.int32)
    print(
        f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{checkpoint.nbytes / 1e9:.1f} GB, {given.layers} layers, {tokens.size} tokens\n")
    prove_offloaded(checkpoint.path, device)
    prove_offloaded(checkpoint.path, device, 3)
    sweep(checkpoint, architecture, given, tokens, device, dtype, given.experts)  # warm
    expected, whole_s = None, None
    print("| experts at once | sweep s | of whole layers | peak device GB | largest difference |")
    print("|---|---|---|---|---|")
    for part in (1, 2, 4, 16):
        at_once = given.experts // part
        found, seconds, memory = sweep(
            checkpoint, architecture, given, tokens, device, dtype, at_once
        )
        expected, whole_s = (found, seconds) if expected is None else (expected, whole_s)
        difference = float((found.float() - expected.float()).abs().max())
        print(
            f"| {at_once} | {seconds:.2f} | {seconds / whole_s:.2f} | {memory / 1e9:.2f} | "
            f"{difference:.1e} |"
        )


def sweep(checkpoint, architecture, given, tokens, device, dtype, at_once):
    """The last streams, seconds, and peak bytes on the device."""
    engine = OffloadedEngine(
        OffloadedModel(
            checkpoint,
            architecture,
            num_layers=given.layers,
            dtype=dtype,
            device=device,
            keep_cached=True,
        ),
        given.batch,
    )
    engine.model.hold(at_once, batch_tokens=given.batch * given.length, tokens=tokens.size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    rows = engine.sweep(tokens, range(given.windows), (given.layers,), (), lambda _: None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - began
    engine.model.close()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return rows.tensors[f"boundary {given.layers}"].cpu(), seconds, memory


def write(given, device, dtype):
    folder = given.folder / f"mixture-{given.layers}x{given.hidden}x{given.experts}x{given.inner}"
    if folder.exists():
        return folder
    config = transformers.Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        moe_intermediate_size=given.inner,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=max(1, given.hidden // 512),
        head_dim=128,
        num_experts=given.experts,
        num_experts_per_tok=given.chosen,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    with device:
        model = transformers.Qwen3MoeForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
