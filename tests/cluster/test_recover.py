"""A run on three nodes against the same run in one process, and what it refuses."""

import contextlib
import errno
import itertools
import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from live_sums import use_rank, waiting
from ray_processes import NODE, nothing_leaked, rank_pids
from run_files import events, operator_tensors, worst_difference
from safetensors.torch import load_file
from trace_files import check_format, named

from ghost_dist.cluster import failures
from ghost_dist.cluster import replica as replica_module
from ghost_dist.cluster import session as session_module
from ghost_dist.cluster.leases import LeaseQueue, Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.rank import Rank
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    NonFiniteActivationError,
    RunMismatchError,
)
from ghost_dist.pipeline import engine
from ghost_dist.pipeline.recover import recover
from ghost_dist.report.record import RunRecord
from ghost_dist.report.trace import trace_of
from ghost_dist.statistics.store import StatisticsStore

SPANS = [[1, 3], [5, 6]]


@pytest.fixture
def make(make_config, cluster):
    def make_for_cluster(**overrides):
        fields = {
            "cluster__address": cluster.address,
            "engine__tensor_parallel": 2,
            "selection__spans": SPANS,
            "operator__name": "ghost-joint",
        }
        return make_config(**{**fields, **overrides})

    return make_for_cluster


def test_two_replicas_of_two_ranks_equal_one_process(
    make, make_config, cluster, tmp_path, monkeypatch
):
    alone = make_config(
        selection__spans=SPANS, operator__name="ghost-joint", output__path=str(tmp_path / "alone")
    )
    recover(alone, again="solve")
    with monkeypatch.context() as patched:
        use_rank(patched, waiting(tmp_path / "loaded", 4))
        # What is run twice is committed once.
        patched.setattr("ghost_dist.cluster.leases.STRAGGLER", float("inf"))
        recover_on_cluster(make(engine__replicas=2), again="solve")
    run = tmp_path / "run"
    # float32: the halves of a row-parallel product are added in another order.
    difference = worst_difference(operator_tensors(run), operator_tensors(tmp_path / "alone"))
    assert 0 < difference < 1e-5
    store = StatisticsStore.open(run / "statistics.zarr")
    assert store.plan.blocks == 2
    whole = StatisticsStore.open(tmp_path / "alone" / "statistics.zarr").total()
    for entry, sums in store.total().items():
        assert sums.num_tokens == whole[entry].num_tokens == 16 * 64
        for name, array in sums.arrays().items():
            expected = whole[entry].arrays()[name]
            torch.testing.assert_close(array, expected, rtol=0, atol=1e-5 * float(expected.max()))
    ready = events(run, "replica-ready")
    assert len({pid for event in ready for pid in event["pids"]}) == 4
    half = [size for event in ready for size in event["parameter_bytes"]]
    assert len(set(half)) == 1
    committed = [event["range"] for event in events(run, "range-committed")]
    assert sorted(committed) == list(range(4))
    trace = trace_of(RunRecord(run).events)
    check_format(trace)
    of_track = named(trace)
    for replica, rank in itertools.product(range(2), range(2)):
        spans = of_track[f"replica {replica}", f"rank {rank}"]
        assert [name for name, *_ in spans][:2] == ["start", "load"]
        mine = sum(event["replica"] == replica for event in events(run, "range-committed"))
        assert [name for name, *_ in spans].count("forward") == mine
        assert len(of_track[f"replica {replica}", f"rank {rank} writes"]) == mine
    fits = [span for spans in of_track.values() for span in spans if span[0] == "fit"]
    assert len(fits) == len(events(run, "span-fitted")) > 0
    clean, left = nothing_leaked(cluster)
    assert clean, left

    # The same bits, however many replicas there are, and when the run is continued with others.
    again = tmp_path / "again"
    config = make(engine__replicas=1, output__path=str(again))
    recover_on_cluster(config, again="calibrate")
    for range_id in (1, 3):
        StatisticsStore.open(again / "statistics.zarr").discard(range_id)
    config = make(engine__replicas="auto", output__path=str(again))
    recover_on_cluster(config, again="solve")
    assert worst_difference(operator_tensors(again), operator_tensors(run)) == 0
    with pytest.raises(RunMismatchError, match=r"engine\.tensor_parallel: 2 in RUN, 1 now"):
        recover_on_cluster(make(engine__tensor_parallel=1, output__path=str(again)))


@pytest.mark.parametrize(("criterion", "spans"), [("paper", None), ("search", 2)])
def test_selection_on_a_cluster(make_config, cluster, tmp_path, criterion, spans):
    fields = {
        "selection__spans": None,
        "selection__criterion": criterion,
        "selection__remove": 3,
        "selection__max_spans": spans,
        "calibration__windows": 8,
    }
    on_cluster = make_config(
        **fields,
        cluster__address=cluster.address,
        engine__tensor_parallel=2,
        output__path=str(tmp_path / "cluster"),
    )
    alone = make_config(**fields)
    found = recover_on_cluster(on_cluster, again="select")
    assert found == recover(alone, again="select")


def test_a_driver_without_room_reads_layer_by_layer(make, tmp_path, text_file, monkeypatch, capsys):
    fields = {
        "operator__name": "auto",
        "operator__choose": "kl",
        "evaluation__corpora": {"text": str(text_file)},
        "evaluation__windows": 2,
        "evaluation__window_length": 64,
    }
    results = {}
    for name in ("whole", "little"):
        with monkeypatch.context() as patched:
            if name == "little":
                patched.setattr(engine, "free_bytes", lambda _: 1000)
            config = make(**fields, output__path=str(tmp_path / name))
            results[name] = recover_on_cluster(config)
    assert "which the driver runs, read the model layer by layer" in capsys.readouterr().err
    whole, little = results["whole"], results["little"]
    assert whole["samples"]
    assert not little["samples"]  # a token generated would be a model read
    assert worst_difference(*(operator_tensors(tmp_path / name) for name in results)) == 0
    assert little["chosen"] == whole["chosen"]
    for variant, perplexity in whole["perplexity"]["text"].items():
        assert little["perplexity"]["text"][variant] == pytest.approx(perplexity, rel=1e-5)
    # With room again it goes on as it began.
    (tmp_path / "little" / "stages" / "evaluate.json").unlink()
    again = recover_on_cluster(make(**fields, output__path=str(tmp_path / "little")))
    assert again["perplexity"] == little["perplexity"]
    assert not again["samples"]


@pytest.mark.parametrize("engine_kind", ["resident", "streaming"])
def test_attentions_and_mlps_that_go_by_themselves(make_config, cluster, tmp_path, engine_kind):
    fields = {
        "selection__spans": [[1, 3]],
        "selection__sublayers": ("attention:4", "mlp:6"),
        "operator__name": "ghost-joint",
        "engine__kind": engine_kind,
    }
    alone = make_config(**fields, output__path=str(tmp_path / "alone"))
    recover(alone, again="export")
    on_cluster = {"cluster__address": cluster.address, "engine__replicas": 2}
    recover_on_cluster(make_config(**fields, **on_cluster), again="export")
    for file in (tmp_path / "alone" / "checkpoint").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / "checkpoint" / file.name).read_bytes()


def test_resident_replicas_give_the_bits_of_one_process(
    make_config, cluster, tmp_path, monkeypatch
):
    watched = contextlib.nullcontext(lambda: 0.5)  # as a GPU of this process
    monkeypatch.setattr("ghost_dist.pipeline.stage_records.watched_idle", lambda _: watched)
    config = make_config(
        cluster__address=cluster.address, engine__kind="resident", engine__replicas=2
    )
    result = recover_on_cluster(config)
    alone = make_config(output__path=str(tmp_path / "alone"))
    assert recover(alone)["gpu_idle"]["all"] == 0.5
    assert "gpu_idle" not in result  # those of the ranks are not watched
    assert (
        worst_difference(operator_tensors(tmp_path / "run"), operator_tensors(tmp_path / "alone"))
        == 0
    )
    assert result["reload_max_abs_difference"] < 1e-4
    assert events(tmp_path / "run", "span-leased") == []  # one span, and the driver's device is one
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_a_node_that_joins_is_used(make_config, cluster, tmp_path, monkeypatch):
    """Three nodes of 2 CPUs take three replicas of 2; the fourth comes while they load."""
    monkeypatch.setattr("ghost_dist.cluster.pool.LOOK_FOR_ROOM_S", 0.0)
    joined = []

    class Joining(replica_module.Replica):
        def run(self, *arguments):
            if not joined:
                joined.append(cluster.add_node(**NODE))
            time.sleep(0.3)  # the driver: the others wait for it, and the fourth can load
            super().run(*arguments)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Joining)
    config = make_config(
        cluster__address=cluster.address,
        cluster__cpus_per_rank=2,
        engine__kind="resident",
        engine__replicas="auto",
        calibration__windows=64,
        calibration__ranges=64,
    )
    try:
        recover_on_cluster(config, again="calibrate")
    finally:
        cluster.remove_node(joined[0])
    assert len(events(tmp_path / "run", "replica-start")) == 4


def test_room_that_was_never_given_is_asked_for_again(make_config, cluster, tmp_path, monkeypatch):
    """Ray has lost a request for room; the run does not wait for it until it gives up."""

    class Lost(replica_module.Replica):
        def __init__(self, number, spec, shape, *arguments):
            if number == 0:  # a bundle of what no node has
                shape = replace(shape, gpus_per_rank=1)
            super().__init__(number, spec, shape, *arguments)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Lost)
    monkeypatch.setattr("ghost_dist.cluster.pool.ASK_AGAIN_S", 2.0)
    config = make_config(cluster__address=cluster.address, engine__kind="resident")
    recover_on_cluster(config, again="calibrate")
    assert [one["replica"] for one in events(tmp_path / "run", "replica-start")] == [0, 1]
    assert [one["replica"] for one in events(tmp_path / "run", "replica-ready")] == [1]


def test_a_straggler_of_a_stage_that_is_over_writes_nothing(
    make_config, cluster, tmp_path, monkeypatch
):
    """It is stopped in its first range of the selection and goes on in the calibration, when the
    store of the selection has been removed."""
    stopped = []

    class Stopping(replica_module.Replica):
        def run(self, *arguments):
            super().run(*arguments)
            if not stopped:
                stopped.append(self.places[0].pid)
                os.kill(stopped[0], signal.SIGSTOP)

    class Continuing(session_module.CollectOnCluster):
        def __call__(self, store, tokens, collectors, stage, **more):
            if stage == "calibrate":
                assert not selection.exists()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stopped[0], signal.SIGCONT)
                time.sleep(1.0)  # long enough for it to run the range
            super().__call__(store, tokens, collectors, stage, **more)

    selection = tmp_path / "run" / "selection.zarr"
    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Stopping)
    monkeypatch.setattr("ghost_dist.cluster.session.CollectOnCluster", Continuing)
    config = make_config(
        cluster__address=cluster.address,
        cluster__heartbeat_timeout_s=250,
        engine__kind="resident",
        engine__replicas=2,
        selection__spans=None,
        selection__remove=2,
    )
    recover_on_cluster(config, again="calibrate")
    twice = Counter(
        event["range"]
        for event in events(tmp_path / "run", "range-leased")
        if event["stage"] == "select"
    )
    assert max(twice.values()) == 2
    assert events(tmp_path / "run", "replica-lost") == []
    assert not selection.exists()
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"engine__replicas": 4}, ConfigError, r"room for 3 such replicas .*engine\.replicas=3"),
        ({"engine__tensor_parallel": 4}, ConfigError, "does not divide the 2 key-value heads"),
        ({"engine__device": "cuda"}, ConfigError, "no node of the Ray cluster has a GPU"),
        (
            {"cluster__address": "127.0.0.1:1"},
            ConfigError,
            r"No Ray cluster answers at .*ray status",
        ),
        ({"cluster__address": "ray://h:10001"}, ConfigError, "ghost-dist submit CONFIG"),
    ],
)
def test_bad_input_is_refused_within_seconds(make, tmp_path, overrides, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        recover_on_cluster(make(**overrides))
    assert time.monotonic() - began < 60  # no placement timeout: that is 300 s
    assert not (tmp_path / "run" / "statistics.zarr" / "ranges").exists()


def test_what_every_replica_would_meet_stops_the_run_at_once(make_config, cluster, tmp_path):
    """A weight that overflows: no use in trying another replica."""
    config = make_config(output__path=str(tmp_path / "x"))
    broken = tmp_path / "broken"
    shutil.copytree(config.model.path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e38
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    config = make_config(
        model__path=str(broken), cluster__address=cluster.address, engine__kind="resident"
    )
    with pytest.raises(NonFiniteActivationError, match="layer 3"):
        recover_on_cluster(config)
    assert events(tmp_path / "run", "replica-lost") == []
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.mark.parametrize("fault", ["gone", "other"])
def test_a_node_without_the_checkpoint_is_named(make_config, cluster, tmp_path, monkeypatch, fault):
    """The driver's copy changes between its check and the ranks' loading."""
    own = tmp_path / "model"
    config = make_config(output__path=str(tmp_path / "x"))
    shutil.copytree(config.model.path, own)

    class Late(replica_module.Replica):
        def _join(self, *arguments):
            if fault == "gone":
                own.rename(tmp_path / "moved")
            else:
                text = (own / "config.json").read_text()
                (own / "config.json").write_text(text.replace("1e-06", "1e-05"))
            super()._join(*arguments)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Late)
    config = make_config(
        model__path=str(own), cluster__address=cluster.address, engine__kind="resident"
    )
    message = "does not exist on node" if fault == "gone" else "is another checkpoint than"
    with pytest.raises(CheckpointError, match=message):
        recover_on_cluster(config)


def test_other_versions_on_a_node_are_named(make_config, cluster, monkeypatch):
    own = replica_module.versions
    monkeypatch.setattr(replica_module, "versions", lambda: {**own(), "torch": "1.0"})
    config = make_config(cluster__address=cluster.address, engine__kind="resident")
    with pytest.raises(ConfigError, match=r"other versions than the driver: torch .*driver: 1\.0"):
        recover_on_cluster(config)


def test_a_run_that_only_crashes_stops_and_says_so(make_config, cluster, tmp_path, monkeypatch):
    class Dying(replica_module.Replica):
        def _join(self, *arguments):
            os.kill(self.places[0].pid if self.places else rank_pids(cluster)[0], 9)
            super()._join(*arguments)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Dying)
    config = make_config(
        cluster__address=cluster.address, cluster__max_crashes=1, engine__kind="resident"
    )
    with pytest.raises(ClusterError, match=r"2 x crash.*same command continues"):
        recover_on_cluster(config)
    lost = events(tmp_path / "run", "replica-lost")
    assert len(lost) == 2
    said = r"(rank 0|a rank) \(process \d+ on [\d.]+\) died: its worker process has died"
    assert all(re.fullmatch(said, one["detail"]) for one in lost), lost
    kept = [path.read_text() for path in (tmp_path / "run" / "failures").iterdir()]
    assert len(kept) == 2
    told = ("died: its worker", " replica-start replica=", "--- what Ray says", "disk of /")
    assert all(part in text for text in kept for part in told), kept
    monkeypatch.undo()
    assert recover_on_cluster(config)["tokens"] == 16 * 64


@pytest.mark.parametrize("fault", ["crash", "full disk", "full disks"])
def test_a_node_that_fails_for_reasons_of_its_own_is_left_out(
    make_config, cluster, tmp_path, monkeypatch, fault
):
    """The others wait until it is; a disk that two nodes find full is full for all."""
    sick = {
        node.node_id for node in list(cluster.worker_nodes)[: 2 if fault == "full disks" else 1]
    }
    run = tmp_path / "run"

    class OfSickNode(Rank):
        def run(self, *arguments):
            if ray.get_runtime_context().get_node_id() not in sick:
                # What it finishes between the two full disks would say that disks are not full.
                while (run / "events.jsonl").read_text().count('"node-left-out"') < len(sick):
                    time.sleep(0.1)
            elif fault == "crash":
                os._exit(1)
            return super().run(*arguments)

        @ray.method(concurrency_group="write")
        def write(self, *arguments):
            if ray.get_runtime_context().get_node_id() in sick:
                raise OSError(errno.ENOSPC, "No space left on device", "/its/own")
            return super().write(*arguments)

    use_rank(monkeypatch, OfSickNode)
    config = make_config(
        cluster__address=cluster.address,
        cluster__cpus_per_rank=2,  # a node has room for one
        engine__kind="resident",
        engine__replicas=3,
    )
    if fault == "full disks":
        with pytest.raises(OSError, match=r"No space left on device: '/its/own'"):
            recover_on_cluster(config, again="calibrate")
        assert len(events(run, "replica-lost")) == 1
        return
    recover_on_cluster(config, again="calibrate")
    [out] = events(run, "node-left-out")
    assert {out["node_id"]} == sick
    lost = events(run, "replica-lost")
    assert len(lost) == (2 if fault == "crash" else 1)
    assert all(one["failure"] == "crash" for one in lost)
    assert ("No space left" in lost[0]["detail"]) == (fault == "full disk")
    [warning] = [one["message"] for one in events(run, "warning") if "left out" in one["message"]]
    assert lost[-1]["detail"] in warning
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.mark.parametrize(
    ("nodes", "rank", "blamed"),
    [("ab", 1, "b"), ("ab", 0, "a"), ("ab", None, None), ("aa", None, "a"), ("", 0, None)],
)
def test_a_loss_is_of_one_node_or_of_none(nodes, rank, blamed):
    replica = SimpleNamespace(node_ids=list(nodes))
    assert replica_module.ReplicaLost(replica, "hang", "no answer", rank).node == blamed


def test_what_a_node_finishes_makes_up_for_its_losses():
    pool = SimpleNamespace(_failures=Counter(), _full=set(), _losses=Counter("AC"))
    pool.replicas = {7: SimpleNamespace(node_ids=["A", "B"])}
    pool._queue = LeaseQueue([0])
    Pool.finished(pool, pool._queue.lease(Worker(7), 0.0))
    assert pool._queue.done
    assert +pool._losses == Counter("C")


def test_ranks_that_ray_has_forgotten_with_their_node(make_config, cluster, tmp_path, monkeypatch):
    """As it did when a node moved to another address between placement and start."""

    class Forgotten(replica_module.Replica):
        def _start_ranks(self, answers):
            super()._start_ranks(answers)
            if self.number == 0:
                self.node_ids = ["0" * 56]
                self._calls.clear()

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Forgotten)
    config = make_config(
        cluster__address=cluster.address, engine__kind="resident", engine__replicas=1
    )
    recover_on_cluster(config, again="calibrate")
    [lost] = events(tmp_path / "run", "replica-lost")
    assert lost["detail"] == "its node died before the ranks started"
    assert lost["nodes"] == "node 00000000, which is gone"


def test_a_driver_that_was_held_blames_no_rank(make_config, cluster, tmp_path, monkeypatch):
    """The file system of RUN answers late: the ranks would have answered."""

    class Held(session_module.CollectOnCluster):
        def __call__(self, *arguments, **more):
            events, told = self._pool.reporter.event, []

            def late(kind, **fields):
                if kind == "range-ran" and not told:
                    told.append(kind)
                    time.sleep(6)
                events(kind, **fields)

            monkeypatch.setattr(self._pool.reporter, "event", late)
            super().__call__(*arguments, **more)
            assert told

    monkeypatch.setattr("ghost_dist.cluster.session.CollectOnCluster", Held)
    config = make_config(
        cluster__address=cluster.address, cluster__heartbeat_timeout_s=4, engine__kind="resident"
    )
    recover_on_cluster(config, again="calibrate")
    assert events(tmp_path / "run", "replica-lost") == []


@pytest.mark.parametrize("where", ["here", "on another node", "stopped"])
def test_what_a_hung_rank_did_is_kept(make_config, cluster, tmp_path, monkeypatch, where):
    """Its stacks and the end of its log, though Ray and all of its files may be gone tomorrow."""

    class Stuck(Rank):
        def run(self, *arguments):
            print("so far so good", file=sys.stderr, flush=True)
            if where == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)

    use_rank(monkeypatch, Stuck)
    if where == "on another node":
        monkeypatch.setattr(failures, "_is_here", lambda _: False)
    config = make_config(
        cluster__address=cluster.address,
        cluster__progress_timeout_s=1,
        cluster__max_hangs=0,
        engine__kind="resident",
        engine__replicas=1,
    )
    with pytest.raises(ClusterError, match=r"1 x hang.*took more than 1 s to finish a batch") as e:
        recover_on_cluster(config)
    [file] = (tmp_path / "run" / "failures").iterdir()
    assert f"logs and stacks: {file}" in str(e.value)
    text = file.read_text()
    stacks = r"state: [SR] .*so far so good.*test_recover.py.*in run\n"
    if where == "stopped":  # it can do nothing itself
        read = r"--- py-spy.*[. ]run \(test_recover.py:\d+\)"
        if not shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            read = "its stacks could be read by py-spy, which is not installed here"
        stacks = f"state: T .*{read}.*so far so good"
    assert re.search(stacks, text, re.DOTALL), text
    assert re.search(r" range-leased .*\nclock: \+\d+\.\d s from", text, re.DOTALL), text


def test_what_ranks_wait_for_of_each_other_is_kept(make_config, cluster, tmp_path, monkeypatch):
    """The flight recorder's last collectives, of rank 0 one more than of rank 1."""

    class Late(Rank):
        def run(self, *arguments):
            if self._rank == 1:
                time.sleep(1000)
            super().run(*arguments)

    use_rank(monkeypatch, Late)
    config = make_config(
        cluster__address=cluster.address,
        cluster__progress_timeout_s=2,
        cluster__max_hangs=0,
        engine__tensor_parallel=2,
        engine__replicas=1,
    )
    with pytest.raises(ClusterError, match="took more than 2 s to finish a batch"):
        recover_on_cluster(config)
    *dumps, file = sorted(
        (tmp_path / "run" / "failures").iterdir(), key=lambda path: (path.suffix, path.name)
    )
    of_ranks = re.split(r"\n--- last collectives of rank \d\n", file.read_text())[1:]
    [[number, state], [other, over]] = (
        re.findall(r" number (\d+) of group 0: .*, (over|not over); in \S+, \S+:\d+", said)[-1]
        for said in of_ranks
    )
    assert (state, over) == ("not over", "over")
    assert int(number) == int(other) + 1
    assert "gloo:all_reduce ['Float']" in of_ranks[0].splitlines()[-1]
    assert "in inference_all_reduce, " in of_ranks[0].splitlines()[-1]
    assert [path.name for path in dumps] == [f"{file.stem}-rank-{rank}" for rank in (0, 1)]
    first, second = (pickle.loads(path.read_bytes())["entries"] for path in dumps)
    assert len(first) == len(second) + 1


def test_a_notice_of_preemption_ends_a_rank_at_once(make_config, cluster, tmp_path, monkeypatch):
    told = []

    class Warned(replica_module.Replica):
        def run(self, *arguments):
            super().run(*arguments)
            if not told:
                told.append(self.places[0].pid)
                os.kill(told[0], signal.SIGTERM)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Warned)
    config = make_config(cluster__address=cluster.address, engine__kind="resident")
    recover_on_cluster(config, again="calibrate")
    [lost] = events(tmp_path / "run", "replica-lost")
    assert lost["failure"] in ("crash", "preemption")
    store = StatisticsStore.open(tmp_path / "run" / "statistics.zarr")
    assert store.missing() == ()
    assert store.damaged() == {}
