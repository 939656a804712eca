"""Deals windows to ranges and ranges to folds: the train / held-out split is by window.

A range is the unit of commit and retry: one or more pieces of consecutive windows. Fold ``k`` of
``K`` holds out the ranges ``k, k + K, k + 2 K, ...``, so with two pieces or ranges a fold every
fold samples the whole corpus; every window is held out exactly once, and no window lies on both
sides. Windows are in the order of their places in the source, so what a fold holds out is stretches
of the text and not windows between those that were fitted on: only where two pieces meet may a
document be on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from ghost_dist.errors import ConfigError


def assign_ranges(num_windows: int, num_ranges: int, *, pieces: int = 1) -> list[tuple[int, ...]]:
    """Cut ``range(num_windows)`` into stretches whose sizes differ by at most one, and deal them.

    Range i of n has the ``pieces`` i, i + n, i + 2 n, ...; the first ones are the longer ones.
    """
    count = num_ranges * pieces
    if num_ranges < 1 or num_windows < count:
        raise ConfigError(
            f"{num_windows} calibration windows cannot be cut into {count} ranges: each holds "
            "at least one window. Raise calibration.windows, or lower calibration.ranges or "
            "operator.folds."
        )
    size, longer = divmod(num_windows, count)
    starts = [index * size + min(index, longer) for index in range(count + 1)]
    cut = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    return [tuple(itertools.chain(*cut[index::num_ranges])) for index in range(num_ranges)]


def fold_of_range(range_id: int, folds: int) -> int:
    """The fold that holds this range out."""
    return range_id % folds


class NotHeldOutError(RuntimeError):
    """What is to be judged was fitted on what is to judge it: a mistake of this package."""


def check_held_out(fitted_on: Collection[int], judged_by: Collection[int], what: str) -> None:
    """Refuse to judge a fit by folds, or windows, that it has seen."""
    seen = sorted(set(fitted_on) & set(judged_by))
    if seen:
        raise NotHeldOutError(
            f"{what} would be judged by {seen}, which it was fitted on. Its figure would be no "
            "held-out one; please report this with the command that was run."
        )
