"""The live reduction without Ray: which replica adds what, and that no range is added twice."""

import multiprocessing

import pytest
import torch

from ghost_dist.cluster.fit import divide
from ghost_dist.cluster.running_sums import (
    ReduceSpec,
    ReplicaGroup,
    RunningSums,
    gather_columns,
    host_meeting,
    reduce_folds,
)
from ghost_dist.errors import ReductionError
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan
from ghost_dist.statistics.sums import ColumnBlock

FOLDS, RANGES, Z, C = 2, 7, 5, 3
CPU = torch.device("cpu")
ALONE = ReplicaGroup(ReduceSpec({}, (), "", 0, 0, 1, ()), ColumnBlock(), CPU, 10)
EPS = torch.finfo(torch.float64).eps


def moments_of(range_id, num_tokens=8):
    generator = torch.Generator().manual_seed(range_id)

    def normal(*shape):
        # Of very different size, so that another order of additions rounds differently.
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (range_id % 4)

    return Moments(num_tokens, normal(Z, Z), normal(Z, C), normal(Z), normal(C), normal(C))


def block_of(sums, block):
    arrays = {
        name: a[..., block.of(a.shape[-1])].clone() if name in sums.BY_COLUMNS else a
        for name, a in sums.arrays().items()
    }
    return Moments(sums.num_tokens, **arrays)


@pytest.fixture
def store(tmp_path):
    """Two column blocks, seven ranges of two windows of four tokens."""
    ranges = tuple((2 * i, 2 * i + 1) for i in range(RANGES))
    store = StatisticsStore(
        tmp_path / "statistics.zarr", StatisticsPlan({}, {"a": "moments"}, ranges, 4, 2)
    )
    for range_id in range(RANGES):
        blocks = [
            store.write_block(
                range_id, f"attempt{range_id}", {"a": block_of(moments_of(range_id), block)}, block
            )
            for block in (ColumnBlock(0, 2), ColumnBlock(1, 2))
        ]
        store.commit_attempt(range_id, f"attempt{range_id}", blocks)
    return store


def test_a_block_is_read_as_its_rank_wrote_it(store):
    for index in range(2):
        block = ColumnBlock(index, 2)
        [found] = store.read(3, block=block).values()
        expected = block_of(moments_of(3), block)
        assert found.num_tokens == 8
        assert found.gram_ZZ.shape == (Z, 2 + index)
        for name, array in expected.arrays().items():
            assert torch.equal(found.arrays()[name], array), name


def test_every_range_is_dealt_once():
    committed = {i: f"a{i}" for i in range(7)}
    live = {4: {0: "a0", 3: "a3"}, 5: {1: "a1"}, 9: {}}
    parts = divide(committed, live)
    assert parts[4].kept == {0: "a0", 3: "a3"}
    assert parts[5].kept == {1: "a1"}
    dealt = sorted(i for part in parts.values() for i in (*part.kept, *part.read))
    assert dealt == list(range(7))
    assert max(len(part.read) for part in parts.values()) == 2  # 2, 4, 5, 6 over three


def test_replicas_without_a_range_take_no_part():
    assert divide({0: "a"}, {1: {0: "a"}, 2: {}}).keys() == {1}


def test_an_attempt_that_lost_cannot_be_in_the_sums():
    with pytest.raises(ReductionError, match="kept attempt zombie of range 0"):
        divide({0: "a"}, {1: {0: "zombie"}})


def test_a_range_is_not_added_twice():
    running = RunningSums(FOLDS)
    running.add(0, "x", {"a": moments_of(0)})
    with pytest.raises(ReductionError, match="Range 0 is in the running sums already"):
        running.add(0, "y", {"a": moments_of(0)})


def test_what_is_added_later_does_not_change_what_was_given():
    first, second = moments_of(0), moments_of(2)
    before = {name: array.clone() for name, array in first.arrays().items()}
    running = RunningSums(FOLDS)
    running.add(0, "x", {"a": first})
    running.add(2, "y", {"a": second})
    assert running.folds[0]["a"].num_tokens == 16
    for name, array in first.arrays().items():
        assert torch.equal(array, before[name])
        assert torch.equal(running.folds[0]["a"].arrays()[name], array + second.arrays()[name])


@pytest.mark.parametrize("ranges", [range(6), (0, 1, 2, 3, 4, 5, 5)])
def test_ranges_that_are_not_all_there_once_are_refused(store, ranges):
    running = RunningSums(FOLDS)
    for number, range_id in enumerate(ranges):
        if number == 6:
            running.kept.pop(range_id)  # a second attempt that nobody noticed
        running.add(
            range_id, f"x{number}", {"a": block_of(moments_of(range_id), ColumnBlock(0, 2))}
        )
    with pytest.raises(ReductionError, match=r"counts once, .*\{6: 0\}"):
        reduce_folds(running, ALONE, store, lambda _: None)


def test_tokens_of_a_fold_are_compared_with_the_plan(store):
    running = RunningSums(FOLDS)
    for range_id in range(RANGES):
        part = block_of(moments_of(range_id, 7 if range_id == 3 else 8), ColumnBlock(0, 2))
        running.add(range_id, "x", {"a": part})
    with pytest.raises(ReductionError, match="fold 1 hold 23 tokens, but its ranges have 24"):
        reduce_folds(running, ALONE, store, lambda _: None)


def _rank(path, replica, rank, address, port, world_port, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    store, block = StatisticsStore.open(path), ColumnBlock(rank, 2)
    own = f"tcp://{address}:{world_port}"
    dist.init_process_group("gloo", init_method=own, rank=rank, world_size=2)
    running = RunningSums(FOLDS)
    # Replica 0 has all of fold 0 and one range of fold 1; replica 1 nothing of fold 0.
    mine = (6, 2, 0, 4, 5) if replica == 0 else (3, 1)
    for range_id in mine:
        running.add(range_id, "x", store.read(range_id, block=block))
    spec = ReduceSpec({}, (), address, port, replica, 2, ())
    group = ReplicaGroup(spec, block, CPU, 30)
    folds = reduce_folds(running, group, store, lambda _: None)
    owner = 1 - replica
    whole = gather_columns(folds, "a", block, owner, CPU)
    assert (whole is None) == (rank != owner)
    if whole is not None:
        results.put((replica, [{n: t.tolist() for n, t in f.arrays().items()} for f in whole]))
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.model
def test_two_worlds_of_two_ranks_give_the_ordered_sum_within_rounding(store):
    """In other orders than that of the ids; every entry within n eps times its absolute sum."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ghost_dist.cluster.running_sums"])
    meeting, results = host_meeting("127.0.0.1", 30), context.Queue()
    ranks = []
    for replica in range(2):
        port = free_port()
        for rank in range(2):
            arguments = (store.path, replica, rank, "127.0.0.1", meeting.port, port, results)
            ranks.append(context.Process(target=_rank, args=arguments))
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=60) for _ in range(2))
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    assert found[0] == found[1]  # the same bits at both replicas
    differing = 0
    for fold in range(FOLDS):
        ids = [i for i in range(RANGES) if i % FOLDS == fold]
        [ordered] = store.total(ids).values()
        for name, array in ordered.arrays().items():
            absolute = sum(moments_of(i).arrays()[name].abs() for i in ids)
            difference = (torch.tensor(found[0][fold][name], dtype=torch.float64) - array).abs()
            assert (difference <= (len(ids) - 1) * EPS * absolute).all()
            differing += int((difference > 0).sum())
    assert differing > 0  # else the bound was not tried


def test_a_group_of_one_changes_nothing():
    tensor = torch.arange(3, dtype=torch.float64)
    ALONE.add(tensor)
    assert tensor.tolist() == [0, 1, 2]
