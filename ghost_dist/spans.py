"""Half-open spans of decoder layers and the renumbering that follows from removing them.

Boundary ``b`` is the residual stream entering layer ``b``; boundary ``L`` is what the final norm
receives. Removing ``[start, stop)`` hands boundary ``start`` to whatever read boundary ``stop``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghost_dist.errors import ConfigError


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Layers ``start, ..., stop - 1``, numbered from 0."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


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


def check_spans(spans: Iterable[Span], num_layers: int) -> tuple[Span, ...]:
    """Sort, join adjacent spans (one cut has one operator) and check against the model.

    A span may start at layer 0 and may end at the last layer; at least one layer must stay, and
    none may be given twice.
    """
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
    """New boundary at which each span's operator acts: ``start`` less the layers cut before it.

    The operator of a span transforms the stream entering the new layer of that index, or the
    final norm where the index equals the new number of layers. ``spans`` must be sorted.
    """
    positions: dict[Span, int] = {}
    removed = 0
    for span in spans:
        positions[span] = span.start - removed
        removed += len(span)
    return positions
