"""Search for halves of layers and whole layers that go, by score per parameter.

A removal is the sorted tuple of halves that go: ``2 layer`` is an attention, the next an MLP. That
goes of which the score rises least per net parameter, until no more fits into what is to go. Then
units come back, one at a time, and others take their place, as long as that is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ghost_dist.errors import ConfigError
from ghost_dist.solver.removals import Removal, Score
from ghost_dist.solver.search import Found, Judges, ScoredSearch, Table, num_kept


class UnitSearch(ScoredSearch):
    """One search; it is run once.

    ``units`` may go at once, each the halves that it consists of. ``net``: parameters less by a
    removal, what is put in its place counted; ``target`` of them should go, as near below as units
    allow, or above by less than ``slack``. A generation but the first has ``width`` removals at
    most, and ``exchanges`` units are tried to be exchanged.
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
        table: Table | None = None,
        after_generation: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        super().__init__(score, judges, table, after_generation)
        self._units, self._net = units, net
        self._target, self._most = target, target + slack
        self._width, self._exchanges, self._allow = width, exchanges, allow
        self._cost: dict[Removal, float] = {}  # of units, per parameter, when last looked at
        self._asked[()] = set()

    @property
    def likely(self) -> int:
        few = min(self._width, len(self._units))
        one = few * len(self._judges.part(0)) + self._judges.more(few)
        steps = self._most / max(1, self._net(self._units[0]))
        return round((steps + 2 * self._exchanges) * one)

    def run(self) -> Found:
        best = self._filled((), "greedy")
        if not best:
            least = min(map(self._net, self._units), default=0)
            raise ConfigError(
                f"selection.remove is {self._target:,} parameters, and there is no attention or "
                f"MLP to go of which that would be half: the smallest has {least:,}. Raise it, or "
                "protect fewer layers."
            )
        tried, improved = 0, True
        while improved and tried < self._exchanges:
            improved = False
            for unit in self._cheapest_back(best)[: self._exchanges - tried]:
                tried += 1
                fewer = tuple(half for half in best if half not in unit)
                other = self._filled(fewer, "exchange", but=unit)
                if other != best and self._mean(other) < self._mean(best):
                    best, improved = other, True
                    break
        return self._found(best)

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
        part, known = self._part, [removal] if removal else []
        self._ask([*left, *known], part)
        for more in left:
            self._cost[moves[more]] = self._ratio(removal, more, part)
        left.sort(key=lambda more: (self._cost[moves[more]], more))
        del left[num_kept(len(left)) :]
        self._ask([*left, *known], self._judges.windows)
        best = min(left, key=lambda more: (self._ratio(removal, more), more))
        self._tell(step, best, parameters=self._net(best))
        return best

    def _cheapest_back(self, removal: Removal) -> list[Removal]:
        """Units of a removal, that first which costs most per parameter."""
        inside = [unit for unit in self._units if set(unit) <= set(removal)]
        whole = {half for unit in inside if len(unit) > 1 for half in unit}
        inside = [unit for unit in inside if len(unit) > 1 or unit[0] not in whole]
        fewer = {u: tuple(half for half in removal if half not in u) for u in inside}
        part = self._part
        self._ask([*filter(None, fewer.values()), removal], part)
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
