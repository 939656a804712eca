"""SIGKILL at random moments: the same call continues, and the operators are bitwise the same."""

import os
import random
import signal
import subprocess
import time

import pytest
import yaml
from children import child
from run_files import operators

from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.config_file import config_tree
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore

RUNS = {
    "spans": {"selection__spans": [[1, 3], [5, 6]]},
    "search": {
        "selection__spans": None,
        "selection__criterion": "search",
        "selection__remove": 2,
        "selection__effort": "quick",
    },
    "streamed": {
        "engine__kind": "streaming",
        "operator__name": "ghost-joint",
        "selection__spans": [[5, 7]],
        "selection__sublayers": ("attention:1", "mlp:3"),
        "calibration__windows": 64,
    },
}
KILLS = (8, 20, 8)  # of each of them; chaos_nightly has more


def wait_and_kill(process, delay_s):
    """True if the process was still at work when it was killed."""
    process.start()
    process.join(delay_s)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "least"),
    [
        *zip(RUNS, KILLS, strict=True),
        *(pytest.param(name, 60, marks=pytest.mark.chaos_nightly) for name in RUNS),
    ],
)
def test_killed_runs_end_in_bitwise_equal_operators(make_config, tmp_path, name, least):
    fields = {"calibration__windows": 32, "calibration__ranges": 16, **RUNS[name]}

    def start(run):
        config = make_config(**fields, output__path=str(run))
        return child(config, tmp_path / "log.txt", "solve")

    calm = tmp_path / "calm"
    for run in (tmp_path / "warm-up", calm):
        began = time.monotonic()
        process = start(run)
        process.start()
        process.join()
        assert process.exitcode == 0
        duration_s = time.monotonic() - began

    chance = random.Random(0)
    kills = runs = 0
    while kills < least:
        run = tmp_path / f"disturbed-{runs}"
        runs += 1
        interrupted = True
        while interrupted:
            interrupted = wait_and_kill(start(run), chance.uniform(0.1, 0.95) * duration_s)
            kills += interrupted
        assert operators(run) == operators(calm)
        store = StatisticsStore.open(run / "statistics.zarr")
        assert (store.damaged(), store.missing()) == ({}, ())
        counted = [w for i in store.committed() for w in store.plan.ranges[i]]
        assert sorted(counted) == list(range(fields["calibration__windows"]))
        assert not list(run.glob("streams-*"))


def test_streams_that_a_kill_left_behind_the_last_commit_go(make_config, tmp_path):
    config = make_config(**RUNS["streamed"])
    recover(config)
    (tmp_path / "run" / "streams-calibrate").mkdir()
    recover(config, again="solve")
    assert not list((tmp_path / "run").glob("streams-*"))


@pytest.mark.timeout(300)
def test_kill_during_export_leaves_no_checkpoint_that_looks_complete(make_config, tmp_path):
    config = make_config()
    expected = recover(make_config(output__path=str(tmp_path / "calm")))
    recover(config, again="solve")
    run = tmp_path / "run"
    chance = random.Random(1)
    kills = 0
    while not (run / "result.json").exists():
        process = child(config, tmp_path / "log.txt")
        interrupted = wait_and_kill(process, chance.uniform(0.2, 3.0) if kills < 4 else 120)
        kills += interrupted
        if (run / "checkpoint").exists():  # whatever bears the final name is whole
            tensors = open_checkpoint(run / "checkpoint").tensors
            assert sum("ghost" in name for name in tensors) == 1
    assert kills >= 3
    result = recover(config)
    assert result["fingerprint"] == expected["fingerprint"]
    assert not (run / "checkpoint.unverified").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_are_told_and_continue(make_config, forked, tmp_path, number):
    """The command, in a process of its own."""
    config = make_config(calibration__windows=48, calibration__ranges=24)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(config)))
    command = [forked.program, "-m", "ghost_dist", "recover", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ledger = tmp_path / "run" / "statistics.zarr" / "ledger"
    with process:
        while not (ledger / "00000.json").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        error = process.stderr.read()
    assert process.returncode == 128 + number, error
    assert "The same command continues" in error
    assert "Traceback" not in error
    assert "Loading weights" not in error  # a progress bar of transformers
    calm = make_config(
        calibration__windows=48, calibration__ranges=24, output__path=str(tmp_path / "calm")
    )
    recover(calm, again="solve")
    recover(config, again="solve")
    assert operators(tmp_path / "run") == operators(tmp_path / "calm")
