"""A store that keeps ranges in memory and writes them in a thread: same sums, nothing read back."""

import pytest
import torch

from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics import at_hand
from ghost_dist.statistics import store as on_disk
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan

PLAN = StatisticsPlan({"model": "m"}, {"1-3/stream": "moments"}, ((0,), (1,), (2,)), 7)


def sums(seed):
    generator = torch.Generator().manual_seed(seed)
    gram, cross, row = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 5), (5, 3), 5)
    )
    return {"1-3/stream": Moments(7, gram + gram.T, cross, row, row[:3], row[:3])}


@pytest.fixture
def store(tmp_path):
    return StoreAtHand(tmp_path / "statistics.zarr", PLAN)


def totals(store):
    return [array for part in store.total().values() for array in part.arrays().values()]


@pytest.mark.parametrize("room", [0.4, 0.0])
def test_sums_at_hand_are_bitwise_those_on_the_disk(store, monkeypatch, room):
    monkeypatch.setattr(at_hand, "SHARE_AT_HAND", room)
    committed = []
    for range_id in range(3):
        store.keep(range_id, sums(range_id), lambda: committed.append(1))
    assert store.missing() == ()
    assert (store.bytes_at_hand(torch.device("cpu")) > 0) == (room > 0)
    found = totals(store)
    store.flush()
    store.release()
    assert committed == [1, 1, 1]
    assert all(map(torch.equal, found, totals(StatisticsStore.open(store.path))))


def test_after_a_failed_write_nothing_is_committed_and_it_is_told(store, monkeypatch):
    write = on_disk.write_array

    def full(path, values):
        if "00001" in str(path):
            raise OSError("no space left")
        return write(path, values)

    monkeypatch.setattr(on_disk, "write_array", full)
    for range_id in range(2):
        store.keep(range_id, sums(range_id), lambda: None)
    with pytest.raises(OSError, match="no space left"):
        store.flush()
    assert StatisticsStore.open(store.path).missing() == (1, 2)


def test_a_run_reads_nothing_back(make_config, monkeypatch):
    def refuse(path, expected):
        raise AssertionError(f"{path} is read back")

    monkeypatch.setattr(on_disk, "read_array", refuse)
    recover(make_config(), again="solve")
