"""Search for the removal of least score: pure combinatorics, who scores knows the model.

Units (layers) are numbered; a removal is the sorted tuple of those that go. Its score is the mean
of one number per judging window, as many of every source of text. The steps are in docs/theory.md.
Of many removals another part of the windows is looked at in every generation, so that none is
learned, and only of the best of them all windows.

The table of scores is all the state there is: the same search with the table of a stopped one makes
the same decisions without scoring again what it holds, and goes on where that one ended.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghost_dist.errors import ConfigError
from ghost_dist.solver.removals import Removal, Rules, Score, single_spans

Table = Mapping[Removal, Mapping[int, float]]
"""Scores by removal and judging window."""

_PARTS = 4  # of the judging windows
_KEPT, _FEWEST_KEPT = 0.25, 4  # of the removals of a generation
_ERRORS = 1.0  # standard errors that an improvement is larger than
_MUTANTS = 16  # of a generation
_PATIENCE = 3  # generations of mutants without a better one


@dataclass(frozen=True)
class Judges:
    """Judging windows: number w is piece ``w // sources`` of source ``w % sources``.

    ``rough``: of the first half of the pieces there are rough scores too, numbered behind them.
    """

    sources: int
    pieces: int
    rough: bool = False

    @property
    def windows(self) -> range:
        return range(self.sources * self.pieces)

    def part(self, number: int) -> list[int]:
        """What many are scored on: rough scores, or windows of every source that come in turn."""
        if self.rough:
            half = self.sources * ((self.pieces + 1) // 2)
            return [w + len(self.windows) for w in self.windows[:half]]
        parts = min(_PARTS, self.pieces)
        return [w for w in self.windows if w // self.sources % parts == number % parts]

    def more(self, count: int) -> int:
        """Evaluations of the removals that are kept of so many, and are scored on all windows."""
        again = 0 if self.rough else len(self.part(0))
        return num_kept(count) * (len(self.windows) - again)


@dataclass(frozen=True)
class Found:
    removal: Removal  # the best on all judging windows
    score: float
    scores: tuple[float, ...]  # by source
    evaluations: int  # removals times windows that were scored
    candidates: int  # removals that were scored on any
    generations: tuple[dict[str, Any], ...]  # what was done, evaluations up to then, the best


class Search:
    """One search; it is run once.

    No generation begins after ``budget`` evaluations; None: ``effort`` times as many as the greedy
    part takes. ``width``: most removals of a generation but the first and the spans; None: all.
    ``possible``: whether the model can be cut so; asked of whole removals only.
    """

    def __init__(
        self,
        rules: Rules,
        score: Score,
        judges: Judges,
        *,
        budget: int | None = None,
        effort: float = 2.0,
        width: int | None = None,
        seed: int = 0,
        table: Table | None = None,
        possible: Callable[[Removal], bool] = lambda _: True,
        after_generation: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.table = {removal: dict(scores) for removal, scores in (table or {}).items()}
        self._score, self._judges, self._told = score, judges, after_generation
        self._asked: dict[Removal, set[int]] = {}
        self._generations: list[dict[str, Any]] = []
        self.rules, self._possible, self._width = rules, possible, width
        self._random = random.Random(seed)
        self._cost: dict[int, float] = {}  # of units, when they were last looked at
        self.budget = search_budget(rules, judges, budget, effort, width)

    def run(self) -> Found:
        best = self._greedy()
        spans = [s for s in single_spans(self.rules) if self.rules.allow(s) and self._possible(s)]
        if spans and not self._better(best, span := self._generation("span", spans)):
            best = span
        best = self._climbed(best)
        unimproved = 0
        while unimproved < _PATIENCE and (mutant := self._mutated(best)) is not None:
            unimproved += 1
            if self._better(other := self._climbed(mutant), best):
                best, unimproved = other, 0
        return Found(
            best,
            self._mean(best),
            tuple(self._of_sources(best)),
            self.evaluations,
            sum(map(bool, self._asked.values())),
            tuple(self._generations),
        )

    def _greedy(self) -> Removal:
        removal: Removal = ()
        while len(removal) < self.rules.remove:
            candidates = self._one_more(removal)
            if not candidates:
                raise ConfigError(
                    f"The search came to {removal}, and none of the removals of "
                    f"{self.rules.remove} layers that contain it can be cut out of this model. "
                    "Give selection.spans."
                )
            part, before = self._part, removal
            removal = self._generation("greedy", candidates)
            if before:
                self._ask([before], part)
            base = self._mean(before, part) if before else 0.0
            for candidate in candidates:
                [unit] = set(candidate) - set(before)
                self._cost[unit] = self._mean(candidate, part) - base
        return removal

    def _one_more(self, base: Removal, but: Removal = ()) -> list[Removal]:
        """A removal and one unit more, all that can be ``but`` one, or as many as ``width`` of
        those whose unit cost least when it was last looked at.
        """
        found = []
        for unit in range(self.rules.num_units):
            if unit not in base and unit not in self.rules.protect:
                more = tuple(sorted((*base, unit)))
                if more != but and self.rules.allow(more) and self._counts(more):
                    found.append((self._cost.get(unit, math.inf), more))
        if self._width is not None and self._cost:
            found = sorted(found)[: self._width]
        return sorted(more for _, more in found)

    def _climbed(self, removal: Removal) -> Removal:
        while (better := self._swapped(removal)) is not None:
            removal = better
        return removal

    def _swapped(self, removal: Removal) -> Removal | None:
        """The first better one where one unit, that first which costs most, is exchanged."""
        fewer = [tuple(u for u in removal if u != unit) for unit in removal]
        if not self._affords(fewer):
            return None
        part = self._part
        self._ask(fewer, part)
        fewer.sort(key=lambda removal: (self._mean(removal, part), removal))
        self._tell("return", fewer[0], part)
        for base in fewer:
            swaps = self._one_more(base, but=removal)
            if not self._affords(swaps):
                return None
            if swaps and self._better(found := self._generation("swap", swaps), removal):
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

    def _counts(self, removal: Removal) -> bool:
        return len(removal) < self.rules.remove or self._possible(removal)

    def _generation(self, step: str, candidates: Sequence[Removal]) -> Removal:
        """Score some, the better ones on more windows; the best of them."""
        part, left = self._part, list(candidates)
        self._ask(left, part)
        left.sort(key=lambda removal: (self._mean(removal, part), removal))
        del left[num_kept(len(left)) :]
        self._ask(left, self._judges.windows)
        best = min(left, key=lambda removal: (self._mean(removal), removal))
        self._tell(step, best)
        return best

    def _affords(self, candidates: Sequence[Removal]) -> bool:
        """Whether the budget lasts for a generation of these."""
        part = set(self._part)
        few = sum(len(part - self._asked.get(removal, set())) for removal in candidates)
        return self.evaluations + few + self._judges.more(len(candidates)) <= self.budget

    def _better(self, removal: Removal, than: Removal) -> bool:
        """Whether it is by more than the standard error of the improvement over the sources."""
        improvement = self._mean(than) - self._mean(removal)
        if self._judges.sources < 2 or not math.isfinite(improvement):
            return improvement > 0
        pairs = zip(self._of_sources(than), self._of_sources(removal), strict=True)
        spread = statistics.stdev(old - new for old, new in pairs)
        return improvement > _ERRORS * spread / math.sqrt(self._judges.sources)

    @property
    def evaluations(self) -> int:
        """Removals times windows so far, whether they were scored now or in the table before."""
        return sum(map(len, self._asked.values()))

    @property
    def _part(self) -> list[int]:
        """The windows that all of the next generation are scored on."""
        return self._judges.part(len(self._generations))

    def _ask(self, removals: Sequence[Removal], windows: Sequence[int]) -> None:
        """Have removals scored on these windows, where they are not yet."""
        missing: dict[tuple[int, ...], list[Removal]] = {}
        for removal in removals:
            self._asked.setdefault(removal, set()).update(windows)
            have = self.table.setdefault(removal, {})
            if lacks := tuple(window for window in windows if window not in have):
                missing.setdefault(lacks, []).append(removal)
        for lacks, some in missing.items():
            for removal, scores in zip(some, self._score(some, lacks), strict=True):
                self.table[removal].update(zip(lacks, scores, strict=True))

    def _mean(self, removal: Removal, windows: Sequence[int] | None = None) -> float:
        windows = self._judges.windows if windows is None else windows
        return math.fsum(self.table[removal][window] for window in windows) / len(windows)

    def _of_sources(self, removal: Removal) -> list[float]:
        step = self._judges.sources
        return [self._mean(removal, self._judges.windows[first::step]) for first in range(step)]

    def _tell(self, step: str, best: Removal, windows: Sequence[int] | None = None) -> None:
        self._generations.append(
            {
                "step": step,
                "evaluations": self.evaluations,
                "removed": list(best),
                "score": _plain(self._mean(best, windows)),
            }
        )
        self._told(self._generations[-1])


def greedy_counts(rules: Rules, width: int | None = None) -> list[int]:
    """Removals of each generation at most, until units have gone one at a time, and as one span."""
    free = rules.num_units - len(set(rules.protect))
    later = [min(free - gone, width or free) for gone in range(1, rules.remove)]
    return [free, *later, len(single_spans(rules))]


def greedy_evaluations(
    rules: Rules, judges: Judges, width: int | None = None, *, spans: bool = True
) -> int:
    """What it takes at most until then, or before the ``spans``: a larger removal begins so."""
    part, counts = len(judges.part(0)), greedy_counts(rules, width)
    counts = counts if spans else counts[:-1]
    again = (rules.remove - 1) * part if judges.rough else 0  # what more is removed from
    return again + sum(count * part + judges.more(count) for count in counts)


def search_budget(
    rules: Rules, judges: Judges, budget: int | None, effort: float, width: int | None = None
) -> int:
    """Evaluations of a :class:`Search` at most; ConfigError where it could not end."""
    least = greedy_evaluations(rules, judges, width)
    budget = budget if budget is not None else math.ceil(effort * least)
    if budget < least:
        raise ConfigError(
            f"A budget of {budget} evaluations is too small: to remove {rules.remove} of "
            f"{rules.num_units} layers one at a time takes up to {least}. Raise "
            "selection.effort, or remove fewer layers."
        )
    return budget


def table_as_plain(table: Table) -> dict[str, Any]:
    """For a JSON file; exact."""
    return {
        ",".join(map(str, removal)): {str(window): _plain(s) for window, s in scores.items()}
        for removal, scores in table.items()
    }


def table_from_plain(plain: Mapping[str, Any]) -> dict[Removal, dict[int, float]]:
    """Inverse of :func:`table_as_plain`."""
    return {
        tuple(map(int, removal.split(","))) if removal else (): {
            int(window): math.inf if score is None else score for window, score in scores.items()
        }
        for removal, scores in plain.items()
    }


def _plain(score: float) -> float | None:
    return score if math.isfinite(score) else None


def num_kept(count: int) -> int:
    """Of so many removals, those that go from a part of the windows to all."""
    return min(count, max(_FEWEST_KEPT, math.ceil(_KEPT * count)))
