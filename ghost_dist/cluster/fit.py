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

from ghost_dist.cluster.leases import Holders, Lease, LeaseQueue, Worker
from ghost_dist.cluster.messages import FitWork
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.reduce import LiveReduction
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.candidates import stored_keys
from ghost_dist.pipeline.fitting import FitHere, FitJob, Outcome
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span
from ghost_dist.statistics.store import StatisticsStore


class FitOnCluster:
    """Fits on the ranks of a pool of replicas, or here; the ``FitSpans`` of a run.

    Replicas drop their model before; lost ones are replaced by ones that never load it.
    """

    def __init__(self, inputs: RunInputs, reporter: Reporter, pool: Pool) -> None:
        self._inputs, self._reporter, self._pool = inputs, reporter, pool
        folds = inputs.config.folds
        self._here = FitHere(
            inputs.source, inputs.architecture, folds, inputs.fit_device, inputs.fit_room
        )
        self._holders: Holders[Span] = Holders()  # ranks that have the sums of a span
        self._reduced = False

    def __call__(
        self, store: StatisticsStore, jobs: Sequence[FitJob], advance: Callable[[int], None]
    ) -> list[Outcome]:
        of_span: dict[Span, list[int]] = {}
        for number, job in enumerate(jobs):
            of_span.setdefault(job.span, []).append(number)
        fitted = any(job.candidate.kind() is not None for job in jobs)
        if not fitted or not self._on_ranks(len(of_span)):
            self._pool.release()
            return self._here(store, jobs, advance)
        self._pool.begin(1)
        self._unload()
        work = FitWork(
            store.path.resolve(),
            store.plan_fingerprint,
            self._inputs.config.folds,
            self._inputs.fit_room,
        )
        if self._inputs.config.engine.reduction == "all-reduce" and not self._reduced:
            self._reduced = True
            keys: dict[Span, list[tuple[str, ...]]] = {}
            for job in jobs:
                kind, of_span_keys = job.candidate.kind(), keys.setdefault(job.span, [])
                names = stored_keys(kind, job.span, store.plan.entries) if kind else ()
                if names and names not in of_span_keys:
                    of_span_keys.append(names)
            reduction = LiveReduction(self._pool, self._reporter)
            self._holders.give(reduction.run(store, work, keys))
        outcomes: dict[int, Outcome] = {}

        def take(span: Span, found: Sequence[Outcome]) -> None:
            outcomes.update(zip(of_span[span], found, strict=True))
            advance(len(found))

        by_span = {span: [jobs[i] for i in numbers] for span, numbers in of_span.items()}
        self._fit(work, by_span, take)
        return [outcomes[number] for number in range(len(jobs))]

    def _on_ranks(self, num_spans: int) -> bool:
        driver, ranks = self._inputs.fit_device.type, self._inputs.worker_device.type
        if self._inputs.config.engine.reduction == "all-reduce":
            return True
        if driver != ranks:
            return ranks == "cuda"
        return num_spans > 1

    def _unload(self) -> None:
        """Replicas with the model drop it; those that were still coming are not waited for."""
        for replica in list(self._pool.replicas.values()):
            if replica.state == "idle":
                replica.unload(time.monotonic())
            elif replica.has_model:
                self._pool.drop(replica)

    def _fit(
        self,
        work: FitWork,
        by_span: dict[Span, list[FitJob]],
        take: Callable[[Span, Sequence[Outcome]], None],
    ) -> None:
        queue = LeaseQueue(by_span, self._holders, twice=False)
        leases: dict[Worker, Lease[Span]] = {}

        def step(replica: Replica) -> None:
            """Take what a replica's ranks have fitted, and give them something to do."""
            self._pool.poll(replica)
            now = time.monotonic()
            for rank, _, sent in replica.answers():
                lease = leases.pop(Worker(replica.number, rank))
                queue.finished(lease, now)
                self._pool.progressed()
                self._reporter.event(
                    "span-fitted",
                    span=str(lease.item),
                    fits=len(sent),
                    replica=replica.number,
                    rank=rank,
                )
                take(lease.item, sent)
            for rank in replica.free_ranks:
                worker = Worker(replica.number, rank)
                if (found := queue.lease(worker, now)) is not None:
                    leases[worker] = found
                    self._holders.read(worker, found.item)
                    replica.ask(rank, "fit", found.attempt, work, by_span[found.item], now=now)
                    self._reporter.event(
                        "span-leased", span=str(found.item), replica=replica.number, rank=rank
                    )

        def lost(replica: int) -> None:
            self._holders.lost(replica)
            for worker in [worker for worker in leases if worker.replica == replica]:
                del leases[worker]

        self._pool.work_off(queue, step, num_layers=0, ranks=self._pool.shape.ranks, lost=lost)
