"""The replicas of a run: started where there is room, replaced when lost, released together."""

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import ray
from ray.util import metrics

from ghost_dist.cluster.failures import keep_failure
from ghost_dist.cluster.leases import (
    LOSSES,
    Failure,
    Holders,
    Lease,
    LeaseQueue,
    Node,
    Shape,
    left_out,
    may_go_on,
)
from ghost_dist.cluster.rank import EngineSpec
from ghost_dist.cluster.replica import Replica, ReplicaLost, State
from ghost_dist.errors import ClusterError
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.progress import Reporter

POLL_S = 0.5  # longest that the driver sleeps while nothing comes back
LOOK_FOR_ROOM_S = 5.0  # how often it looks for nodes that have joined
ASK_AGAIN_S = 60.0  # for room: Ray has lost requests when a node came back with another address

Items = Literal["ranges", "search_parts", "spans"]
"""What a queue holds: ranges to run, parts of a generation of a search to score, spans to fit."""


class Pool:
    """All replicas, those that load and that wait for room included; ``nodes``: living ones.

    ``num_layers`` is what new replicas load; 0: nothing, they only fit.
    """

    def __init__(
        self, inputs: RunInputs, reporter: Reporter, shape: Shape, nodes: Callable[[], list[Node]]
    ) -> None:
        self.inputs, self.reporter, self.shape, self._nodes = inputs, reporter, shape, nodes
        self.replicas: dict[int, Replica] = {}
        self.num_layers = 0
        self.holders: Holders[Any] = Holders()  # ranks that have the sums of a span
        self._queue: LeaseQueue[Any] = LeaseQueue(())
        self._metrics = _Metrics(self.replicas)
        self._numbers = itertools.count()
        self._failures: Counter[Failure] = Counter()
        self._last_loss = ""
        self._losses, self._full = Counter[str](), set[str]()  # by id of the node
        self._left_out: tuple[str, ...] = ()
        self._looked, self._room = -math.inf, 0
        self._placed = 0.0  # when a replica was there last, or was not waited for

    @property
    def wanted(self) -> int:
        """Replicas: as configured, or as many as there is room for."""
        wanted, now = self.inputs.config.engine.replicas, time.monotonic()
        if now - self._looked > LOOK_FOR_ROOM_S or not self._room:
            self._looked, self._room = now, self.shape.fitting(self._usable())
        return max(1, self._room) if wanted == "auto" else wanted

    def _usable(self) -> list[Node]:
        """Living nodes but those that are left out, which is told when it changes."""
        nodes = self._nodes()
        out = left_out(self._losses, nodes, self.shape)
        for node in nodes:
            if node.id in set(out) - set(self._left_out):
                self.reporter.warn(
                    f"node {node.name} is left out, as it loses replicas and finishes nothing. It "
                    "gets a new one only if no other node has room, or once Ray was started on it "
                    f"again. The last was {self._last_loss}"
                )
                self.reporter.event("node-left-out", node=node.name, node_id=node.id)
        self._left_out = out
        return [node for node in nodes if node.id not in out]

    def begin(self, needed: int | Literal["auto"]) -> None:
        """Other work comes, for so many replicas; what was lost before it does not count."""
        self.shape.check_room(self._nodes(), 1 if needed == "auto" else needed)
        self._failures.clear()
        self._placed = time.monotonic()
        for replica in self.replicas.values():
            replica.restart_timeouts()

    def work_off(
        self,
        queue: LeaseQueue[Any],
        items: Items,
        begin: Callable[[Replica, Lease[Any]], None],
        show: Callable[[], int | None] = lambda: None,
    ) -> None:
        """The driver's loop: take what replicas have finished, give them more, until all is done.

        ``begin`` has an item done, and tells :meth:`finished`. ``show`` tells the tokens that
        count, where items have such.
        """
        self._queue, workers = queue, 1 if self.num_layers else self.shape.ranks

        def give(replica: Replica) -> None:
            for worker in replica.free:
                lease = queue.lease(worker, time.monotonic())
                if lease is not None:
                    begin(replica, lease)

        while not queue.done:
            # More replicas than there is to do would be idle.
            self.grow(-(-(queue.num_pending + len(queue.leases)) // workers))
            self.poll(give)
            committed = show()
            self._metrics.show(items, queue, committed)
            self.reporter.at_work["committed"] = committed
            if not queue.done:
                self.wait()
        self.reporter.at_work["committed"] = None  # what follows has other tokens, or none

    def share(
        self,
        queue: LeaseQueue[Any],
        items: Items,
        method: str,
        asked: Callable[[Replica, Lease[Any]], tuple[Any, ...]],
        take: Callable[[Lease[Any], Any], None],
    ) -> None:
        """The same by single ranks: a ``method`` of theirs, ``asked`` for an item."""

        def done(lease: Lease[Any], found: Any) -> None:
            if lease in queue.leases:  # else another one was first
                self.finished(lease)
                take(lease, found)

        def begin(replica: Replica, lease: Lease[Any]) -> None:
            arguments, then = asked(replica, lease), partial(done, lease)
            replica.ask(lease.worker.rank, method, *arguments, then=then)

        self.work_off(queue, items, begin)

    def poll(self, then: Callable[[Replica], None] = lambda _: None) -> None:
        """Look what has come back from every replica; the lost ones go."""
        for replica in list(self.replicas.values()):
            try:
                replica.poll()
                then(replica)
            except ReplicaLost as lost:
                self.lose(lost)
        self._tell_replicas()

    def _tell_replicas(self) -> None:
        self._metrics.show_replicas()
        self.reporter.at_work["replicas"] = [
            {"replica": number, "state": replica.state, "nodes": [p.node for p in replica.places]}
            for number, replica in self.replicas.items()
        ]

    def wait(self) -> None:
        """Until something comes back, or for a while."""
        refs = [ref for replica in self.replicas.values() for ref in replica.refs]
        if refs:
            ray.wait(refs, timeout=POLL_S)
        else:
            time.sleep(POLL_S)

    def finished(self, lease: Lease[Any]) -> None:
        """An item is done: what was lost before it does not count."""
        self._queue.finished(lease, time.monotonic())
        self._failures.clear()
        self._full.clear()
        for node in self.replicas[lease.worker.replica].node_ids:
            self._losses[node] = 0

    def grow(self, useful: int) -> None:
        """Add replicas where there is room, up to what is useful and wanted."""
        for replica in [r for r in self.replicas.values() if r.state == "joining"]:
            # Ray has forgotten actors that were about to start on a node that died.
            if not {node.id for node in self._nodes()}.issuperset(replica.node_ids):
                what = "its node died before the ranks started"
                self.lose(ReplicaLost(replica, "crash", what))
        now, config = time.monotonic(), self.inputs.config
        wait_s, target = config.cluster.wait_s, min(self.wanted, useful)
        placing = [r for r in self.replicas.values() if r.state == "placing"]
        if not placing or len(placing) < len(self.replicas):
            self._placed = now
        elif now - self._placed > wait_s:
            self.shape.check_room(self._nodes(), 1)
            raise ClusterError(
                f"No replica could be placed within cluster.wait_s={wait_s:g} s: the cluster has "
                "the resources but others hold them, or its nodes are going. Wait for them, or add "
                f"nodes. {self._last_loss}"
            )
        for replica in placing:
            if now - replica.began > ASK_AGAIN_S or replica.left_out != self._left_out:
                self.drop(replica)
        while len(self.replicas) < max(1, target):
            number = next(self._numbers)
            how = self.shape.strategy(self._usable())
            out = self._left_out
            replica = Replica(number, self._spec(), self.shape, how, self.reporter, out)
            self.replicas[number] = replica
            self.reporter.event("replica-start", replica=number, ranks=self.shape.ranks)
            self.reporter.say(f"starting replica {number}, of {self.shape.ranks} rank(s)")

    def lose(self, lost: ReplicaLost) -> None:
        """Close a lost replica, and stop the run if a budget of losses is spent."""
        replica, node = lost.replica, lost.node
        if lost.disk is not None:
            self._stop_if_full(node, lost.disk)
        if node is not None and lost.failure != "preemption":
            # A full disk stays full.
            self._losses[node] += LOSSES if lost.disk else 1
        self._failures[lost.failure] += 1
        self._metrics.lost.inc(1, {"failure": lost.failure})
        names = {node.id: node.name for node in self._nodes()}
        found = (names.get(i, f"node {i[:8]}, which is gone") for i in replica.node_ids)
        nodes = ", ".join(dict.fromkeys(found)) or "no node yet"
        self._last_loss = f"replica {replica.number} on {nodes}: {lost.failure}, {lost.detail}"
        kept = None
        with contextlib.suppress(OSError):  # of a full disk, say: the run goes on without
            run = Path(self.inputs.config.output.path)
            said = f"lost {self._last_loss}\n\n--- what Ray says\n{lost.__cause__ or 'nothing'}"
            kept = keep_failure(run, replica, said)
            self._last_loss += f" (logs and stacks: {kept})"
        for other in self.replicas.values():
            other.restart_timeouts()
        self.reporter.warn(f"lost {self._last_loss}. What it had committed is kept.")
        what = {"failure": lost.failure, "detail": lost.detail, "file": kept and str(kept)}
        self.reporter.event("replica-lost", replica=replica.number, nodes=nodes, **what)
        self.drop(replica)
        if not may_go_on(self._failures, self.inputs.config.cluster):
            counts = ", ".join(f"{count} x {kind}" for kind, count in self._failures.items())
            raise ClusterError(
                "Replicas were lost without a range or a span being finished in between: "
                f"{counts}. The last was {self._last_loss}. Finished ranges are kept, and the same "
                "command continues. If the nodes are in order, allow more with "
                "cluster.max_crashes, cluster.max_hangs, cluster.heartbeat_timeout_s or "
                "cluster.progress_timeout_s."
            )

    def _stop_if_full(self, node: str | None, error: OSError) -> None:
        """Raise what a disk said unless it is of one node alone, and another has room."""
        self._full.add(node or "")
        others = [other for other in self._nodes() if other.id not in self._full]
        if len(self._full) > 1 or not self.shape.fitting(others):
            raise error

    def drop(self, replica: Replica) -> None:
        """Close a replica; what it was at is done by others."""
        replica.close()
        self.reporter.event("replica-end", replica=replica.number)
        del self.replicas[replica.number]
        self._queue.lost(replica.number)
        self.holders.lost(replica.number)
        self._tell_replicas()

    def release(self) -> None:
        """Give all replicas back; new ones load nothing until somebody says what."""
        for replica in list(self.replicas.values()):
            self.drop(replica)
        self.num_layers = 0

    def _spec(self) -> EngineSpec:
        inputs, config = self.inputs, self.inputs.config
        # A selection has a range for each fold, calibration as many or more.
        ranges = inputs.num_ranges if config.selection.given else config.folds
        files = replace(inputs.source, path=inputs.source.path.resolve(), tensors={}, headers={})
        bare = replace(inputs, source=files, tokenizer=None, evaluation={}, tasks=(), loaded={})
        return EngineSpec(bare, self.num_layers, -(-config.calibration.windows // ranges))


class _Metrics:
    """What a run shows in Ray's metrics; the names are in ``docs/cluster.md``."""

    def __init__(self, replicas: Mapping[int, Replica]) -> None:
        def gauge(name: str, what: str, *keys: str) -> metrics.Gauge:
            return metrics.Gauge(f"ghost_dist_{name}", what, tag_keys=keys)

        self._ranges = gauge("ranges", "Window ranges of the stage, by state.", "state")
        searched = "Parts of the removals that a search scores next, by state."
        self._search_parts = gauge("search_parts", searched, "state")
        self._spans = gauge("spans", "Spans to fit, by state.", "state")
        self._replicas = gauge("replicas", "Copies of the model, by state.", "state")
        self._tokens = gauge("tokens", "Tokens of the stage that are committed.")
        per_second = "Tokens per second of a replica over its range at hand."
        self._rate = gauge("tokens_per_second", per_second, "replica")
        self.lost = metrics.Counter(
            "ghost_dist_replicas_lost_total", "Replicas lost, by failure.", tag_keys=("failure",)
        )
        self._of = replicas
        self._rates: dict[int, float] = {}

    def show(self, items: Items, queue: LeaseQueue[Any], committed: int | None) -> None:
        gauge: metrics.Gauge = getattr(self, f"_{items}")
        gauge.set(queue.num_pending, {"state": "pending"})
        gauge.set(len({lease.item for lease in queue.leases}), {"state": "leased"})
        if committed is not None:
            self._tokens.set(committed)

    def show_replicas(self) -> None:
        """Their states and rates. A gauge keeps its value: those that run nothing are set to 0."""
        now = time.monotonic()
        self._rates = dict.fromkeys(self._rates, 0.0)
        for replica in self._of.values():
            for lease, tokens in replica.under_way:
                if tokens is not None:
                    self._rates[replica.number] = tokens / max(now - lease.since, 1e-9)
        for number, rate in self._rates.items():
            self._rate.set(rate, {"replica": str(number)})
        states = Counter(replica.state for replica in self._of.values())
        for state in get_args(State):
            self._replicas.set(states[state], {"state": state})
