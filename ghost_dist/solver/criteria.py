"""From streamed scores to spans; pure functions.

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
