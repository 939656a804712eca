"""A real Ray cluster of three nodes on this machine."""

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from ray_processes import three_nodes


@pytest.fixture(scope="module")
def cluster():
    with three_nodes() as cluster:
        yield cluster
