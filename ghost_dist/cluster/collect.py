"""The driver's loop: leases ranges to replicas, commits what they wrote, replaces what is lost.

The driver touches no tensor and decides alone. It needs no state of its own to be restarted: what
is committed is in the store, and Ray ends the actors of a driver that died.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable

import ray

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.cluster.messages import Work
from ghost_dist.cluster.pool import POLL_S, Pool
from ghost_dist.cluster.ranges import Lease, RangeQueue
from ghost_dist.cluster.replica import Replica, ReplicaLost
from ghost_dist.pipeline.collectors import Collectors
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.timing import RangeTimes
from ghost_dist.progress import Advance, Reporter
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock


class CollectOnCluster:
    """Fills stores on the replicas of a cluster; the ``Collect`` of a run.

    Replicas stay between stages that need the same layers or fewer, until :meth:`release`.

    Parameters
    ----------
    inputs, reporter
        Of the run.
    pool
        Its replicas.
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
        """Run every range that is missing in the store, and commit it.

        Raises
        ------
        ConfigError
            If the cluster has no room, or nodes differ.
        ClusterError
            If replicas are lost without progress too often, or none can be placed.
        GhostDistError, OSError
            What any replica meets: a damaged checkpoint, activations that are not finite, a full
            disk. Committed ranges are kept.
        """
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
                config.operator.folds if keep else None,
            )
        )
        queue = RangeQueue(missing)

        def tokens_of(range_id: int) -> int:
            return len(store.plan.ranges[range_id]) * tokens.window_length

        committed = int(tokens.tokens.size) - sum(map(tokens_of, missing))
        with self._reporter.stage(stage, int(tokens.tokens.size), "tokens", committed) as advance:
            progress = _Progress(committed, advance, tokens_of)
            while not queue.done:
                # More replicas than ranges to run would have nothing to do.
                self._pool.grow(queue.num_pending + len(queue.leases), self._num_layers)
                for replica in list(self._pool.replicas.values()):
                    self._step(replica, queue, store, work_id, work, stage, progress, keep)
                progress.show(self._pool.replicas.values(), queue)
                self._pool.metrics.show(queue, self._pool.replicas.values(), progress.committed)
                refs = [ref for replica in self._pool.replicas.values() for ref in replica.refs]
                if refs:
                    ray.wait(refs, timeout=POLL_S)
                else:
                    time.sleep(POLL_S)
        self._drop_stragglers()

    def _drop_stragglers(self) -> None:
        """Close replicas that still run a range which another has committed.

        They would write into a store that the next stage may have removed.
        """
        for replica in list(self._pool.replicas.values()):
            if replica.under_way:
                self._pool.drop(replica)

    def release(self) -> None:
        """End all replicas and give their devices back."""
        self._pool.release()
        self._num_layers = 0

    def _step(
        self,
        replica: Replica,
        queue: RangeQueue,
        store: StatisticsStore,
        work_id: str,
        work: object,
        stage: str,
        progress: _Progress,
        keep: bool,
    ) -> None:
        """Take what a replica has finished, and give it something to do."""
        now, event = time.monotonic(), self._reporter.event
        try:
            written = self._pool.poll(replica)
        except ReplicaLost as lost:
            self._pool.lose(replica, lost)
            queue.lost(replica.number)
            return
        if written is not None:
            won = self._commit(replica, queue, store, *written, stage, progress)
            if keep:
                replica.settle(written[0], committed=won)
        if replica.state == "idle":
            lease = queue.lease(replica.number, now)
            if lease is not None:
                replica.run(work_id, work, lease, now)
                event(
                    "range-leased",
                    stage=stage,
                    range=lease.range_id,
                    attempt=lease.attempt,
                    replica=replica.number,
                )

    def _commit(
        self,
        replica: Replica,
        queue: RangeQueue,
        store: StatisticsStore,
        lease: Lease,
        blocks: list[WrittenBlock],
        times: list[RangeTimes],
        stage: str,
        progress: _Progress,
    ) -> bool:
        """Whether the attempt counts from now on."""
        if lease not in queue.leases:
            # Another replica was first, or it is of a stage that is over: it never counts.
            store.discard_attempt(lease.range_id, lease.attempt)
            return False
        now = time.monotonic()
        won = store.commit_attempt(lease.range_id, lease.attempt, blocks)
        queue.committed(lease, now)
        self._pool.progressed()
        progress.committed += len(store.plan.ranges[lease.range_id]) * store.plan.window_length
        self._reporter.event(
            "range-committed",
            stage=stage,
            range=lease.range_id,
            attempt=lease.attempt,
            replica=replica.number,
            seconds=round(now - lease.since, 3),
            forward_s=[round(of_rank.forward_s, 3) for of_rank in times],
            sums_s=[round(of_rank.sums_s, 3) for of_rank in times],
        )
        return won


class _Progress:
    """Tokens that count and tokens under way, as one number that a person sees."""

    def __init__(self, committed: int, advance: Advance, tokens_of: Callable[[int], int]) -> None:
        self.committed = self._shown = committed
        self._advance, self._tokens_of = advance, tokens_of

    def show(self, replicas: Iterable[Replica], queue: RangeQueue) -> None:
        """Tell what has changed; what a lost replica had not committed is taken back."""
        running = {lease.attempt for lease in queue.leases}
        best: dict[int, int] = {}
        for replica in replicas:
            for lease, tokens in replica.under_way:
                if lease.attempt in running:
                    of_range = self._tokens_of(lease.range_id) if tokens is None else tokens
                    best[lease.range_id] = max(best.get(lease.range_id, 0), of_range)
        now = self.committed + sum(best.values())
        if now != self._shown:
            self._advance(now - self._shown)
            self._shown = now
