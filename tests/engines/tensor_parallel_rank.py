"""One rank of the world of test_tensor_parallel.py; writes what it saw to a file.

Run as ``tensor_parallel_rank.py FOLDER RANK DEGREE``; FOLDER holds ``plan.json`` and checkpoints.
"""

import contextlib
import datetime as dt
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import deepspeed.comm
import numpy as np
import torch
import torch.distributed as dist
import transformers

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines import sharding, tensor_parallel
from ghost_dist.engines.layerwise import adds_mlp_output
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.errors import GhostDistError

CPU = torch.device("cpu")
NUM_LAYERS, LENGTH = 5, 20
"""One layer less than the checkpoints have."""


class Recorder:
    def __init__(self, boundaries, mlp_layers):
        self.boundaries, self.mlp_layers = boundaries, mlp_layers
        self.seen = {}

    def __call__(self, boundary, window, stream_TC):
        self.seen["boundary", boundary, window] = stream_TC.clone()

    def take_mlp(self, layer, window, input_TF, product_TC):
        self.seen["input", layer, window] = input_TF.clone()
        self.seen["product", layer, window] = product_TC.clone()


def open_engine(folder, degree, dtype=torch.float32):
    architecture = inspect_architecture(open_checkpoint(folder))
    engine = tensor_parallel.open_tensor_parallel(
        folder,
        architecture,
        num_layers=NUM_LAYERS,
        dtype=dtype,
        device=CPU,
        degree=degree,
        batch=2,
    )
    return engine, architecture


def record(engine, architecture, windows):
    layers = tuple(layer for layer in architecture.down_projections if layer < NUM_LAYERS)
    recorder, done = Recorder((0, 2, NUM_LAYERS), layers), []
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, architecture.vocab_size, (windows, LENGTH), dtype=np.int32)
    engine.run(tokens, range(windows), recorder, done.append)
    assert sum(done) == tokens.size
    return recorder.seen


def load_whole(folder, architecture, dtype=torch.float32):
    return load_decoder(folder, architecture, num_layers=NUM_LAYERS, dtype=dtype, device=CPU)


def relative_error(got, expected):
    """Over all streams, in the Frobenius norm."""
    keys = [key for key in expected if key[0] == "boundary"]
    error = sum(float((got[key].float() - expected[key]).square().sum()) for key in keys)
    return (error / sum(float(expected[key].square().sum()) for key in keys)) ** 0.5


def compare(folder, degree, dtype):
    """Sharded in ``dtype`` against unsharded in float32."""
    engine, architecture = open_engine(folder, degree, dtype)
    whole = load_whole(folder, architecture)
    # In bfloat16 a token may go to another expert: enough tokens that such cases even out.
    windows = 3 if dtype == torch.float32 else 40
    expected = record(ResidentEngine(whole, 2), architecture, windows)
    got = record(engine, architecture, windows)
    assert got.keys() == expected.keys()
    differences = {"boundary": 0.0, "input": 0.0, "product": 0.0}
    digest = hashlib.sha256()
    for key, tensor in expected.items():
        assert got[key].shape == tensor.shape
        assert got[key].dtype == dtype
        difference = float((got[key].float() - tensor).abs().max() / tensor.abs().max())
        differences[key[0]] = max(differences[key[0]], difference)
        digest.update(got[key].float().numpy().tobytes())
    both = (engine.decoder, whole)
    adds = [
        [adds_mlp_output(layers, layer) for layer in architecture.down_projections if layer < 3]
        for layers in both
    ]
    rounded = expected
    if dtype != torch.float32:
        plain = ResidentEngine(load_whole(folder, architecture, dtype), 2)
        rounded = record(plain, architecture, windows)
    return {
        "differences": differences,
        "error": relative_error(got, expected),
        "error_unsharded": relative_error(rounded, expected),
        "streams": digest.hexdigest(),
        "conformance": engine.conformance,
        "parameter_bytes": engine.parameter_bytes,
        "read_bytes": engine.read_bytes,
        "whole_bytes": sum(p.numel() * 4 for p in whole.model.parameters()),
        "widest": max((t.shape[-1] for k, t in got.items() if k[0] == "input"), default=0),
        "adds_mlp_output": adds,
    }


restore = tensor_parallel.restore_buffers


def pass_on(_, __, output):
    return output


def nothing(*_, **__):
    return None


def put_nothing_aside(_):
    return contextlib.nullcontext()


def restore_zeros(model, buffers, device):
    restore(model, {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}, device)


SABOTAGE = {
    "experts are not summed": (sharding, "_sum_over_ranks", pass_on),
    "linear layers are not summed": (deepspeed.comm, "inference_all_reduce", nothing),
    "biases of experts are added by every rank": (sharding.Sharding, "add_once", nothing),
    "wide norms are left whole": (tensor_parallel, "shard_wide_norms", nothing),
    "wide norms see their own columns only": (sharding.dist, "all_reduce", nothing),
    "sinks are left whole": (tensor_parallel, "shard_sinks", nothing),
    "fused attention keeps the heads of all": (tensor_parallel, "narrow_fused_attention", nothing),
    "gates of one output are sharded": (sharding, "GATES", ()),
    "mixers are sharded": (tensor_parallel, "kept_whole", put_nothing_aside),
    "buffers are wiped": (tensor_parallel, "restore_buffers", restore_zeros),
}


def attempt(function):
    start = time.monotonic()
    try:
        result = function()
    except GhostDistError as error:
        result = {"message": str(error), "kind": type(error).__name__}
    return {**result, "seconds": time.monotonic() - start}


def join_world(folder, name, rank, degree):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / name}",
        rank=rank,
        world_size=degree,
        timeout=dt.timedelta(seconds=60),
    )


def main(folder, rank, degree):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    plan = json.loads((folder / "plan.json").read_text())
    join_world(folder, "world", rank, degree)
    results = {}
    for name, checkpoint, dtype, sabotage in plan["runs"]:

        def run(checkpoint=checkpoint, dtype=dtype, sabotage=sabotage):
            fault = contextlib.nullcontext()
            if sabotage:
                fault = mock.patch.object(*SABOTAGE[sabotage])
            with fault:
                return compare(folder / checkpoint, degree, getattr(torch, dtype))

        results[name] = attempt(run)
    dist.destroy_process_group()
    # A world of one in the same process: the rest of the program sees no difference.
    join_world(folder, f"alone{rank}", 0, 1)
    results["alone"] = attempt(lambda: compare(folder / "llama", 1, torch.float32))
    dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
