"""What is decided without Ray: how many replicas fit, and whether a loss is one too many."""

import pytest

from ghost_dist.cluster.leases import Node, Shape, left_out, may_go_on
from ghost_dist.engine_config import ClusterConfig
from ghost_dist.errors import ConfigError

EIGHT = [Node(f"n{i}", cpus=64, gpus=8) for i in range(2)]


@pytest.mark.parametrize(
    ("nodes", "shape", "fitting", "how"),
    [
        (EIGHT, Shape(8, 4, 1), 2, "STRICT_PACK"),
        (EIGHT, Shape(4, 4, 1), 4, "STRICT_PACK"),
        (EIGHT, Shape(16, 4, 1), 1, "PACK"),
        (EIGHT, Shape(3, 4, 1), 4, "STRICT_PACK"),
        (EIGHT, Shape(8, 16, 1), 1, "PACK"),  # 4 ranks of 16 CPUs on each node
        ([Node("a", 2, 0), Node("b", 2, 0), Node("c", 2, 0)], Shape(2, 1, 0), 3, "STRICT_PACK"),
        ([Node("a", 1, 0), Node("b", 1, 0)], Shape(2, 1, 0), 1, "PACK"),
        ([Node("a", 4, 0)], Shape(1, 1, 1), 0, "PACK"),
    ],
)
def test_replicas_that_fit(nodes, shape, fitting, how):
    assert shape.fitting(nodes) == fitting
    assert shape.strategy(nodes) == how
    if fitting:
        shape.check_room(nodes, fitting)
    with pytest.raises(ConfigError, match="room for"):
        shape.check_room(nodes, fitting + 1)


def test_too_few_gpus_says_needed_found_and_what_to_change():
    expected = (
        r"engine\.replicas=3 x engine\.tensor_parallel=8 ranks of 1 GPU need 24 GPUs with 4 CPUs "
        r"each, but the cluster has room for 2 such replicas \(n0: 64 CPUs, 8 GPUs, n1: .*\)\. Set "
        r"engine\.replicas=2 or auto"
    )
    with pytest.raises(ConfigError, match=expected):
        Shape(8, 4, 1).check_room(EIGHT, 3)
    with pytest.raises(ConfigError, match=r"Lower engine\.tensor_parallel, or add nodes"):
        Shape(8, 4, 1).check_room([Node("a", 64, 4)], 1)


@pytest.mark.parametrize(
    ("failures", "goes_on"),
    [
        ({"crash": 2}, True),
        ({"crash": 3}, False),
        ({"hang": 1, "crash": 2}, True),
        ({"hang": 2}, False),
        ({"preemption": 1000}, True),
        ({"preemption": 1000, "crash": 3}, False),
    ],
)
def test_budgets_are_separate(failures, goes_on):
    assert may_go_on(failures, ClusterConfig(max_crashes=2, max_hangs=1)) == goes_on


def test_preemptions_may_have_a_budget():
    assert not may_go_on({"preemption": 2}, ClusterConfig(max_preemptions=1))


def test_a_node_that_fails_twice_in_a_row_is_left_out_while_another_has_room():
    a, b, small = Node("a", 2, 0, "A"), Node("b", 2, 0, "B"), Node("c", 1, 0, "C")
    shape = Shape(2, 1, 0)
    assert left_out({"A": 1}, [a, b, small], shape) == ()
    assert left_out({"A": 2}, [a, b, small], shape) == ("A",)
    assert left_out({"A": 2}, [a, small], shape) == ()
    back = Node("a", 2, 0, "D")
    assert left_out({"A": 2}, [back, b], shape) == ()
    assert left_out({"A": 2, "B": 2}, [a, b, small], shape) == ()
    assert left_out({"A": 2, "B": 2}, [a, b, back], shape) == ("A", "B")
