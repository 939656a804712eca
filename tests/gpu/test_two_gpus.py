"""Two real GPUs under Ray, on pico: tensor parallelism, shared reading, live sums, over NCCL."""

import json
from pathlib import Path

import pytest
import torch
from run_files import worst_difference

pytest.importorskip("ray", reason="Ray is not installed")

from live_sums import showing, within_rounding
from safetensors.torch import load_file

from ghost_dist.assets.stdlib_text import CALIBRATION_MODULES, stdlib_text
from ghost_dist.cluster.session import recover_on_cluster
from ghost_dist.config_file import load_config
from ghost_dist.demo import PICO
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
FILE = "operators/5-10.safetensors"


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    root = tmp_path_factory.mktemp("two-gpus")
    text = root / "text.txt"
    text.write_text(stdlib_text(CALIBRATION_MODULES), encoding="utf-8")

    def configure(name, **fields):
        given = {
            "model.path": str(PICO),
            "model.dtype": "float32",
            "calibration.source": str(text),
            "calibration.windows": 32,
            "calibration.window_length": 512,
            "calibration.ranges": 16,
            "selection.spans": [[5, 10]],
            "operator.name": "ghost-joint",
            "operator.features": "stream",
            "operator.choose": "residual",
            # Not a multiple of the replicas, which take turns: a fold has ranges of both.
            "operator.folds": 3,
            "engine.device": "cuda",
            "engine.batch": 2,
            "output.path": str(root / name),
        }
        return load_config(None, {**given, **{k.replace("__", "."): v for k, v in fields.items()}})

    return configure


@pytest.fixture(scope="module")
def alone(configure):
    config = configure("alone")
    recover(config, again="solve")
    return operators(config)


def operators(config):
    return load_file(Path(config.output.path, FILE))


def test_two_ranks_of_one_replica(configure, alone):
    config = configure("ranks", engine__tensor_parallel=2)
    recover_on_cluster(config, again="solve")
    worst = worst_difference(operators(config), alone)
    print(f"\ntensor-parallel 2 over NCCL: operators differ by {worst:.1e}")
    # float32: the halves of a product are added in another order.
    assert 0 < worst < 1e-4


def test_two_ranks_that_stream_share_windows_and_reading(configure, alone):
    config = configure("peers", engine__kind="streaming", engine__data_parallel=2)
    recover_on_cluster(config, again="solve")
    worst = worst_difference(operators(config), alone)
    print(f"\nstreaming, data-parallel 2 over NCCL: operators differ by {worst:.1e}")
    assert worst < 1e-9


def test_two_replicas_that_stream(configure, alone):
    config = configure("streams", engine__kind="streaming", engine__replicas=2)
    recover_on_cluster(config, again="solve")
    got = operators(config)
    assert all(torch.equal(got[name], tensor) for name, tensor in alone.items())


@pytest.fixture(scope="module")
def two_replicas(configure, tmp_path_factory):
    config = configure("replicas", engine__replicas=2, engine__kind="tensor_parallel")
    with pytest.MonkeyPatch.context() as patch:
        # Neither begins before both have loaded, or the first would run all of so small a text.
        showing(patch, tmp_path_factory.mktemp("loaded") / "held", ranks=2)
        recover_on_cluster(config, again="solve")
    return config


def test_two_replicas_share_the_ranges(two_replicas, alone):
    worst = worst_difference(operators(two_replicas), alone)
    print(f"\ntwo replicas, sums added in order: operators differ by {worst:.1e}")
    assert worst < 1e-4
    lines = Path(two_replicas.output.path, "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    committed = [event for event in events if event["event"] == "range-committed"]
    assert len(committed) == 16
    assert len({event["replica"] for event in committed}) == 2


def test_the_all_reduce_equals_the_sums_in_order(configure, two_replicas, tmp_path, monkeypatch):
    showing(monkeypatch, tmp_path / "held", ranks=2)
    config = configure(
        "live", engine__replicas=2, engine__kind="tensor_parallel", engine__reduction="all-reduce"
    )
    recover_on_cluster(config, again="solve")
    store = StatisticsStore.open(Path(config.output.path, "statistics.zarr"))
    differing, ratio = within_rounding(tmp_path / "held", store, 3)
    worst = worst_difference(operators(config), operators(two_replicas))
    print(f"\n{differing} entries differ, {ratio:.2f} of the bound; operators by {worst:.1e}")
    assert differing > 0
    assert 0 < worst < 1e-9
