"""The driver's part of the live reduction: who adds which ranges, and who gets which spans.

The driver decides with explicit lists. A range is live at a replica if the attempt that this
replica ran is the committed one, by the manifest; every other range is read from the store by one
replica. If anything breaks on the way, all replicas that took part are closed, their half-added
sums with them, and the spans are fitted from the store, where everything is: the sums of a
reduction are never the record.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ghost_dist.cluster.leases import Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import FitWork
from ghost_dist.cluster.replica import Replica, ReplicaLost
from ghost_dist.cluster.running_sums import ReduceSpec
from ghost_dist.errors import ReductionError
from ghost_dist.spans import Span
from ghost_dist.statistics.store import StatisticsStore

Keys = dict[Span, list[tuple[str, ...]]]
"""Names of the sums that the fits of each span need, as ``FitHere.hold`` takes them."""


@dataclass
class Part:
    """The ranges of one replica: in its running sums, and to be read."""

    kept: dict[int, str] = field(default_factory=dict)
    read: list[int] = field(default_factory=list)


def divide(committed: dict[int, str], live: dict[int, dict[int, str]]) -> dict[int, Part]:
    """Which replica adds which ranges: each committed one once.

    ``committed``: the attempt that counts, of every range of the plan. ``live``: the attempts in
    the running sums of each replica; one that does not count cannot be taken out and is an error.
    What nobody has is dealt to those with the least to read; replicas without any range are left
    out.
    """
    parts = {replica: Part() for replica in live}
    for replica, ranges in live.items():
        for range_id, attempt in ranges.items():
            if committed[range_id] != attempt:
                raise ReductionError(
                    f"Replica {replica} has kept attempt {attempt} of range {range_id}, but "
                    f"{committed[range_id]} was committed."
                )
            parts[replica].kept[range_id] = attempt
    kept = {range_id for part in parts.values() for range_id in part.kept}
    for range_id in committed:
        if range_id not in kept:
            least = min(parts, key=lambda replica: (len(parts[replica].read), replica))
            parts[least].read.append(range_id)
    return {replica: part for replica, part in parts.items() if part.kept or part.read}


def reduce_live(pool: Pool, store: StatisticsStore, work: FitWork, keys: Keys) -> None:
    """Reduce over replicas that hold no model any more; the pool's holders are who got what.

    If it breaks off, nobody has any, and the replicas that took part are closed.
    """
    began, ranks = time.monotonic(), pool.shape.ranks
    replicas = _unloaded(pool, useful=-(-len(keys) // ranks))
    ids = range(len(store.plan.ranges))
    committed = {range_id: store.committed_attempt(range_id) for range_id in ids}
    parts = divide(committed, {replica.number: replica.live for replica in replicas})
    members = [replica for replica in replicas if replica.number in parts]
    # Spans go round the replicas first, so that few spans are spread over the nodes.
    workers = [Worker(replica.number, rank) for rank in range(ranks) for replica in members]
    holders = {span: workers[i % len(workers)] for i, span in enumerate(keys)}
    try:
        _reduce(pool, members, parts, work, keys, holders)
    except _Broken as broken:
        lost = broken.lost
        pool.reporter.warn(
            f"the all-reduce over {len(members)} replicas broke off ({lost.failure}, "
            f"{lost.detail}): the sums are read from the store instead, and added in order."
        )
        pool.reporter.event("reduction-failed", failure=lost.failure, detail=lost.detail)
        for replica in members:
            if replica is not broken.replica:
                pool.drop(replica)
        pool.lose(broken.replica, lost)
        return
    pool.reporter.event(
        "reduced",
        seconds=round(time.monotonic() - began, 3),
        kept={str(number): sorted(part.kept) for number, part in parts.items()},
        read={str(number): part.read for number, part in parts.items()},
    )
    pool.holders.give(holders)


class _Broken(Exception):  # noqa: N818 - an event: the reduction is given up
    def __init__(self, replica: Replica, lost: ReplicaLost) -> None:
        super().__init__(lost.detail)
        self.replica, self.lost = replica, lost


def _unloaded(pool: Pool, useful: int) -> list[Replica]:
    """The placed replicas, once each has dropped its model and added what it kept."""
    while True:
        # More replicas than there are would only read what others could; but one there must be.
        pool.grow(0 if pool.replicas else useful)
        pool.poll()
        placed = [replica for replica in pool.replicas.values() if replica.state != "placing"]
        if placed and all(r.state == "unloaded" and r.acknowledged for r in placed):
            return placed
        pool.wait()


def _reduce(
    pool: Pool,
    members: Sequence[Replica],
    parts: dict[int, Part],
    work: FitWork,
    keys: Keys,
    holders: dict[Span, Worker],
) -> None:
    found: list[Any] = []

    def ask(replica: Replica, rank: int, method: str, *arguments: Any) -> None:
        replica.ask(rank, method, uuid.uuid4().hex, *arguments, then=found.append)

    def answers(number: int) -> list[Any]:
        while len(found) < number:
            pool.wait()
            for replica in members:
                try:
                    replica.poll()
                except ReplicaLost as lost:
                    raise _Broken(replica, lost) from lost
        return found

    port = 0
    if len(members) > 1:
        ask(members[0], 0, "host")
        port = answers(1).pop()
    for index, replica in enumerate(members):
        part = parts[replica.number]
        spec = ReduceSpec(
            kept=part.kept,
            read=tuple(part.read),
            address=members[0].places[0].address,
            port=port,
            index=index,
            count=len(members),
            gather=tuple(
                (of_span, worker.rank)
                for span, worker in holders.items()
                if worker.replica == replica.number
                for of_span in keys[span]
            ),
        )
        for rank in range(pool.shape.ranks):
            ask(replica, rank, "reduce", work, spec)
    answers(len(members) * pool.shape.ranks)
