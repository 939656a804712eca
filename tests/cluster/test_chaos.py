"""Faults at random moments on a real cluster: the operators are bitwise those of a calm run.

Each fault hits whatever is there at that moment: ranks that load, compute or write, the driver, a
whole node. A driver that was killed is started again by the same call; a node that was killed is
replaced by a new one. Runs follow each other until all faults were injected.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections import Counter
from functools import partial

import pytest
from children import child
from ray_hosts import three_hosts
from ray_processes import NODE, nothing_leaked, rank_pids
from run_files import operators
from shared_files import freeze, hold, mounted

from ghost_dist.config_file import config_tree
from ghost_dist.statistics.store import StatisticsStore

RANGES = 24


class Chaos:
    """Runs of one configuration, and the faults that hit them."""

    def __init__(self, cluster, make_config, root, seed):
        self.cluster, self.make_config, self.root = cluster, make_config, root
        self.random = random.Random(seed)
        self.injected = Counter()
        self.runs, self.timers = 0, []
        root.mkdir(exist_ok=True)

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
            for pid in ranks:  # one that is stopped would outlive its node, as on no real machine
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            node = self.random.choice(sorted(self.cluster.worker_nodes, key=str))
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(**NODE)
        elif kind in ("held files", "frozen files"):  # of all: this is one host
            self.later(2.0, (hold if kind == "held files" else freeze)(self.root.parent))
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

    def later(self, seconds, do):
        timer = threading.Timer(seconds, do)
        timer.start()
        self.timers.append(timer)


DRIVE = """
import json, sys
import torch
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import config_from_tree
torch.set_num_threads(1)
recover_on_cluster(config_from_tree(json.load(open(sys.argv[1]))), again="solve")
"""


class HostChaos(Chaos):
    """The driver is a process of the head's host; faults are also those of a network, of disks and
    of clocks."""

    def __init__(self, hosts, make_config, root, seed):
        super().__init__(hosts, make_config, root, seed)
        self.numbers = iter(range(20, 250))

    def config(self, name, **overrides):
        hung = {"cluster__progress_timeout_s": 15}  # a rank that waits for a file answers
        config = super().config(name, **hung, **overrides)
        model = self.root / "model"
        if not model.exists():
            shutil.copytree(config.model.path, model)
        return super().config(name, model__path=str(model), **hung, **overrides)

    def start(self, config):
        given = self.root / "config.json"
        given.write_text(json.dumps(config_tree(config)))
        with (self.root / "driver.log").open("ab") as log:
            driver = self.cluster.python(0, "-c", DRIVE, str(given), stdout=log, stderr=log)
        return Driver(driver)

    def hit(self, kind, driver):
        if kind not in HOSTS:
            return super().hit(kind, driver)
        host = 0 if kind.endswith("of the head") else self.random.choice((1, 2))
        if not rank_pids(self.cluster) or any(timer.is_alive() for timer in self.timers):
            return False  # one at a time: with both workers gone there is nothing to hit
        hosts, ends = self.cluster, None
        if kind == "move":
            hosts.come_back(host, number=next(self.numbers))
        elif kind == "clock":
            hosts.come_back(host, clock_s=self.random.randint(-172800, 172800))  # two days
        elif kind == "full disk":
            ends = hosts.fill(host)
        elif kind == "frozen files":
            ends = hosts.freeze()
        elif kind.startswith("partition"):
            hosts.cut(host)
            ends = partial(self.come_back, host)
        else:
            late_s = self.random.choice((0.05, 0.5)) if kind == "late files" else 0.0
            ends = hosts.hold(host, late_s)
        if ends is not None:
            # From 1 s, short ones as often as long ones.
            most_s = 90 if kind.startswith("partition") else 30
            self.later(most_s ** self.random.random(), ends)
        self.injected[kind] += 1
        return True

    def come_back(self, host):
        """The link works again; a node that Ray has given up in between ends, and is replaced."""
        self.cluster.mend(host)
        if host and not self.cluster.survives(host):
            self.cluster.kill_node(host)
            self.cluster.start_node(host)


class Driver:
    """A process as :mod:`multiprocessing` has them."""

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def join(self, seconds=None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    @property
    def exitcode(self):
        return self.process.poll()


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
    while faults or any(timer.is_alive() for timer in chaos.timers):
        name = f"run{chaos.runs}"
        found = chaos.disturbed(name, faults, **overrides)
        assert found == expected, f"{name} after {dict(chaos.injected)}"
        check_counted_once(chaos.root / name)
    clean, left = nothing_leaked(chaos.cluster)
    assert clean, left
    print(f"\n{sum(chaos.injected.values())} faults {dict(chaos.injected)} in {chaos.runs} runs")


ALL = ("kill", "kill", "kill", "stop", "term", "driver", "node")
FILES = ("held files", "frozen files")  # where they can be


@pytest.mark.timeout(900)
def test_twenty_faults(cluster, make_config, tmp_path):
    """Replicas of one rank, which load fast: more faults hit work."""
    with mounted(tmp_path / "mounted") as files:
        chaos = Chaos(cluster, make_config, (files or tmp_path) / "whole", seed=0)
        storm(chaos, (*2 * ALL, *(FILES if files else ())), engine__kind="resident")
        shared = Chaos(cluster, make_config, tmp_path / "shared", seed=1)
        storm(shared, 2 * ("kill", "stop", "driver"), engine__tensor_parallel=2)


@pytest.fixture
def hosts():
    with three_hosts() as hosts:
        yield hosts


HOSTS = (
    *("partition", "partition", "partition of the head", "move"),
    *("full disk", "full disk", "clock"),
    *("late files", "held files", "held files of the head", "frozen files"),
)


# Storms of 50 faults each, on new hosts: 200 in an hour; 20 storms are a thousand.
STORMS = int(os.environ.get("GHOST_DIST_HOST_STORMS", "4"))


@pytest.mark.chaos_nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(STORMS))
def test_faults_of_hosts(hosts, make_config, seed):
    chaos = HostChaos(hosts, make_config, hosts.shared / "nightly", seed)
    kinds = (*HOSTS, "kill", "kill", "driver", "driver")
    storm(chaos, (*3 * kinds, *chaos.random.sample(kinds, 5)), engine__kind="resident")


@pytest.mark.chaos_nightly
@pytest.mark.timeout(7200)
def test_two_hundred_faults(cluster, make_config, tmp_path):
    """Replicas of one rank and of two, a hundred faults each."""
    for number, overrides in enumerate(
        ({"engine__kind": "resident"}, {"engine__tensor_parallel": 2})
    ):
        chaos = Chaos(cluster, make_config, tmp_path / str(number), seed=2 + number)
        storm(chaos, chaos.random.choices(ALL, k=100), **overrides)
