"""The driver's part of filling a store: leases ranges to replicas and commits what they wrote.

The driver touches no tensor and decides alone. It needs no state of its own to be restarted: what
is committed is in the store, and Ray ends the actors of a driver that died.
"""

import time
from functools import partial

import ray

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.cluster.leases import Lease, LeaseQueue
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import StoreOfRun, Work
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.collectors import Collectors, last_boundary
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
        tokens_of = [len(windows) * tokens.window_length for windows in store.plan.ranges]
        committed = shown = total - sum(tokens_of[range_id] for range_id in missing)

        def begin(replica: Replica, lease: Lease[int]) -> None:
            replica.run(work, lease, partial(written, replica, lease))
            pool.reporter.event("range-leased", stage=stage, **lease.of_range)

        def written(replica: Replica, lease: Lease[int], blocks: list[WrittenBlock]) -> None:
            nonlocal committed
            won = False
            if lease not in queue.leases:
                # Another replica was first, or it is of a stage that is over: it never counts.
                store.discard_attempt(lease.item, lease.attempt)
            else:
                took = {"seconds": round(time.monotonic() - lease.since, 3)}
                won = store.commit_attempt(lease.item, lease.attempt, blocks)
                pool.finished(lease)
                committed += tokens_of[lease.item]
                pool.reporter.event("range-committed", stage=stage, **lease.of_range, **took)
            if keep:
                replica.acknowledge(lease, committed=won)

        def show() -> int:
            """Tell tokens that count or are under way; those of a lost replica are taken back."""
            nonlocal shown
            best, running = dict[int, int](), set(queue.leases)
            for replica in pool.replicas.values():
                for lease, ran in replica.under_way:
                    if lease in running:
                        of_range = tokens_of[lease.item] if ran is None else ran
                        best[lease.item] = max(best.get(lease.item, 0), of_range)
            now = committed + sum(best.values())
            if now != shown:
                advance(now - shown)
                shown = now
            return committed

        with pool.reporter.stage(stage, total, "tokens", committed) as advance:
            pool.work_off(queue, "ranges", begin, show)
        # Those that still run a range which another has committed would write into a store that
        # the next stage may have removed.
        for replica in list(pool.replicas.values()):
            if replica.under_way:
                pool.drop(replica)
