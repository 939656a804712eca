"""A real Ray cluster of three nodes on this machine, the same for all files that ask for it."""

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from ray_processes import three_nodes


@pytest.fixture(scope="package")
def cluster(forked):
    with three_nodes(forked) as cluster:
        yield cluster
