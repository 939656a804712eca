"""Which removals of units (layers) there are: sorted tuples of the numbers of those that go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ghost_dist.errors import ConfigError

Removal = tuple[int, ...]
Score = Callable[[Sequence[Removal], Sequence[int]], list[list[float]]]
"""Removals, and numbers of judging windows, to a score per removal and window; inf: as bad as can
be. Several removals are scored at once because they share work; one's score depends on no other."""


@dataclass(frozen=True)
class Rules:
    num_units: int  # of the model
    remove: int  # how many go
    protect: Collection[int] = ()  # units that stay
    min_length: int = 1  # of a run of neighbours that go
    max_length: int | None = None  # None: no bound
    max_spans: int | None = None  # most such runs; None: no bound
    frees: Sequence[float] = ()  # by each unit; empty: it does not matter
    least: float = 0.0  # that those that go free together

    def __post_init__(self) -> None:
        if not 0 < self.remove < self.num_units or not self.allow(()):
            raise ConfigError(
                f"No removal of {self.remove} of {self.num_units} layers keeps to the bounds: "
                f"{len(set(self.protect))} layers protected, spans of {self.min_length} to "
                f"{self.max_length or self.remove} layers, at most "
                f"{self.max_spans or self.remove} of them. Remove fewer layers, protect fewer "
                "(selection.protect), or widen selection.max_spans, min_length or max_length."
            )

    def allow(self, removal: Collection[int]) -> bool:
        """Whether a removal keeps to the rules, or one that is not whole may still come to."""
        gone = frozenset(removal)
        if self.frees:
            later = {*range(self.num_units)} - gone - {*self.protect}
            most = sorted((self.frees[unit] for unit in later), reverse=True)
            freed = [*(self.frees[unit] for unit in gone), *most[: self.remove - len(gone)]]
            if math.fsum(freed) < self.least:
                return False
        longest = self.max_length or self.remove
        # (spans, units of the last one) to the numbers of removed units, as bits of an integer
        states = {(0, 0): 1}
        for unit in range(self.num_units):
            after: dict[tuple[int, int], int] = {}
            for (spans, length), counts in states.items():
                if unit not in gone and (length == 0 or length >= self.min_length):
                    after[spans, 0] = after.get((spans, 0), 0) | counts
                begun = spans + (length == 0)
                fits = length < longest and begun <= (self.max_spans or self.num_units)
                if fits and unit not in self.protect:
                    counted = length + 1 if self.max_length else min(length + 1, self.min_length)
                    key = (begun if self.max_spans else 0, counted)
                    after[key] = after.get(key, 0) | counts << 1
            states = after
        return any(
            counts >> self.remove & 1
            for (_, length), counts in states.items()
            if length == 0 or length >= self.min_length
        )


def single_spans(rules: Rules) -> list[Removal]:
    starts = range(rules.num_units - rules.remove + 1)
    return [tuple(range(start, start + rules.remove)) for start in starts]


def exhaustive(rules: Rules, score: Score, windows: Sequence[int]) -> list[tuple[float, Removal]]:
    """Every removal that the rules allow with its score, the best first."""
    free = [unit for unit in range(rules.num_units) if unit not in rules.protect]
    removals = [r for r in itertools.combinations(free, rules.remove) if rules.allow(r)]
    scores = score(removals, windows)
    return sorted((math.fsum(s) / len(windows), r) for s, r in zip(scores, removals, strict=True))
