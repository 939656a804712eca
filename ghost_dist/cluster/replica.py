"""The driver's side of one replica: placed, joined, loaded, then leased one range after another.

Nothing here waits: :meth:`Replica.poll` looks at what has come back and says so, or raises
:class:`ReplicaLost`. A replica with a lost rank is closed as a whole and another one takes its
place, in a placement group of its own: one that lost a node cannot be used again reliably.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ghost_dist.cluster.failures import Failure
from ghost_dist.cluster.placement import Shape
from ghost_dist.cluster.ranges import Lease
from ghost_dist.cluster.rank import Beat, EngineSpec, Loaded, Place, remote_rank, versions
from ghost_dist.config import ClusterConfig
from ghost_dist.errors import ConfigError, GhostDistError
from ghost_dist.statistics.store import WrittenBlock

State = Literal["placing", "joining", "loading", "idle", "busy", "full"]
"""full: a range is run, but the one before it is still being written."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of the store that another replica would meet too."""


class ReplicaLost(Exception):  # noqa: N818 - an event, not a mistake
    """A rank crashed, hung or was preempted; the replica is of no use any more."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure: Failure = failure
        self.detail = detail


class Replica:
    """One copy of the model on ``shape.ranks`` actors.

    Parameters
    ----------
    number
        Unique within the run.
    spec, shape, strategy, config
        What to load, what it needs, how Ray places it, and the timeouts.
    now
        Seconds of the driver's clock, as in all methods.
    """

    def __init__(
        self,
        number: int,
        spec: EngineSpec,
        shape: Shape,
        strategy: str,
        config: ClusterConfig,
        now: float,
    ) -> None:
        self.number, self.state = number, "placing"
        self._running: Lease | None = None
        self._writing: Lease | None = None
        self._writes: list[Any] = []
        self.places: list[Place] = []
        self.loaded: list[Loaded] = []
        self.tokens = 0
        self.began = now
        self._spec, self._shape, self._config = spec, shape, config
        self._group = placement_group([shape.bundle] * shape.ranks, strategy=strategy)
        self._refs: list[Any] = [self._group.ready()]
        self._ranks: list[Any] = []
        self._beats: dict[int, Any] = {}
        self._answered: dict[int, float] = {}
        self._asked = self._moved = now

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self.state in ("idle", "busy", "full")

    @property
    def refs(self) -> Sequence[Any]:
        """What the driver may wait for."""
        return [*self._refs, *self._writes]

    @property
    def under_way(self) -> list[tuple[Lease, int | None]]:
        """Leases that are not handed back, with the tokens run so far; None: all of them."""
        found: list[tuple[Lease, int | None]] = []
        if self._writing is not None:
            found.append((self._writing, None))
        if self._running is not None:
            found.append((self._running, self.tokens if self.state == "busy" else None))
        return found

    def poll(self, now: float) -> tuple[Lease, list[WrittenBlock]] | None:
        """See what has come back; a lease and its blocks once all ranks have written theirs.

        Raises
        ------
        ReplicaLost
            If the replica must be replaced.
        GhostDistError, OSError
            What any other replica would meet as well.
        """
        self._check_alive(now)
        written = None
        if self._writing is not None and (blocks := self._all_of(self._writes)) is not None:
            written = (self._writing, blocks)
            self._writing, self._writes, self._moved = None, [], now
        results = self._all_of(self._refs)
        if results is not None:
            match self.state:
                case "placing":
                    self._start_ranks(now)
                case "joining":
                    self._join(results, now)
                case "loading":
                    self.loaded, self.state, self._refs = results, "idle", []
                case "busy":
                    self.state, self._refs, self._moved = "full", [], now
        if self.state == "full" and self._writing is None:
            lease = self._running
            assert lease is not None
            self._writes = [
                rank.write.remote(lease.range_id, lease.attempt) for rank in self._ranks
            ]
            self._running, self._writing, self.state = None, lease, "idle"
        return written

    def run(self, work_id: str, work: Any, lease: Lease, now: float) -> None:
        """Begin a range; ``work`` is a reference to a :class:`~ghost_dist.cluster.rank.Work`."""
        assert self.state == "idle"
        self._running, self.state, self.tokens, self._moved = lease, "busy", 0, now
        self._refs = [
            rank.run.remote(work_id, work, lease.range_id, lease.attempt) for rank in self._ranks
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
        self._ranks, self._refs, self._writes = [], [], []

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
        if self.state == "idle" and self._writing is None:
            self._moved = now  # nothing to do
        limit, doing = {
            "joining": (config.wait_s, "start its actors"),
            "loading": (config.load_timeout_s, "load the model"),
        }.get(self.state, (config.progress_timeout_s, "finish a batch or to write a range"))
        if now - self._moved > limit:
            raise ReplicaLost("hang", f"it took more than {limit:g} s to {doing}")
        if self.state == "joining":
            return
        for number, ref in list(self._beats.items()):
            if ray.wait([ref], timeout=0)[0]:
                beat: Beat = self._get(ref)
                del self._beats[number]
                self._answered[number] = now
                running = self._running
                if running is not None and beat.attempt == running.attempt and number == 0:
                    if beat.tokens != self.tokens:
                        self._moved = now
                    self.tokens = beat.tokens
        silent = min(self._answered, key=self._answered.__getitem__)
        if now - self._answered[silent] > config.heartbeat_timeout_s:
            raise ReplicaLost(
                "hang", f"rank {silent} has not answered for {config.heartbeat_timeout_s:g} s"
            )
        if now - self._asked > min(1.0, config.heartbeat_timeout_s / 4):
            self._asked = now
            for number, rank in enumerate(self._ranks):
                if number not in self._beats:
                    self._beats[number] = rank.beat.remote()

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
