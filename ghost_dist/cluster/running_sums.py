"""The live reduction: what a rank keeps of the ranges that it has run, and how replicas add it up.

Every rank of a replica keeps its block of columns of the sums of every fold. Ranks with the same
block, one of each replica, all-reduce them; then a replica's ranks send their blocks of a span to
the one that solves it. Each rank is in the ``torch.distributed`` world of its replica already, so
the group over replicas is a process group of its own, on a store of its own.
"""

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ghost_dist.calibration.split import fold_of_range
from ghost_dist.devices import begin
from ghost_dist.errors import ReductionError
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.sums import ColumnBlock, Sums

Folds = list[dict[str, Sums]]


@dataclass(frozen=True)
class ReduceSpec:
    kept: Mapping[int, str]  # ranges it must have kept, with the attempt that was committed
    read: tuple[int, ...]  # ranges that no living replica has: read from the store
    address: str  # with port: where the replicas' ranks meet
    port: int
    index: int  # of its replica among the count that take part
    count: int
    gather: tuple[tuple[str, int], ...]  # names of sums, rank that gets all columns


class RunningSums:
    """Per fold the sum of one rank's columns over the ranges it was given, in float64."""

    def __init__(self, folds: int) -> None:
        self.kept: dict[int, str] = {}
        self.folds: Folds = [{} for _ in range(folds)]

    def add(self, range_id: int, attempt: str, sums: Mapping[str, Sums]) -> None:
        """Add a range; it must not be in the sum already."""
        if range_id in self.kept:
            raise ReductionError(f"Range {range_id} is in the running sums already.")
        self.kept[range_id] = attempt
        fold = self.folds[fold_of_range(range_id, len(self.folds))]
        for entry, part in sums.items():
            found = fold[entry] if entry in fold else _zeros(part)
            arrays = found.arrays()
            for name, array in part.arrays().items():
                arrays[name].add_(array)  # in place: a sum may be gigabytes
            fold[entry] = replace(found, num_tokens=found.num_tokens + part.num_tokens)


def _zeros(like: Sums) -> Sums:
    arrays = {name: torch.zeros_like(array) for name, array in like.arrays().items()}
    return type(like)(0, **arrays)


class ReplicaGroup:
    """The ranks of several worlds that keep the same columns; :meth:`add` sums over them."""

    def __init__(
        self, spec: ReduceSpec, block: ColumnBlock, device: torch.device, timeout_s: float
    ) -> None:
        self._device = device
        self._group: Any = None
        if spec.count == 1:
            return
        timeout = dt.timedelta(seconds=timeout_s)
        meeting = TCPStore(spec.address, spec.port, is_master=False, timeout=timeout)
        own = PrefixStore(f"block-{block.index}", meeting)
        if device.type == "cuda":
            begin(device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(own, spec.index, spec.count, options)
        else:
            self._group = dist.ProcessGroupGloo(own, spec.index, spec.count, timeout)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor on the CPU by its sum over the group; the same bits on all ranks."""
        if self._group is None:
            return
        on_device = tensor.to(self._device)
        self._group.allreduce([on_device]).wait()
        if on_device is not tensor:
            tensor.copy_(on_device)

    def close(self) -> None:
        if self._group is not None and self._device.type == "cuda":
            self._group.shutdown()
        self._group = None


def host_meeting(address: str, timeout_s: float) -> Any:
    """A store on this node, at any free ``port``, where the ranks of several replicas meet."""
    timeout = dt.timedelta(seconds=timeout_s)
    return TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)


def reduce_folds(
    running: RunningSums,
    group: ReplicaGroup,
    store: StatisticsStore,
    advance: Callable[[int], None],
) -> Folds:
    """Every fold's sums, these columns, in place; all ranks together have each range once."""
    folds, num_folds = running.folds, len(running.folds)
    shapes = next(fold for fold in folds if fold)  # who has no range takes no part
    entries = list(store.plan.entries)
    for fold in folds:
        for entry in entries:
            if entry not in fold:
                fold[entry] = _zeros(shapes[entry])
    num_ranges = len(store.plan.ranges)
    counts_R = torch.tensor([int(i in running.kept) for i in range(num_ranges)])
    tokens_KE = torch.tensor([[fold[entry].num_tokens for entry in entries] for fold in folds])
    group.add(counts_R)
    group.add(tokens_KE)
    wrong = {i: int(n) for i, n in enumerate(counts_R) if int(n) != 1}
    if wrong:
        raise ReductionError(f"Every range counts once, but these are in the sums {wrong} times.")
    for number, fold in enumerate(folds):
        ids = [i for i in range(num_ranges) if fold_of_range(i, num_folds) == number]
        expected = sum(len(store.plan.ranges[i]) for i in ids) * store.plan.window_length
        for column, entry in enumerate(entries):
            found = int(tokens_KE[number, column])
            if found != expected:
                raise ReductionError(
                    f"The sums of {entry} over fold {number} hold {found} tokens, but its ranges "
                    f"have {expected}."
                )
            for array in fold[entry].arrays().values():
                group.add(array)
                advance(1)
            fold[entry] = replace(fold[entry], num_tokens=expected)
    return folds


def gather_columns(
    folds: Folds, key: str, block: ColumnBlock, owner: int, device: torch.device
) -> list[Sums] | None:
    """Sums with all columns, on their owner (None elsewhere); collective over the replica."""
    parts = [fold[key] for fold in folds]
    if block.count == 1:
        return parts
    whole = []
    for part in parts:
        blocks: list[dict[str, Tensor]] = [{} for _ in range(block.count)]
        blocks[0] = dict(part.arrays())  # small arrays are the same on all ranks
        for name in sorted(part.BY_COLUMNS):
            own = part.arrays()[name]
            if block.index != owner:
                _send(own, owner, device)
                continue
            for source, arrays in enumerate(blocks):
                arrays[name] = own if source == owner else _receive(own, source, device)
        if block.index == owner:
            whole.append(type(part).join(part.num_tokens, blocks))
    return whole if block.index == owner else None


def _send(tensor: Tensor, destination: int, device: torch.device) -> None:
    dist.send(torch.tensor([tensor.shape[-1]], device=device), destination)
    dist.send(tensor.to(device).contiguous(), destination)


def _receive(like: Tensor, source: int, device: torch.device) -> Tensor:
    """A tensor of the shape of another but for its last axis: blocks differ by a column."""
    width = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(width, source)
    shape = (*like.shape[:-1], int(width))
    found = torch.empty(shape, dtype=like.dtype, device=device)
    dist.recv(found, source)
    return found.cpu()
