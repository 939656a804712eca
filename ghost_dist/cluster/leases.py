"""What is decided without Ray and without a clock: who does what, what fits, and when to give up.

A lease is one attempt at one item. A worker that is lost gives its items back. What counts is
decided elsewhere, for ranges by the manifests of ``statistics/store.py``. Ranges are run by
replicas; when none is left, one that takes much longer than the others is leased a second time, so
that a slow replica delays the end by no more than one range. Spans are fitted by single ranks.
"""

import statistics
import uuid
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from ghost_dist.engine_config import ClusterConfig
from ghost_dist.errors import ConfigError

Item = TypeVar("Item", bound=Hashable)

LOSSES = 2
"""A node that lost so many replicas in a row, for reasons of its own, gets no more."""
STRAGGLER = 2.0
"""A lease older than this many median durations is given to a second worker, if one is idle."""


class Worker(NamedTuple):
    """A replica as a whole, or one of its ranks."""

    replica: int
    rank: int = 0


@dataclass(frozen=True)
class Lease(Generic[Item]):
    """One attempt at one item by one worker; ``since`` in seconds of the caller's clock."""

    item: Item
    attempt: str
    worker: Worker
    since: float

    @property
    def of_range(self) -> dict[str, Any]:
        """What events of a range say of it."""
        return {"range": self.item, "attempt": self.attempt, "replica": self.worker.replica}


class Holders(dict[Item, Worker]):
    """The worker that has what an item needs: the only one that gets it, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self._given: set[Item] = set()

    def give(self, given: Mapping[Item, Worker]) -> None:
        """Workers have been given what items need, for good."""
        self.update(given)
        self._given |= given.keys()

    def read(self, worker: Worker, item: Item) -> None:
        """A worker reads what an item needs, and has what it read before no more."""
        if item in self._given:
            return
        for other in [o for o, of in self.items() if of == worker and o not in self._given]:
            del self[other]
        self[item] = worker

    def lost(self, replica: int) -> None:
        """A replica is gone, and what its ranks had with it."""
        for item in [item for item, worker in self.items() if worker.replica == replica]:
            del self[item]
            self._given.discard(item)


class LeaseQueue(Generic[Item]):
    """Leases of items in order, to their ``holders`` alone; without any, stragglers go twice."""

    def __init__(self, items: Iterable[Item], holders: Holders[Item] | None = None) -> None:
        self._pending, self._holders = list(items), holders
        self._leases: dict[str, Lease[Item]] = {}
        self._durations: list[float] = []

    @property
    def done(self) -> bool:
        return not self._pending and not self._leases

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def leases(self) -> tuple[Lease[Item], ...]:
        """Attempts under way at items that are not finished."""
        return tuple(self._leases.values())

    def lease(self, worker: Worker, now: float) -> Lease[Item] | None:
        """The next item for an idle worker: one that it holds, else the first that nobody holds."""
        held: Mapping[Item, Worker] = self._holders or {}
        own = [item for item in self._pending if held.get(item) == worker]
        free = [item for item in self._pending if item not in held]
        item = next(iter((*own, *free)), None)
        if item is not None:
            self._pending.remove(item)
        elif self._holders is None:
            item = self._straggler(worker, now)
        if item is None:
            return None
        if self._holders is not None:
            self._holders.read(worker, item)
        lease = Lease(item, uuid.uuid4().hex, worker, now)
        self._leases[lease.attempt] = lease
        return lease

    def finished(self, lease: Lease[Item], now: float) -> None:
        """The item of this lease is done; other attempts at it are of no use any more."""
        self._durations.append(now - lease.since)
        self._leases = {a: other for a, other in self._leases.items() if other.item != lease.item}

    def lost(self, replica: int) -> None:
        """A replica is gone: its items are handed out again unless another one is at them too."""
        for lease in self.leases:
            if lease.worker.replica == replica:
                del self._leases[lease.attempt]
                if all(other.item != lease.item for other in self._leases.values()):
                    self._pending.insert(0, lease.item)

    def _straggler(self, worker: Worker, now: float) -> Item | None:
        if not self._durations:
            return None
        limit = STRAGGLER * statistics.median(self._durations)
        items = [lease.item for lease in self.leases]
        slow = [
            lease
            for lease in self.leases
            if items.count(lease.item) == 1 and lease.worker != worker and now - lease.since > limit
        ]
        return min(slow, key=lambda lease: lease.since).item if slow else None


Failure = Literal["crash", "hang", "preemption"]


@dataclass(frozen=True)
class Node:
    """A living node: its name, and the CPUs and GPUs that Ray may give away there."""

    name: str
    cpus: float
    gpus: float
    id: str = ""  # Ray's; a node that comes back has another one


@dataclass(frozen=True)
class Shape:
    ranks: int
    cpus_per_rank: int
    gpus_per_rank: int  # 0 or 1
    setting: str = "engine.tensor_parallel"  # the field that says how many ranks, for messages

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one rank, in Ray's names."""
        needs = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank}
        return {name: float(amount) for name, amount in needs.items() if amount}

    def ranks_on(self, node: Node) -> int:
        rooms = [node.cpus // self.cpus_per_rank]
        if self.gpus_per_rank:
            rooms.append(node.gpus // self.gpus_per_rank)
        return int(min(rooms))

    def fitting(self, nodes: Sequence[Node]) -> int:
        """Replicas that nodes have room for."""
        rooms = [self.ranks_on(node) for node in nodes]
        return sum(room // self.ranks for room in rooms) or sum(rooms) // self.ranks

    def strategy(self, nodes: Sequence[Node]) -> str:
        """STRICT_PACK, all ranks on one node, wherever one node is large enough; else PACK."""
        fits_one = any(self.ranks_on(node) >= self.ranks for node in nodes)
        return "STRICT_PACK" if fits_one else "PACK"

    def check_room(self, nodes: Sequence[Node], replicas: int) -> None:
        """Refuse what nodes have no room for, with what each has and what to change."""
        fitting = self.fitting(nodes)
        if fitting >= replicas:
            return
        kind = "GPU" if self.gpus_per_rank else "CPU"
        each = self.gpus_per_rank or self.cpus_per_rank
        beside = f" with {self.cpus_per_rank} CPUs each" if self.gpus_per_rank else ""
        found = ", ".join(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
        advice = f"Lower {self.setting}" + ("" if self.gpus_per_rank else " or cpus_per_rank")
        if fitting:
            advice = f"Set engine.replicas={fitting} or auto"
        raise ConfigError(
            f"engine.replicas={replicas} x {self.setting}={self.ranks} ranks of {each} "
            f"{kind}{'s' if each > 1 else ''} need {replicas * self.ranks * each} {kind}s{beside}, "
            f"but the cluster has room for {fitting} such replicas ({found}). {advice}, or add "
            "nodes."
        )


def left_out(losses: Mapping[str, int], nodes: Sequence[Node], shape: Shape) -> tuple[str, ...]:
    """Living nodes that get no new replica; none if the others have no room for one.

    ``losses``: replicas that each node has lost since one there finished something, by its id.
    """
    out = tuple(sorted(node.id for node in nodes if losses.get(node.id, 0) >= LOSSES))
    others = [node for node in nodes if node.id not in out]
    return out if shape.fitting(others) else ()


def may_go_on(failures: Mapping[Failure, int], config: ClusterConfig) -> bool:
    """Whether to replace a lost replica; ``failures``: since the last progress, with this one.

    So a run on machines that are taken away every few minutes goes on as long as it gets anywhere.
    """
    most: dict[Failure, float] = {"crash": config.max_crashes, "hang": config.max_hangs}
    if config.max_preemptions is not None:
        most["preemption"] = config.max_preemptions
    return all(failures.get(kind, 0) <= number for kind, number in most.items())
