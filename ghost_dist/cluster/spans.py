"""Which rank fits which span: a queue of leases, without Ray and without a clock.

A span is fitted by one rank, whole: its sums are read once. A rank that holds the sums of a span,
since it has read them before or was given them by a reduction, is the only one that gets it as long
as it lives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ghost_dist.spans import Span


class Seat(NamedTuple):
    """A rank of a replica."""

    replica: int
    rank: int


class SpanQueue:
    """Leases of spans.

    Parameters
    ----------
    spans
        To be fitted.
    holders
        Who holds the sums of a span; kept up to date here, for the next queue.
    given
        Spans whose holder was given their sums for good, kept up to date too; of the sums of others
        a rank keeps the last that it read.
    """

    def __init__(self, spans: Iterable[Span], holders: dict[Span, Seat], given: set[Span]) -> None:
        self._pending = list(spans)
        self._leases: dict[Seat, Span] = {}
        self._holders, self._given = holders, given

    @property
    def done(self) -> bool:
        """Whether every span is fitted."""
        return not self._pending and not self._leases

    @property
    def num_pending(self) -> int:
        """Spans that nobody fits."""
        return len(self._pending)

    @property
    def num_leased(self) -> int:
        """Spans that are being fitted."""
        return len(self._leases)

    def lease(self, seat: Seat) -> Span | None:
        """A span for an idle rank: one that it holds, else the first that nobody holds."""
        assert seat not in self._leases
        own = [span for span in self._pending if self._holders.get(span) == seat]
        free = [span for span in self._pending if span not in self._holders]
        span = next(iter((*own, *free)), None)
        if span is None:
            return None
        self._pending.remove(span)
        self._leases[seat] = span
        if span not in self._given:
            read = [s for s, of in self._holders.items() if of == seat and s not in self._given]
            for other in read:
                del self._holders[other]
            self._holders[span] = seat
        return span

    def finished(self, seat: Seat) -> Span:
        """The rank has fitted what it had."""
        return self._leases.pop(seat)

    def lost(self, replica: int) -> None:
        """A replica is gone: what its ranks fitted or held is anybody's."""
        for seat in [seat for seat in self._leases if seat.replica == replica]:
            self._pending.insert(0, self._leases.pop(seat))
        for span in [span for span, seat in self._holders.items() if seat.replica == replica]:
            del self._holders[span]
            self._given.discard(span)
