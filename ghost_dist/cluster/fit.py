"""Fits spans on the devices of the replicas' ranks, where that is better than in the driver.

The rule depends on the configuration and on the kinds of devices alone, so that a run that is
continued computes in the same place: the ranks fit if they have GPUs and the driver has none, if
there is more than one span, or if the sums are all-reduced, since they have them then. Else the
driver fits, and the replicas are released before; so it does with a GPU beside ranks without one.

The all-reduce: the driver decides who adds which ranges, and who gets which spans. What no replica
has is read from the store by one. If anything breaks on the way, all replicas that took part are
closed, and the spans are fitted from the store: the sums of a reduction are never the record.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghost_dist.cluster.leases import Lease, LeaseQueue, Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import StoreOfRun
from ghost_dist.cluster.replica import Replica, ReplicaLost
from ghost_dist.cluster.running_sums import ReduceSpec
from ghost_dist.errors import ReductionError
from ghost_dist.pipeline.candidates import stored_kind
from ghost_dist.pipeline.fitting import FitHere, FitJob, Outcome
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import sums_key
from ghost_dist.statistics.store import StatisticsStore

Keys = dict[Span, list[str]]
"""Names of the sums that the fits of each span need, as ``FitHere.hold`` takes them."""


@dataclass
class Part:
    """The ranges of one replica: in its running sums, and to be read."""

    kept: dict[int, str]
    read: list[int] = field(default_factory=list)


def divide(committed: dict[int, str], live: dict[int, dict[int, str]]) -> dict[int, Part]:
    """Which replica adds which ranges: each ``committed`` one once; those without any are left out.

    ``live``: the attempts in the running sums of each replica; one that does not count cannot be
    taken out and is an error. What nobody has is dealt to those with the least to read.
    """
    parts = {replica: Part(dict(ranges)) for replica, ranges in live.items()}
    for replica, ranges in live.items():
        for range_id, attempt in ranges.items():
            if committed[range_id] != attempt:
                raise ReductionError(
                    f"Replica {replica} has kept attempt {attempt} of range {range_id}, but "
                    f"{committed[range_id]} was committed."
                )
    kept = {range_id for part in parts.values() for range_id in part.kept}
    for range_id in committed:
        if range_id not in kept:
            least = min(parts, key=lambda replica: (len(parts[replica].read), replica))
            parts[least].read.append(range_id)
    return {replica: part for replica, part in parts.items() if part.kept or part.read}


def reduce_live(pool: Pool, store: StatisticsStore, place: StoreOfRun, keys: Keys) -> None:
    """Reduce over replicas that hold no model any more; the pool's holders are who got what."""
    began, ranks = time.monotonic(), pool.shape.ranks
    replicas = _unloaded(pool, useful=-(-len(keys) // ranks))
    committed = {i: store.committed_attempt(i) for i in range(len(store.plan.ranges))}
    parts = divide(committed, {replica.number: replica.live for replica in replicas})
    members = [replica for replica in replicas if replica.number in parts]
    # Spans go round the replicas first, so that few spans are spread over the nodes.
    workers = [Worker(replica.number, rank) for rank in range(ranks) for replica in members]
    holders = {span: workers[i % len(workers)] for i, span in enumerate(keys)}
    try:
        _reduce(pool, members, parts, place, keys, holders)
    except ReplicaLost as lost:
        pool.reporter.warn(
            f"the all-reduce over {len(members)} replicas broke off ({lost.failure}, "
            f"{lost.detail}): the sums are read from the store instead, and added in order."
        )
        pool.reporter.event("reduction-failed", failure=lost.failure, detail=lost.detail)
        for replica in members:
            if replica is not lost.replica:
                pool.drop(replica)
        pool.lose(lost)
        return
    pool.reporter.event(
        "reduced",
        seconds=round(time.monotonic() - began, 3),
        kept={str(number): sorted(part.kept) for number, part in parts.items()},
        read={str(number): part.read for number, part in parts.items()},
    )
    pool.holders.give(holders)


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
    place: StoreOfRun,
    keys: Keys,
    holders: dict[Span, Worker],
) -> None:
    port, answers = 0, list[Any]()

    def wait(number: int) -> None:
        while len(answers) < number:
            pool.wait()
            for replica in members:
                replica.poll()

    if len(members) > 1:
        members[0].ask(0, "host", then=answers.append)
        wait(1)
        port = answers.pop()
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
                (key, worker.rank)
                for span, worker in holders.items()
                if worker.replica == replica.number
                for key in keys[span]
            ),
        )
        for rank in range(pool.shape.ranks):
            replica.ask(rank, "reduce", place, spec, then=answers.append)
    wait(len(members) * pool.shape.ranks)


class FitOnCluster:
    """Fits on the ranks of a pool of replicas, or here; the ``FitSpans`` of a run.

    Replicas drop their model before; lost ones are replaced by ones that never load it.
    """

    def __init__(self, pool: Pool) -> None:
        inputs, self._pool, self._reduced = pool.inputs, pool, False
        of_run = (inputs.source, inputs.architecture, inputs.config.folds)
        self._here = FitHere(*of_run, inputs.fit_device, inputs.fit_room)

    def __call__(
        self, store: StatisticsStore, jobs: Sequence[FitJob], advance: Callable[[int], None]
    ) -> list[Outcome]:
        of_span: dict[Span, list[int]] = {}
        for number, job in enumerate(jobs):
            of_span.setdefault(job.span, []).append(number)
        inputs = self._pool.inputs
        driver, ranks = inputs.fit_device.type, inputs.worker_device.type
        reduces = inputs.config.engine.reduction == "all-reduce"
        on_ranks = reduces or (len(of_span) > 1 if driver == ranks else ranks == "cuda")
        if not on_ranks or all(job.candidate.kind() is None for job in jobs):
            self._pool.release()
            return self._here(store, jobs, advance)
        self._pool.begin(1)
        self._unload()
        place = StoreOfRun(store.path.resolve(), store.plan_fingerprint)
        if reduces and not self._reduced:
            self._reduced = True
            keys: Keys = {}
            for job in jobs:
                kind, of_span_keys = job.candidate.kind(), keys.setdefault(job.span, [])
                stored = stored_kind(kind, job.span, store.plan.entries) if kind else None
                if stored and (name := sums_key(job.span, stored)) not in of_span_keys:
                    of_span_keys.append(name)
            reduce_live(self._pool, store, place, keys)
        outcomes: dict[int, Outcome] = {}

        def asked(_: Replica, lease: Lease[Span]) -> tuple[Any, ...]:
            self._event("span-leased", lease)
            return place, [jobs[number] for number in of_span[lease.item]]

        def take(lease: Lease[Span], found: list[Outcome]) -> None:
            self._event("span-fitted", lease, fits=len(found))
            outcomes.update(zip(of_span[lease.item], found, strict=True))
            advance(len(found))

        queue = LeaseQueue(of_span, self._pool.holders)
        self._pool.share(queue, "spans", "fit", asked, take)
        return [outcomes[number] for number in range(len(jobs))]

    def _unload(self) -> None:
        """Replicas with the model drop it; those that were still coming are not waited for."""
        self._pool.num_layers = 0
        for replica in list(self._pool.replicas.values()):
            if replica.state == "idle":
                replica.unload()
            elif replica.spec.num_layers and replica.state not in ("unloading", "unloaded"):
                self._pool.drop(replica)

    def _event(self, name: str, lease: Lease[Span], **more: int) -> None:
        worker = lease.worker._asdict()
        self._pool.reporter.event(name, span=str(lease.item), **worker, **more)
