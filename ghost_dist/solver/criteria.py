"""From streamed scores to spans, and from a size to a number of layers; pure functions.

Legend: L layers, n layers to remove.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from ghost_dist.errors import ConfigError
from ghost_dist.spans import Span, check_spans


def best_span(
    scores: Sequence[float], remove: int, *, largest: bool, protect: Collection[int] = ()
) -> Span:
    """The span of ``remove`` layers of largest or least score, NaN none; the first of equals."""
    sign = -1 if largest else 1
    starts = [
        start
        for start, score in enumerate(scores)
        if not math.isnan(score) and not any(start <= layer < start + remove for layer in protect)
    ]
    if not starts:
        raise ConfigError(
            f"No span of {remove} layers is a candidate with {len(set(protect))} protected "
            "layers. Remove fewer layers or protect fewer (selection.protect)."
        )
    start = min(starts, key=lambda candidate: sign * scores[candidate])
    return Span(start, start + remove)


def paper_candidates(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores with NaN for the starts that the code of arXiv 2605.15491 never tries: the first, 0,
    and the last, L - n.
    """
    return (math.nan, *scores[1:-1], math.nan)


def least_influential(
    influences: Sequence[float], remove: int, protect: Collection[int] = ()
) -> tuple[Span, ...]:
    """The ``remove`` layers of least influence, the earlier of equals; neighbours are joined."""
    free = [layer for layer in range(len(influences)) if layer not in protect]
    if remove > min(len(free), len(influences) - 1):
        raise ConfigError(
            f"{remove} layers cannot go: of the model's {len(influences)} layers {len(free)} are "
            "not protected, and at least one must be kept."
        )
    taken = sorted(free, key=lambda layer: (influences[layer], layer))[:remove]
    return check_spans((Span(layer, layer + 1) for layer in taken), len(influences))


def layers_of_size(size: float, layer_sizes: Sequence[float], protect: Collection[int] = ()) -> int:
    """Least number of layers that hold ``size``, each counted as the mean of those that may go."""
    free = [float(s) for layer, s in enumerate(layer_sizes) if layer not in protect]
    mean = math.fsum(free) / len(free) if free else 0.0
    # A tolerance of 1e-9 layers: a target written as 7 / 32 of the layers must not need 8.
    remove = max(1, math.ceil(size / mean - 1e-9)) if mean > 0 else 0
    if not 0 < remove <= min(len(free), len(layer_sizes) - 1) or size <= 0:
        raise ConfigError(
            f"Removing {size:.6g} is not possible: the {len(free)} layers that may go hold "
            f"{math.fsum(free):.6g} in all, and at least one of {len(layer_sizes)} must be kept. "
            "Give a smaller selection.remove, greater than 0."
        )
    return remove
