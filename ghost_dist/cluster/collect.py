"""The driver's loop: leases ranges to replicas, commits what they wrote, replaces what is lost.

The driver touches no tensor and decides alone. It needs no state of its own to be restarted: what
is committed is in the store, and Ray ends the actors of a driver that died.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable

import ray

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.cluster.failures import Failure, decide
from ghost_dist.cluster.metrics import Metrics
from ghost_dist.cluster.placement import Node, Shape, check_room, num_fitting, strategy
from ghost_dist.cluster.ranges import Lease, RangeQueue
from ghost_dist.cluster.rank import EngineSpec, Work
from ghost_dist.cluster.replica import Replica, ReplicaLost
from ghost_dist.errors import ClusterError
from ghost_dist.pipeline.collectors import Collectors
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.progress import Advance, Reporter
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock

POLL_S = 0.5
"""Longest that the driver sleeps while nothing comes back."""
LOOK_FOR_ROOM_S = 5.0
"""How often it looks for nodes that have joined."""


class CollectOnCluster:
    """Fills stores on the replicas of a cluster; the ``Collect`` of a run.

    Replicas stay between stages that need the same layers or fewer, until :meth:`release`.

    Parameters
    ----------
    inputs, reporter
        Of the run.
    shape
        What a replica needs.
    nodes
        Asks for the living nodes.
    """

    def __init__(
        self,
        inputs: RunInputs,
        reporter: Reporter,
        shape: Shape,
        nodes: Callable[[], list[Node]],
    ) -> None:
        self._inputs, self._reporter, self._shape, self._nodes = inputs, reporter, shape, nodes
        self._config = inputs.config.cluster
        self._replicas: dict[int, Replica] = {}
        self._numbers = itertools.count()
        self._num_layers = 0
        self._failures: Counter[Failure] = Counter()
        self._last_loss = ""
        self._looked = 0.0
        self._room = 0
        self._metrics = Metrics()

    def __call__(
        self, store: StatisticsStore, tokens: TokenWindows, collectors: Collectors, stage: str
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
            self.release()  # what is loaded ends too early
            self._num_layers = collectors.last_boundary
        wanted = self._inputs.config.engine.replicas
        check_room(self._nodes(), self._shape, 1 if wanted == "auto" else wanted)
        work_id = uuid.uuid4().hex
        work = ray.put(
            Work(store.path.resolve(), store.plan_fingerprint, tokens.tokens, collectors)
        )
        self._failures.clear()
        queue = RangeQueue(missing)

        def tokens_of(range_id: int) -> int:
            return len(store.plan.ranges[range_id]) * tokens.window_length

        committed = int(tokens.tokens.size) - sum(map(tokens_of, missing))
        with self._reporter.stage(stage, int(tokens.tokens.size), "tokens", committed) as advance:
            progress = _Progress(committed, advance, tokens_of)
            while not queue.done:
                self._grow(queue)
                for replica in list(self._replicas.values()):
                    self._step(replica, queue, store, work_id, work, stage, progress)
                progress.show(self._replicas.values(), queue)
                self._metrics.show(queue, self._replicas.values(), progress.committed)
                refs = [ref for replica in self._replicas.values() for ref in replica.refs]
                if refs:
                    ray.wait(refs, timeout=POLL_S)
                else:
                    time.sleep(POLL_S)
        self._drop_stragglers()

    def _drop_stragglers(self) -> None:
        """Close replicas that still run a range which another has committed.

        They would write into a store that the next stage may have removed.
        """
        for number, replica in list(self._replicas.items()):
            if replica.under_way:
                replica.close()
                del self._replicas[number]

    def release(self) -> None:
        """End all replicas and give their devices back."""
        for replica in self._replicas.values():
            replica.close()
        self._replicas.clear()

    def _step(
        self,
        replica: Replica,
        queue: RangeQueue,
        store: StatisticsStore,
        work_id: str,
        work: object,
        stage: str,
        progress: _Progress,
    ) -> None:
        """Take what a replica has finished, and give it something to do."""
        now, event = time.monotonic(), self._reporter.event
        was_ready = replica.ready
        try:
            written = replica.poll(now)
        except ReplicaLost as lost:
            self._lose(replica, queue, lost)
            return
        if replica.ready and not was_ready:
            event(
                "replica-ready",
                replica=replica.number,
                seconds=round(now - replica.began, 3),
                nodes=[place.node for place in replica.places],
                pids=[place.pid for place in replica.places],
                parameter_bytes=[loaded.parameter_bytes for loaded in replica.loaded],
                conformance=[loaded.conformance for loaded in replica.loaded],
            )
        if written is not None:
            self._commit(replica, queue, store, *written, stage, progress)
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
        stage: str,
        progress: _Progress,
    ) -> None:
        if lease not in queue.leases:
            # Another replica was first, or it is of a stage that is over: it never counts.
            store.discard_attempt(lease.range_id, lease.attempt)
            return
        now = time.monotonic()
        store.commit_attempt(lease.range_id, lease.attempt, blocks)
        queue.committed(lease, now)
        self._failures.clear()
        progress.committed += len(store.plan.ranges[lease.range_id]) * store.plan.window_length
        self._reporter.event(
            "range-committed",
            stage=stage,
            range=lease.range_id,
            attempt=lease.attempt,
            replica=replica.number,
            seconds=round(now - lease.since, 3),
        )

    def _lose(self, replica: Replica, queue: RangeQueue, lost: ReplicaLost) -> None:
        """Close a lost replica, and stop the run if it has been too many."""
        self._failures[lost.failure] += 1
        self._metrics.lost(lost.failure)
        nodes = ", ".join(dict.fromkeys(place.node for place in replica.places)) or "no node yet"
        self._last_loss = f"replica {replica.number} on {nodes}: {lost.failure}, {lost.detail}"
        self._reporter.warn(f"lost {self._last_loss}. What it had committed is kept.")
        self._reporter.event(
            "replica-lost", replica=replica.number, failure=lost.failure, detail=lost.detail
        )
        replica.close()
        del self._replicas[replica.number]
        queue.lost(replica.number)
        if decide(self._failures, self._config) == "stop":
            counts = ", ".join(f"{count} x {kind}" for kind, count in self._failures.items())
            raise ClusterError(
                f"Replicas were lost without a range being finished in between: {counts}. The last "
                f"was {self._last_loss}. Finished ranges are kept, and the same command continues. "
                "If the nodes are in order, allow more with cluster.max_crashes, "
                "cluster.max_hangs, cluster.heartbeat_timeout_s or cluster.progress_timeout_s."
            )

    def _grow(self, queue: RangeQueue) -> None:
        """Add replicas where there is room and work for them."""
        now = time.monotonic()
        wanted = self._inputs.config.engine.replicas
        if now - self._looked > LOOK_FOR_ROOM_S or not self._room:
            self._looked, self._room = now, num_fitting(self._nodes(), self._shape)
        target = min(
            self._room if wanted == "auto" else wanted,
            queue.num_pending + len(queue.leases),  # more would have nothing to do
        )
        placing = [r for r in self._replicas.values() if r.state == "placing"]
        if len(placing) == len(self._replicas) and any(
            now - replica.began > self._config.wait_s for replica in placing
        ):
            check_room(self._nodes(), self._shape, 1)
            raise ClusterError(
                f"No replica could be placed within cluster.wait_s={self._config.wait_s:g} s: the "
                "cluster has the resources but others hold them, or its nodes are going. Wait for "
                f"them, or add nodes. {self._last_loss}"
            )
        while len(self._replicas) < max(1, target):
            number = next(self._numbers)
            self._replicas[number] = Replica(
                number,
                self._spec(),
                self._shape,
                strategy(self._nodes(), self._shape),
                self._config,
                now,
            )
            self._reporter.event("replica-start", replica=number, ranks=self._shape.ranks)

    def _spec(self) -> EngineSpec:
        inputs, engine = self._inputs, self._inputs.config.engine
        return EngineSpec(
            path=inputs.source.path.resolve(),
            model_fingerprint=inputs.model_fingerprint,
            architecture=inputs.architecture,
            num_layers=self._num_layers,
            dtype=inputs.dtype,
            device=inputs.worker_device.type,
            batch=inputs.batch,
            degree=engine.tensor_parallel,
            sharded=engine.kind != "resident",
            backend=engine.backend,
            trust_remote_code=inputs.config.model.trust_remote_code,
            threads=self._config.cpus_per_rank,
            timeout_s=self._config.progress_timeout_s,
        )


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
