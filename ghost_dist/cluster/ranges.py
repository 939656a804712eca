"""Which replica runs which range of windows: a queue of leases, without Ray and without a clock.

A lease is one attempt at one range. Whoever commits first wins; nothing here decides what counts,
the manifests of ``statistics/store.py`` do. A replica that is lost gives its range back. When no
range is left to hand out, one that takes much longer than the others is leased a second time, so
that a slow replica delays the end by no more than one range.
"""

from __future__ import annotations

import statistics
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

STRAGGLER = 2.0
"""A lease older than this many median durations is given to a second replica, if one is idle."""


@dataclass(frozen=True)
class Lease:
    """One attempt at one range by one replica; ``since`` in seconds of the caller's clock."""

    range_id: int
    attempt: str
    replica: int
    since: float


class RangeQueue:
    """Leases of the ranges that are missing.

    Parameters
    ----------
    missing
        Ids of the ranges to run.
    """

    def __init__(self, missing: Iterable[int]) -> None:
        self._pending = deque(missing)
        self._left = set(self._pending)
        self._leases: dict[str, Lease] = {}
        self._durations: list[float] = []

    @property
    def done(self) -> bool:
        """Whether every range has been committed."""
        return not self._left

    @property
    def num_pending(self) -> int:
        """Ranges that nobody runs."""
        return len(self._pending)

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Attempts under way at ranges that are not committed."""
        return tuple(self._leases.values())

    @property
    def median_duration(self) -> float | None:
        """Seconds that a committed range took, None before the first."""
        return statistics.median(self._durations) if self._durations else None

    def lease(self, replica: int, now: float) -> Lease | None:
        """The next range for an idle replica, or None if there is nothing useful to do."""
        range_id = self._pending.popleft() if self._pending else self._straggler(replica, now)
        if range_id is None:
            return None
        lease = Lease(range_id, uuid.uuid4().hex, replica, now)
        self._leases[lease.attempt] = lease
        return lease

    def committed(self, lease: Lease, now: float) -> None:
        """The range of this lease counts now; other attempts at it are of no use any more."""
        self._durations.append(now - lease.since)
        self._left.discard(lease.range_id)
        self._leases = {
            attempt: other
            for attempt, other in self._leases.items()
            if other.range_id != lease.range_id
        }

    def lost(self, replica: int) -> None:
        """A replica is gone: its range is handed out again unless another one has it too."""
        gone = [lease for lease in self._leases.values() if lease.replica == replica]
        for lease in gone:
            del self._leases[lease.attempt]
            if all(other.range_id != lease.range_id for other in self._leases.values()):
                self._pending.appendleft(lease.range_id)

    def _straggler(self, replica: int, now: float) -> int | None:
        median = self.median_duration
        if median is None:
            return None
        holders: dict[int, list[Lease]] = {}
        for lease in self._leases.values():
            holders.setdefault(lease.range_id, []).append(lease)
        slow = [
            of_range[0]
            for of_range in holders.values()
            if len(of_range) == 1
            and of_range[0].replica != replica
            and now - of_range[0].since > STRAGGLER * median
        ]
        return min(slow, key=lambda lease: lease.since).range_id if slow else None
