"""Replicas that stream, each over whole ranges, against one process that holds the model."""

import json
import os
import signal
from collections import Counter

import pytest
from families import TEXT, save_checkpoint, save_tokenizer
from live_sums import use_rank, waiting
from ray_processes import nothing_leaked

from ghost_dist.cluster.rank import Rank
from ghost_dist.cluster.recover import recover_on_cluster
from ghost_dist.pipeline.recover import recover

FIELDS = {
    "selection__spans": None,
    "selection__remove": 3,
    "selection__max_spans": 2,
    "operator__name": "ghost-joint",
    "operator__choose": "kl",
}


def operators(run):
    return {path.name: path.read_bytes() for path in (run / "operators").iterdir()}


def events(run, kind):
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture
def alone(make_config, tmp_path):
    config = make_config(**FIELDS, output__path=str(tmp_path / "alone"))
    return recover(config), operators(tmp_path / "alone")


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
            from ghost_dist.engines.streaming import StreamingEngine

            own = StreamingEngine._run_layer

            def run_layer(engine, layer, *rest):
                if layer == 2 and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(engine, layer, *rest)

            StreamingEngine._run_layer = run_layer
            return super().run(*arguments)

    use_rank(monkeypatch, RankThatDies)
    recover_on_cluster(make(), again="solve")
    run = tmp_path / "run"
    assert marker.exists()
    assert len(events(run, "replica-lost")) >= 1
    assert operators(run) == alone[1]
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_replicas_hold_experts_in_parts(make_config, cluster, tmp_path, monkeypatch):
    source = save_checkpoint("mixtral", tmp_path / "source")
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text(TEXT)
    told = tmp_path / "parts"

    class RankThatTells(Rank):
        def run(self, *arguments):
            told.write_text(str(self._engine.model._experts_at_once))
            return super().run(*arguments)

    use_rank(monkeypatch, RankThatTells)
    fields = {
        "model__path": str(source),
        "calibration__source": str(tmp_path / "text.txt"),
        "calibration__windows": 8,
        "calibration__window_length": 32,
        "selection__spans": [[2, 4]],
    }
    recover(make_config(**fields, output__path=str(tmp_path / "alone")), again="solve")
    config = make_config(
        **fields,
        engine__kind="streaming",
        engine__experts=3,
        engine__replicas=2,
        cluster__address=cluster.address,
    )
    recover_on_cluster(config, again="solve")
    assert told.read_text() == "3"
    assert operators(tmp_path / "run") == operators(tmp_path / "alone")
