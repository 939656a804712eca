"""A store whose ranges stay in memory after they were computed, and are written behind that.

Who sums them up takes them from memory, where there is room; what is on the disk is read only by
another process, or where there is none. Both have the same bits, so nothing depends on it.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ghost_dist.devices import copies_beside, free_or_cached_bytes, mark
from ghost_dist.statistics.store import CPU, StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan
from ghost_dist.statistics.sums import ColumnBlock, Sums

SHARE_AT_HAND = 0.4


class StoreAtHand(StatisticsStore):
    """The same store; ranges given to :meth:`keep` count for this process from then on."""

    def __init__(self, path: Path, plan: StatisticsPlan) -> None:
        super().__init__(path, plan)
        self._held: dict[int, Mapping[str, Sums]] = {}
        self._writer = ThreadPoolExecutor(1)
        self._writes: list[Future[None]] = []

    def keep(self, range_id: int, sums: Mapping[str, Sums], committed: Callable[[], None]) -> None:
        """Have the sums of a range at hand; commit it, then call ``committed``, in a thread.

        Without room for all ranges it is committed at once. An error of the thread is raised by the
        next call, or by :meth:`flush`; nothing is committed after it.
        """
        for one in self._writes:
            if one.done():
                one.result()
        device = _device_of(sums)
        nbytes = len(self.plan.ranges) * sum(part.nbytes for part in sums.values())
        place = next((d for d in (device, CPU) if self._has_room(d, nbytes)), None)
        if place is None:
            self.flush()
            self.commit(range_id, sums)
            committed()
            return
        held = {key: part.to(place) for key, part in sums.items()}
        self._held[range_id] = held
        ready = mark(place)

        def commit() -> None:
            if any(one.done() and one.exception() for one in self._writes):
                return
            with copies_beside(place, ready):
                on_host = {key: part.to(CPU) for key, part in held.items()}
            self.commit(range_id, on_host)
            committed()

        self._writes.append(self._writer.submit(commit))

    def flush(self) -> None:
        """Wait until everything that is to be written is on the disk."""
        for write in self._writes:
            write.result()
        self._writes.clear()

    def to_host(self) -> None:
        """Give a device's memory back."""
        self.flush()
        for range_id, sums in self._held.items():
            self._held[range_id] = {key: part.to(CPU) for key, part in sums.items()}

    def release(self) -> None:
        """Give memory back; what is being written keeps its own until it is."""
        self._held.clear()

    def bytes_at_hand(self, device: torch.device) -> int:
        ranges = [sums for sums in self._held.values() if _device_of(sums) == device]
        return sum(part.nbytes for sums in ranges for part in sums.values())

    def read(
        self,
        range_id: int,
        entries: Collection[str] | None = None,
        block: ColumnBlock | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Sums]:
        if block is not None or range_id not in self._held:
            return super().read(range_id, entries, block, device)
        held = self._held[range_id]
        wanted = [key for key in self.plan.entries if entries is None or key in entries]
        return {key: held[key].to(device) for key in wanted}

    def _has_range(self, range_id: int) -> bool:
        return range_id in self._held or super()._has_range(range_id)

    def _has_room(self, device: torch.device, nbytes: int) -> bool:
        free = free_or_cached_bytes(device) + self.bytes_at_hand(device)
        return nbytes <= SHARE_AT_HAND * free


def _device_of(sums: Mapping[str, Sums]) -> torch.device:
    return next(iter(next(iter(sums.values())).arrays().values())).device
