"""Which removals of units (layers) there are: sorted tuples of the numbers of those that go."""

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
    max_spans: int | None = None  # most runs of neighbours that go; None: no bound
    frees: Sequence[float] = ()  # by each unit; empty: it does not matter
    least: float = 0.0  # that those that go free together

    def __post_init__(self) -> None:
        if not 0 < self.remove < self.num_units or not self.allow(()):
            raise ConfigError(
                f"No removal of {self.remove} of {self.num_units} layers keeps to the bounds: "
                f"{len(set(self.protect))} layers protected, at most "
                f"{self.max_spans or self.remove} spans. Remove fewer layers, protect fewer "
                "(selection.protect), or allow more spans (selection.max_spans)."
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
        # (spans, whether the last unit went) to the numbers of removed units, as bits of an integer
        states = {(0, False): 1}
        for unit in range(self.num_units):
            after: dict[tuple[int, bool], int] = {}
            for (spans, inside), counts in states.items():
                if unit not in gone:
                    after[spans, False] = after.get((spans, False), 0) | counts
                begun = 0 if self.max_spans is None else spans + (not inside)
                if unit not in self.protect and begun <= (self.max_spans or 0):
                    after[begun, True] = after.get((begun, True), 0) | counts << 1
            states = after
        return any(counts >> self.remove & 1 for counts in states.values())


def single_spans(rules: Rules) -> list[Removal]:
    starts = range(rules.num_units - rules.remove + 1)
    return [tuple(range(start, start + rules.remove)) for start in starts]
