"""Spans fitted on the ranks of replicas, with sums from the store or from a live all-reduce."""

import json
import os
import re
import signal
import time
from itertools import chain

import pytest
import torch
from live_sums import showing, use_rank, within_rounding
from ray_processes import nothing_leaked
from run_files import events, operator_tensors, worst_difference

from ghost_dist.cluster import replica as replica_module
from ghost_dist.cluster.rank import Rank
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.errors import ClusterError, SingularGramError
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore

SPANS = [[1, 3], [4, 5], [6, 7]]


@pytest.fixture
def make(make_config, cluster):
    def make_for_cluster(**overrides):
        fields = {
            "cluster__address": cluster.address,
            "engine__kind": "resident",
            "engine__replicas": 2,
            "selection__spans": SPANS,
        }
        return make_config(**{**fields, **overrides})

    return make_for_cluster


@pytest.fixture
def alone(make_config, tmp_path_factory):
    """Operators and record of the same run in one process."""

    def run(**overrides):
        folder = tmp_path_factory.mktemp("alone")
        recover(
            make_config(selection__spans=SPANS, output__path=str(folder / "run"), **overrides),
            again="solve",
        )
        return operator_tensors(folder / "run"), solve_record(folder / "run")

    return run


def solve_record(run):
    return json.loads((run / "stages" / "solve.json").read_text())["outputs"]


CHOOSING = {
    "operator__name": "auto",
    "operator__features": "auto",
    "operator__choose": "kl",
    "calibration__windows": 24,
}
"""Every path: candidates with shifted ridges, two judges, joint fits, the plain cut."""


def test_ranks_fit_the_bits_of_the_driver(make, alone, cluster, tmp_path, monkeypatch):
    """Two at a time; also when the driver has been busy for a long time between two calls."""
    fitting = tmp_path / "fitting"
    fitting.mkdir()

    class RankThatWaits(Rank):
        def fit(self, *arguments):
            (fitting / str(os.getpid())).touch()
            deadline = time.monotonic() + 100
            while len(list(fitting.iterdir())) < 2:
                assert time.monotonic() < deadline, "no other rank fits beside this one"
                time.sleep(0.05)
            return super().fit(*arguments)

    class Unheard(replica_module.Replica):
        def restart_timeouts(self):
            long_ago = time.monotonic() - 1000
            asked = [rank.heartbeat.remote() for rank in self._ranks]
            self._heartbeats = {rank: (ref, long_ago) for rank, ref in enumerate(asked)}
            super().restart_timeouts()

    use_rank(monkeypatch, RankThatWaits)
    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Unheard)
    expected, record = alone(**CHOOSING)
    recover_on_cluster(make(**CHOOSING), again="solve")
    run = tmp_path / "run"
    found = operator_tensors(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for key in ("fits", "candidates", "chosen", "files"):
        assert solve_record(run)[key] == record[key]
    fitted = events(run, "span-fitted")
    assert len({(event["replica"], event["rank"]) for event in fitted}) == 2
    rounds = len(fitted) / len(SPANS)
    assert rounds == int(rounds) > 2
    assert events(run, "replica-lost") == []
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_a_solving_rank_is_killed(make, alone, cluster, tmp_path, monkeypatch):
    """Without a budget the run stops; the same command goes on, and another rank fits the span."""
    expected, _ = alone(operator__name="ghost-joint")
    killed = []

    class Dying(replica_module.Replica):
        def ask(self, rank, method, *arguments, then):
            super().ask(rank, method, *arguments, then=then)
            if method == "fit" and len(killed) < 2:
                killed.append(self.places[rank].pid)
                os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Dying)
    run = tmp_path / "run"
    strict = make(operator__name="ghost-joint", cluster__max_crashes=0)
    # Both ranks are killed in the same round of the driver's loop, the first is one too many.
    with pytest.raises(ClusterError, match=r"1 x crash.*same command continues"):
        recover_on_cluster(strict, again="solve")
    clean, left = nothing_leaked(cluster)
    assert clean, left
    del killed[1:]
    ranges, losses = len(events(run, "range-leased")), len(events(run, "replica-lost"))
    leases = len(events(run, "span-leased"))
    recover_on_cluster(make(operator__name="ghost-joint"), again="solve")
    assert worst_difference(operator_tensors(run), expected) == 0
    assert len(events(run, "range-leased")) == ranges
    assert events(run, "replica-ready")[-1]["parameter_bytes"] == [0]  # it has never had a model
    assert len(killed) == 2
    assert len(events(run, "replica-lost")) == losses + 1
    spans = [event["span"] for event in events(run, "span-fitted")]
    assert sorted(spans) == ["[1, 3)", "[4, 5)", "[6, 7)"]
    assert len(events(run, "span-leased")) == leases + 4
    clean, left = nothing_leaked(cluster)
    assert clean, left


def test_what_cannot_be_fitted_is_the_same_error(make, make_config, cluster, tmp_path):
    """No ridge, and fewer tokens than channels."""
    fields = {
        "operator__ridge": {"absolute": 0.0},
        "calibration__windows": 4,
        "calibration__window_length": 8,
        "selection__spans": SPANS,
    }
    with pytest.raises(SingularGramError) as expected:
        recover(make_config(**fields, output__path=str(tmp_path / "alone")), again="solve")
    with pytest.raises(SingularGramError, match=re.escape(str(expected.value))):
        recover_on_cluster(make(**fields, engine__replicas=1), again="solve")
    assert len(events(tmp_path / "run", "span-fitted")) == len(SPANS)
    clean, left = nothing_leaked(cluster)
    assert clean, left


ALL_REDUCE = {"engine__reduction": "all-reduce", "operator__name": "ghost-joint"}


@pytest.fixture
def one_lease_each(monkeypatch):
    """No range is run by a second replica: the sums of the slower one would not take part."""
    monkeypatch.setattr("ghost_dist.cluster.leases.STRAGGLER", float("inf"))


@pytest.mark.usefixtures("one_lease_each")
def test_live_sums_are_the_ordered_ones_within_rounding(make, cluster, tmp_path, monkeypatch):
    """Two replicas of two ranks; then the same from what an earlier run left in the store."""
    showing(monkeypatch, tmp_path / "held", ranks=4)
    fields = {"engine__kind": "auto", "engine__tensor_parallel": 2, "calibration__windows": 24}
    fields["calibration__ranges"] = 16
    # Replicas take turns: a fold must have ranges of both, or its sums would be the ordered ones.
    fields["operator__folds"] = 3
    config = make(**ALL_REDUCE, **fields)
    recover_on_cluster(config, again="solve")
    run = tmp_path / "run"
    [reduced] = events(run, "reduced")
    assert sorted(chain(*reduced["kept"].values())) == list(range(16))
    assert list(chain(*reduced["read"].values())) == []
    assert len({(e["replica"], e["rank"]) for e in events(run, "span-fitted")}) == 3
    store = StatisticsStore.open(run / "statistics.zarr")
    differing, _ = within_rounding(tmp_path / "held", store, 3)
    assert differing > 0  # else nothing was tried
    live = operator_tensors(run)
    for path in (tmp_path / "held").glob("*.pt"):
        path.unlink()
    recover_on_cluster(config, again="solve")
    reduced = events(run, "reduced")[-1]
    assert list(chain(*reduced["kept"].values())) == []
    assert sorted(map(len, reduced["read"].values())) == [8, 8]
    within_rounding(tmp_path / "held", store, 3)
    assert worst_difference(operator_tensors(run), live) < 1e-9
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.mark.usefixtures("one_lease_each")
def test_a_rank_dies_in_the_all_reduce(make, alone, cluster, tmp_path, monkeypatch):
    """The run goes on with the ordered sums, to the bits of one process."""
    expected, _ = alone(operator__name="ghost-joint")
    marker = tmp_path / "died"
    running = tmp_path / "running"
    running.mkdir()

    class RankThatDies(Rank):
        def run(self, *arguments):
            (running / str(os.getpid())).touch()
            while len(list(running.iterdir())) < 2:  # so that both replicas have ranges
                time.sleep(0.05)
            return super().run(*arguments)

        def reduce(self, task, work, spec):
            from ghost_dist.cluster import running_sums

            own = running_sums.ReplicaGroup.add
            calls = []

            def add(group, tensor):
                calls.append(tensor)
                if spec.index == 1 and len(calls) == 9:
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                own(group, tensor)

            running_sums.ReplicaGroup.add = add
            super().reduce(task, work, spec)

    use_rank(monkeypatch, RankThatDies)
    recover_on_cluster(make(**ALL_REDUCE), again="solve")
    run = tmp_path / "run"
    assert marker.exists()
    [failed] = events(run, "reduction-failed")
    assert failed["failure"] == "crash"
    assert any("broke off" in event["message"] for event in events(run, "warning"))
    assert events(run, "reduced") == []
    assert worst_difference(operator_tensors(run), expected) == 0
    clean, left = nothing_leaked(cluster)
    assert clean, left


@pytest.mark.usefixtures("one_lease_each")
def test_a_replica_dies_with_its_running_sums(make, alone, cluster, tmp_path, monkeypatch):
    """What it had committed is read from the store by those that live, once."""
    expected, _ = alone(operator__name="ghost-joint")
    showing(monkeypatch, tmp_path / "held")
    killed = []

    class Dying(replica_module.Replica):
        def acknowledge(self, lease, *, committed):
            super().acknowledge(lease, committed=committed)
            if not killed and len(self.live) == 2:
                killed.append(self)
                os.kill(self.places[0].pid, signal.SIGKILL)

    monkeypatch.setattr("ghost_dist.cluster.pool.Replica", Dying)
    recover_on_cluster(make(**ALL_REDUCE), again="solve")
    run = tmp_path / "run"
    [reduced] = events(run, "reduced")
    [dead] = killed
    assert sorted(chain(*reduced["read"].values())) == sorted(dead.live)
    assert str(dead.number) not in reduced["kept"]
    store = StatisticsStore.open(run / "statistics.zarr")
    within_rounding(tmp_path / "held", store, 4)
    assert worst_difference(operator_tensors(run), expected) < 1e-9
    clean, left = nothing_leaked(cluster)
    assert clean, left
