"""The driver's part of filling a store: leases ranges to replicas and commits what they wrote.

The driver touches no tensor and decides alone. It needs no state of its own to be restarted: what
is committed is in the store, and Ray ends the actors of a driver that died.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.cluster.leases import Lease, LeaseQueue, Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import StoreOfRun, Work
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.collectors import Collectors, last_boundary
from ghost_dist.progress import Advance
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock


class CollectOnCluster:
    """Fills stores on the replicas of a cluster; the ``Collect`` of a run.

    Replicas stay between stages that need the same layers or fewer, until ``release``.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool, self.release = pool, pool.release

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
        pool, config, missing = self._pool, self._pool.inputs.config, store.missing()
        if not missing:
            return
        needed = last_boundary(collectors)
        if needed > pool.num_layers:
            pool.release()  # what is loaded ends too early, or was dropped to fit
            pool.num_layers = needed
        pool.begin(config.engine.replicas)
        keep = to_fit and config.engine.reduction == "all-reduce"
        place = StoreOfRun(store.path.resolve(), store.plan_fingerprint)
        work = ray.put(Work(place, tokens.tokens, collectors, keep))
        queue: LeaseQueue[int] = LeaseQueue(missing)
        total = int(tokens.tokens.size)
        done = total - tokens.window_length * sum(len(store.plan.ranges[i]) for i in missing)
        with pool.reporter.stage(stage, total, "tokens", done) as advance:
            filling = _Filling(pool, store, stage, queue, work, keep, done, done)
            pool.work_off(queue, filling.lease, "ranges", show=lambda: filling.show(advance))
        # Those that still run a range which another has committed would write into a store that
        # the next stage may have removed.
        for replica in list(pool.replicas.values()):
            if replica.under_way:
                pool.drop(replica)


@dataclass
class _Filling:
    """A store that is being filled."""

    _pool: Pool
    _store: StatisticsStore
    _stage: str
    _queue: LeaseQueue[int]
    _work: Any
    _keep: bool
    _committed: int  # tokens that count
    _shown: int

    def lease(self, replica: Replica) -> None:
        if replica.state != "idle":
            return
        lease = self._queue.lease(Worker(replica.number), time.monotonic())
        if lease is not None:
            replica.run(self._work, lease, partial(self._commit, replica, lease))
            self._event("range-leased", lease)

    def show(self, advance: Advance) -> int:
        """Tell the tokens that count or are under way; those of a lost replica are taken back."""
        running = {lease.attempt for lease in self._queue.leases}
        best: dict[int, int] = {}
        for replica in self._pool.replicas.values():
            for lease, tokens in replica.under_way:
                if lease.attempt in running:
                    of_range = self._tokens_of(lease) if tokens is None else tokens
                    best[lease.item] = max(best.get(lease.item, 0), of_range)
        now = self._committed + sum(best.values())
        if now != self._shown:
            advance(now - self._shown)
            self._shown = now
        return self._committed

    def _commit(self, replica: Replica, lease: Lease[int], blocks: list[WrittenBlock]) -> None:
        won = False
        if lease not in self._queue.leases:
            # Another replica was first, or it is of a stage that is over: it never counts.
            self._store.discard_attempt(lease.item, lease.attempt)
        else:
            now = time.monotonic()
            won = self._store.commit_attempt(lease.item, lease.attempt, blocks)
            self._queue.finished(lease, now)
            self._pool.progressed(replica.number)
            self._committed += self._tokens_of(lease)
            self._event("range-committed", lease, seconds=round(now - lease.since, 3))
        if self._keep:
            replica.acknowledge(lease, committed=won)

    def _tokens_of(self, lease: Lease[int]) -> int:
        plan = self._store.plan
        return len(plan.ranges[lease.item]) * plan.window_length

    def _event(self, name: str, lease: Lease[int], **more: float) -> None:
        self._pool.reporter.event(name, stage=self._stage, **lease.of_range, **more)
