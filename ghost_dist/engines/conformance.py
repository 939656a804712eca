"""Proof, before real weights are loaded, that a family computes the same sharded as unsharded.

AutoTP guesses by names which layers it may split; a wrong guess gives wrong streams without any
error. So a small random model of the same classes and the same head counts is saved, loaded through
the very code that will load the real one, and run next to the unsharded engine on every rank.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture, inspect_architecture
from ghost_dist.checkpoint.load import Decoder, load_decoder
from ghost_dist.checkpoint.peers import errors_shared
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.engines.resident import Engine
from ghost_dist.engines.small_model import small_model
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError

TOLERANCE = 1e-4
"""Largest difference in float32, relative to the largest entry. Sums in another order give 1e-6;
a layer that is split wrongly gave 0.14 and more where it ran at all."""

_WINDOWS, _LENGTH = 2, 16

LoadEngine = Callable[[Path, Architecture, int, torch.dtype], Engine]


def check_conformance(
    checkpoint: Checkpoint,
    architecture: Architecture,
    load: LoadEngine,
    device: torch.device,
    degree: int = 1,
    *,
    what: str,
    advice: str,
) -> float:
    """Run a small random model of the family by an engine and as a whole; collective in a world.

    ``load`` gives an engine over the first layers of a checkpoint folder; ``what`` it does and the
    ``advice`` are for the error if a stream differs by too much, on any rank. Returns the largest
    difference on this rank, relative to the largest entry of the stream.
    """
    together = dist.is_initialized()
    shared = errors_shared if together else contextlib.nullcontext
    message: list[dict[str, bytes] | None] = [None]
    with shared():  # one rank draws and saves it: transformers saves on that rank only
        if not together or dist.get_rank() == 0:
            message[0] = small_model(checkpoint, architecture, degree)
    if together:
        dist.broadcast_object_list(message)
    files = message[0]
    assert files is not None, "rank 0 sent no model"
    with tempfile.TemporaryDirectory(prefix="ghost_dist_conformance_") as folder, shared():
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            worst, problem = _compare(Path(folder), load, device)
        except (ConfigError, UnsupportedArchitectureError):
            raise
        except Exception as error:  # whatever a library raises on a model that it runs wrongly
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            raise UnsupportedArchitectureError(
                f"Family {architecture.model_type} cannot be {what}: a small random model of it "
                f"does not compute what it computes as a whole ({problem}). {advice}"
            )
    return worst


Seen = dict[tuple[str, int, int], Tensor]  # by what it is, number of boundary or layer, and window


@dataclass
class _Recorder:
    """A sink that keeps everything."""

    boundaries: tuple[int, ...]
    mlp_layers: tuple[int, ...]
    seen: Seen = field(default_factory=dict)

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self.seen["boundary", boundary, window] = stream_TC.clone()

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        self.seen["down_proj input of layer", layer, window] = input_TF.clone()
        self.seen["down_proj product of layer", layer, window] = product_TC.clone()


@torch.inference_mode()
def _as_a_whole(decoder: Decoder, tokens: Tokens) -> Seen:
    """What the model's own forward gives, looked at by hooks."""
    recorder = _Recorder((), ())

    def entering(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for window, stream_TC in enumerate(args[0] if args else kwargs["hidden_states"]):
                recorder(layer, window, stream_TC)

        return hook

    def down(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            product = output if module.bias is None else output - module.bias
            rows = (part.reshape(*tokens.shape, -1) for part in (args[0], product))
            for window, of_window in enumerate(zip(*rows, strict=True)):
                recorder.take_mlp(layer, window, *of_window)

        return hook

    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(decoder.layers):
            handle = layer.register_forward_pre_hook(entering(number), with_kwargs=True)
            hooks.callback(handle.remove)
        for number in decoder.architecture.down_projections:
            handle = decoder.down_projection(number).register_forward_hook(down(number))
            hooks.callback(handle.remove)
        last = decoder(torch.from_numpy(tokens).to(decoder.device, torch.int64))
    for window, stream_TC in enumerate(last):
        recorder(decoder.num_layers, window, stream_TC)
    return recorder.seen


def _compare(folder: Path, load: LoadEngine, device: torch.device) -> tuple[float, str | None]:
    architecture = inspect_architecture(open_checkpoint(folder))
    num_layers = architecture.num_layers
    whole = load_decoder(folder, architecture, num_layers, torch.float32, device)
    engine = load(folder, architecture, num_layers, torch.float32)
    generator = np.random.default_rng(0)
    shape = (_WINDOWS, _LENGTH)
    tokens = generator.integers(0, architecture.vocab_size, shape, dtype=np.int32)
    expected = _as_a_whole(whole, tokens)
    recorder = _Recorder(tuple(range(num_layers + 1)), tuple(architecture.down_projections))
    engine.run(tokens, range(_WINDOWS), recorder, lambda _: None)
    worst, problem = 0.0, None
    for key, tensor in expected.items():
        difference = float((recorder.seen[key] - tensor).abs().max() / tensor.abs().max())
        if not difference <= TOLERANCE and problem is None:
            what, index, window = key
            problem = f"{what} {index}, window {window}, differs by {difference:.1e} of its scale"
        worst = max(worst, difference)
    return worst, problem
