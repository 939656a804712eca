"""The replicas of a run: started where there is room, replaced when lost, released together."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import ray

from ghost_dist.cluster.leases import Lease, LeaseQueue
from ghost_dist.cluster.messages import EngineSpec
from ghost_dist.cluster.metrics import Metrics
from ghost_dist.cluster.placement import (
    Failure,
    Node,
    Shape,
    check_room,
    may_go_on,
    num_fitting,
    strategy,
)
from ghost_dist.cluster.replica import Replica, ReplicaLost
from ghost_dist.errors import ClusterError
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.timing import RangeTimes
from ghost_dist.progress import Reporter
from ghost_dist.statistics.store import WrittenBlock

Written = tuple[Lease[int], list[WrittenBlock], list[RangeTimes]]
POLL_S = 0.5  # longest that the driver sleeps while nothing comes back
LOOK_FOR_ROOM_S = 5.0  # how often it looks for nodes that have joined


class Pool:
    """All replicas, those that load and that wait for room included; ``nodes``: living ones."""

    def __init__(
        self, inputs: RunInputs, reporter: Reporter, shape: Shape, nodes: Callable[[], list[Node]]
    ) -> None:
        self._inputs, self._reporter, self._nodes = inputs, reporter, nodes
        self._config = inputs.config.cluster
        self.shape = shape
        self.replicas: dict[int, Replica] = {}
        self.metrics = Metrics()
        self._numbers = itertools.count()
        self._announced: set[int] = set()
        self._failures: Counter[Failure] = Counter()
        self._last_loss = ""
        self._looked = 0.0
        self._room = 0

    def begin(self, needed: int) -> None:
        """Other work comes, for so many replicas; what was lost before it does not count."""
        check_room(self._nodes(), self.shape, needed)
        self._failures.clear()
        for replica in self.replicas.values():
            replica.restart_timeouts(time.monotonic())

    def work_off(
        self,
        queue: LeaseQueue[Any],
        step: Callable[[Replica], None],
        *,
        num_layers: int,
        ranks: int = 1,
        show: Callable[[], int | None] = lambda: None,
        lost: Callable[[int], None] = lambda _: None,
    ) -> None:
        """The driver's loop: take what replicas have finished, give them more, until all is done.

        ``step`` looks at one replica and gives it something to do; ``num_layers`` are what new
        replicas load; ``ranks``: items that a replica does at a time. ``show`` tells what is done:
        tokens that count, or None while spans are fitted. ``lost`` is told the number of a lost
        replica, whose items go back to the queue.
        """
        while not queue.done:
            # More replicas than there is to do would be idle.
            self.grow(-(-(queue.num_pending + len(queue.leases)) // ranks), num_layers)
            for replica in list(self.replicas.values()):
                try:
                    step(replica)
                except ReplicaLost as error:
                    queue.lost(replica.number)
                    lost(replica.number)
                    self.lose(replica, error)
            self.metrics.show(queue, self.replicas.values(), show())
            if not queue.done:
                self.wait(self.replicas.values())

    def wait(self, replicas: Iterable[Replica]) -> None:
        """Until something comes back from one of these, or for a while."""
        refs = [ref for replica in replicas for ref in replica.refs]
        if refs:
            ray.wait(refs, timeout=POLL_S)
        else:
            time.sleep(POLL_S)

    def progressed(self) -> None:
        """Something was finished: what was lost before it does not count."""
        self._failures.clear()

    def poll(self, replica: Replica) -> Written | None:
        """As :meth:`Replica.poll`; says when a replica has become ready."""
        written = replica.poll(time.monotonic())
        if (replica.ready or replica.state == "unloaded") and replica.number not in self._announced:
            self._announced.add(replica.number)
            self._reporter.event(
                "replica-ready",
                replica=replica.number,
                seconds=round(time.monotonic() - replica.began, 3),
                nodes=[place.node for place in replica.places],
                pids=[place.pid for place in replica.places],
                parameter_bytes=[loaded.parameter_bytes for loaded in replica.loaded],
                conformance=[loaded.conformance for loaded in replica.loaded],
            )
        return written

    def grow(self, useful: int, num_layers: int) -> None:
        """Add replicas where there is room, up to what is useful and wanted."""
        now = time.monotonic()
        wanted = self._inputs.config.engine.replicas
        if now - self._looked > LOOK_FOR_ROOM_S or not self._room:
            self._looked, self._room = now, num_fitting(self._nodes(), self.shape)
        target = min(self._room if wanted == "auto" else wanted, useful)
        placing = [r for r in self.replicas.values() if r.state == "placing"]
        if len(placing) == len(self.replicas) and any(
            now - replica.began > self._config.wait_s for replica in placing
        ):
            check_room(self._nodes(), self.shape, 1)
            raise ClusterError(
                f"No replica could be placed within cluster.wait_s={self._config.wait_s:g} s: the "
                "cluster has the resources but others hold them, or its nodes are going. Wait for "
                f"them, or add nodes. {self._last_loss}"
            )
        while len(self.replicas) < max(1, target):
            number = next(self._numbers)
            self.replicas[number] = Replica(
                number,
                self._spec(num_layers),
                self.shape,
                strategy(self._nodes(), self.shape),
                self._config,
                now,
            )
            self._reporter.event("replica-start", replica=number, ranks=self.shape.ranks)

    def lose(self, replica: Replica, lost: ReplicaLost) -> None:
        """Close a lost replica, and stop the run if a budget of losses is spent."""
        self._failures[lost.failure] += 1
        self.metrics.lost(lost.failure)
        nodes = ", ".join(dict.fromkeys(place.node for place in replica.places)) or "no node yet"
        self._last_loss = f"replica {replica.number} on {nodes}: {lost.failure}, {lost.detail}"
        self._reporter.warn(f"lost {self._last_loss}. What it had committed is kept.")
        self._reporter.event(
            "replica-lost", replica=replica.number, failure=lost.failure, detail=lost.detail
        )
        self.drop(replica)
        if not may_go_on(self._failures, self._config):
            counts = ", ".join(f"{count} x {kind}" for kind, count in self._failures.items())
            raise ClusterError(
                "Replicas were lost without a range or a span being finished in between: "
                f"{counts}. The last was {self._last_loss}. Finished ranges are kept, and the same "
                "command continues. If the nodes are in order, allow more with "
                "cluster.max_crashes, cluster.max_hangs, cluster.heartbeat_timeout_s or "
                "cluster.progress_timeout_s."
            )

    def drop(self, replica: Replica) -> None:
        replica.close()
        del self.replicas[replica.number]

    def release(self) -> None:
        for replica in list(self.replicas.values()):
            self.drop(replica)

    def _spec(self, num_layers: int) -> EngineSpec:
        inputs, engine = self._inputs, self._inputs.config.engine
        # A selection has a range for each fold, calibration as many or more.
        selects = inputs.config.selection.spans is None
        ranges = inputs.config.folds if selects else inputs.num_ranges
        return EngineSpec(
            path=inputs.source.path.resolve(),
            model_fingerprint=inputs.model_fingerprint,
            architecture=inputs.architecture,
            num_layers=num_layers,
            dtype=inputs.dtype,
            device=inputs.worker_device.type,
            batch=inputs.batch,
            degree=engine.ranks,
            kind="tensor_parallel" if engine.kind == "auto" else engine.kind,
            experts=engine.experts,
            window_length=inputs.config.calibration.window_length,
            range_windows=-(-inputs.config.calibration.windows // ranges),
            backend=engine.backend,
            threads=self._config.cpus_per_rank,
            timeout_s=self._config.progress_timeout_s,
        )
