"""The driver's side of one replica: placed, joined, loaded, then given one range after another.

Nothing here waits: :meth:`Replica.poll` looks at what has come back and hands it on, or raises
:class:`ReplicaLost`. A replica with a lost rank is closed as a whole and another one takes its
place, in a placement group of its own: one that lost a node cannot be used again reliably.
"""

import contextlib
import errno
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ghost_dist.cluster.leases import Failure, Lease, Shape, Worker
from ghost_dist.cluster.rank import EngineSpec, Place, remote_rank, versions
from ghost_dist.errors import ConfigError, GhostDistError
from ghost_dist.pipeline.collectors import RangeTimes
from ghost_dist.progress import Reporter
from ghost_dist.statistics.store import WrittenBlock

State = Literal["placing", "joining", "loading", "idle", "busy", "full", "unloading", "unloaded"]
"""full: a range is run, but the one before it is still being written. unloaded: without the model;
each rank takes tasks of its own."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of a disk: the node's own, or of one that every replica would meet."""

_RECORDER_S = 2.0


@dataclass(eq=False)
class ReplicaLost(Exception):  # noqa: N818 - an event, not a mistake
    """A rank crashed, hung or was preempted; the replica is of no use any more."""

    replica: "Replica"
    failure: Failure
    detail: str
    rank: int | None = None  # which one it was, if that is known
    disk: OSError | None = None  # what a disk said to it

    @property
    def node(self) -> str | None:
        """Id of the node that it was of: the rank's, or that of all; None: not known."""
        node_ids = self.replica.node_ids
        one = self.rank is not None and node_ids[self.rank : self.rank + 1]
        nodes = set(one or node_ids)
        return nodes.pop() if len(nodes) == 1 else None


@dataclass
class _Call:
    """What all ranks, or one, were asked; it is over when all of them have answered."""

    refs: list[Any]
    then: Callable[[list[Any]], None]
    limit_s: float  # without progress
    doing: str
    moved: float
    method: str = ""
    rank: int | None = None
    task: str = ""  # name of the attempt, or of the task, in heartbeats
    done: int = 0  # as they say


class Replica:
    """One copy of the model on ``shape.ranks`` actors."""

    def __init__(
        self,
        number: int,
        spec: EngineSpec,
        shape: Shape,
        strategy: str,
        reporter: Reporter,
        left_out: Sequence[str] = (),
    ) -> None:
        self.number, self.spec, self.left_out = number, spec, left_out
        self.state: State = "placing"
        self.live: dict[int, str] = {}
        """Committed attempt of each range that its ranks have in their running sums."""
        self.places: list[Place] = []
        self.node_ids: list[str] = []
        """Of each rank, once there is room for it."""
        self.began = self._asked = self._checked = time.monotonic()
        self._shape, self._config, self._reporter = shape, spec.inputs.config.cluster, reporter
        self._leases: list[Lease[int]] = []  # of ranges that are run or written
        self._ranks: list[Any] = []
        self._heartbeats: dict[int, tuple[Any, float]] = {}
        """By rank those that are not answered yet, and since when."""
        elsewhere = {"ray.io/node-id": f"!in({','.join(left_out)})"} if left_out else {}
        self._group = placement_group(
            [shape.bundle] * shape.ranks,
            strategy=strategy,
            bundle_label_selector=[elsewhere] * shape.ranks,
        )
        # How long it waits for resources is the pool's to judge.
        ready = _Call([self._group.ready()], self._start_ranks, math.inf, "", self.began)
        self._calls = [ready]

    @property
    def acknowledged(self) -> bool:
        """Whether the ranks' running sums are those of :attr:`live`."""
        return all(call.method != "acknowledge" for call in self._calls)

    @property
    def refs(self) -> list[Any]:
        return [ref for call in self._calls for ref in call.refs]

    @property
    def under_way(self) -> list[tuple[Lease[int], int | None]]:
        """Leases that are not handed back, with the tokens run so far; None: all of them."""
        tokens = {call.task: call.done for call in self._calls if call.method == "run"}
        return [(lease, tokens.get(lease.attempt)) for lease in self._leases]

    @property
    def free(self) -> list[Worker]:
        """Who can begin something: with the model all ranks together, without it each alone."""
        if self.state == "idle":
            return [Worker(self.number)]
        ranks = range(len(self._ranks)) if self.state == "unloaded" else ()
        busy = {call.rank for call in self._calls}
        return [Worker(self.number, rank) for rank in ranks if rank not in busy]

    def poll(self) -> None:
        """Hand on what has come back. Raises ReplicaLost, or what every replica would meet."""
        for call in list(self._calls):
            done, waiting = ray.wait(call.refs, num_returns=len(call.refs), timeout=0)
            # An error of one counts at once.
            values = {ref: self._get(ref, call.rank or call.refs.index(ref)) for ref in done}
            if not waiting:
                self._calls.remove(call)
                call.then([values[ref] for ref in call.refs])
        self._check_alive()

    def run(
        self, work: Any, lease: Lease[int], written: Callable[[list[WrittenBlock]], None]
    ) -> None:
        """Begin a range of a ``Work``; ``written`` is told once its blocks are on the disk."""
        assert self.state == "idle"

        def ran(times: list[RangeTimes]) -> None:
            self._reporter.event("range-ran", **lease.of_range, **RangeTimes.told(times))
            self.state = "full" if len(self._leases) > 1 else "idle"
            self._ask("write", lease.item, lease.attempt, then=wrote)

        def wrote(blocks: list[WrittenBlock]) -> None:
            self._leases.remove(lease)
            if self.state == "full":
                self.state = "idle"
            for call in self._calls:
                if call.method == "write":  # ranks write one after the other: it begins now
                    call.moved = time.monotonic()
            written(blocks)

        self._leases.append(lease)
        self.state = "busy"
        self._ask("run", work, lease.item, lease.attempt, then=ran, task=lease.attempt)

    def acknowledge(self, lease: Lease[int], *, committed: bool) -> None:
        """Tell the ranks whether an attempt that they have written is to be in their sums."""
        if committed:
            self.live[lease.item] = lease.attempt
        self._ask("acknowledge", lease.item, lease.attempt, committed)

    def unload(self) -> None:
        assert self.state == "idle"
        assert not self.under_way

        def unloaded(_: list[Any]) -> None:
            self.state = "unloaded"

        self._ask("unload", then=unloaded)
        self.state = "unloading"

    def ask(self, rank: int, method: str, *arguments: Any, then: Callable[[Any], None]) -> None:
        """Begin a task of one rank: a method that takes the task's name, then the arguments."""
        assert self.state == "unloaded"
        task = uuid.uuid4().hex
        self._ask(method, task, *arguments, then=lambda got: then(got[0]), task=task, rank=rank)

    def restart_timeouts(self) -> None:
        """Nobody has polled for a while: the ranks' silence until now is not theirs."""
        now = time.monotonic()
        self._heartbeats = {rank: (ref, now) for rank, (ref, _) in self._heartbeats.items()}
        for call in self._calls:
            call.moved = now

    def collectives(self) -> dict[int, bytes]:
        """What the flight recorders of its ranks have, by rank: of those that answer soon."""
        asked = self._ranks if self.places else []
        refs = [rank.collectives.remote() for rank in asked]
        found = {}
        for ref in ray.wait(refs, num_returns=len(refs), timeout=_RECORDER_S)[0]:
            with contextlib.suppress(RayError):
                found[refs.index(ref)] = ray.get(ref)
        return found

    def close(self) -> None:
        """End every actor and give the resources back; may be called at any time."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._group)
        self._ranks, self._calls = [], []

    def _ask(
        self,
        method: str,
        *arguments: Any,
        then: Callable[[list[Any]], None] = lambda _: None,
        task: str = "",
        rank: int | None = None,
    ) -> None:
        config = self._config
        limit_s, doing = {
            "place": (config.wait_s, "start its actors"),
            "load": (config.load_timeout_s, "load the model"),
            "unload": (config.progress_timeout_s, "unload the model"),
            "run": (config.progress_timeout_s, "finish a batch"),
            "write": (config.progress_timeout_s, "write a range"),
            "acknowledge": (config.progress_timeout_s, "add the sums of a range"),
            "score": (config.fit_timeout_s, "score removals"),
        }.get(method, (config.fit_timeout_s, "get the sums of a span, or to fit it once"))
        ranks = self._ranks if rank is None else [self._ranks[rank]]
        refs = [getattr(actor, method).remote(*arguments) for actor in ranks]
        now = time.monotonic()
        self._calls.append(_Call(refs, then, limit_s, doing, now, method, rank, task))

    def _start_ranks(self, _: list[Any]) -> None:
        where = placement_group_table(self._group)["bundles_to_node_id"]
        self.node_ids = [where[index] for index in range(self._shape.ranks)]
        self._ranks = [
            remote_rank(
                index,
                num_cpus=self._shape.cpus_per_rank,
                num_gpus=self._shape.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            )
            for index in range(self._shape.ranks)
        ]
        self._ask("place", then=self._join)
        self.state = "joining"

    def _join(self, places: list[Place]) -> None:
        self.places = places
        own = versions()
        for place in places:
            differing = [
                f"{name} {place.versions.get(name)} (driver: {version})"
                for name, version in own.items()
                if place.versions.get(name) != version
            ]
            if differing:
                raise ConfigError(
                    f"Node {place.node} has other versions than the driver: {', '.join(differing)}."
                    " Sums of different versions must not be mixed: install the same on all nodes."
                )
        then = partial(self._loaded, time.monotonic())
        self._ask("load", places[0].address, places[0].port, self.spec, then=then)
        self.state = "loading"

    def _loaded(self, joined: float, loaded: list[tuple[int, float | None]]) -> None:
        self.state = "idle" if self.spec.num_layers else "unloaded"
        now = time.monotonic()
        self._reporter.event(
            "replica-ready",
            replica=self.number,
            seconds=round(now - self.began, 3),
            load_s=round(now - joined, 3),
            nodes=[place.node for place in self.places],
            pids=[place.pid for place in self.places],
            parameter_bytes=[nbytes for nbytes, _ in loaded],
            conformance=[difference for _, difference in loaded],
        )

    def _check_alive(self) -> None:
        """Raise ReplicaLost for what takes too long or does not answer."""
        now, patience_s = time.monotonic(), self._config.heartbeat_timeout_s
        if now - self._checked > patience_s / 2:  # a file system has held the driver, say
            self.restart_timeouts()
        self._checked = now
        for number, (ref, since) in list(self._heartbeats.items()):
            if ray.wait([ref], timeout=0)[0]:
                task, done = self._get(ref, number)
                del self._heartbeats[number]
                for call in self._calls:
                    told = call.task == task and number == (call.rank or 0)
                    if told and call.done != done:
                        call.done, call.moved = done, now
            elif now - since > patience_s:
                what = f"rank {number} has not answered for {patience_s:g} s"
                raise ReplicaLost(self, "hang", what, number)
        for call in self._calls:
            if now - call.moved > call.limit_s:
                who = "it" if call.rank is None else f"rank {call.rank}"
                what = f"{who} took more than {call.limit_s:g} s to {call.doing}"
                raise ReplicaLost(self, "hang", what, call.rank)
        if self.places and now - self._asked > min(1.0, patience_s / 4):
            self._asked = now
            for number, rank in enumerate(self._ranks):
                if number not in self._heartbeats:
                    self._heartbeats[number] = rank.heartbeat.remote(), now

    def _get(self, ref: Any, rank: int) -> Any:
        """The value of a finished call of a rank, or what its failure means."""
        try:
            return ray.get(ref)
        except RayActorError as error:
            preempted = isinstance(error, ActorDiedError) and error.preempted
            failure: Failure = "preemption" if preempted else "crash"
            raise ReplicaLost(self, failure, self._death(error), rank) from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, GhostDistError):
                raise cause from error
            if isinstance(cause, OSError) and cause.errno in _DISK:
                disk = OSError(cause.errno, cause.strerror, cause.filename)
                what = f"rank {rank}: {_first_line(cause)}"
                raise ReplicaLost(self, "crash", what, rank, disk) from error
            # Not the rank's own, maybe: the others of its world get errors when one dies.
            what = f"{type(cause).__name__}: {_first_line(cause)}"
            raise ReplicaLost(self, "crash", what) from error
        except RayError as error:
            raise ReplicaLost(self, "crash", _first_line(error)) from error

    def _death(self, error: RayActorError) -> str:
        """Which rank has died, as what process, and why as far as Ray knows."""
        lines = [line.strip() for line in str(error).splitlines()]
        known = dict(line.split(": ", 1) for line in lines if line.startswith(("pid: ", "ip: ")))
        why = next((line for line in lines if "is dead because" in line), _first_line(error))
        why = why.partition("because ")[2].partition(". ")[0].partition(" Worker exit")[0] or why
        if "creation task" in why:  # whose traceback follows
            why = lines[-1]
        if "pid" not in known:
            return why.rstrip(".")
        pid, ip = known["pid"], known.get("ip", "?")
        ranks = [n for n, place in enumerate(self.places) if str(place.pid) == pid]
        rank = f"rank {ranks[0]}" if ranks else "a rank"
        return f"{rank} (process {pid} on {ip}) died: {why.rstrip('.')}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
