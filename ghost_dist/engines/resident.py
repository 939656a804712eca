"""The whole truncated model on one device.

Only layers below the last boundary are built and loaded. Windows go through in batches, and every
boundary that the sink wants is pushed as it comes, so nothing is recomputed and no list of hidden
states is kept.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import load_model, truncated_config
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.sweep import Tap, sweep
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.statistics.span_sums import Collector

AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per forward when the batch is left to us: enough to fill the device's matrix units."""


class Engine(Protocol):
    """Runs the unpruned model up to its last boundary; no head, no cache, no gradient."""

    device: torch.device
    parameter_bytes: int = 0  # of a rank's share; 0 where nothing is shared
    conformance: float | None = None
    """Largest relative difference of the small random model by this engine and as a whole."""

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Collector,
        advance: Callable[[int], None],
    ) -> None:
        """Push the sink's boundaries for rows of ``tokens``; tells ``advance`` tokens done."""


class ResidentEngine(Engine):
    """Runs layers in memory, which ranks may share, ``batch`` windows at a time."""

    read_bytes: int | None = None  # by this rank of what is shared; None: not known

    def __init__(self, decoder: LayerwiseModel, batch: int, *, compiled: bool = False) -> None:
        self.decoder, self._batch = decoder, batch
        if compiled:
            for layer in decoder.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        self.device = decoder.device

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Collector,
        advance: Callable[[int], None],
    ) -> None:
        sweep(
            self.decoder,
            [Variant()],
            tokens[list(windows)],
            [_Push(sink, windows)],
            batch=self._batch,
            stop=sink.boundaries[-1],
            advance=advance,
        )


class _Push(Tap):
    """Gives a sink what it wants as it comes."""

    def __init__(self, sink: Collector, windows: Sequence[int]) -> None:
        self._sink, self._windows = sink, windows
        self._boundaries, self.mlp_layers = frozenset(sink.boundaries), sink.mlp_layers

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        if boundary in self._boundaries:
            for window, stream_TC in zip(self._windows[part], stream_BTC, strict=True):
                self._sink(boundary, window, stream_TC)

    def mlp(self, layer: int, part: slice, input_BTF: Tensor, product_BTC: Tensor) -> None:
        for window, *rows in zip(self._windows[part], input_BTF, product_BTC, strict=True):
            self._sink.take_mlp(layer, window, *rows)


def load_decoder(
    path: Path,
    architecture: Architecture,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerwiseModel:
    """Read embeddings and the first layers only; each must hand its output to the next."""
    config = truncated_config(open_checkpoint(path), architecture, num_layers)
    model = load_model(architecture.base_class, path, dtype, device, config)
    end_at_boundary(model, architecture, num_layers)
    decoder = LayerwiseModel(model, architecture.of_base)
    check_stream(decoder)
    return decoder


def end_at_boundary(model: Any, architecture: Architecture, num_layers: int) -> None:
    """Let a base model, without its head, return the stream behind its first layers."""
    norm: Any = nn.Identity()
    norm.weight = torch.empty(0, dtype=model.dtype)  # some cast to the dtype of a norm
    model.set_submodule(architecture.of_base.final_norm, norm)
    del model.get_submodule(architecture.of_base.layers)[num_layers:]


@torch.inference_mode()
def check_stream(decoder: LayerwiseModel) -> None:
    """Run two tokens and see that each layer's output is the next one's input, and the last one
    what the final norm would get: only then does removing a span mean what we take it to mean.
    """
    architecture = decoder.architecture
    body = decoder.model.get_submodule(architecture.base_prefix)
    inputs: list[Any] = []
    outputs: list[Any] = []
    beside: list[Any] = []  # what layers gave besides the stream
    taken: list[Any] = []  # and what of that others were given

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs.get("hidden_states"))
        for value in (*args[1:], *kwargs.values()):
            taken.extend(given for given in beside if given is value)

    def after(_: Any, __: Any, output: Any) -> None:
        if isinstance(output, tuple):
            beside.extend(value for value in output[1:] if isinstance(value, Tensor))
        outputs.append(output[0] if isinstance(output, tuple) else output)

    def replaced(_: Any, __: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        rest = (_other_values(v) if isinstance(v, Tensor) else v for v in output[1:])
        made = getattr(type(output), "_make", tuple)  # of a named tuple
        return made((output[0], *rest))

    # Two ids: one may be that of padding, whose embedding is zero and stays so in all layers.
    ids_BT = torch.arange(2, device=decoder.device)[None]
    with decoder.entered(), contextlib.ExitStack() as hooks:
        for module in (*decoder.layers, decoder.final_norm):
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        result = body(input_ids=ids_BT, use_cache=False)[0]
    if taken:  # does it matter to them?
        with contextlib.ExitStack() as hooks:
            for module in decoder.layers:
                hooks.enter_context(module.register_forward_hook(replaced))
            if not torch.equal(body(input_ids=ids_BT, use_cache=False)[0], result):
                raise UnsupportedArchitectureError(
                    f"Family {architecture.model_type} is not supported: its layers hand on "
                    "something besides the residual stream, so a layer cannot be removed by itself."
                )
    joined = len(inputs) == decoder.num_layers + 1 and all(
        given is taken for given, taken in zip(outputs[:-1], inputs[1:], strict=True)
    )
    whole = result.shape == (1, 2, architecture.hidden_size) and torch.equal(result, outputs[-1])
    if not joined or not whole:
        raise UnsupportedArchitectureError(
            f"Family {architecture.model_type} is not supported: its layers do not hand one "
            "residual stream from each to the next and to the final norm."
        )


def _other_values(tensor: Tensor) -> Tensor:
    """Far from what a layer gives: a choice of experts, or of keys, must come out otherwise."""
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor)  # an index that is there whatever is indexed
    generator = torch.Generator().manual_seed(0)
    return 100 * torch.randn(tensor.shape, generator=generator).to(tensor)


def auto_batch(device: torch.device, window_length: int, range_windows: int) -> int:
    """Windows per forward that fill the device: at least 1, and a divisor of those of a range."""
    # On a GPU the shape of a batch decides the last bits: engines that batch otherwise, and a run
    # that was stopped with some ranges done, agree where all batches have one shape.
    most = min(range_windows, AUTO_BATCH_TOKENS[device.type] // window_length)
    return next((size for size in range(most, 1, -1) if range_windows % size == 0), 1)
