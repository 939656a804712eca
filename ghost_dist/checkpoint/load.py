"""Models with weights: the layers below a boundary, a whole causal LM, a tokenizer.

transformers reads the files. That they hold the model was found before (``tensor_check.py``); here
a tensor that holds NaN is an error, since it would spoil every sum.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ghost_dist.checkpoint.architecture import Architecture, causal_lm_class, why_not
from ghost_dist.checkpoint.conversions import quiet_loading
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.checkpoint.reader import Checkpoint, lazy_tensors, open_checkpoint
from ghost_dist.checkpoint.surgery import note_return_type
from ghost_dist.errors import CheckpointError, UnsupportedArchitectureError
from ghost_dist.spans import Span

_CHECKED_AT_ONCE = 1 << 24
_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


class Decoder:
    """Embeddings and first layers of a model, its final norm left out: it ends at a boundary."""

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture.of_base
        self._norm: Any = nn.Identity()
        self._norm.weight = torch.empty(0, dtype=model.dtype)  # some cast to the dtype of a norm
        layers = model.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList), "the layer list moved"
        model.set_submodule(self.architecture.final_norm, self._norm)
        self.layers = layers
        self.num_layers = len(layers)
        self.hidden_size = architecture.hidden_size
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The stream (B, T, C) entering layer ``num_layers``; ids (B, T) without padding."""
        stream_BTC: Tensor = self.model(input_ids=input_ids, use_cache=False)[0]
        return stream_BTC

    def down_projection(self, layer: int) -> Any:
        """The module that ends the MLP of a layer, this rank's part; KeyError if it has none."""
        return self.layers[layer].get_submodule(self.architecture.down_projections[layer])


def load_decoder(
    path: Path,
    architecture: Architecture,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """Read embeddings and the first layers only; each must hand its output to the next."""
    model_class = getattr(transformers, architecture.base_class)
    config = truncated_config(open_checkpoint(path), architecture, num_layers)
    model = _load(model_class, path, dtype, device, config)
    del model.get_submodule(architecture.in_base(architecture.layers))[num_layers:]
    decoder = Decoder(model, architecture)
    check_stream(decoder, architecture)
    return decoder


def truncated_config(checkpoint: Checkpoint, architecture: Architecture, num_layers: int) -> Any:
    """The transformers configuration of the first ``num_layers`` layers, or of a few more.

    Some families (Gemma 4, whose last layer always attends to all tokens) have none of certain
    numbers of layers. The surplus is to be deleted once the model is built.
    """
    assert 0 < num_layers <= architecture.num_layers, "no such boundary"
    config_class, whole = getattr(transformers, architecture.config_class), architecture.num_layers
    cuts = [(Span(kept, whole),) for kept in range(num_layers, whole)]
    above = next((cut for cut in cuts if why_not(architecture, checkpoint.config, cut) is None), ())
    return read_config(config_class, cut_config(checkpoint.config, above, architecture.fields))


def load_causal_lm(path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    raw = open_checkpoint(path).config
    config = read_config(CONFIG_MAPPING[raw["model_type"]], raw)
    return _load(causal_lm_class(config), path, dtype, device, config)


def layers_of_causal_lm(model: Any, architecture: Architecture) -> Decoder:
    """The layers of a whole model, checked as those of :func:`load_decoder` are; it stays whole."""
    base = model.get_submodule(architecture.base_prefix)
    path = architecture.in_base(architecture.final_norm)
    norm = base.get_submodule(path)
    try:
        decoder = Decoder(base, architecture)
        check_stream(decoder, architecture)
    finally:
        base.set_submodule(path, norm)
    return decoder


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; CheckpointError if there is none that can be read."""
    try:
        if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise FileNotFoundError("none of its files is there")
        with quiet_loading():
            return transformers.AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read: {error}. Copy tokenizer.json and "
            "tokenizer_config.json of the model into the folder."
        ) from error


def _load(
    model_class: Any, path: Path, dtype: torch.dtype, device: torch.device, config: Any
) -> Any:
    arguments: dict[str, Any] = {"config": config}
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    source: Path | None = path
    checkpoint = open_checkpoint(path)
    reports: list[str] = []
    try:
        with contextlib.ExitStack() as files, quiet_loading() as reports:
            if not checkpoint.as_in_files:
                # transformers knows FP8, but takes every block for 128 x 128 of whole ones.
                tensors = lazy_tensors(checkpoint, checkpoint.tensors, files, device)
                arguments["state_dict"] = tensors
                source = None
            model = model_class.from_pretrained(
                source, dtype=dtype, use_safetensors=True, local_files_only=True, **arguments
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            "\n".join((f"{path} cannot be loaded by transformers: {error}", *reports))
        ) from error
    check_finite(path, model, dtype)
    return model.requires_grad_(False).eval()


def check_finite(path: Path, model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        rows = parameter.detach() if parameter.ndim else parameter.detach()[None]
        # Piece by piece: isfinite makes two copies, which for embeddings are gigabytes.
        pieces = rows.chunk(1 + rows.numel() // _CHECKED_AT_ONCE)
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
            raise non_finite_weight(path, name, dtype)


def non_finite_weight(path: Path, name: str, dtype: torch.dtype) -> CheckpointError:
    """The error for a tensor that holds NaN or Inf in the dtype of the computation."""
    return CheckpointError(
        f"{path}: tensor {name} holds NaN or Inf as {str(dtype).removeprefix('torch.')}. "
        "If the checkpoint has a wider dtype its numbers may overflow: try "
        "model.dtype=bfloat16 or float32. Else download or copy it again."
    )


@torch.inference_mode()
def check_stream(decoder: Decoder, architecture: Architecture) -> None:
    """Run two tokens and see that each layer's output is the next one's input, and the last one
    what the final norm would get: only then does removing a span mean what we take it to mean.
    """
    inputs: list[Any] = []
    outputs: list[Any] = []
    beside: list[Any] = []  # what layers gave besides the stream
    taken: list[Any] = []  # and what of that others were given

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs.get("hidden_states"))
        for value in (*args[1:], *kwargs.values()):
            taken.extend(given for given in beside if given is value)

    def after(module: Any, __: Any, output: Any) -> None:
        if module is not decoder._norm:
            note_return_type(module, None, output)
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
    with contextlib.ExitStack() as hooks:
        for module in (*decoder.layers, decoder._norm):
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        result = decoder(ids_BT)
    if taken:  # does it matter to them?
        with contextlib.ExitStack() as hooks:
            for module in decoder.layers:
                hooks.callback(module.register_forward_hook(replaced).remove)
            if not torch.equal(decoder(ids_BT), result):
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
