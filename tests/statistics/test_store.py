"""The store and its ledger: committed once, whole or not at all, and no damage goes unnoticed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zarr
from disk_steps import Killed, each_kind, watched
from run_files import flip

from ghost_dist.durable import fingerprint
from ghost_dist.errors import CorruptStoreError, RunMismatchError
from ghost_dist.statistics.layer_scores import ScoreSums
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore, remove_store
from ghost_dist.statistics.store_plan import StatisticsPlan, stored_plan
from ghost_dist.statistics.sums import ColumnBlock, num_numbers

C, LENGTH = 8, 16
PLAN = StatisticsPlan(
    inputs={"model": "m", "tokens": "t", "batch": 1},
    entries={"1-3/stream": "moments", "all/scores": "scores"},
    ranges=((0, 1), (2, 3), (4,)),
    window_length=LENGTH,
)


def moments(seed, windows=2):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, gram = windows * LENGTH, draw(C, C)
    return {
        "1-3/stream": Moments(tokens, gram + gram.T, draw(C, C), draw(C), draw(C), draw(C)),
        "all/scores": ScoreSums(tokens, draw(C), draw(1)),
    }


@pytest.fixture(autouse=True)
def arrays_of_their_own(monkeypatch):
    """The small arrays of these tests stand for large ones."""
    monkeypatch.setattr("ghost_dist.statistics.store.PACKED_BYTES", 0)


@pytest.fixture
def store(tmp_path):
    store = StatisticsStore(tmp_path / "statistics.zarr", PLAN)
    for range_id, windows in enumerate((2, 2, 1)):
        assert store.commit(range_id, moments(range_id, windows))
    return store


def equal(a, b):
    return a.keys() == b.keys() and all(
        type(a[entry]) is type(b[entry])
        and a[entry].num_tokens == b[entry].num_tokens
        and all(torch.equal(a[entry].arrays()[n], b[entry].arrays()[n]) for n in a[entry].arrays())
        for entry in a
    )


def array_file(store, range_id, name):
    """The one chunk file of an array, found without the code under test."""
    found = (store.path / "ranges" / f"{range_id:05d}").glob(f"*/0/{name}/c/**/0")
    [path] = [path for path in found if path.is_file()]
    return path


def test_reads_back_bitwise_in_another_process_image(store):
    again = StatisticsStore.open(store.path)
    assert again.plan == PLAN
    assert again.committed() == (0, 1, 2)
    assert equal(again.read(1), moments(1))


def test_total_is_the_sum_in_id_order(store):
    a, b, c = moments(0), moments(1), moments(2, 1)
    assert equal(store.total(), {s: (a[s] + b[s]) + c[s] for s in a})
    assert equal(store.total([2, 0]), {s: a[s] + c[s] for s in a})


def test_order_of_commits_does_not_matter(store, tmp_path):
    other = StatisticsStore(tmp_path / "other.zarr", PLAN)
    for range_id, windows in ((2, 1), (0, 2), (1, 2)):
        other.commit(range_id, moments(range_id, windows))
    assert equal(other.total(), store.total())


def test_first_commit_wins_and_leaves_no_second_attempt(store):
    assert not store.commit(0, moments(99))
    assert equal(store.read(0), moments(0))
    assert len(list((store.path / "ranges" / "00000").iterdir())) == 1


def test_incomplete_store_has_no_total(tmp_path):
    store = StatisticsStore(tmp_path / "s.zarr", PLAN)
    store.commit(1, moments(1))
    assert store.missing() == (0, 2)
    with pytest.raises(CorruptStoreError, match=r"\[0, 2\] are not committed"):
        store.total()


def in_blocks(sums, count):
    """What each of several ranks holds: its columns of the large arrays, all of the small."""
    return [
        {
            entry: type(found)(
                found.num_tokens,
                **{
                    name: array[..., ColumnBlock(index, count).of(array.shape[-1])]
                    if name in found.BY_COLUMNS
                    else array
                    for name, array in found.arrays().items()
                },
            )
            for entry, found in sums.items()
        }
        for index in range(count)
    ]


def write_blocks(store, range_id, attempt, sums):
    parts = in_blocks(sums, store.plan.blocks)
    return [
        store.write_block(range_id, attempt, part, ColumnBlock(index, len(parts)))
        for index, part in enumerate(parts)
    ]


@pytest.fixture
def shared_store(tmp_path):
    """Of a replica of three ranks."""
    return StatisticsStore(tmp_path / "shared.zarr", replace(PLAN, blocks=3))


def test_blocks_of_ranks_are_read_as_one(shared_store):
    written = write_blocks(shared_store, 0, "one", moments(0))
    assert shared_store.committed() == ()
    assert shared_store.commit_attempt(0, "one", written)
    assert equal(shared_store.read(0), moments(0))
    chunks = (shared_store.path / "ranges" / "00000" / "one").glob("*/1-3/stream/gram_ZZ")
    assert len(list(chunks)) == 3
    assert not (shared_store.path / "ranges/00000/one/1/1-3/stream/sum_y_C").exists()


def test_of_a_whole_gram_half_is_stored_and_all_read_back(tmp_path):
    size = 1000  # strips of 256 rows, the last of 232
    gram = torch.randn(size, size, dtype=torch.float64)
    gram, row = gram + gram.T, gram[0].clone()
    sums = {"1-3/stream": Moments(LENGTH, gram, gram[:, :3], row, row[:3], row[:3])}
    plan = replace(PLAN, entries={"1-3/stream": "moments"}, ranges=((0,),))
    store = StatisticsStore(tmp_path / "whole.zarr", plan)
    assert store.commit(0, sums)
    assert equal(store.read(0), sums)
    chunks = [p for p in store.path.rglob("*/gram_ZZ/*/c/*/*") if p.is_file()]
    assert sum(path.stat().st_size for path in chunks) == num_numbers(size) * 8
    assert num_numbers(size) < 0.63 * size**2
    shutil.rmtree(next(store.path.rglob("*/gram_ZZ/2")))
    with pytest.raises(CorruptStoreError, match=r"gram_ZZ/2 of range 0"):
        store.read(0)


def test_small_arrays_are_one_file(shared_store, monkeypatch):
    limit = C * C * 8  # that of a whole cross; a third of its columns is less
    monkeypatch.setattr("ghost_dist.statistics.store.PACKED_BYTES", limit)
    whole = StatisticsStore(shared_store.path.with_name("whole.zarr"), PLAN)
    assert whole.commit(0, moments(0))
    shared_store.commit_attempt(0, "one", write_blocks(shared_store, 0, "one", moments(0)))
    for store, arrays in ((whole, {"packed", "cross_ZC", "0"}), (shared_store, {"packed"})):
        assert {path.parent.name for path in store.path.rglob("*/zarr.json")} == arrays
        assert equal(store.read(0), moments(0))
        assert equal(store.read(0, ["all/scores"]), {"all/scores": moments(0)["all/scores"]})
    flip(array_file(whole, 0, "packed"), 40)
    with pytest.raises(CorruptStoreError, match=r"0/packed of range 0"):
        whole.read(0)


def test_of_two_attempts_only_the_first_committed_counts(shared_store):
    written = [
        write_blocks(shared_store, 0, name, moments(seed))
        for seed, name in enumerate(("first", "second"))
    ]
    assert shared_store.commit_attempt(0, "second", written[1])
    assert not shared_store.commit_attempt(0, "first", written[0])
    assert equal(shared_store.read(0), moments(1))
    assert [path.name for path in (shared_store.path / "ranges" / "00000").iterdir()] == ["second"]


def test_a_lost_block_is_named(shared_store):
    shared_store.commit_attempt(0, "one", write_blocks(shared_store, 0, "one", moments(0)))
    shutil.rmtree(shared_store.path / "ranges" / "00000" / "one" / "2")
    with pytest.raises(CorruptStoreError, match=r"one/2/1-3/stream/gram_ZZ of range 0"):
        shared_store.read(0)


def test_a_manifest_of_fewer_blocks_is_not_believed(shared_store):
    shared_store.commit_attempt(0, "one", write_blocks(shared_store, 0, "one", moments(0)))
    path = shared_store.path / "ledger" / "00000.json"
    manifest = json.loads(path.read_bytes())
    manifest["blocks"] = manifest["blocks"][:2]
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "sha256": fingerprint(manifest)}))
    with pytest.raises(CorruptStoreError, match="number of blocks differ"):
        shared_store.read(0)


def test_attempt_without_manifest_is_rubbish(store):
    orphan = store.path / "ranges" / "00001" / "deadbeef"
    orphan.mkdir()
    (orphan / "x").write_text("half")
    (store.path / "ledger" / ".00002.json.abc.ghost-partial").write_text("{")
    assert equal(store.read(1), moments(1))
    store.sweep()
    assert not orphan.exists()
    assert not list((store.path / "ledger").glob(".*"))
    assert store.damaged() == {}


DAMAGE = {
    "flipped bit": lambda store: flip(array_file(store, 1, "1-3/stream/gram_ZZ/0"), 40),
    "truncated chunk": lambda store: array_file(store, 1, "all/scores/sums_S").write_bytes(
        b"1234567890"
    ),
    "empty chunk": lambda store: array_file(store, 1, "all/scores/sums_S").write_bytes(b""),
    "deleted chunk": lambda store: array_file(store, 1, "1-3/stream/sum_z_Z").unlink(),
    "deleted array": lambda store: next(
        (store.path / "ranges" / "00001").glob("*/0/1-3/stream/sumsq_y_C/zarr.json")
    ).unlink(),
    "flipped bit in the manifest": lambda store: flip(store.path / "ledger" / "00001.json", 90),
    "half a manifest": lambda store: (store.path / "ledger" / "00001.json").write_text("{"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_only_that_range_is_run_again(store, kind):
    before = store.total()
    DAMAGE[kind](store)
    damaged = store.damaged()
    assert list(damaged) == [1], damaged
    with pytest.raises(CorruptStoreError) as caught:
        store.total()
    assert caught.value.range_ids == (1,)
    store.sweep()
    store.discard(1)
    assert store.missing() == (1,)
    assert store.commit(1, moments(1))
    store.sweep()
    assert store.damaged() == {}
    assert equal(store.total(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("windows", [0, 1]),
        ("num_tokens", {"1-3/stream": 32, "all/scores": 64}),
        ("plan", "x"),
        ("range", 0),
    ],
)
def test_forged_manifest_is_refused_although_its_own_hash_is_right(store, field, value):
    path = store.path / "ledger" / "00001.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest[field] = value
    path.write_text(json.dumps({**manifest, "sha256": fingerprint(manifest)}))
    with pytest.raises(CorruptStoreError, match=f"range 1 is not as it was committed.*{field}"):
        store.read(1)


def test_manifest_of_another_range_is_refused(store):
    source = store.path / "ledger" / "00000.json"
    (store.path / "ledger" / "00001.json").write_bytes(source.read_bytes())
    assert list(store.damaged()) == [1]


def test_other_inputs_are_refused_by_name(store):
    plan = StatisticsPlan(**{**PLAN.__dict__, "inputs": {**PLAN.inputs, "batch": 2}})
    with pytest.raises(RunMismatchError, match="batch: 1 in the store, 2 now"):
        StatisticsStore(store.path, plan)


def test_full_disk_commits_nothing(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path / "s.zarr", PLAN)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ghost_dist.statistics.store.fsync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        store.commit(0, moments(0))
    assert store.committed() == ()
    assert list((store.path / "ranges" / "00000").iterdir()) == []
    monkeypatch.undo()
    assert store.commit(0, moments(0))


def test_a_missing_chunk_is_nan_for_who_reads_without_our_ledger(store):
    [path] = (store.path / "ranges" / "00000").glob("*/0/1-3/stream/gram_ZZ/0")
    array = zarr.open_array(path, mode="r")
    assert torch.isnan(torch.tensor(float(array.fill_value)))


TINY = replace(PLAN, entries={"all/scores": "scores"}, ranges=((0, 1),))
OLDER = replace(TINY, entries={"old/scores": "scores"})


def filled(path, plan=TINY):
    """What a command does: a store of another plan is removed, its own is made and filled."""
    if stored_plan(path) not in (None, plan):
        remove_store(path)
    store = StatisticsStore(path, plan)
    store.sweep()
    assert store.damaged() == {}  # what is there counts or is rubbish; nothing is complained of
    sums = dict.fromkeys(plan.entries, moments(0)["all/scores"])
    for range_id in store.missing():
        store.commit(range_id, sums)
    return store


def _made_anew(path):
    remove_store(path)
    return filled(path)


@pytest.fixture
def packed(monkeypatch):
    """All arrays in one, as small ones are; a step for one is a step for all."""
    monkeypatch.setattr("ghost_dist.statistics.store.PACKED_BYTES", 1 << 20)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("plan", [OLDER, TINY], ids=["other plan", "same plan"])
@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_removing_and_making_a_store_may_stop_at_every_step(tmp_path, plan, full):
    older, path = tmp_path / "older", tmp_path / "statistics.zarr"
    filled(older, plan)
    shutil.copytree(older, path)
    with watched(path, full=full) as calm:
        expected = _made_anew(path).total()
    points = each_kind(calm.steps)
    assert len(points) > (9 if full else 20)
    for last in points:
        shutil.rmtree(path)
        shutil.copytree(older, path)
        with watched(path, last, full=full), pytest.raises(OSError if full else Killed):
            _made_anew(path)
        assert equal(filled(path).total(), expected), calm.steps[last - 1]


@pytest.mark.usefixtures("packed")
def test_discarding_a_range_may_stop_at_every_step(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "statistics.zarr"
    expected = filled(whole).total()
    flip(array_file(StatisticsStore.open(whole), 0, "packed"), 40)

    def mend():
        store = StatisticsStore(path, TINY)
        store.sweep()
        for range_id in store.damaged():
            store.discard(range_id)
        store.sweep()
        return filled(path)

    shutil.copytree(whole, path)
    with watched(path) as calm:
        mend()
    for last in each_kind(calm.steps):
        shutil.rmtree(path)
        shutil.copytree(whole, path)
        with watched(path, last), pytest.raises(Killed):
            mend()
        assert equal(mend().total(), expected), calm.steps[last - 1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 4}', None])
def test_a_damaged_plan_costs_no_range(store, content):
    path = store.path / "ledger" / "plan.json"
    expected = store.total()
    if content is None:
        flip(path, 60)
    else:
        path.write_bytes(content)
    assert stored_plan(store.path) is None
    with pytest.raises(CorruptStoreError, match=r"plan\.json"):
        StatisticsStore.open(store.path)
    again = StatisticsStore(store.path, PLAN)
    assert again.missing() == ()
    assert again.damaged() == {}
    assert equal(again.total(), expected)
    assert stored_plan(store.path) == PLAN


def test_opening_and_reading_changes_nothing(store):
    with watched(store.path, 1) as watcher:
        again = StatisticsStore.open(store.path)
        assert again.damaged() == {}
        assert again.missing() == ()
        again.total()
    assert watcher.steps == []


def test_killed_writer_leaves_nothing_that_counts(tmp_path):
    """A writer is killed in the middle of commits; whatever is committed is whole."""
    code = f"""
import os, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from test_store import StatisticsStore, PLAN, moments
from pathlib import Path
for _ in sys.stdin:  # a line for each writer
    if (pid := os.fork()) > 0:
        os.waitpid(pid, 0)
        print("ended", flush=True)
        continue
    store = StatisticsStore(Path(sys.argv[1]), PLAN)
    print(os.getpid(), flush=True)
    while True:
        for range_id, windows in ((0, 2), (1, 2), (2, 1)):
            store.commit(range_id, moments(range_id, windows))
            store._manifest_path(range_id).unlink()
"""
    starter = [sys.executable, "-c", code, str(tmp_path / "s.zarr")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(starter, **pipes) as process:
        for number in range(4):
            process.stdin.write("next\n")
            pid = int(process.stdout.readline())
            time.sleep(0.1 + 0.13 * number)
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            store = StatisticsStore.open(tmp_path / "s.zarr")
            assert store.damaged() == {}
            for range_id in store.committed():
                assert equal(store.read(range_id), moments(range_id, len(PLAN.ranges[range_id])))
            store.sweep()
        process.stdin.close()
