"""Search for the removal of least score: pure combinatorics, who scores knows the model.

Units (layers) are numbered; a removal is the sorted tuple of those that go. Its score is the mean
of one number per judging window, so many removals are scored on few windows and only the best of
them on more. Units go one at a time from the dense model; then one comes back and another goes, as
long as that improves; then several do at random, and again one at a time from there, until the
budget ends or nothing improves.

The table of scores is all the state there is: the same search with the table of a stopped one makes
the same decisions without scoring again what it holds, and goes on where that one ended.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghost_dist.errors import ConfigError

Removal = tuple[int, ...]
Score = Callable[[Sequence[Removal], range], list[list[float]]]
"""Removals, and numbers of judging windows, to a score per removal and window; inf: as bad as can
be. Several removals are scored at once because they share work; one's score depends on no other."""

_KEPT = 0.25  # of the removals of a generation, from few windows to more
_FEWEST_KEPT = 4
_MUTANTS = 16  # of a generation
_PATIENCE = 3  # generations of mutants without a better one


@dataclass(frozen=True)
class Rules:
    """Which removals there are.

    Attributes
    ----------
    num_units
        Of the model.
    remove
        How many go.
    protect
        Units that stay.
    min_length, max_length
        Of a run of neighbours that go; None: no bound.
    max_spans
        Most such runs; None: no bound.
    """

    num_units: int
    remove: int
    protect: Collection[int] = ()
    min_length: int = 1
    max_length: int | None = None
    max_spans: int | None = None

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


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes
    ----------
    removal, score
        The best on all judging windows.
    evaluations
        Removals times windows that were scored.
    candidates
        Removals that were scored on any.
    generations
        What was done, the evaluations up to then, and what was best.
    """

    removal: Removal
    score: float
    evaluations: int
    candidates: int
    generations: tuple[dict[str, Any], ...]


class Search:
    """One search; it is run once.

    Parameters
    ----------
    rules
        What may go.
    score
        Who scores.
    depths
        Numbers of judging windows, ascending: of many removals, ..., of few.
    budget
        Evaluations after which no generation begins; None: as many as the greedy part takes, by
        ``effort`` times.
    effort
        See ``budget``.
    seed
        Of the mutations.
    table
        Scores of a search with the same parameters that was stopped.
    possible
        Whether the model can be cut so; asked of whole removals only.
    after_generation
        Called with the last entry of ``generations``; ``table`` may be written then.

    Raises
    ------
    ConfigError
        If the budget is less than it takes to come to one whole removal.
    """

    def __init__(
        self,
        rules: Rules,
        score: Score,
        depths: Sequence[int],
        *,
        budget: int | None = None,
        effort: float = 2.0,
        seed: int = 0,
        table: Mapping[Removal, Sequence[float]] | None = None,
        possible: Callable[[Removal], bool] = lambda _: True,
        after_generation: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.rules, self.table = rules, {r: list(scores) for r, scores in (table or {}).items()}
        self._score, self._depths, self._possible = score, tuple(depths), possible
        self._random, self._told = random.Random(seed), after_generation
        self._asked: dict[Removal, int] = {}
        self._generations: list[dict[str, Any]] = []
        least = greedy_evaluations(rules, depths)
        self.budget = budget if budget is not None else math.ceil(effort * least)
        if self.budget < least:
            raise ConfigError(
                f"A budget of {self.budget} evaluations is too small: to remove {rules.remove} of "
                f"{rules.num_units} layers one at a time takes up to {least}. Raise "
                "selection.effort, or remove fewer layers."
            )

    @property
    def evaluations(self) -> int:
        """Removals times windows so far, whether they were scored now or in the table before."""
        return sum(self._asked.values())

    def run(self) -> Found:
        """Search until the budget ends or nothing improves.

        Raises
        ------
        ConfigError
            If the model can be cut at none of the removals that were come to.
        """
        best = self._climbed(self._greedy())
        unimproved = 0
        while unimproved < _PATIENCE and (mutant := self._mutated(best)) is not None:
            unimproved += 1
            if self._mean(other := self._climbed(mutant)) < self._mean(best):
                best, unimproved = other, 0
        return Found(
            best, self._mean(best), self.evaluations, len(self._asked), tuple(self._generations)
        )

    def _greedy(self) -> Removal:
        removal: Removal = ()
        while len(removal) < self.rules.remove:
            candidates = [c for c in self._one_more(removal) if self._counts(c)]
            if not candidates:
                raise ConfigError(
                    f"The search came to {removal}, and none of the removals of "
                    f"{self.rules.remove} layers that contain it can be cut out of this model. "
                    "Give selection.spans, or selection.criterion=recoverability."
                )
            removal = self._generation("greedy", candidates)
        return removal

    def _climbed(self, removal: Removal) -> Removal:
        while (better := self._swapped(removal)) is not None:
            removal = better
        return removal

    def _swapped(self, removal: Removal) -> Removal | None:
        """The first better one, where one unit comes back and another goes; None: there is none.

        Units come back in the order of what that improves.
        """
        fewer = [tuple(u for u in removal if u != unit) for unit in removal]
        if not self._affords(fewer):
            return None
        self._generation("return", fewer)
        for base in sorted(fewer, key=self._rank_seen):
            swaps = [c for c in self._one_more(base) if c != removal and self._counts(c)]
            if not self._affords(swaps):
                return None
            if swaps and self._mean(found := self._generation("swap", swaps)) < self._mean(removal):
                return found
        return None

    def _mutated(self, removal: Removal) -> Removal | None:
        """The best of some with two or three units swapped at random; None: the budget ends."""
        mutants: dict[Removal, None] = {}
        for _ in range(8 * _MUTANTS):
            swaps = min(self._random.choice((2, 2, 3)), len(removal))
            stays = self._random.sample(removal, len(removal) - swaps)
            others = sorted(set(range(self.rules.num_units)) - set(removal))
            goes = self._random.sample(others, min(swaps, len(others)))
            mutant = tuple(sorted((*stays, *goes)))
            new = len(mutant) == self.rules.remove and mutant not in self._asked
            if new and self.rules.allow(mutant) and self._counts(mutant):
                mutants[mutant] = None
            if len(mutants) == _MUTANTS:
                break
        if not mutants or not self._affords(list(mutants)):
            return None
        return self._generation("mutate", list(mutants))

    def _one_more(self, removal: Removal) -> Iterator[Removal]:
        for unit in range(self.rules.num_units):
            if unit not in removal and unit not in self.rules.protect:
                more = tuple(sorted((*removal, unit)))
                if self.rules.allow(more):
                    yield more

    def _counts(self, removal: Removal) -> bool:
        return len(removal) < self.rules.remove or self._possible(removal)

    def _generation(self, step: str, candidates: Sequence[Removal]) -> Removal:
        """Score some, the better ones on more windows; the best of them."""
        left = list(candidates)
        for before, depth in itertools.pairwise((0, *self._depths)):
            if before:
                left.sort(key=lambda removal: (self._mean(removal, before), removal))
                del left[_num_kept(len(left)) :]
            self._ask(left, depth)
        best = min(left, key=self._rank)
        self._generations.append(
            {
                "step": step,
                "evaluations": self.evaluations,
                "removed": list(best),
                "score": _plain(self._mean(best)),
            }
        )
        self._told(self._generations[-1])
        return best

    def _ask(self, removals: Sequence[Removal], depth: int) -> None:
        """Have removals scored on the first windows, those that are not yet."""
        missing: dict[int, list[Removal]] = {}
        for removal in removals:
            self._asked[removal] = max(depth, self._asked.get(removal, 0))
            have = len(self.table.get(removal, ()))
            if have < depth:
                missing.setdefault(have, []).append(removal)
        for have, some in missing.items():
            for removal, scores in zip(some, self._score(some, range(have, depth)), strict=True):
                self.table.setdefault(removal, []).extend(scores)

    def _affords(self, candidates: Sequence[Removal]) -> bool:
        """Whether the budget lasts for a generation of these."""
        unseen = sum(removal not in self._asked for removal in candidates)
        return self.evaluations + _evaluations(unseen, self._depths) <= self.budget

    def _mean(self, removal: Removal, depth: int | None = None) -> float:
        return math.fsum(self.table[removal][: depth or self._depths[-1]]) / (
            depth or self._depths[-1]
        )

    def _rank(self, removal: Removal) -> tuple[float, Removal]:
        return self._mean(removal), removal

    def _rank_seen(self, removal: Removal) -> tuple[float, Removal]:
        """By the windows that all of a generation were scored on."""
        return self._mean(removal, self._depths[0]), removal


def greedy_evaluations(rules: Rules, depths: Sequence[int]) -> int:
    """What it takes at most until the units have gone one at a time."""
    free = rules.num_units - len(set(rules.protect))
    return sum(_evaluations(free - gone, depths) for gone in range(rules.remove))


def exhaustive(rules: Rules, score: Score, num_windows: int) -> list[tuple[float, Removal]]:
    """Every removal that the rules allow with its score, the best first."""
    free = [unit for unit in range(rules.num_units) if unit not in rules.protect]
    removals = [r for r in itertools.combinations(free, rules.remove) if rules.allow(r)]
    scores = score(removals, range(num_windows))
    return sorted((math.fsum(s) / num_windows, r) for s, r in zip(scores, removals, strict=True))


def table_as_plain(table: Mapping[Removal, Sequence[float]]) -> dict[str, list[float | None]]:
    """For a JSON file; exact."""
    return {
        ",".join(map(str, removal)): [_plain(score) for score in scores]
        for removal, scores in table.items()
    }


def table_from_plain(plain: Mapping[str, Sequence[float | None]]) -> dict[Removal, list[float]]:
    """Inverse of :func:`table_as_plain`."""
    return {
        tuple(map(int, removal.split(","))) if removal else (): [
            math.inf if score is None else score for score in scores
        ]
        for removal, scores in plain.items()
    }


def _evaluations(count: int, depths: Sequence[int]) -> int:
    """Of a generation of so many removals that were not scored before."""
    total = 0
    for before, depth in itertools.pairwise((0, *depths)):
        count = _num_kept(count) if before else count
        total += count * (depth - before)
    return total


def _plain(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _num_kept(count: int) -> int:
    return min(count, max(_FEWEST_KEPT, math.ceil(_KEPT * count)))
