"""What can be checked of launch/ and configs/ without a cluster: schemas, shell, control flow."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ghost_dist.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])
SLURM = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture(autouse=True)
def _no_other_environment(monkeypatch):
    """Of whoever runs the tests."""
    monkeypatch.delenv("GHOST_DIST_VENV", raising=False)


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_config_loads(path):
    config = load_config(path, {})
    if config.on_cluster:
        # The driver cannot run such a model, so nothing may be chosen or measured with it.
        assert config.operator.choose == "residual"
        assert not config.evaluation.corpora


def test_configs_name_their_size():
    sizes = {
        path.stem.rpartition("_")[2]: load_config(path, {}).engine
        for path in CONFIGS
        if path.stem.endswith("gpu")
    }
    for name, engine in sizes.items():
        replicas, _, ranks = name.removesuffix("gpu").rpartition("x")
        assert engine.replicas == int(replicas or 1)
        assert engine.tensor_parallel == int(ranks)


def test_kuberay_manifest():
    documents = list(yaml.safe_load_all((ROOT / "launch/kuberay_rayjob.yaml").read_text()))
    job = next(d for d in documents if d["kind"] == "RayJob")
    claim = next(d for d in documents if d["kind"] == "PersistentVolumeClaim")
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert spec["entrypoint"].startswith("ghost-dist recover ")
    assert "\n" not in spec["entrypoint"].strip()
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # the first with tokens
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = set()
    for group in pods:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
        (mount,) = container["volumeMounts"]
        assert claims[mount["name"]] == claim["metadata"]["name"]
        for argument in spec["entrypoint"].split():
            path = argument.rpartition("=")[2]
            assert "/" not in path or path.startswith(mount["mountPath"] + "/")
    assert len(images) == 1
    config = load_config(ROOT / "configs" / Path(spec["entrypoint"].split()[2]).name, {})
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config.engine.tensor_parallel
    assert workers["replicas"] == config.engine.replicas


def test_ray_up_fits_rays_schema():
    config = yaml.safe_load((ROOT / "launch/ray_up.yaml").read_text())
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token &&" in commands[-1]
    found = importlib.util.find_spec("ray")  # found, and not imported: that takes seconds
    if found is None or found.origin is None:
        pytest.skip("ray is not installed, which ships the schema")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((Path(found.origin).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_script_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--shell=bash", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- launch/environment.sh and launch/test.sh with stand-ins for pip and the checks --------------


@pytest.fixture
def scripts(tmp_path):
    """Run a script of launch/ in a checkout of its own; gives what it has started, line by line."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    tools, started = checkout / ".venv" / "bin", checkout / "started"
    tools.mkdir(parents=True)
    python = f"""
        case "$1 $2" in
          "-c "* | launch/*) exit 0 ;;
          "-m "*) echo "$*" >>{started} ;;
          *) exec {sys.executable} "$@" ;;
        esac"""
    for name, script in {"python": python, "activate": f'export PATH="{tools}:$PATH"'}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    for name in ("ruff", "mypy", "ghost-dist"):
        (tools / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{started}\n')
    for path in tools.iterdir():
        path.chmod(0o755)

    def run(name, *arguments):
        started.write_text("")
        subprocess.run(
            ["bash", str(checkout / "launch" / name), *arguments], check=True, capture_output=True
        )
        return started.read_text().splitlines()

    run.checkout = checkout
    return run


def installed(lines):
    return [line.split(" --editable ")[1] for line in lines if line.startswith("-m pip install")]


def test_what_is_installed_only_grows(scripts):
    assert installed(scripts("demo.sh")) == ["."]
    assert installed(scripts("test.sh", "--quick")) == [".[test]"]
    assert installed(scripts("demo.sh")) == []
    assert installed(scripts("docs.sh")) == [".[docs,test]"]
    assert installed(scripts("test.sh", "--quick")) == []
    [everything] = installed(scripts("test.sh", "-x"))
    assert {"dev", "test", "cluster", "docs", "harness"} <= set(everything[2:-1].split(","))
    for name in ("demo.sh", "docs.sh", "test.sh"):
        assert installed(scripts(name)) == []
    project = scripts.checkout / "pyproject.toml"
    project.write_text(project.read_text() + "\n# changed\n")
    assert installed(scripts("demo.sh")) == [everything]


def test_a_path_is_tested_at_once(scripts):
    lines = scripts("test.sh", "tests/solver", "-x")
    assert [line for line in lines if " pip " not in line] == ["-m pytest tests/solver -x"]


def test_the_whole_suite_and_the_quick_one_check_everything_else_too(scripts):
    whole, quick = scripts("test.sh"), scripts("test.sh", "--quick", "-x")
    for lines in (whole, quick):
        assert {"ruff check .", "ruff format --check .", "mypy "} <= set(lines)
    [tests] = [line for line in whole if line.startswith("-m pytest")]
    assert tests.endswith("-m not gpu and not chaos_nightly")
    [tests] = [line for line in quick if line.startswith("-m pytest")]
    assert "not chaos_nightly and not model" in tests
    assert tests.endswith(" -x")


# --- launch/slurm.sbatch with stand-ins for Slurm, Ray and ghost-dist -----------------------------

STAND_INS = {
    # Drops srun's own options, and runs the rest here.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": """
        if [ "$1" = show ]; then printf 'one\\ntwo\\n'; else echo "$@" >>scontrol.log; fi""",
    "hostname": "echo 192.0.2.10",
    "ray": """
        case $1 in
          get-auth-token) mkdir -p "$HOME/.ray"; echo secret >"$HOME/.ray/auth_token" ;;
          start) [ ! -e "fail$2" ] || exit 3; echo "$*" >>ray.log; exec sleep 30 ;;
        esac""",
    "python": "cat nodes",  # how many have joined
    "sleep": 'if [ "$1" = 600 ]; then echo "$*" >>sleep.log; else exec /bin/sleep "$1"; fi',
    "ghost-dist": """
        until [ "$(cat ray.log 2>/dev/null | wc -l)" = 2 ]; do /bin/sleep 0.02; done
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >token.log
        echo "$RAY_AUTH_MODE $RAY_ADDRESS [$CUDA_VISIBLE_DEVICES] $*" >driver.log
        [ -e wait ] || exit "$(cat code)"
        trap 'kill $!; exit 143' TERM
        /bin/sleep 30 &
        touch waiting
        wait $!""",
}


@pytest.fixture
def slurm(tmp_path):
    """Start the script on two hosts; files of the folder steer the stand-ins."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "nodes").write_text("2\n")
    (tmp_path / "code").write_text("0\n")
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "GHOST_DIST_VENV": "none",
    }
    started = []

    def start(**more):
        process = subprocess.Popen(
            ["bash", str(SLURM), "run.yaml", "--set", "engine.replicas=2"],
            env={**environment, **more},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:  # the sessions of this test, if it failed half-way
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process):
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


def test_slurm_runs_the_driver_and_ends_ray(slurm, tmp_path):
    (tmp_path / "code").write_text("1\n")
    process = slurm()
    assert finish(process) == (1, "")  # the driver's code
    worker, head = sorted((tmp_path / "ray.log").read_text().splitlines())
    assert "--head --node-ip-address=192.0.2.10 --port=20007" in head
    assert "--address=192.0.2.10:20007" in worker
    for line in (head, worker):
        assert "--block" in line
        assert "--num-cpus=4 --num-gpus=8" in line
    assert (tmp_path / "driver.log").read_text() == (
        "token 192.0.2.10:20007 [] recover run.yaml --set engine.replicas=2 "
        "--set cluster.address=auto\n"
    )
    assert (tmp_path / "token.log").read_text() == "600\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing that it started is left
    assert not list(tmp_path.glob(".ghost-dist-slurm-7/.ray"))


@pytest.mark.parametrize("which", ["--head", "--address=192.0.2.10:20007"])
def test_slurm_fails_when_a_ray_start_fails(slurm, tmp_path, which):
    (tmp_path / f"fail{which}").touch()
    (tmp_path / "nodes").write_text("0\n" if which == "--head" else "1\n")
    code, errors = finish(slurm())
    assert code == 1
    assert "error: a 'ray start' failed" in errors
    assert not (tmp_path / "driver.log").exists()


def test_slurm_fails_when_nodes_do_not_join(slurm, tmp_path):
    (tmp_path / "nodes").write_text("1\n")
    code, errors = finish(slurm(JOIN_TIMEOUT="0"))
    assert code == 1
    assert "error: only 1 of 2 nodes" in errors


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


@pytest.mark.parametrize(
    ("number", "restarts", "code", "requeued", "waited"),
    [
        (signal.SIGUSR1, "0", 143, True, False),  # the time limit comes near
        (signal.SIGUSR1, "20", 1, False, False),  # once too often
        (signal.SIGTERM, "0", 143, False, True),  # Slurm requeues by itself, or the user cancelled
    ],
)
def test_slurm_stops_the_driver(slurm, tmp_path, number, restarts, code, requeued, waited):
    (tmp_path / "wait").touch()
    process = slurm(SLURM_RESTART_COUNT=restarts)
    wait_for(tmp_path / "waiting")
    process.send_signal(number)
    assert finish(process)[0] == code
    assert (tmp_path / "scontrol.log").exists() == requeued
    assert (tmp_path / "sleep.log").exists() == waited


def test_workers_see_the_groups(request):
    """Else two Ray clusters run side by side, and wait for each other."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("in one process there are no groups")
    assert request.node.nodeid.endswith("test_launch.py")
    assert "@" in request.node.nodeid
