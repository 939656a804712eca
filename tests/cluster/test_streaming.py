"""Replicas that stream, each over whole ranges, against one process that holds the model."""

import json
import os
import signal
from collections import Counter

import pytest
import torch
from families import TEXT, save_checkpoint, save_tokenizer
from live_sums import use_rank, waiting
from ray_processes import nothing_leaked
from run_files import events, operators
from safetensors.torch import load, load_file

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.cluster.rank import Rank
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.errors import ConfigError, NonFiniteActivationError
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore

FIELDS = {
    "selection__spans": None,
    "selection__remove": 3,
    "operator__name": "ghost-joint",
    "operator__choose": "kl",
}


@pytest.fixture(scope="module")
def of_one_process():
    """What was run once for all tests of this file."""
    return {}


@pytest.fixture
def alone(make_config, tmp_path, of_one_process):
    if "dense" not in of_one_process:
        config = make_config(**FIELDS, output__path=str(tmp_path / "alone"))
        of_one_process["dense"] = recover(config), operators(tmp_path / "alone")
    return of_one_process["dense"]


@pytest.fixture
def make(make_config, cluster):
    def make_for_cluster(**overrides):
        fields = {"cluster__address": cluster.address, "engine__kind": "streaming"}
        return make_config(**{**FIELDS, **fields, "engine__replicas": 2, **overrides})

    return make_for_cluster


def test_streaming_replicas_give_the_bits_of_a_resident_run(
    make, alone, cluster, tmp_path, monkeypatch
):
    expected, of_alone = alone
    use_rank(monkeypatch, waiting(tmp_path / "loaded", 2))
    result = recover_on_cluster(make())
    run = tmp_path / "run"
    assert operators(run) == of_alone
    assert result["spans"] == expected["spans"]
    assert result["reload_max_abs_difference"] < 1e-4
    committed = Counter((e["stage"], e["range"]) for e in events(run, "range-committed"))
    assert sorted(committed) == [(s, r) for s in ("calibrate", "select") for r in range(4)]
    assert set(committed.values()) == {1}
    ready = events(run, "replica-ready")
    assert len({pid for event in ready for pid in event["pids"]}) >= 2
    assert all(event["conformance"] == [0.0] for event in ready if event["conformance"] != [None])
    assert not list(run.glob("streams-*"))
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_a_rank_dies_between_two_layers(make, alone, cluster, tmp_path, monkeypatch):
    """Its range begins again on another replica; nothing counts twice."""
    marker = tmp_path / "died"

    class RankThatDies(Rank):
        def run(self, *arguments):
            from ghost_dist.engines.offloaded import OffloadedModel

            own = OffloadedModel.running

            def running(model, layer, *rest, **options):
                if layer == 2 and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(model, layer, *rest, **options)

            OffloadedModel.running = running
            return super().run(*arguments)

    use_rank(monkeypatch, RankThatDies)
    recover_on_cluster(make(), again="solve")
    run = tmp_path / "run"
    assert marker.exists()
    assert len(events(run, "replica-lost")) >= 1
    assert operators(run) == alone[1]
    clean, left = nothing_leaked(cluster)
    assert clean, left


def same_numbers(run, expected):
    """Batches and blocks of columns of other shapes: equal up to the rounding of float32 products,
    which differs by processor, times what the solve makes of it. An expert too few is 1e-2.
    """
    found = sorted((run / "operators").glob("*.safetensors"))
    assert [path.name for path in found] == sorted(n for n in expected if "safetensors" in n)
    for path in found:
        theirs = load(expected[path.name])
        for name, tensor in load_file(path).items():
            apart = torch.linalg.vector_norm(tensor.double() - theirs[name].double())
            assert apart <= 1e-4 * torch.linalg.vector_norm(theirs[name].double()), name


def test_ranks_that_share_the_windows_and_the_reading(make, alone, cluster, tmp_path, monkeypatch):
    expected, of_alone = alone
    reads = tmp_path / "reads"
    reads.mkdir()

    class RankThatCounts(Rank):
        def run(self, work, range_id, attempt):
            reader = self._engine.model._reader
            before = reader.bytes_read
            found = super().run(work, range_id, attempt)
            line = [str(work.store.path), range_id, self._block.index, reader.bytes_read - before]
            (reads / f"{attempt}-{self._block.index}").write_text(json.dumps(line))
            return found

    use_rank(monkeypatch, RankThatCounts)
    result = recover_on_cluster(make(engine__replicas=1, engine__data_parallel=2))
    run = tmp_path / "run"
    assert result["spans"] == expected["spans"]
    same_numbers(run, of_alone)
    assert result["reload_max_abs_difference"] < 1e-4
    ready = events(run, "replica-ready")
    assert ready
    assert all(len(event["pids"]) == 2 for event in ready)
    by_range = {}
    for path in reads.iterdir():
        work, range_id, rank, nbytes = json.loads(path.read_text())
        by_range.setdefault((work, range_id), {})[rank] = nbytes
    assert len(by_range) == 8  # four ranges of each of two stages
    for of_ranks in by_range.values():
        assert sorted(of_ranks) == [0, 1]
        assert 0.4 < of_ranks[0] / sum(of_ranks.values()) < 0.6
    # Each stage reads what it needs of the decoder once a range, whoever reads it.
    assert len({(work, sum(of.values())) for (work, _), of in by_range.items()}) == 2
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_more_ranks_than_windows(make_config, cluster, tmp_path):
    """Five windows in four ranges: in three of them one of the two ranks has no window at all."""
    few = {"operator__name": "ghost-joint", "calibration__windows": 5}
    shared = {
        "cluster__address": cluster.address,
        "engine__kind": "streaming",
        "engine__data_parallel": 2,
    }
    recover(make_config(**few, output__path=str(tmp_path / "alone")))
    recover_on_cluster(make_config(**few, **shared))
    same_numbers(tmp_path / "run", operators(tmp_path / "alone"))


def test_what_one_of_the_ranks_meets_ends_the_run_by_name(make, cluster, tmp_path, monkeypatch):
    """The other one waits for it in a collective, and must not be waited for."""

    class RankWithBadStream(Rank):
        def run(self, *arguments):
            model = self._engine.model
            embed = model.embed

            def spoilt(ids_BT):
                stream_BTC = embed(ids_BT)
                if self._block.index == 1:
                    stream_BTC[0, 0, 0] = float("nan")
                return stream_BTC

            model.embed = spoilt
            return super().run(*arguments)

    use_rank(monkeypatch, RankWithBadStream)
    with pytest.raises(NonFiniteActivationError, match="entering layer 0 ") as met:
        recover_on_cluster(make(engine__replicas=1, engine__data_parallel=2))
    windows = StatisticsStore.open(tmp_path / "run" / "selection.zarr").plan.ranges[0]
    assert met.value.window == windows[len(windows) // 2]  # the first one of the second rank
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.fixture
def mixture(make_config, tmp_path, of_one_process):
    """Of 4 experts; and the operators of a run that holds it."""
    source = save_checkpoint("mixtral", tmp_path / "source")
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text(TEXT)
    fields = {
        "model__path": str(source),
        "calibration__source": str(tmp_path / "text.txt"),
        "calibration__windows": 8,
        "calibration__window_length": 32,
        "selection__spans": [[2, 4]],
        "operator__name": "ghost",
    }
    if "mixture" not in of_one_process:
        recover(make_config(**fields, output__path=str(tmp_path / "alone")), again="solve")
        of_one_process["mixture"] = operators(tmp_path / "alone")
    return fields, of_one_process["mixture"]


@pytest.fixture
def run_mixture(make_config, mixture, cluster, tmp_path, monkeypatch):
    """Run it on the cluster; experts that each rank holds."""
    told = tmp_path / "told"
    told.mkdir()

    def run(kind=Rank, **overrides):
        class RankThatTells(kind):
            def run(self, *arguments):
                found = self._engine.model._held.experts
                (told / f"{self._block.index} {found}").touch()
                return super().run(*arguments)

        use_rank(monkeypatch, RankThatTells)
        fields = {**mixture[0], "engine__kind": "streaming", "cluster__address": cluster.address}
        recover_on_cluster(make_config(**{**fields, **overrides}), again="solve")
        return sorted(path.name for path in told.iterdir())

    return run


def test_replicas_hold_experts_in_parts(run_mixture, mixture, tmp_path):
    assert run_mixture(engine__experts=3, engine__replicas=2) == ["0 3"]
    assert operators(tmp_path / "run") == mixture[1]


def test_ranks_that_share_the_reading_hold_the_same_experts(run_mixture, mixture, tmp_path):
    """One has memory for whole layers, the other for less; they read the same at the same time."""
    source = open_checkpoint(mixture[0]["model__path"])
    ends = {}
    with OffloadedModel(
        source,
        inspect_architecture(source),
        num_layers=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ) as model:
        for free in range(50_000, 2_000_000, 10_000):
            try:
                held = model.hold("auto", batch_tokens=64, tokens=32, free=free)
                ends[held.experts] = free
            except ConfigError:
                continue
    assert set(ends) >= {1, 2, None}
    little, plenty = ends[2], ends[None]

    class RankWithLittle(Rank):
        def load(self, *arguments):
            import ghost_dist.cluster.rank as module

            measured = module.free_bytes
            module.free_bytes = lambda _: little if self._rank else plenty
            try:
                return super().load(*arguments)
            finally:
                module.free_bytes = measured

    found = run_mixture(RankWithLittle, engine__batch=2, engine__data_parallel=2)
    assert found == ["0 2", "1 2"]
    same_numbers(tmp_path / "run", mixture[1])
