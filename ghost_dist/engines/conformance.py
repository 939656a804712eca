"""Proof, before real weights are loaded, that a family computes the same sharded as unsharded.

AutoTP guesses by names which layers it may split; a wrong guess gives wrong streams without any
error. So a small random model of the same classes and the same head counts is saved, loaded through
the very code that will load the real one, and run next to the unsharded engine on every rank.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture, inspect_architecture
from ghost_dist.checkpoint.conversions import save_model
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.checkpoint.peers import errors_shared
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.resident import Engine, load_decoder
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Collector

TOLERANCE = 1e-4
"""Largest difference in float32, relative to the largest entry. Sums in another order give 1e-6;
a layer that is split wrongly gave 0.14 and more where it ran at all."""

_WINDOWS, _LENGTH = 2, 16

LoadEngine = Callable[[Path, Architecture], Engine]  # all layers, in float32
Seen = dict[tuple[str, int, int], Tensor]  # by what it is, number of boundary or layer, and window
Used = TypeVar("Used")


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

    ``what`` the engine does and the ``advice`` are for the error if a stream differs by too much,
    on any rank. Returns the largest difference on this rank, relative to the largest entry.
    """
    together = dist.is_initialized()
    shared = errors_shared if together else contextlib.nullcontext
    message: list[dict[str, bytes] | None] = [None]
    with shared():  # one rank draws and saves it: transformers saves on that rank only
        if not together or dist.get_rank() == 0:
            message[0] = with_small_model(checkpoint, architecture, degree, _files)
    if together:
        dist.broadcast_object_list(message)
    assert message[0] is not None, "rank 0 sent no model"
    with tempfile.TemporaryDirectory(prefix="ghost_dist_conformance_") as folder, shared():
        for name, content in message[0].items():
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


@dataclass
class _Recorder(Collector):
    boundaries: tuple[int, ...]
    mlp_layers: tuple[int, ...]
    seen: Seen = field(default_factory=dict)

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self.seen["boundary", boundary, window] = stream_TC.clone()

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        self.seen["down_proj input of layer", layer, window] = input_TF.clone()
        self.seen["down_proj product of layer", layer, window] = product_TC.clone()


@torch.inference_mode()
def _as_a_whole(decoder: LayerwiseModel, tokens: Tokens) -> Seen:
    """What the model's own forward gives, looked at by hooks."""
    recorder = _Recorder((), ())

    def entering(layer: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for window, stream_TC in enumerate(args[0] if args else kwargs["hidden_states"]):
            recorder(layer, window, stream_TC)

    def down(layer: int, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        product = output if module.bias is None else output - module.bias
        rows = (part.reshape(*tokens.shape, -1) for part in (args[0], product))
        for window, of_window in enumerate(zip(*rows, strict=True)):
            recorder.take_mlp(layer, window, *of_window)

    with contextlib.ExitStack() as hooks:
        for number, module in enumerate((*decoder.layers, decoder.final_norm)):
            note = partial(entering, number)
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        for number in decoder.architecture.down_projections:
            module = decoder.down_projection(number)
            hooks.enter_context(module.register_forward_hook(partial(down, number)))
        ids_BT = torch.from_numpy(tokens).to(decoder.device, torch.int64)
        decoder.model(input_ids=ids_BT, use_cache=False)
    return recorder.seen


def _compare(folder: Path, load: LoadEngine, device: torch.device) -> tuple[float, str | None]:
    architecture = inspect_architecture(open_checkpoint(folder))
    num_layers = architecture.num_layers
    whole = load_decoder(folder, architecture, num_layers, torch.float32, device)
    engine = load(folder, architecture)
    shape, generator = (_WINDOWS, _LENGTH), np.random.default_rng(0)
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


_VOCABULARY, _HEAD, _INNER_PER_RANK, _EXPERTS = 128, 16, 16, 8
_INNER = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("ffn_dim", "n_inner"),
)
_HEADS = (
    *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("q_lora_rank", "kv_lora_rank", "mamba_d_state", "mamba_chunk_size"),
)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _files(model: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        inspect_architecture(open_checkpoint(Path(folder)))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def with_small_model(
    checkpoint: Checkpoint, architecture: Architecture, degree: int, use: Callable[[Any], Used]
) -> Used:
    """What ``use`` makes of a random LM like the checkpoint's, which ``degree`` ranks can share."""
    reasons = []
    for small_heads in (True, False):
        try:
            config = _small_config(checkpoint, architecture, degree, small_heads)
            model = architecture.causal_lm_class(config).eval()
            _draw_weights(model)
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, _LENGTH, dtype=torch.int64), use_cache=False)
            return use(model)
        except Exception as error:  # a size that the family cannot have
            reasons.append(f"{type(error).__name__}: {error}")
    raise UnsupportedArchitectureError(
        f"Family {architecture.model_type} can only be run whole on one device: no small model of "
        f"it could be built to prove another engine right ({'; '.join(reasons)}). Set "
        "engine.kind=resident."
    )


def _small_config(
    checkpoint: Checkpoint, architecture: Architecture, degree: int, small_heads: bool
) -> Any:
    """One layer of each kind, everything narrow; where a family allows it, the heads too."""
    kept = _one_layer_of_each_kind(checkpoint.config, architecture)
    gone = [Span(la, la + 1) for la in range(architecture.num_layers) if la not in kept]
    config = read_config(cut_config(checkpoint.config, gone, architecture.fields))
    sizes = {name: size for name, size in config.to_dict().items() if type(size) is int}
    for name in sizes.keys() & set(_INNER):
        # What the degree leaves over is kept: an uneven split is one more case.
        size = min(sizes[name], _INNER_PER_RANK * degree + sizes[name] % degree)
        setattr(config, name, size)
    for name in sizes.keys() & set(_EXPERT_COUNTS):
        if sizes[name] > _EXPERTS:
            setattr(config, name, _EXPERTS)
            config.num_experts_per_tok = min(config.num_experts_per_tok, _EXPERTS // 2)
            for group in sizes.keys() & {"n_group", "topk_group"}:
                setattr(config, group, 1)
    if small_heads:
        _shrink_heads(config, sizes)
    config.vocab_size = min(config.vocab_size, _VOCABULARY)
    for name in _TOKEN_IDS:
        setattr(config, name, None)
    return config


def _shrink_heads(config: Any, sizes: Mapping[str, int]) -> None:
    """Fewer numbers per head; the numbers of heads stay, they are what is dealt out."""
    heads, width = getattr(config, "num_attention_heads", None), config.hidden_size
    mamba = ("mamba_expand", "mamba_n_heads", "mamba_d_head")
    mamba_heads_span_stream = (
        sizes.keys() >= set(mamba) and sizes[mamba[0]] * width == sizes[mamba[1]] * sizes[mamba[2]]
    )
    for name in sizes.keys() & set(_HEADS):
        setattr(config, name, min(sizes[name], _HEAD))
    if heads and width % heads == 0:
        config.hidden_size = heads * min(width // heads, _HEAD)
    if mamba_heads_span_stream:
        config.mamba_d_head = config.mamba_expand * config.hidden_size // config.mamba_n_heads
    if "word_embed_proj_dim" in sizes:
        config.word_embed_proj_dim = config.hidden_size


def _one_layer_of_each_kind(raw: Mapping[str, Any], architecture: Architecture) -> list[int]:
    """The first layer of every kind that the configuration tells apart; two layers at least."""
    fields = architecture.fields
    kinds: dict[Any, int] = {}
    for layer in range(architecture.num_layers):
        kind = (
            *(values[layer] for values in fields.lists.values()),
            *(layer in layers for layers in fields.indices.values()),
            *(layer < count for count in fields.counts.values()),
            layer in architecture.down_projections,
        )
        kinds.setdefault(repr(kind), layer)
    kept = set(kinds.values())
    # A list as long as there are layers would be taken for one entry per layer.
    others = {
        len(value)
        for name, value in read_config(raw).to_dict().items()
        if isinstance(value, (list, tuple)) and name not in fields.lists
    }
    for layer in range(architecture.num_layers):
        if len(kept) > 1 and len(kept) not in others:
            break
        kept.add(layer)
    return sorted(kept)


@torch.no_grad()
def _draw_weights(model: torch.nn.Module) -> None:
    """N(0, 0.08^2) around what the family initialises norms with: no layer is near the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.08
        is_scale = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        parameter.copy_(noise + parameter.mean() if is_scale else noise)
