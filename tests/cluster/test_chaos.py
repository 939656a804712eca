"""Faults at random moments on a real cluster: the operators are bitwise those of a calm run.

Each fault hits whatever is there at that moment: ranks that load, compute or write, the driver, a
whole node. A driver that was killed is started again by the same call; a node that was killed is
replaced by a new one. Runs follow each other until all faults were injected.
"""

import json
import os
import random
import signal
from collections import Counter

import pytest
from children import child
from ray_processes import NODE, nothing_leaked, rank_pids

from ghost_dist.statistics.store import StatisticsStore

RANGES = 24


class Chaos:
    """Runs of one configuration, and the faults that hit them."""

    def __init__(self, cluster, make_config, root, seed):
        self.cluster, self.make_config, self.root = cluster, make_config, root
        self.random = random.Random(seed)
        self.injected = Counter()
        self.runs = 0

    def config(self, name, **overrides):
        fields = {
            "output__path": str(self.root / name),
            "cluster__address": self.cluster.address,
            "cluster__heartbeat_timeout_s": 8,
            "cluster__max_crashes": 1000,
            "cluster__max_hangs": 1000,
            "calibration__windows": 96,
            "calibration__ranges": RANGES,
            "selection__spans": [[2, 4], [5, 6]],  # two: fitted on the ranks
            "engine__replicas": 2,
        }
        return self.make_config(**{**fields, **overrides})

    def start(self, config):
        driver = child(config, self.root / "driver.log", "solve", on_cluster=True)
        driver.start()
        return driver

    def calm(self, name, **overrides):
        driver = self.start(self.config(name, **overrides))
        driver.join()
        assert driver.exitcode == 0, (self.root / "driver.log").read_text()[-3000:]
        return operators(self.root / name)

    def disturbed(self, name, faults, **overrides):
        """A run that is hit until all faults were injected, which takes them from the list, or it
        has ended."""
        self.runs += 1
        config = self.config(name, **overrides)
        driver = self.start(config)
        while True:
            driver.join(self.random.uniform(0.2, 3.0) if faults else 300)
            if driver.exitcode == 0:
                return operators(self.root / name)
            if driver.exitcode is not None:
                assert driver.exitcode < 0, (self.root / "driver.log").read_text()[-3000:]
                driver = self.start(config)
            elif faults:
                if self.hit(faults[-1], driver):
                    faults.pop()
            else:
                pytest.fail("the run hangs: " + (self.root / "driver.log").read_text()[-3000:])

    def hit(self, kind, driver):
        """Inject a fault; False if there was nothing to hit."""
        ranks = rank_pids(self.cluster)
        if kind == "driver":
            os.kill(driver.pid, signal.SIGKILL)
            driver.join()
        elif kind == "node":
            node = self.random.choice(sorted(self.cluster.worker_nodes, key=str))
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(**NODE)
        elif ranks:
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[kind]
            try:
                os.kill(self.random.choice(ranks), number)
            except ProcessLookupError:
                return False
        else:
            return False
        self.injected[kind] += 1
        return True


def operators(run):
    return {path.name: path.read_bytes() for path in sorted((run / "operators").iterdir())}


def check_counted_once(run):
    """Every window in exactly one committed range, committed by exactly one manifest."""
    store = StatisticsStore.open(run / "statistics.zarr")
    assert store.missing() == ()
    assert store.damaged() == {}
    windows = []
    for range_id in range(RANGES):
        manifest = json.loads((run / f"statistics.zarr/ledger/{range_id:05d}.json").read_text())
        windows += manifest["windows"]
    assert sorted(windows) == list(range(96))
    assert all(sums.num_tokens == 96 * 64 for sums in store.total().values())


def storm(chaos, kinds, **overrides):
    expected = chaos.calm("calm", **overrides)
    faults = chaos.random.sample(kinds, len(kinds))
    while faults:
        name = f"run{chaos.runs}"
        found = chaos.disturbed(name, faults, **overrides)
        assert found == expected, f"{name} after {dict(chaos.injected)}"
        check_counted_once(chaos.root / name)
    clean, left = nothing_leaked(chaos.cluster)
    assert clean, left
    print(f"\n{sum(chaos.injected.values())} faults {dict(chaos.injected)} in {chaos.runs} runs")


ALL = ("kill", "kill", "kill", "stop", "term", "driver", "node")


@pytest.mark.timeout(900)
def test_every_kind_of_fault(cluster, make_config, tmp_path):
    """Replicas of one rank, which load fast: more faults hit work."""
    chaos = Chaos(cluster, make_config, tmp_path, seed=0)
    storm(chaos, ALL, engine__kind="resident")
    shared = Chaos(cluster, make_config, tmp_path / "shared", seed=1)
    shared.root.mkdir()
    storm(shared, ("kill", "stop", "driver"), engine__tensor_parallel=2)


@pytest.mark.chaos_nightly
@pytest.mark.timeout(7200)
def test_two_hundred_faults(cluster, make_config, tmp_path):
    """Replicas of one rank and of two, a hundred faults each."""
    for number, overrides in enumerate(
        ({"engine__kind": "resident"}, {"engine__tensor_parallel": 2})
    ):
        root = tmp_path / str(number)
        root.mkdir()
        chaos = Chaos(cluster, make_config, root, seed=2 + number)
        storm(chaos, chaos.random.choices(ALL, k=100), **overrides)
