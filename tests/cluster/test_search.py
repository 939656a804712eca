"""A search whose removals are scored by the ranks of a cluster, against one process."""

import json
import os
import signal

import pytest
from ray_processes import nothing_leaked
from run_files import events

from ghost_dist.cluster import replica as replica_module
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline import layer_times
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.searching import Searches

SEARCH = {
    "selection__spans": None,
    "selection__criterion": "search",
    "selection__remove": 2,
    "operator__name": "ghost",
}


@pytest.fixture
def make(make_config, cluster, tmp_path):
    def make_for_cluster(name, **overrides):
        fields = {
            "cluster__address": cluster.address,
            "engine__kind": "resident",
            "output__path": str(tmp_path / name),
            **SEARCH,
        }
        return make_config(**{**fields, **overrides})

    return make_for_cluster


def searched(config, run):
    """Spans and record of a search; ``run`` is what does it."""
    spans = run(config, again="select")["spans"]
    with open(f"{config.output.path}/stages/select.json") as file:
        found = json.load(file)["outputs"]
        return spans, found["search"], found.get("pareto")


def test_any_number_of_replicas_finds_the_bits_of_one_process(
    make, make_config, cluster, tmp_path, monkeypatch
):
    """Rank 0 of the first replica is killed while it scores, and another takes its part."""
    asked, killed, on_host = [], [], []

    class Watched(replica_module.Replica):
        def ask(self, rank, method, *arguments, then):
            super().ask(rank, method, *arguments, then=then)
            asked.append((self.number, rank, method))
            on_host.append(arguments[-1])
            if len(asked) == 4 and not killed:
                killed.append(self.places[rank].pid)
                os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Watched)
    alone = make_config(**SEARCH, output__path=str(tmp_path / "alone"))
    expected = searched(alone, recover)
    counts, count = [], Searches._count
    monkeypatch.setattr(Searches, "_count", lambda of, n: (counts.append(n), count(of, n)))
    two = searched(make("two", engine__replicas=2), recover_on_cluster)
    found = two[1]  # each part once, though one was lost, and before its generation is through
    assert min(counts) >= 0
    assert sum(counts) == found["evaluations"]
    assert len(list(filter(None, counts))) > len(found["generations"])
    assert len(killed) == len(events(tmp_path / "two", "replica-lost")) == 1
    assert {method for *_, method in asked} == {"score"}
    started = [one["replica"] for one in events(tmp_path / "two", "replica-start")]
    assert started == [0, 1, 2]  # two, and one in the place of the lost one, however late it comes
    asked.clear()
    on_host.clear()
    sharded = {"engine__kind": "tensor_parallel", "engine__tensor_parallel": 2}
    ranks = searched(make("ranks", **sharded), recover_on_cluster)
    assert {rank for _, rank, _ in asked} == {0, 1}
    assert set(on_host) == {2}  # both ranks are of one node, and keep dense streams each
    offloaded = searched(make("offloaded", engine__kind="streaming"), recover_on_cluster)
    assert two == ranks == offloaded == expected
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_targets_take_the_layers_that_they_take_in_one_process(make, make_config, tmp_path):
    """Seconds are measured on a rank's device: here made up, by a process that is not this one."""
    driver = os.getpid()

    def made_up(elsewhere):
        def request_seconds(config, source, architecture):
            assert (os.getpid() != driver) == elsewhere
            seconds = layer_times.Seconds((1.0,) * architecture.num_layers, 10.0, 0.05)
            return dict.fromkeys(("", "prefill", "decode"), seconds)

        return request_seconds

    def refused(*_):
        raise ConfigError("two layers do not fit")

    fields = {"selection__remove": None, "selection__pareto": "1,kv 75%"}
    target = {**SEARCH, **fields, "selection__target": "speedup 1.3"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ghost_dist.pipeline.recover.request_seconds", made_up(False))
        alone = make_config(**target, output__path=str(tmp_path / "alone"))
        expected = searched(alone, recover)
        patch.setattr(layer_times, "request_seconds", made_up(True))
        assert searched(make("two", engine__replicas=2, **target), recover_on_cluster) == expected
        patch.setattr(layer_times, "request_seconds", refused)
        with pytest.raises(ConfigError, match="two layers do not fit"):
            recover_on_cluster(make("refused", **target))
    assert not (tmp_path / "refused").exists()
    assert sum(b - a for a, b in expected[0]) == 3  # 10 / (10 - 2) is 1.25
    assert [row["wanted"] for row in expected[2]] == ["1", "kv 75%", "speedup 1.3"]
