"""Ranks of a replica: what each runs and reads of the whole, and errors that all must see."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ghost_dist.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Peers:
    """This rank and how many there are in the torch.distributed world; or a process of its own."""

    rank: int = 0
    count: int = 1

    def part_of(self, total: int, rank: int | None = None) -> range:
        """Which of ``total`` items are a rank's (None: this one's); parts differ by one at most."""
        rank = self.rank if rank is None else rank
        return range(rank * total // self.count, (rank + 1) * total // self.count)

    def owner_of(self, item: int, total: int) -> int:
        return next(r for r in range(self.count) if item in self.part_of(total, r))

    def gather(self, memory: Tensor) -> None:
        """Fill memory of which ranks hold equal parts, not waiting for queued work; collective."""
        size = memory.numel() // self.count
        own = memory[self.rank * size : (self.rank + 1) * size]
        dist.all_gather_into_tensor(memory, own)

    def send(self, tensor: Tensor, owner: int) -> None:
        """Give a rank's tensor to the others, which write it into theirs; collective."""
        if self.count > 1:
            dist.broadcast(tensor, owner)


ALONE = Peers()


@contextlib.contextmanager
def errors_shared() -> Iterator[None]:
    """Raise on every rank what any rank raised inside (errors of one message); collective."""
    own: ConfigError | CheckpointError | None = None
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        own = error
    found: list[ConfigError | CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if own is not None:
        raise own
    for rank, other in enumerate(found):
        if other is not None:
            raise type(other)(f"{other} (Found by rank {rank}.)")
