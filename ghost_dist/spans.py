"""What can go: half-open spans of decoder layers, and the attention or the MLP of one.

Layers are renumbered when spans go; a layer that only loses a half stays where it is.

Boundary ``b`` is the residual stream entering layer ``b``; boundary ``L`` is what the final norm
receives. Removing ``[start, stop)`` hands boundary ``start`` to whatever read boundary ``stop``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ghost_dist.errors import ConfigError

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")  # in the order in which they add to the stream


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Layers ``start, ..., stop - 1``, numbered from 0."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True, order=True, slots=True)
class Sublayer:
    """The attention (whatever mixes tokens) or the MLP of a layer, which is numbered from 0."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part}:{self.layer}"


def pairs_of(spans: Iterable[Span]) -> list[list[int]]:
    """Plain values, as records and results have them."""
    return [[span.start, span.stop] for span in spans]


def parse_spans(text: str) -> tuple[Span, ...]:
    """Read ``"11:18"`` or ``"3:5,11:18"``, Python's half-open slices."""
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if match is None:
            raise ConfigError(
                f"Span {part.strip()!r} is not of the form start:stop (half open, counted from 0), "
                "for example 11:18 for layers 11 to 17, or 3:5,11:18 for two spans."
            )
        spans.append(Span(int(match[1]), int(match[2])))
    return tuple(spans)


def parse_sublayers(text: str) -> tuple[Sublayer, ...]:
    """Read ``"attention:5,mlp:7"``."""
    found = []
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(attention|mlp)\s*:\s*(\d+)\s*", item)
        if match is None:
            raise ConfigError(
                f"Sublayer {item.strip()!r} is not of the form attention:LAYER or mlp:LAYER "
                "(counted from 0), for example attention:5,mlp:7."
            )
        found.append(Sublayer(int(match[2]), match[1]))  # type: ignore[arg-type]
    return tuple(found)


def check_units(
    spans: Iterable[Span], sublayers: Iterable[Sublayer], num_layers: int
) -> tuple[tuple[Span, ...], tuple[Sublayer, ...]]:
    """Spans as :func:`check_spans` gives them, of both halves of a layer too, and other halves."""
    halves = sorted(sublayers)
    for sublayer in halves:
        if sublayer.layer >= num_layers:
            raise ConfigError(
                f"{sublayer} is out of range: the model has layers 0 to {num_layers - 1}."
            )
        if halves.count(sublayer) > 1:
            raise ConfigError(f"{sublayer} is given twice; give each once.")
    layers = [sublayer.layer for sublayer in halves]
    whole = {layer for layer in layers if layers.count(layer) == 2}
    both = [Span(layer, layer + 1) for layer in sorted(whole)]
    found = check_spans([*spans, *both], num_layers)
    left = tuple(sublayer for sublayer in halves if sublayer.layer not in whole)
    for sublayer in left:
        if any(span.start <= sublayer.layer < span.stop for span in found):
            raise ConfigError(f"{sublayer} is of a layer that goes as a whole; give it once.")
    return found, left


def check_spans(spans: Iterable[Span], num_layers: int) -> tuple[Span, ...]:
    """Sort, join adjacent spans (one cut has one operator) and check against the model."""
    merged: list[Span] = []
    for span in sorted(spans):
        if span.stop <= span.start:
            raise ConfigError(f"Span {span} is empty: its stop must be greater than its start.")
        if span.start < 0 or span.stop > num_layers:
            raise ConfigError(
                f"Span {span} is out of range: the model has layers 0 to {num_layers - 1}, so "
                f"0 <= start < stop <= {num_layers}."
            )
        if merged and span.start < merged[-1].stop:
            raise ConfigError(f"Spans {merged[-1]} and {span} overlap; give each layer once.")
        if merged and span.start == merged[-1].stop:
            merged[-1] = Span(merged[-1].start, span.stop)
        else:
            merged.append(span)
    if sum(map(len, merged)) >= num_layers:
        raise ConfigError(
            f"The spans remove all {num_layers} layers; at least one layer must be kept."
        )
    return tuple(merged)


def kept_layers(spans: Sequence[Span], num_layers: int) -> tuple[int, ...]:
    """Old indices of the layers that stay, in order; position in the tuple is the new index."""
    removed = {layer for span in spans for layer in range(span.start, span.stop)}
    return tuple(layer for layer in range(num_layers) if layer not in removed)


def operator_positions(spans: Sequence[Span]) -> dict[Span, int]:
    """New boundary at which each span's operator acts; behind the last layer is the final norm."""
    return {one: one.start - sum(len(span) for span in spans if span < one) for one in spans}
