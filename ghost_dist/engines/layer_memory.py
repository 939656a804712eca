"""What layers that are read one after the other hold of a device, and how much of them fits.

The one model of bytes and the one choice, for the engine and for ``plan``. In this order: whole
layers, the next one being read while one runs; layers whose routed experts are held in parts; whole
layers one at a time, each read when the one before it is gone.

Legend: C hidden width, F width of an MLP's inner layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ghost_dist.engines.expert_parts import experts_per_token

_PARTS_AT_ONCE = 2  # of experts: the next one is read when this one has been converted
_WIDTHS_OF_A_PAIR = 7  # C wide: gathered and sorted inputs, products, weighted ones in float32
_STREAMS_OF_A_LAYER = 8  # C wide: residual, normed, queries, keys, values, attention, copies
_STREAMS_OF_AN_MLP = 3  # F wide: gate, up, their product
_BATCHES_AT_ONCE = 2
_LOGITS_AT_ONCE = 1 << 25
_LOGIT_BYTES = 16  # in the model's dtype and three times in float32


@dataclass(frozen=True)
class Residency:
    """What of the layers is on the device at once."""

    experts: int | None = None  # routed ones of a part; None: layers are whole
    prefetch: bool = True  # the next layer, or part, is read while one runs


@dataclass(frozen=True)
class LayerBytes:
    """What takes memory of the device while layers run, in bytes."""

    layer: int  # the largest
    embeddings: int
    head: int  # with its logits; 0 where it is not run
    batch: int
    rest: int = 0  # of the largest layer with routed experts, without them
    beside: int = 0  # the largest of all layers without routed experts
    expert: int = 0
    count: int = 0  # routed experts of the layer that has most; 0: none that can be held in parts
    pairs: int = 0  # of all pairs of token and expert of a batch

    def weights(self, held: Residency) -> int:
        if held.experts is not None:
            ahead = max(self.beside, self.head)
            running = self.rest + ahead + _PARTS_AT_ONCE * held.experts * self.expert
            return max(self.embeddings + self.rest, running)
        twice = self.layer if self.count else 0  # experts are stacked: for a moment they are twice
        if held.prefetch:  # the first layer beside the embeddings, the head beside the last
            return max(self.embeddings, self.layer, self.head) + self.layer + twice
        return max(self.embeddings, self.layer + twice, self.head)

    def of_batch(self, held: Residency) -> int:
        return self.batch if held.experts is None else max(self.batch, self.pairs)

    def at_once(self, held: Residency) -> int:
        return self.weights(held) + self.of_batch(held)


def choose_residency(
    fits: Callable[[Residency], bool], count: int, experts: int | Literal["auto"] = "auto"
) -> Residency | None:
    """The first of what can be held that fits; None if nothing does.

    ``count``: routed experts of a layer that can be held in parts; 0: none. A number of ``experts``
    is taken as it is, whether it fits or not.
    """
    whole = Residency() if fits(Residency()) else Residency(prefetch=False)
    if experts != "auto":
        return Residency(experts) if experts < count else whole
    if whole.prefetch:
        return whole
    parts = next((n for n in range(count - 1, 0, -1) if fits(Residency(n))), None)
    if parts is not None:
        return Residency(even_part(count, parts))
    return whole if fits(whole) else None


def even_part(count: int, fitting: int) -> int:
    """Experts of a part where ``fitting`` fit: the fewest parts, two at least, of like sizes."""
    return -(-count // max(2, -(-count // fitting)))


def widest_activation(layer: nn.Module, config: Any) -> int:
    """Numbers per token of the widest activation inside a layer."""
    widest = 0
    for module in layer.modules():
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        experts = [w for w in weights if w.ndim == 3 and not isinstance(module, nn.Conv1d)]
        if experts:  # what is 2-dimensional beside them are biases
            used = min(len(experts[0]), experts_per_token(config) or len(experts[0]))
            widest = max(widest, *(used * max(weight.shape[1:]) for weight in experts))
        else:
            widest = max([widest, *(size for w in weights if w.ndim == 2 for size in w.shape)])
    return widest


def activation_bytes(tokens: int, hidden_size: int, widest: int, itemsize: int) -> int:
    """What a forward of so many tokens holds at once, beside weights and streams kept."""
    numbers = max(_STREAMS_OF_A_LAYER * hidden_size, _STREAMS_OF_AN_MLP * widest)
    return tokens * numbers * itemsize


def batch_bytes(tokens: int, hidden_size: int, widest: int, itemsize: int) -> int:
    """Of a batch in a layer, and what is left there of the one before."""
    return _BATCHES_AT_ONCE * activation_bytes(tokens, hidden_size, widest, itemsize)


def pair_bytes(hidden_size: int, expert_numbers: int, itemsize: int) -> int:
    """What a forward of experts holds for each pair of token and expert (of so many parameters)."""
    return (_WIDTHS_OF_A_PAIR * hidden_size + expert_numbers // hidden_size) * itemsize


def logits_bytes(tokens: int, vocab_size: int) -> int:
    """Of a piece of a batch's positions."""
    return _LOGIT_BYTES * min(_LOGITS_AT_ONCE, tokens * vocab_size)
