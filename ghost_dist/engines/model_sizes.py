"""Bytes and FLOPs of a model and its layers, from the headers and a model on the meta device.

FLOPs are those of matrix products, 2 for a multiplication and an addition: twice the parameters
that a token meets, of experts only the routed and the shared ones, and for attention
``2 heads (d_qk + d_v)`` per token and key, all T keys of the window. Fused kernels skip about half
of the keys where attention is causal without a window; that is not taken off, because it is not so
on every device. Left out: embeddings, norms, activations, the scans of state-space layers.

Legend: C hidden width, F inner width of an MLP, V entries of the vocabulary, T tokens of a window.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ghost_dist.checkpoint.architecture import Architecture, exported_sizes, layer_sizes
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import empty_model
from ghost_dist.engines.expert_parts import experts_per_token, routed_experts
from ghost_dist.engines.memory import LayerBytes
from ghost_dist.engines.sharding import GATES

_WIDTHS_OF_A_PAIR = 7  # C wide: gathered and sorted inputs, products, weighted ones in float32
_STREAMS_OF_A_LAYER = 8  # C wide: residual, normed, queries, keys, values, attention, copies
_STREAMS_OF_AN_MLP = 3  # F wide: gate, up, their product
_LOGITS_AT_ONCE = 1 << 25
_LOGIT_BYTES = 20  # in the model's dtype and four times in float32


@dataclass(frozen=True)
class LayerSizes:
    loaded_bytes: int  # in the compute dtype
    sharded_bytes: int  # the part that tensor-parallel ranks share
    matmul_flops: int
    attention_flops: int  # per token and key
    widest: int  # numbers per token of the widest activation inside
    kind: str  # equal for layers that cost the same
    experts: int  # routed ones that can be held in parts
    expert_bytes: int
    stored_bytes: int = 0
    exported_bytes: int = 0  # what was FP8 is bfloat16 there

    @property
    def rest_bytes(self) -> int:
        """In memory without routed experts that can be held in parts."""
        return self.loaded_bytes - self.experts * self.expert_bytes

    def flops(self, window_length: int) -> int:
        """Per token, in a window of so many tokens."""
        return self.matmul_flops + self.attention_flops * window_length


@dataclass(frozen=True)
class ModelSizes:
    layers: tuple[LayerSizes, ...]
    hidden_size: int
    vocab_size: int
    itemsize: int  # of the compute dtype
    below_bytes: int  # what comes before the layers
    above_bytes: int  # final norm and head; 0 for a head that is the embeddings
    experts_per_token: int  # routed ones
    stored_bytes: int = 0  # of the checkpoint, as it is and as it would be written
    exported_bytes: int = 0
    below_stored_bytes: int = 0

    @property
    def experts(self) -> int:
        """Routed experts of a layer that can be held in parts, of the layer with most; else 0."""
        return max(layer.experts for layer in self.layers)

    @property
    def head_flops(self) -> int:
        return 2 * self.hidden_size * self.vocab_size

    @property
    def head_bytes(self) -> int:
        """Final norm and head in memory, where the head is the embeddings too."""
        tied = self.above_bytes < self.hidden_size * self.vocab_size * self.itemsize
        return self.above_bytes + (self.below_bytes if tied else 0)

    def layer_bytes(self, batch_tokens: int, *, head: bool) -> LayerBytes:
        """streaming: what takes memory of the device while layers run, and the head if it does."""
        routed = [layer for layer in self.layers if layer.experts]
        expert = max((layer.expert_bytes for layer in routed), default=0)
        numbers = expert // self.itemsize // self.hidden_size
        pair = (_WIDTHS_OF_A_PAIR * self.hidden_size + numbers) * self.itemsize
        return LayerBytes(
            layer=self.largest_layer_bytes,
            embeddings=self.below_bytes,
            head=self.head_bytes + self.logits_bytes(batch_tokens) if head else 0,
            batch=2 * self.activation_bytes(batch_tokens),  # what is left of the one before
            rest=max((layer.rest_bytes for layer in routed), default=0),
            beside=max(layer.rest_bytes for layer in self.layers),
            expert=expert,
            count=self.experts,
            pairs=batch_tokens * self.experts_per_token * pair,
        )

    @property
    def widest(self) -> int:
        """Numbers per token of the widest activation inside a layer."""
        return max(layer.widest for layer in self.layers)

    @property
    def causal_lm_bytes(self) -> int:
        return self.decoder_bytes(len(self.layers)) + self.above_bytes

    @property
    def largest_layer_bytes(self) -> int:
        return max(layer.loaded_bytes for layer in self.layers)

    def rest_flops(self, layer: LayerSizes, window_length: int) -> int:
        """Per token, of a layer without its routed experts."""
        routed = 2 * self.experts_per_token * layer.expert_bytes // self.itemsize
        return layer.flops(window_length) - routed

    def decoder_bytes(self, num_layers: int, tensor_parallel: int = 1) -> int:
        """Embeddings and the first layers in memory, of one rank."""
        layers = self.layers[:num_layers]
        shared = sum(layer.sharded_bytes for layer in layers)
        whole = sum(layer.loaded_bytes - layer.sharded_bytes for layer in layers)
        return self.below_bytes + whole + -(-shared // tensor_parallel)

    def decoder_stored_bytes(self, num_layers: int) -> int:
        return self.below_stored_bytes + sum(la.stored_bytes for la in self.layers[:num_layers])

    def activation_bytes(self, tokens: int) -> int:
        """What a forward of so many tokens holds at once, beside weights and streams kept."""
        numbers = max(_STREAMS_OF_A_LAYER * self.hidden_size, _STREAMS_OF_AN_MLP * self.widest)
        return tokens * numbers * self.itemsize

    def logits_bytes(self, tokens: int) -> int:
        """Of a piece of a batch's positions."""
        return _LOGIT_BYTES * min(_LOGITS_AT_ONCE, tokens * self.vocab_size)

    def stream_bytes(self, tokens: int) -> int:
        """Streams of so many tokens at one boundary."""
        return tokens * self.hidden_size * self.itemsize


def model_sizes(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype
) -> ModelSizes:
    """Sizes of a model in a compute dtype, and in its files; no tensor is read."""
    config = read_config(checkpoint.config)
    loaded = loaded_sizes(empty_model(architecture.causal_lm_class, config), architecture, dtype)
    _, stored = layer_sizes(checkpoint, architecture)
    exported = exported_sizes(checkpoint, architecture)
    above_stored = sum(map(checkpoint.stored_bytes, architecture.above_in_files))
    unused = sum(map(checkpoint.stored_bytes, architecture.unused))
    return replace(
        loaded,
        layers=tuple(
            replace(layer, stored_bytes=as_it_is, exported_bytes=as_written)
            for layer, as_it_is, as_written in zip(loaded.layers, stored, exported, strict=True)
        ),
        stored_bytes=checkpoint.nbytes,
        exported_bytes=checkpoint.bytes_once_read,
        below_stored_bytes=checkpoint.nbytes - sum(stored) - above_stored - unused,
    )


def loaded_sizes(model: Any, architecture: Architecture, dtype: torch.dtype) -> ModelSizes:
    """Sizes of a causal LM on the meta device in a compute dtype, its files left out."""
    wide = _kept_in_float32(model, dtype)
    head, loaded = f"{architecture.head}.weight", dict[int, int]()
    tied = [head] if head in model.all_tied_weights_keys else []  # it is the embeddings
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        own = tensor.dtype.itemsize if not tensor.is_floating_point() else dtype.itemsize
        loaded[id(tensor)] = tensor.numel() * (4 if name in wide else own)
    listed, config = model.get_submodule(architecture.layers), model.config
    lists = architecture.fields.lists.values()  # of names, such as sliding_attention
    layers = tuple(
        _layer(layer, config, loaded, " ".join(str(values[number]) for values in lists))
        for number, layer in enumerate(listed)
    )
    routed = [found.count for layer in listed if (found := routed_experts(layer)) is not None]
    above = {
        id(tensor)
        for path in (architecture.final_norm, architecture.head)
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items()
        if f"{path}.{name}" not in tied
    }
    above_bytes = sum(loaded[tensor] for tensor in above)
    in_layers = sum(layer.loaded_bytes for layer in layers)
    return ModelSizes(
        layers=layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        itemsize=dtype.itemsize,
        below_bytes=sum(loaded.values()) - in_layers - above_bytes,
        above_bytes=above_bytes,
        experts_per_token=(experts_per_token(config) or max(routed)) if routed else 0,
    )


def _layer(layer: nn.Module, config: Any, loaded: Mapping[int, int], named: str) -> LayerSizes:
    matmul = attention = sharded = widest = 0
    for path, module in layer.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        attention += _attention_flops(module, config)
        experts = [w for w in weights if w.ndim == 3 and not isinstance(module, nn.Conv1d)]
        if experts:  # what is 2-dimensional beside them are biases
            used = min(len(experts[0]), experts_per_token(config) or len(experts[0]))
            widest = max(widest, *(used * max(weight.shape[1:]) for weight in experts))
            matmul += sum(2 * used * weight[0].numel() for weight in experts)
            sharded += sum(loaded[id(parameter)] for parameter in experts)
            continue
        widest = max([widest, *(size for w in weights if w.ndim == 2 for size in w.shape)])
        matmul += sum(2 * weight.numel() for weight in weights)
        if _is_shared_by_ranks(layer, path, module):
            sharded += sum(loaded[id(weight)] for weight in weights)
    loaded_bytes = sum(loaded[id(t)] for t in layer.state_dict(keep_vars=True).values())
    count = expert_bytes = 0
    if (found := routed_experts(layer)) is not None and found.problem is None:
        routed, count = layer.get_submodule(found.path), found.count
        expert_bytes = sum(loaded[id(p)] for p in routed.parameters(recurse=False)) // count
    return LayerSizes(
        loaded_bytes=loaded_bytes,
        sharded_bytes=sharded,
        matmul_flops=matmul,
        attention_flops=attention,
        widest=widest,
        kind=f"{matmul} {attention} {loaded_bytes} {named}",
        experts=count,
        expert_bytes=expert_bytes,
    )


def _attention_flops(module: nn.Module, config: Any) -> int:
    """Per token and key, of a module that is an attention; else 0."""
    named = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
    width = next((value for value in named if isinstance(value, int)), None)
    if not type(module).__name__.endswith("Attention") or width is None:
        return 0
    values = getattr(module, "v_head_dim", width)
    # Layers of some families have numbers of heads of their own.
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    return 2 * int(heads) * (width + int(values))


def _is_shared_by_ranks(layer: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether tensor-parallel ranks share the weight: linear modules, but gates and mixers."""
    if not isinstance(module, nn.Linear) or path.rpartition(".")[2] in GATES:
        return False
    top = layer.get_submodule(path.partition(".")[0])
    return not any(isinstance(inner, nn.Conv1d) for inner in top.modules())


def _kept_in_float32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Tensors that the family keeps in float32 whatever the compute dtype."""
    return frozenset(
        name
        for name in model.state_dict()
        for pattern in model._get_dtype_plan(dtype)
        if re.search(rf"(^|\.){re.escape(pattern).replace(chr(92) + '*', '.*')}(\.|$)", name)
    )
