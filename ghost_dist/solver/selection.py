"""Which span is removed, from scores that were streamed over the calibration windows."""

from __future__ import annotations

from collections.abc import Sequence

from ghost_dist.errors import ConfigError
from ghost_dist.spans import Span


def check_remove(remove: int, num_layers: int) -> None:
    """Refuse to remove more layers than can go.

    Raises
    ------
    ConfigError
        If no layer would be left.
    """
    if remove >= num_layers:
        raise ConfigError(
            f"selection.remove={remove}, but the model has {num_layers} layers and at least one "
            f"must be kept: give at most {num_layers - 1}."
        )


def most_similar_span(cosines: Sequence[float], remove: int) -> Span:
    """The span of ``remove`` layers whose ends are most alike; the first of equals.

    Parameters
    ----------
    cosines
        Mean per-token cosine between the streams entering layer ``start`` and ``start + remove``,
        index = start.
    """
    start = max(range(len(cosines)), key=lambda index: (cosines[index], -index))
    return Span(start, start + remove)
