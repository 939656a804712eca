"""The driver's part of filling a store: leases ranges to replicas and commits what they wrote.

The driver touches no tensor and decides alone. It needs no state of its own to be restarted: what
is committed is in the store, and Ray ends the actors of a driver that died.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ray

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.cluster.leases import Lease, LeaseQueue, Worker
from ghost_dist.cluster.messages import Work
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.collectors import Collectors
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.timing import RangeTimes
from ghost_dist.progress import Advance, Reporter
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock


class CollectOnCluster:
    """Fills stores on the replicas of a cluster; the ``Collect`` of a run.

    Replicas stay between stages that need the same layers or fewer, until :meth:`release`.
    """

    def __init__(self, inputs: RunInputs, reporter: Reporter, pool: Pool) -> None:
        self._inputs, self._reporter, self._pool = inputs, reporter, pool
        self._num_layers = 0

    def __call__(
        self,
        store: StatisticsStore,
        tokens: TokenWindows,
        collectors: Collectors,
        stage: str,
        *,
        to_fit: bool = False,
    ) -> None:
        """Run and commit every range that is missing; what is finished survives any error."""
        missing = store.missing()
        if not missing:
            return
        if collectors.last_boundary > self._num_layers:
            self._pool.release()  # what is loaded ends too early
            self._num_layers = collectors.last_boundary
        config = self._inputs.config
        wanted = config.engine.replicas
        self._pool.begin(1 if wanted == "auto" else wanted)
        keep = to_fit and config.engine.reduction == "all-reduce"
        work_id = uuid.uuid4().hex
        work = ray.put(
            Work(
                store.path.resolve(),
                store.plan_fingerprint,
                tokens.tokens,
                collectors,
                config.folds if keep else None,
            )
        )
        queue: LeaseQueue[int] = LeaseQueue(missing, twice=True)

        def tokens_of(range_id: int) -> int:
            return len(store.plan.ranges[range_id]) * tokens.window_length

        committed = int(tokens.tokens.size) - sum(map(tokens_of, missing))
        with self._reporter.stage(stage, int(tokens.tokens.size), "tokens", committed) as advance:
            progress = _Progress(committed, advance, tokens_of)
            filling = _Filling(store, stage, queue, progress, work_id, work, keep)
            self._pool.work_off(
                queue,
                lambda replica: self._step(replica, filling),
                num_layers=self._num_layers,
                show=lambda: progress.show(self._pool.replicas.values(), queue),
            )
        # Those that still run a range which another has committed would write into a store that
        # the next stage may have removed.
        for replica in list(self._pool.replicas.values()):
            if replica.under_way:
                self._pool.drop(replica)

    def release(self) -> None:
        self._pool.release()
        self._num_layers = 0

    def _step(self, replica: Replica, filling: _Filling) -> None:
        """Take what a replica has finished, and give it something to do."""
        written, now = self._pool.poll(replica), time.monotonic()
        if written is not None:
            won = self._commit(replica, filling, *written)
            if filling.keep:
                replica.acknowledge(written[0], committed=won)
        if replica.state == "idle":
            lease = filling.queue.lease(Worker(replica.number), now)
            if lease is not None:
                replica.run(filling.work_id, filling.work, lease, now)
                self._reporter.event(
                    "range-leased",
                    stage=filling.stage,
                    range=lease.item,
                    attempt=lease.attempt,
                    replica=replica.number,
                )

    def _commit(
        self,
        replica: Replica,
        filling: _Filling,
        lease: Lease[int],
        blocks: list[WrittenBlock],
        times: list[RangeTimes],
    ) -> bool:
        """Whether the attempt counts from now on."""
        store, queue = filling.store, filling.queue
        if lease not in queue.leases:
            # Another replica was first, or it is of a stage that is over: it never counts.
            store.discard_attempt(lease.item, lease.attempt)
            return False
        now = time.monotonic()
        won = store.commit_attempt(lease.item, lease.attempt, blocks)
        queue.finished(lease, now)
        self._pool.progressed()
        filling.progress.committed += len(store.plan.ranges[lease.item]) * store.plan.window_length
        self._reporter.event(
            "range-committed",
            stage=filling.stage,
            range=lease.item,
            attempt=lease.attempt,
            replica=replica.number,
            seconds=round(now - lease.since, 3),
            forward_s=[round(of_rank.forward_s, 3) for of_rank in times],
            sums_s=[round(of_rank.sums_s, 3) for of_rank in times],
        )
        return won


class _Filling(NamedTuple):
    """A store that is being filled, and what for."""

    store: StatisticsStore
    stage: str
    queue: LeaseQueue[int]
    progress: _Progress
    work_id: str
    work: object
    keep: bool


class _Progress:
    """Tokens that count and tokens under way, as one number that a person sees."""

    def __init__(self, committed: int, advance: Advance, tokens_of: Callable[[int], int]) -> None:
        self.committed = self._shown = committed
        self._advance, self._tokens_of = advance, tokens_of

    def show(self, replicas: Iterable[Replica], queue: LeaseQueue[int]) -> int:
        """Tell what has changed; what a lost replica had not committed is taken back."""
        running = {lease.attempt for lease in queue.leases}
        best: dict[int, int] = {}
        for replica in replicas:
            for lease, tokens in replica.under_way:
                if lease.attempt in running:
                    of_range = self._tokens_of(lease.item) if tokens is None else tokens
                    best[lease.item] = max(best.get(lease.item, 0), of_range)
        now = self.committed + sum(best.values())
        if now != self._shown:
            self._advance(now - self._shown)
            self._shown = now
        return self.committed
