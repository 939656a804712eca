"""Deals windows to folds and folds to ranges: the train / held-out split is by window.

With several sources a fold is of one of them. One source is cut into stretches, and a fold is those
that are like each other and unlike the rest, by how often they have each token. A range is the unit
of commit and retry; fold ``k`` of ``K`` has the ranges ``k, k + K, k + 2 K, ...``.
"""

from collections.abc import Collection, Sequence

import numpy as np

from ghost_dist.calibration.windows import Tokens
from ghost_dist.errors import ConfigError

_STRETCHES = 4  # of a fold
_SCALE = 1 << 20


def folds_of_windows(tokens: Tokens, source_of: Sequence[int], folds: int) -> list[int]:
    """The fold of every window, as on any machine; ``folds`` is a multiple of the sources."""
    sources = len(set(source_of))
    fold_of = np.empty(len(tokens), np.int64)
    if sources > 1:
        for source in range(sources):
            windows = np.flatnonzero(np.asarray(source_of) == source)
            for piece, part in enumerate(np.array_split(windows, folds // sources)):
                fold_of[part] = source + sources * piece
        return fold_of.tolist()
    stretches = np.array_split(np.arange(len(tokens)), min(len(tokens), _STRETCHES * folds))
    _, ids = np.unique(tokens, return_inverse=True)
    ids = ids.reshape(tokens.shape)
    counts = [np.bincount(ids[part].ravel(), minlength=ids.max() + 1) for part in stretches]
    shares = np.stack([_SCALE * count // count.sum() for count in counts])
    apart = np.stack([np.abs(shares - share).sum(1) for share in shares])
    left = list(range(len(stretches)))
    for fold in reversed(range(folds)):
        first = max(left, key=lambda i: (apart[i, left].sum(), -i))
        nearest = sorted(left, key=lambda i: (i != first, apart[i, first], i))
        for stretch in nearest[: -(-len(left) // (fold + 1))]:
            fold_of[stretches[stretch]] = fold
            left.remove(stretch)
    return fold_of.tolist()


def assign_ranges(fold_of: Sequence[int], num_ranges: int) -> list[tuple[int, ...]]:
    folds = max(fold_of) + 1
    ranges: list[tuple[int, ...]] = [()] * num_ranges
    for fold in range(folds):
        ids = range(fold, num_ranges, folds)
        windows = [window for window, of in enumerate(fold_of) if of == fold]
        if not 0 < len(ids) <= len(windows):
            raise ConfigError(
                f"{len(fold_of)} calibration windows in {folds} folds cannot be cut into "
                f"{num_ranges} ranges: each holds at least one window, and each fold one range. "
                "Raise calibration.windows, or lower calibration.ranges or operator.folds."
            )
        for range_id, part in zip(ids, np.array_split(windows, len(ids)), strict=True):
            ranges[range_id] = tuple(part.tolist())
    return ranges


def spread(windows: Sequence[int], most: int) -> list[int]:
    """At most so many of them, but one, at equal distances."""
    count = max(1, min(most, len(windows)))
    return [windows[(2 * i + 1) * len(windows) // (2 * count)] for i in range(count)]


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


def judging_pieces(pieces_of: Sequence[Tokens], count: int) -> list[list[int]]:
    """Of every source's pieces, int32 (P, T), the numbers of so many to judge by.

    Half of them are those least like all other text, by the KL divergence of their tokens from
    those of all the others, each counted once more; the others are spread over the rest.
    """
    totals = np.bincount(np.concatenate([pieces.ravel() for pieces in pieces_of]))
    chosen = []
    for pieces in pieces_of:
        distances = []
        for piece in pieces:
            ids, counts = np.unique(piece, return_counts=True)
            share = counts / piece.size
            elsewhere = (totals[ids] - counts + 1) / (totals.sum() - piece.size + len(totals))
            # Rounded, so that it is the same on every machine.
            distances.append(round(float((share * np.log(share / elsewhere)).sum()), 6))
        order = sorted(range(len(pieces)), key=lambda number: (-distances[number], number))
        furthest = order[: count - count // 2]
        rest = sorted(order[len(furthest) :])
        more = min(count // 2, len(rest))
        chosen.append([*furthest, *(spread(rest, more) if more else ())])
    return chosen
