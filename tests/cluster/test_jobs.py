"""Submission to a cluster that launch/local_cluster.sh starts, with a token, by the command.

The cluster's Python has the libraries, and no ghost_dist.
"""

import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
from functools import partial
from pathlib import Path

import pytest
import yaml
from forked import asking_program, started_server
from ray_hosts import RAY

from ghost_dist.cluster.jobs import Jobs
from ghost_dist.config_file import config_tree
from ghost_dist.errors import ConfigError
from ghost_dist.statistics.store import StatisticsStore

SCRIPT = Path(__file__).parents[2] / "launch" / "local_cluster.sh"


def free_port():
    """A port that is free, and the next one, which the head's Ray client takes.

    Not of those that the kernel gives to connections, one of which may have it a moment later.
    """
    while True:
        port = random.randrange(20000, 30000, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as next_one:
            one.bind(("", port))
            next_one.bind(("", port + 1))
            return port


def python_without(folder, *names):
    """A virtual environment with the libraries of this one but those whose names begin so."""
    venv.create(folder)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            plain = path.name.removeprefix("__editable__").lstrip("_.").lower()
            if not plain.startswith((*names, "__pycache__")):
                (own / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python of the cluster, and its forked stand-in."""
    python = python_without(tmp_path_factory.mktemp("bare"), "ghost_dist")
    asked = [python, "-c", "import ghost_dist"]
    tried = subprocess.run(asked, check=False, capture_output=True, text=True, cwd="/", env={})
    assert "No module named 'ghost_dist'" in tried.stderr
    with tempfile.TemporaryDirectory() as folder:  # a short path: the socket lies there
        socket_path = Path(folder, "socket")
        with started_server(socket_path, python):
            yield python, asking_program(socket_path, Path(folder, "python"))


@pytest.fixture(scope="module")
def dashboard(forked, bare, tmp_path_factory):
    """Address of a cluster of two nodes, the environment of a user who has its token, and what
    the user's commands run in."""
    pytest.importorskip("aiohttp", reason="jobs need ray[default]")
    folder = f"/tmp/ghost-dist-test-{os.getpid()}"  # short: sockets lie below it
    port = free_port()
    programs = tmp_path_factory.mktemp("programs")
    ray = shlex.join([str(bare[0]), "-c", RAY, str(bare[1])])
    (programs / "ray").write_text(f'#!/bin/sh\nexec {ray} "$@"\n')
    (programs / "ray").chmod(0o755)
    user = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    own = {
        **os.environ,
        "PATH": f"{programs}:{bare[0].parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),  # what starts forked processes
        "PORT": str(free_port()),
        "DASHBOARD_PORT": str(port),
        "GHOST_DIST_CLUSTER": folder,
    }
    start = ["bash", str(SCRIPT), "start", "--nodes", "2", "--cpus", "2", "--store-mib", "80"]
    started = subprocess.run(
        start, check=False, env=own, capture_output=True, text=True, timeout=200
    )
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/.ray/auth_token"}
        yield f"http://127.0.0.1:{port}", {**user, **token}, forked.program
    finally:
        stopped = subprocess.run(
            ["bash", str(SCRIPT), "stop"], check=False, env=own, capture_output=True
        )
    assert stopped.returncode == 0


def command(dashboard, *arguments):
    address, environment, program = dashboard
    return subprocess.run(
        [program, "-m", "ghost_dist", *arguments, "--address", address],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture
def config_file(make_config, tmp_path, request):
    config = make_config(
        engine__kind="resident",
        engine__replicas=2,
        output__path=str(tmp_path / "run"),
        **getattr(request, "param", {}),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_tree(config)))
    return path


@pytest.fixture
def submit(dashboard, bare, config_file):
    def submit(*options, python=bare[1], dashboard=dashboard):
        arguments = ("submit", str(config_file), "--python", str(python))
        return command(dashboard, *arguments, *options)

    return submit


TOKEN = "hf_" + "Secret" * 5


def test_a_job_fails_is_looked_at_and_continues_by_the_same_command(
    dashboard, submit, bare, tmp_path
):
    """With a token for the Hub, which the job can read and nothing shows."""
    run, python, token = tmp_path / "run", tmp_path / "python", tmp_path / "token"
    token.write_text(TOKEN)
    # An interpreter that says whether the job has the token.
    asks = f"import huggingface_hub as hub, sys; sys.exit(hub.get_token() != {TOKEN!r})"
    lines = ["#!/bin/sh", shlex.join([str(bare[0]), "-c", asks]) + f" && touch {tmp_path}/has-it"]
    python.write_text("\n".join([*lines, f'exec {bare[1]} "$@"\n']))
    python.chmod(0o755)
    submit = partial(submit, "--env", f"HF_TOKEN_PATH={token}", python=python)
    # Another run's lock on RUN: the job cannot start.
    run.mkdir()
    (run / "foreign.txt").write_text("not a RUN folder")
    failed = submit()
    assert (tmp_path / "has-it").exists()
    assert failed.returncode == 1
    assert "is no RUN folder" in failed.stdout
    assert "ended as FAILED" in failed.stderr
    assert "packag" not in failed.stderr  # what Ray says of an upload
    (run / "foreign.txt").unlink()

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calibrate: 1,024 tokens" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["spans"] == [[3, 5]]
    assert StatisticsStore.open(run / "statistics.zarr").missing() == ()

    found = job_status(dashboard, str(run))
    assert found["status"] == "SUCCEEDED"
    assert found["events"][-1]["event"] == "run-end"
    assert found["events"][-1]["perplexity"] == result["perplexity"]
    assert found["job"].endswith("-2")
    assert found["run"] == str(run)
    listed = command(dashboard, "jobs", "list")
    assert listed.stdout.index("FAILED") < listed.stdout.index("SUCCEEDED")
    assert found["job"][:12] in listed.stdout
    logs = command(dashboard, "jobs", "logs", found["job"])
    assert "checkpoint:" in logs.stdout
    status = command(dashboard, "jobs", "status", found["job"])
    assert "run-end" in status.stdout

    for said in (failed, done, listed, logs, status):
        assert TOKEN not in said.stdout + said.stderr
    assert TOKEN not in str(found)
    cluster = Path(dashboard[1]["RAY_AUTH_TOKEN_PATH"]).parents[1]
    of_run, of_ray = contents(run), contents(cluster)
    assert b"run-end" in of_run
    assert b"HF_TOKEN_PATH" in of_ray
    assert TOKEN.encode() not in of_run + of_ray


def contents(folder):
    """Of all files, one after the other."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_secret_in_the_environment_is_refused(submit):
    """Ray would write it into its logs."""
    refused = submit("--env", "NCCL_DEBUG=INFO", "--env", f"HF_TOKEN={TOKEN}")
    assert refused.returncode == 2
    assert "--env HF_TOKEN: Ray writes the environment of a job into its logs" in refused.stderr
    assert "HF_TOKEN_PATH=FILE" in refused.stderr
    assert TOKEN not in refused.stderr


def job_status(dashboard, job):
    return json.loads(command(dashboard, "jobs", "status", job, "--json").stdout)


def test_libraries_that_the_head_lacks_are_named(submit, tmp_path):
    python = python_without(tmp_path / "poor", "ghost_dist", "zarr", "safetensors")
    old = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "poor")}))
    (old / "safetensors-0.4.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: safetensors\nVersion: 0.4.0\n"
    (old / "safetensors-0.4.0.dist-info" / "METADATA").write_text(metadata)
    refused = submit(python=python)
    assert refused.returncode == 1
    assert f"came with the job, but {python} on" in refused.stdout
    assert "  zarr<3.2,>=3.1.3 (not installed)\n" in refused.stdout
    assert "  safetensors>=0.5 (0.4.0)\n" in refused.stdout
    install = f"{python} -m pip install 'zarr<3.2,>=3.1.3' 'safetensors>=0.5'\n"
    assert install in refused.stdout
    assert "Traceback" not in refused.stdout


# In the driver: the run stands still until it was looked at, and then takes its time.
CALLBACK = """
import time
from pathlib import Path

def wait(event):
    here = Path(__file__).parent
    placed = [replica for replica in event.get("replicas", ()) if replica["nodes"]]
    while len(placed) == 2 and event["stage"] == "calibrate" and not (here / "looked-at").exists():
        time.sleep(0.1)
    if event["event"] == "range-committed" and not (here / "stopped").exists():
        time.sleep(1)
"""
LONG = {"calibration__windows": 240, "calibration__ranges": 120}


@pytest.mark.parametrize("config_file", [LONG], indirect=True, ids=["long"])
def test_a_job_is_not_waited_for_looked_at_and_stopped(dashboard, submit, tmp_path):
    (tmp_path / "mine.py").write_text(CALLBACK)
    submit = partial(submit, "--set", f"output.callback={tmp_path / 'mine.py'}:wait")
    submitted = submit("--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    again = submit("--no-wait")
    assert again.stdout.strip() == job  # it is under way: no second one
    now = {}
    while len([replica for replica in now.get("replicas", ()) if replica["nodes"]]) < 2:
        status = job_status(dashboard, job)
        assert status["status"] in ("PENDING", "RUNNING"), status
        now = status.get("progress") or {}
    assert now["stage"] == "calibrate"
    assert 0 <= now["committed"] <= now["done"] <= now["total"] == 240 * 64
    assert [one["replica"] for one in now["replicas"]] == [0, 1]
    shown = command(dashboard, "jobs", "status", job).stdout
    assert re.search(rf"stage {now['part']} +│ calibrate: [\d,]+ of 15,360 tokens", shown)
    assert re.search(r"committed +│ [\d,]+ of 15,360 tokens", shown)
    assert re.search(rf"replica 1 +│ \w+ on {socket.gethostname()}", shown)
    (tmp_path / "looked-at").touch()
    stopped = command(dashboard, "jobs", "stop", job)
    assert stopped.stdout.strip() == "STOPPED"
    (tmp_path / "stopped").touch()
    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "does not take this request"),
        ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "wrong"}, "does not take this request"),
    ],
)
def test_a_wrong_token_is_refused(dashboard, submit, change, message):
    address, environment, program = dashboard
    changed = {k: v for k, v in {**environment, **change}.items() if v}
    refused = submit(dashboard=(address, changed, program))
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr


def test_nobody_at_the_address():
    with pytest.raises(ConfigError, match=r"No Ray cluster answers at http://127\.0\.0\.1:9"):
        Jobs("127.0.0.1:9")
    with pytest.raises(ConfigError, match="expected the dashboard's address"):
        Jobs("ray://head:10001")


def test_a_cluster_that_takes_jobs_from_anybody_is_refused(open_dashboard):
    with pytest.raises(ConfigError, match=r"CVE-2023-48022.*--allow-unauthenticated"):
        Jobs(open_dashboard)


@pytest.fixture
def open_dashboard():
    """Answers as a dashboard without token authentication does."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("field", ["output.path", "selection.layer_times"])
def test_relative_paths_are_refused(submit, field):
    refused = submit("--set", f"{field}=runs/x")
    assert refused.returncode == 2
    assert f"{field}=runs/x is a relative path" in refused.stderr
