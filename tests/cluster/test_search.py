"""A search whose removals are scored by the ranks of a cluster, against one process."""

import json
import os
import signal

import pytest
from ray_processes import nothing_leaked
from run_files import events

from ghost_dist.cluster import replica as replica_module
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.pipeline.recover import recover

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
        return spans, json.load(file)["outputs"]["search"]


def test_any_number_of_replicas_finds_the_bits_of_one_process(
    make, make_config, cluster, tmp_path, monkeypatch
):
    """Rank 0 of the first replica is killed while it scores, and another takes its part."""
    asked, killed = [], []

    class Watched(replica_module.Replica):
        def ask(self, rank, method, *arguments, then):
            super().ask(rank, method, *arguments, then=then)
            asked.append((self.number, rank, method))
            if len(asked) == 4 and not killed:
                killed.append(self.places[rank].pid)
                os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Watched)
    alone = make_config(**SEARCH, output__path=str(tmp_path / "alone"))
    expected = searched(alone, recover)
    two = searched(make("two", engine__replicas=2), recover_on_cluster)
    assert len(killed) == len(events(tmp_path / "two", "replica-lost")) == 1
    assert {method for *_, method in asked} == {"score"}
    assert len({number for number, *_ in asked}) > 2  # two, and one in the place of the lost one
    asked.clear()
    sharded = {"engine__kind": "tensor_parallel", "engine__tensor_parallel": 2}
    ranks = searched(make("ranks", **sharded), recover_on_cluster)
    assert {rank for _, rank, _ in asked} == {0, 1}
    offloaded = searched(make("offloaded", engine__kind="streaming"), recover_on_cluster)
    assert two == ranks == offloaded == expected
    clean, left = nothing_leaked(cluster)
    assert clean, left
