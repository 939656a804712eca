"""Rank processes of a test's Ray cluster as the kernel sees them, and what a run leaves behind."""

import contextlib
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}


@contextlib.contextmanager
def three_nodes():
    """A real cluster on this machine: head and two nodes of 2 CPUs each."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(2):
        cluster.add_node(**NODE)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylet_pids(cluster):
    return {
        info.process.pid
        for node in cluster.list_all_nodes()
        for info in node.all_processes["raylet"]
    }


def rank_pids(raylets):
    """Processes of ranks below these raylets, found without Ray."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if name.startswith(b"ray::Rank") and parent in raylets:
            found.append(int(folder.name))
    return sorted(found)


def nothing_leaked(cluster, seconds=30.0):
    """Wait until no rank is left, and say what is."""
    deadline = time.monotonic() + seconds
    while (left := rank_pids(raylet_pids(cluster))) and time.monotonic() < deadline:
        time.sleep(0.2)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:
        groups = ray.util.placement_group_table().values()
        held = [group["state"] for group in groups if group["state"] != "REMOVED"]
    finally:
        ray.shutdown()
    return left == [] and held == [], (left, held)
