"""The trained model on a cluster of three nodes: two replicas of two ranks, against one process."""

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from live_sums import showing, within_rounding
from ray_processes import nothing_leaked, three_nodes
from safetensors.torch import load_file

from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore


@pytest.fixture
def cluster(forked):
    with three_nodes(forked) as cluster:
        yield cluster


@pytest.mark.timeout(600)
def test_operators_of_the_trained_model(shared, cluster, tmp_path, monkeypatch):
    def configure(name, **fields):
        given = {
            "model.path": str(shared / "models" / "wiki-llama-32l"),
            "model.dtype": "float32",
            "calibration.source": str(shared / "data" / "calibration.txt"),
            "calibration.windows": 24,
            "calibration.window_length": 512,
            "calibration.ranges": 16,
            "selection.spans": [[11, 18]],
            "operator.name": "ghost-joint",
            "operator.features": "stream",
            "operator.choose": "residual",
            # Not a multiple of the replicas: these take turns, and a fold must have ranges of
            # both, or its sums would be the ordered ones.
            "operator.folds": 3,
            "engine.device": "cpu",
            "output.path": str(tmp_path / name),
        }
        return load_config(None, {**given, **fields})

    on_cluster = {
        "cluster.address": cluster.address,
        "engine.tensor_parallel": 2,
        "engine.replicas": 2,
    }
    recover(configure("alone"), again="solve")
    recover_on_cluster(configure("cluster", **on_cluster), again="solve")
    file = "operators/11-18.safetensors"
    got, expected = (load_file(tmp_path / name / file) for name in ("cluster", "alone"))
    assert got.keys() == expected.keys()
    worst = max(float((got[n] - t).norm() / t.norm()) for n, t in expected.items())
    print(f"\nworst relative difference {worst:.1e}")
    # float32: the ranks' halves of a product are added in another order than one process adds them,
    # which the condition of the least squares enlarges.
    assert 0 < worst < 1e-4

    # The same by a live all-reduce: the sums of every fold, entry by entry, and the operators.
    showing(monkeypatch, tmp_path / "held", ranks=4)
    live = configure("live", **on_cluster, **{"engine.reduction": "all-reduce"})
    recover_on_cluster(live, again="solve")
    store = StatisticsStore.open(tmp_path / "live" / "statistics.zarr")
    differing, ratio = within_rounding(tmp_path / "held", store, 3)
    assert differing > 0
    by_all_reduce = load_file(tmp_path / "live" / file)
    worst = max(float((by_all_reduce[n] - t).norm() / t.norm()) for n, t in got.items())
    print(
        f"all-reduce: {differing} entries differ, {ratio:.2f} of the bound; operators {worst:.1e}"
    )
    assert 0 < worst < 1e-9
    clean, left = nothing_leaked(cluster)
    assert clean, left
