"""Fits spans on the devices of the replicas' ranks, where that is better than in the driver.

The rule depends on the configuration and on the kinds of devices alone, so that a run that is
continued computes in the same place: the ranks fit if they have GPUs and the driver has none, if
there is more than one span, or if the sums are all-reduced, since they have them then. Else the
driver fits, and the replicas are released before. A driver with a GPU beside ranks without one
always fits itself, unless the sums are all-reduced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from ghost_dist.cluster.leases import Lease, LeaseQueue, Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import FitWork
from ghost_dist.cluster.reduce import reduce_live
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.candidates import stored_keys
from ghost_dist.pipeline.fitting import FitHere, FitJob, Outcome
from ghost_dist.spans import Span
from ghost_dist.statistics.store import StatisticsStore


class FitOnCluster:
    """Fits on the ranks of a pool of replicas, or here; the ``FitSpans`` of a run.

    Replicas drop their model before; lost ones are replaced by ones that never load it.
    """

    def __init__(self, pool: Pool) -> None:
        inputs, self._pool = pool.inputs, pool
        self._config, self._room = inputs.config, inputs.fit_room
        self._driver, self._ranks = inputs.fit_device.type, inputs.worker_device.type
        self._here = FitHere(
            inputs.source, inputs.architecture, self._config.folds, inputs.fit_device, self._room
        )
        self._reduced = False

    def __call__(
        self, store: StatisticsStore, jobs: Sequence[FitJob], advance: Callable[[int], None]
    ) -> list[Outcome]:
        of_span: dict[Span, list[int]] = {}
        for number, job in enumerate(jobs):
            of_span.setdefault(job.span, []).append(number)
        reduces = self._config.engine.reduction == "all-reduce"
        if self._driver != self._ranks:
            on_ranks = reduces or self._ranks == "cuda"
        else:
            on_ranks = reduces or len(of_span) > 1
        if not on_ranks or all(job.candidate.kind() is None for job in jobs):
            self._pool.release()
            return self._here(store, jobs, advance)
        self._pool.begin(1)
        self._unload()
        path, fingerprint = store.path.resolve(), store.plan_fingerprint
        work = FitWork(path, fingerprint, self._config.folds, self._room)
        if reduces and not self._reduced:
            self._reduced = True
            keys: dict[Span, list[tuple[str, ...]]] = {}
            for job in jobs:
                kind, of_span_keys = job.candidate.kind(), keys.setdefault(job.span, [])
                names = stored_keys(kind, job.span, store.plan.entries) if kind else ()
                if names and names not in of_span_keys:
                    of_span_keys.append(names)
            reduce_live(self._pool, store, work, keys)
        outcomes: dict[int, Outcome] = {}
        queue = LeaseQueue(of_span, self._pool.holders)

        def take(lease: Lease[Span], found: list[Outcome]) -> None:
            queue.finished(lease, time.monotonic())
            self._pool.progressed()
            self._event("span-fitted", lease, fits=len(found))
            outcomes.update(zip(of_span[lease.item], found, strict=True))
            advance(len(found))

        def fit(replica: Replica) -> None:
            """Give a span to every rank of a replica that has none."""
            for rank in replica.free_ranks:
                lease = queue.lease(Worker(replica.number, rank), time.monotonic())
                if lease is not None:
                    of_lease = [jobs[number] for number in of_span[lease.item]]
                    then = partial(take, lease)
                    replica.ask(rank, "fit", lease.attempt, work, of_lease, then=then)
                    self._event("span-leased", lease)

        self._pool.work_off(queue, fit, ranks=self._pool.shape.ranks)
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
