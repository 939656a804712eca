"""Ranks of a replica of which each runs a part of the windows and reads a part of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


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
