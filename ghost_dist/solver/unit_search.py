"""Search for halves of layers and whole layers that go, by score per parameter.

A removal is the sorted tuple of halves that go: ``2 layer`` is an attention, the next an MLP. From
the dense model on, that goes of which the score rises least per net parameter, until no more fits
into what is to go. Then units come back, one at a time, and others take their place, as long as
that is better. As in ``search.py``, the table of scores is all the state there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ghost_dist.solver.removals import Removal, Score
from ghost_dist.solver.search import Found, Judges

_KEPT, _FEWEST_KEPT = 0.25, 4  # of the removals of a generation, from a part of the windows to all


class UnitSearch:
    """One search; it is run once.

    Parameters
    ----------
    units
        What may go at once, each the halves that it consists of.
    net
        Parameters less by a removal, what is put in its place counted.
    target
        How many should go; as near below as units allow, or above by less than ``slack``.
    width
        Most removals of a generation but the first.
    exchanges
        Units that are tried to be exchanged.
    allow
        Whether the model can be cut so.
    """

    def __init__(
        self,
        units: Sequence[Removal],
        net: Callable[[Removal], int],
        target: int,
        score: Score,
        judges: Judges,
        *,
        slack: int,
        width: int,
        exchanges: int,
        allow: Callable[[Removal], bool] = lambda _: True,
        table: Mapping[Removal, Mapping[int, float]] | None = None,
        after_generation: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.table = {r: dict(scores) for r, scores in (table or {}).items()}
        self._units, self._net, self._most = units, net, target + slack
        self._score, self._judges, self._allow = score, judges, allow
        self._width, self._exchanges, self._told = width, exchanges, after_generation
        self._cost: dict[Removal, float] = {}  # of units, per parameter, when last looked at
        self._generations: list[dict[str, Any]] = []
        self._asked: dict[Removal, set[int]] = {(): set()}

    @property
    def evaluations(self) -> int:
        """Removals times windows so far."""
        return sum(map(len, self._asked.values()))

    @property
    def likely(self) -> int:
        """Evaluations, about."""
        part, windows = len(self._judges.part(0)), len(self._judges.windows)
        few = min(self._width, len(self._units))
        one = few * part + max(_FEWEST_KEPT, math.ceil(_KEPT * few)) * (windows - part)
        steps = self._most / max(1, self._net(self._units[0]))
        return round((steps + 2 * self._exchanges) * one)

    def run(self) -> Found:
        """Search until nothing improves or enough was exchanged."""
        best = self._filled((), "greedy")
        tried = 0
        improved = True
        while improved and tried < self._exchanges:
            improved = False
            for unit in self._cheapest_back(best):
                if tried == self._exchanges:
                    break
                tried += 1
                fewer = tuple(half for half in best if half not in unit)
                other = self._filled(fewer, "exchange", but=unit)
                if other != best and self._mean(other) < self._mean(best):
                    best, improved = other, True
                    break
        step = self._judges.sources
        by_source = [self._mean(best, self._judges.windows[first::step]) for first in range(step)]
        return Found(
            best,
            self._mean(best),
            tuple(by_source),
            self.evaluations,
            len(self._asked),
            tuple(self._generations),
        )

    def _filled(self, removal: Removal, step: str, but: Removal = ()) -> Removal:
        """More goes, without a unit, until nothing fits."""
        while (more := self._next(removal, step, but)) is not None:
            removal, but = more, ()
        return removal

    def _next(self, removal: Removal, step: str, but: Removal) -> Removal | None:
        gone, moves = set(removal), {}
        for unit in self._units:
            if unit != but and gone.isdisjoint(unit):
                more = tuple(sorted((*removal, *unit)))
                if self._net(removal) < self._net(more) <= self._most and self._allow(more):
                    moves[more] = unit
        if not moves:
            return None
        left = sorted(moves, key=lambda more: (self._cost.get(moves[more], math.inf), more))
        if self._cost:
            left = left[: self._width]
        part = self._judges.part(len(self._generations))
        self._ask([*left, *([removal] if removal else [])], part)
        for more in left:
            self._cost[moves[more]] = self._ratio(removal, more, part)
        left.sort(key=lambda more: (self._cost[moves[more]], more))
        del left[max(_FEWEST_KEPT, math.ceil(_KEPT * len(left))) :]
        self._ask([*left, *([removal] if removal else [])], self._judges.windows)
        best = min(left, key=lambda more: (self._ratio(removal, more), more))
        self._generations.append(
            {
                "step": step,
                "evaluations": self.evaluations,
                "removed": list(best),
                "score": score if math.isfinite(score := self._mean(best)) else None,
                "parameters": self._net(best),
            }
        )
        self._told(self._generations[-1])
        return best

    def _cheapest_back(self, removal: Removal) -> list[Removal]:
        """Units of a removal, that first which costs most per parameter."""
        inside = [unit for unit in self._units if set(unit) <= set(removal)]
        whole = {half for unit in inside if len(unit) > 1 for half in unit}
        inside = [unit for unit in inside if len(unit) > 1 or unit[0] not in whole]
        fewer = {u: tuple(half for half in removal if half not in u) for u in inside}
        part = self._judges.part(len(self._generations))
        asked = [r for r in fewer.values() if r]
        self._ask([*asked, removal], part)
        return sorted(
            (u for u in inside if fewer[u]),
            key=lambda u: (-self._ratio(fewer[u], removal, part), u),
        )

    def _ratio(
        self, removal: Removal, more: Removal, windows: Sequence[int] | None = None
    ) -> float:
        before = self._mean(removal, windows) if removal else 0.0
        gone = self._net(more) - self._net(removal)
        return (self._mean(more, windows) - before) / max(1, gone)

    def _mean(self, removal: Removal, windows: Sequence[int] | None = None) -> float:
        windows = self._judges.windows if windows is None else windows
        scores = self.table[removal]
        return math.fsum(scores[window] for window in windows) / len(windows)

    def _ask(self, removals: Sequence[Removal], windows: Sequence[int]) -> None:
        missing: dict[tuple[int, ...], list[Removal]] = {}
        for removal in removals:
            self._asked.setdefault(removal, set()).update(windows)
            have = self.table.setdefault(removal, {})
            if lacks := tuple(window for window in windows if window not in have):
                missing.setdefault(lacks, []).append(removal)
        for lacks, some in missing.items():
            for removal, scores in zip(some, self._score(some, lacks), strict=True):
                self.table[removal].update(zip(lacks, scores, strict=True))
