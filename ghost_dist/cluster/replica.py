"""The driver's side of one replica: placed, joined, loaded, then leased one range after another.

Nothing here waits: :meth:`Replica.poll` looks at what has come back and says so, or raises
:class:`ReplicaLost`. A replica with a lost rank is closed as a whole and another one takes its
place, in a placement group of its own: one that lost a node cannot be used again reliably.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ghost_dist.cluster.leases import Lease
from ghost_dist.cluster.messages import EngineSpec, Heartbeat, Loaded, Place, versions
from ghost_dist.cluster.placement import Failure, Shape
from ghost_dist.cluster.rank import remote_rank
from ghost_dist.engine_config import ClusterConfig
from ghost_dist.errors import ConfigError, GhostDistError
from ghost_dist.pipeline.timing import RangeTimes
from ghost_dist.statistics.store import WrittenBlock

State = Literal["placing", "joining", "loading", "idle", "busy", "full", "unloading", "unloaded"]
"""full: a range is run, but the one before it is still being written. unloaded: without the model;
each rank takes tasks of its own."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of the store that another replica would meet too."""


class ReplicaLost(Exception):  # noqa: N818 - an event, not a mistake
    """A rank crashed, hung or was preempted; the replica is of no use any more."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure: Failure = failure
        self.detail = detail


@dataclass
class _Task:
    """Something that one rank does without the model; ``done`` as its heartbeats say."""

    name: str
    ref: Any
    moved: float
    done: int = 0


class Replica:
    """One copy of the model on ``shape.ranks`` actors; ``now``: seconds of the driver's clock."""

    def __init__(
        self,
        number: int,
        spec: EngineSpec,
        shape: Shape,
        strategy: str,
        config: ClusterConfig,
        now: float,
    ) -> None:
        self.number = number
        self.state: State = "placing"
        self.live: dict[int, str] = {}
        """Committed attempt of each range that its ranks have in their running sums."""
        self._running: Lease[int] | None = None
        self._times: list[RangeTimes] = []
        self._writing: tuple[Lease[int], list[RangeTimes]] | None = None
        self._writes: list[Any] = []
        self._acknowledging: list[Any] = []
        self._tasks: dict[int, _Task] = {}
        self.places: list[Place] = []
        self.loaded: list[Loaded] = []
        self.tokens = 0
        self.began = now
        self._spec, self._shape, self._config = spec, shape, config
        self._group = placement_group([shape.bundle] * shape.ranks, strategy=strategy)
        self._refs: list[Any] = [self._group.ready()]
        self._ranks: list[Any] = []
        self._heartbeats: dict[int, Any] = {}
        self._answered: dict[int, float] = {}
        self._asked = self._moved = now

    @property
    def ready(self) -> bool:
        return self.state in ("idle", "busy", "full")

    @property
    def has_model(self) -> bool:
        """Whether it has loaded the model, or is going to."""
        return bool(self._spec.num_layers) and self.state not in ("unloading", "unloaded")

    @property
    def acknowledged(self) -> bool:
        """Whether the ranks' running sums are those of :attr:`live`."""
        return not self._acknowledging

    @property
    def refs(self) -> Sequence[Any]:
        tasks = [task.ref for task in self._tasks.values()]
        return [*self._refs, *self._writes, *self._acknowledging, *tasks]

    @property
    def under_way(self) -> list[tuple[Lease[int], int | None]]:
        """Leases that are not handed back, with the tokens run so far; None: all of them."""
        found: list[tuple[Lease[int], int | None]] = []
        if self._writing is not None:
            found.append((self._writing[0], None))
        if self._running is not None:
            found.append((self._running, self.tokens if self.state == "busy" else None))
        return found

    def poll(self, now: float) -> tuple[Lease[int], list[WrittenBlock], list[RangeTimes]] | None:
        """What is written: a lease, blocks, times. Raises ReplicaLost, or what all would meet."""
        self._check_alive(now)
        written = None
        if self._writing is not None and (blocks := self._all_of(self._writes)) is not None:
            written = (self._writing[0], blocks, self._writing[1])
            self._writing, self._writes, self._moved = None, [], now
        for ref in list(self._acknowledging):
            if ray.wait([ref], timeout=0)[0]:
                self._get(ref)
                self._acknowledging.remove(ref)
        results = self._all_of(self._refs)
        if results is not None:
            match self.state:
                case "placing":
                    self._start_ranks(now)
                case "joining":
                    self._join(results, now)
                case "loading":
                    self.loaded, self._refs = results, []
                    self.state = "idle" if self._spec.num_layers else "unloaded"
                case "busy":
                    self.state, self._refs, self._moved = "full", [], now
                    self._times = results
                case "unloading":
                    self.state, self._refs = "unloaded", []
        if self.state == "full" and self._writing is None:
            lease = self._running
            assert lease is not None
            self._writes = [rank.write.remote(lease.item, lease.attempt) for rank in self._ranks]
            self._running, self._writing, self.state = None, (lease, self._times), "idle"
        return written

    def acknowledge(self, lease: Lease[int], *, committed: bool) -> None:
        """Tell the ranks whether an attempt that they have written is to be in their sums."""
        if committed:
            self.live[lease.item] = lease.attempt
        self._acknowledging += [
            rank.acknowledge.remote(lease.item, lease.attempt, committed) for rank in self._ranks
        ]

    def restart_timeouts(self, now: float) -> None:
        """Nobody has polled for a while: the ranks' silence until now is not theirs."""
        self._answered = dict.fromkeys(self._answered, now)
        self._moved = now

    def unload(self, now: float) -> None:
        assert self.state == "idle"
        assert not self.under_way
        self._refs = [rank.unload.remote() for rank in self._ranks]
        self.state, self._moved = "unloading", now

    @property
    def free_ranks(self) -> list[int]:
        if self.state != "unloaded":
            return []
        return [number for number in range(len(self._ranks)) if number not in self._tasks]

    def ask(self, rank: int, method: str, task: str, *arguments: Any, now: float) -> None:
        """Begin a task of one rank: a method that takes the task's name, then the arguments."""
        assert rank in self.free_ranks
        ref = getattr(self._ranks[rank], method).remote(task, *arguments)
        self._tasks[rank] = _Task(task, ref, now)

    def answers(self) -> list[tuple[int, str, Any]]:
        """Rank, task and result of every task that has come back; raises as :meth:`poll`."""
        found = []
        for number, task in list(self._tasks.items()):
            if ray.wait([task.ref], timeout=0)[0]:
                result = self._get(task.ref)
                del self._tasks[number]
                found.append((number, task.name, result))
        return found

    def run(self, work_id: str, work: Any, lease: Lease[int], now: float) -> None:
        """Begin a range; ``work`` is a reference to a :class:`~ghost_dist.cluster.rank.Work`."""
        assert self.state == "idle"
        self._running, self.state, self.tokens, self._moved = lease, "busy", 0, now
        self._refs = [
            rank.run.remote(work_id, work, lease.item, lease.attempt) for rank in self._ranks
        ]

    def _all_of(self, refs: Sequence[Any]) -> list[Any] | None:
        """The values of all calls, None while one is out; an error of one counts at once."""
        done, waiting = ray.wait(list(refs), num_returns=len(refs), timeout=0) if refs else ([], [])
        values = {ref: self._get(ref) for ref in done}
        return None if waiting else [values[ref] for ref in refs]

    def close(self) -> None:
        """End every actor and give the resources back; may be called at any time."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._group)
        self._ranks, self._refs, self._writes, self._acknowledging = [], [], [], []
        self._tasks.clear()

    def _start_ranks(self, now: float) -> None:
        self._ranks = [
            remote_rank(
                num_cpus=self._shape.cpus_per_rank,
                num_gpus=self._shape.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            )
            for index in range(self._shape.ranks)
        ]
        self._refs = [rank.place.remote() for rank in self._ranks]
        self.state, self._moved = "joining", now

    def _join(self, places: list[Place], now: float) -> None:
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
        first = places[0]
        self._refs = [
            rank.load.remote(number, first.address, first.port, self._spec)
            for number, rank in enumerate(self._ranks)
        ]
        self.state, self._moved = "loading", now
        self._answered = dict.fromkeys(range(len(self._ranks)), now)

    def _check_alive(self, now: float) -> None:
        """Raise ReplicaLost for what takes too long or does not answer."""
        config = self._config
        if self.state == "placing":
            return  # waiting for resources; the driver says when that is too long
        if self.state == "unloaded" or (self.state == "idle" and self._writing is None):
            self._moved = now  # nothing to do together
        limit, doing = {
            "joining": (config.wait_s, "start its actors"),
            "loading": (config.load_timeout_s, "load the model"),
            "unloading": (config.progress_timeout_s, "unload the model"),
        }.get(self.state, (config.progress_timeout_s, "finish a batch or to write a range"))
        if now - self._moved > limit:
            raise ReplicaLost("hang", f"it took more than {limit:g} s to {doing}")
        if self.state == "joining":
            return
        for number, ref in list(self._heartbeats.items()):
            if ray.wait([ref], timeout=0)[0]:
                found: Heartbeat = self._get(ref)
                del self._heartbeats[number]
                self._answered[number] = now
                running, task = self._running, self._tasks.get(number)
                if running is not None and found.attempt == running.attempt and number == 0:
                    if found.done != self.tokens:
                        self._moved = now
                    self.tokens = found.done
                if task is not None and found.attempt == task.name and found.done != task.done:
                    task.done, task.moved = found.done, now
        for number, task in self._tasks.items():
            if now - task.moved > config.fit_timeout_s:
                raise ReplicaLost(
                    "hang",
                    f"rank {number} took more than {config.fit_timeout_s:g} s for the sums or one "
                    "fit of a span",
                )
        silent = min(self._answered, key=self._answered.__getitem__)
        if now - self._answered[silent] > config.heartbeat_timeout_s:
            raise ReplicaLost(
                "hang", f"rank {silent} has not answered for {config.heartbeat_timeout_s:g} s"
            )
        if now - self._asked > min(1.0, config.heartbeat_timeout_s / 4):
            self._asked = now
            for number, rank in enumerate(self._ranks):
                if number not in self._heartbeats:
                    self._heartbeats[number] = rank.heartbeat.remote()

    def _get(self, ref: Any) -> Any:
        """The value of a finished call, or what its failure means."""
        try:
            return ray.get(ref)
        except RayActorError as error:
            preempted = isinstance(error, ActorDiedError) and error.preempted
            raise ReplicaLost("preemption" if preempted else "crash", _first_line(error)) from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, GhostDistError):
                raise cause from error
            if isinstance(cause, OSError) and cause.errno in _DISK:
                raise OSError(cause.errno, cause.strerror, cause.filename) from error
            raise ReplicaLost("crash", f"{type(cause).__name__}: {_first_line(cause)}") from error
        except RayError as error:
            raise ReplicaLost("crash", _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
