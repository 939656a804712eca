"""A real Ray cluster of three nodes on this machine."""

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed")

from ray.cluster_utils import Cluster  # noqa: E402
from ray_processes import NODE  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Head and two nodes of 2 CPUs each."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
