"""How far a figure would move on other windows of the same text: bootstrap over windows.

All variants are drawn with the same windows, so that a ratio of two has the interval of a paired
comparison. Windows next to each other are not independent; nothing is said of another text.
"""

from collections.abc import Mapping, Sequence

import numpy as np

_RESAMPLES, _SEED = 2000, 0
_LEVEL = 0.95
_DRAWN_AT_ONCE = 50

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def resampled_perplexities(
    nats: Mapping[str, Sequence[float]], tokens_per_window: int
) -> dict[str, FloatArray]:
    """Perplexity of every variant, from the nats of windows, as :func:`resampled_means`."""
    means = resampled_means(nats)
    with np.errstate(over="ignore"):  # beyond exp(709) it is infinite, as the perplexity is
        return {name: np.exp(values / tokens_per_window) for name, values in means.items()}


def resampled_means(per_window: Mapping[str, Sequence[float]]) -> dict[str, FloatArray]:
    """Means (2000,) of each variant's figure on windows drawn with replacement, alike for all."""
    lengths = {len(values) for values in per_window.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"expected the same windows of every variant, got {sorted(lengths)} of")
    [windows] = lengths
    figures_WV = np.array(list(per_window.values()), dtype=np.float64).T
    generator = np.random.default_rng(_SEED)
    means = []
    for _ in range(_RESAMPLES // _DRAWN_AT_ONCE):
        drawn = (windows, np.full(windows, 1 / windows), _DRAWN_AT_ONCE)
        means.append(generator.multinomial(*drawn) @ figures_WV / windows)
    means_RV = np.concatenate(means)
    return {name: means_RV[:, column] for column, name in enumerate(per_window)}


def interval(values: FloatArray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None where they are not finite or all one."""
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return None
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
