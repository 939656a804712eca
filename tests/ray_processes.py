"""Rank processes of a test's Ray cluster as the kernel sees them, and what a run leaves behind."""

import contextlib
import shlex
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from forked import Changed
from ray.cluster_utils import Cluster

# Without what nobody looks at.
NODE = {
    "num_cpus": 2,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "include_log_monitor": False,
}


@contextlib.contextmanager
def three_nodes(forked):
    """A real cluster on this machine: head and two nodes of 2 CPUs each.

    Its workers are processes of ``forked``: a rank would import torch and deepspeed for longer than
    it works.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        python = Path(folder) / "python"
        python.write_text(
            f"""#!/bin/sh
case $1 in
  */default_worker.py) exec {forked.program} "$@" ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
        )
        python.chmod(0o755)
        patch.setattr(ray._private.services, "sys", Changed(sys, executable=str(python)))
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        for _ in range(2):
            cluster.add_node(**NODE)
        cluster.forked = forked
        cluster.servers = {forked.pid}
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def rank_pids(cluster):
    """Processes of its ranks, found without Ray: children of what they were forked from."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if name.startswith(b"ray::Rank") and parent in cluster.servers:
            found.append(int(folder.name))
    return sorted(found)


def nothing_leaked(cluster, seconds=30.0):
    """Wait until no rank is left, and say what is."""
    deadline = time.monotonic() + seconds
    while (left := rank_pids(cluster)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if hasattr(cluster, "held_groups"):
        held = cluster.held_groups()
    else:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        try:
            groups = ray.util.placement_group_table().values()
            held = [group["state"] for group in groups if group["state"] != "REMOVED"]
        finally:
            ray.shutdown()
    return left == [] and held == [], (left, held)
