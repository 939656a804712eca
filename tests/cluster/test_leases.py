"""The queue of leases, alone and together with the ledger of a real store."""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ghost_dist.cluster.leases import Holders, LeaseQueue, Worker
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan
from ghost_dist.statistics.sums import ColumnBlock


def ranges_to_run(missing):
    return LeaseQueue(missing)


def test_ranges_are_handed_out_once_in_order():
    queue = ranges_to_run([3, 5, 8])
    assert [queue.lease(Worker(replica), 0.0).item for replica in range(3)] == [3, 5, 8]
    assert queue.lease(Worker(3), 0.0) is None
    assert not queue.done


def test_a_lost_replica_gives_its_range_back_first():
    queue = ranges_to_run([0, 1, 2])
    queue.lease(Worker(0), 0.0)
    queue.lease(Worker(1), 0.0)
    queue.lost(0)
    lease = queue.lease(Worker(1), 1.0)
    assert lease.item == 0


def test_attempts_are_never_the_same():
    queue = ranges_to_run([0])
    first = queue.lease(Worker(0), 0.0)
    queue.lost(0)
    assert queue.lease(Worker(0), 1.0).attempt != first.attempt


def test_a_straggler_is_leased_a_second_time_and_no_more():
    queue = ranges_to_run([0, 1])
    slow, fast = queue.lease(Worker(0), 0.0), queue.lease(Worker(1), 0.0)
    queue.finished(fast, 1.0)
    assert queue.lease(Worker(1), 1.5) is None  # not slow yet
    assert queue.lease(Worker(0), 9.0) is None  # not to the one that is slow
    second = queue.lease(Worker(1), 2.5)
    assert second.item == slow.item
    assert queue.lease(Worker(2), 99.0) is None
    queue.finished(second, 3.0)
    assert queue.done
    assert queue.leases == ()  # the slow attempt is of no use any more


def test_of_two_holders_one_may_be_lost():
    queue = ranges_to_run([0, 1])
    queue.lease(Worker(0), 0.0)
    queue.finished(queue.lease(Worker(1), 0.0), 1.0)
    queue.lease(Worker(1), 5.0)
    queue.lost(0)
    assert queue.num_pending == 0  # the other still runs it
    queue.lost(1)
    assert queue.num_pending == 1


def test_items_stay_where_what_they_need_is():
    a, b, c = Worker(0, 0), Worker(0, 1), Worker(1, 0)
    holders = Holders()

    def lease(worker):
        return queue.lease(worker, 0.0)

    queue = LeaseQueue("xyz", holders)
    first, second = lease(a), lease(b)
    assert (first.item, second.item) == ("x", "y")
    queue.finished(first, 1.0)
    third = lease(a)
    assert third.item == "z"
    assert holders == {"y": b, "z": a}  # a has read something else since
    assert lease(c) is None  # not a second time, however long it takes
    queue.finished(second, 1.0)
    queue.finished(third, 1.0)
    assert queue.done
    queue = LeaseQueue("xyz", holders)
    assert (lease(b).item, lease(a).item) == ("y", "z")
    queue.lost(0)
    holders.lost(0)
    assert holders == {}
    found = [lease(c)]
    queue.finished(found[0], 1.0)
    found.append(lease(c))
    assert {lease.item for lease in found} <= set("xyz")

    holders.lost(1)
    holders.give({"x": a, "y": a})
    queue = LeaseQueue("xyz", holders)
    found = lease(b)
    assert found.item == "z"
    queue.finished(found, 1.0)
    assert lease(b) is None  # a was given the rest
    found = lease(a)
    assert found.item == "x"
    queue.lost(1)
    holders.lost(1)
    queue.finished(found, 1.0)
    assert holders["x"] == holders["y"] == a
    holders.lost(0)
    assert holders == {}


RANGES, BLOCKS, REPLICAS, C = 5, 2, 3, 4
PLAN = StatisticsPlan(
    inputs={"model": "m"},
    entries={"1-3/stream": "moments"},
    ranges=tuple((i,) for i in range(RANGES)),
    window_length=4,
    blocks=BLOCKS,
)


class Ledger(RuleBasedStateMachine):
    """Replicas write, die, come back as zombies and commit late; drivers die; disks lose blocks.

    Whatever the order, each range counts once, with the sums of one attempt.
    """

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.clock = 0.0
        self.counted = {}
        self.start_driver()

    def start_driver(self):
        self.store = StatisticsStore(self.folder / "statistics.zarr", PLAN)
        self.store.sweep()
        for range_id in self.store.damaged():
            self.store.discard(range_id)
            del self.counted[range_id]
        self.queue = ranges_to_run(self.store.missing())
        self.running = {}
        self.zombies = []

    def sums(self, attempt, width=C):
        """Every number says which attempt it is of."""

        def filled(*shape):
            return torch.full(shape, float(int(attempt[:6], 16)), dtype=torch.float64)

        arrays = (filled(C, width), filled(C, width), filled(C), filled(C), filled(C))
        return {"1-3/stream": Moments(4, *arrays)}

    def write(self, lease, blocks=range(BLOCKS)):
        sums = self.sums(lease.attempt, C // BLOCKS)
        return [
            self.store.write_block(lease.item, lease.attempt, sums, ColumnBlock(i, BLOCKS))
            for i in blocks
        ]

    @rule(replica=st.integers(0, REPLICAS - 1))
    def lease(self, replica):
        self.clock += 1.0
        if replica not in self.running:
            lease = self.queue.lease(Worker(replica), self.clock)
            if lease is not None:
                self.running[replica] = lease

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        replica = data.draw(st.sampled_from(sorted(self.running)))
        lease = self.running.pop(replica)
        written = self.write(lease)
        if lease not in self.queue.leases:
            self.store.discard_attempt(lease.item, lease.attempt)
            return
        assert self.store.commit_attempt(lease.item, lease.attempt, written)
        self.queue.finished(lease, self.clock)
        assert lease.item not in self.counted
        self.counted[lease.item] = lease.attempt

    @precondition(lambda self: self.running)
    @rule(data=st.data(), blocks=st.integers(0, BLOCKS))
    def die_while_writing(self, data, blocks):
        replica = data.draw(st.sampled_from(sorted(self.running)))
        lease = self.running.pop(replica)
        self.write(lease, range(blocks))
        self.queue.lost(replica)
        self.zombies.append((lease, range(blocks, BLOCKS)))

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def zombie_finishes_writing(self, data):
        number = data.draw(st.integers(0, len(self.zombies) - 1))
        self.write(*self.zombies.pop(number))

    @rule()
    def driver_dies(self):
        self.start_driver()

    @precondition(lambda self: self.counted)
    @rule(data=st.data())
    def disk_loses_an_array(self, data):
        range_id = data.draw(st.sampled_from(sorted(self.counted)))
        attempt = self.store.path / "ranges" / f"{range_id:05d}" / self.counted[range_id]
        shutil.rmtree(attempt / "1" / "packed")
        self.start_driver()
        assert range_id in self.store.missing()

    @invariant()
    def what_counts_is_what_was_committed(self):
        if not hasattr(self, "store"):
            return
        assert set(self.store.committed()) == set(self.counted)
        for range_id, attempt in self.counted.items():
            found = self.store.read(range_id)["1-3/stream"].arrays()
            expected = self.sums(attempt)["1-3/stream"].arrays()
            assert all(torch.equal(found[name], expected[name]) for name in expected)

    @invariant()
    def nothing_is_forgotten(self):
        if hasattr(self, "store"):
            leased = {lease.item for lease in self.queue.leases}
            assert self.queue.num_pending + len(leased) == len(self.store.missing())
            assert self.queue.done == (not self.store.missing())

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
