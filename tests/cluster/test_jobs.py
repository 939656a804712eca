"""Submission to a cluster that launch/local_cluster.sh starts, with a token, by the command."""

import contextlib
import json
import os
import random
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
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


@pytest.fixture(scope="module")
def dashboard(forked, tmp_path_factory):
    """Address of a cluster of two nodes, the environment of a user who has its token, and what
    the user's commands run in."""
    pytest.importorskip("aiohttp", reason="jobs need ray[default]")
    folder = f"/tmp/ghost-dist-test-{os.getpid()}"  # short: sockets lie below it
    port = free_port()
    programs = tmp_path_factory.mktemp("programs")
    ray = shlex.join([sys.executable, "-c", RAY, str(forked.program)])
    (programs / "ray").write_text(f'#!/bin/sh\nexec {ray} "$@"\n')
    (programs / "ray").chmod(0o755)
    own = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
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
        yield f"http://127.0.0.1:{port}", {**own, **token}, forked.program
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


def submit(dashboard, config_file, *options):
    arguments = ("submit", str(config_file), "--python", str(dashboard[2]))
    return command(dashboard, *arguments, *options)


def test_a_job_fails_is_looked_at_and_continues_by_the_same_command(
    dashboard, config_file, tmp_path
):
    run = tmp_path / "run"
    # Another run's lock on RUN: the job cannot start.
    run.mkdir()
    (run / "foreign.txt").write_text("not a RUN folder")
    failed = submit(dashboard, config_file)
    assert failed.returncode == 1
    assert "is no RUN folder" in failed.stdout
    assert "ended as FAILED" in failed.stderr
    (run / "foreign.txt").unlink()

    done = submit(dashboard, config_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calibrate: 1,024 tokens" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["spans"] == [[3, 5]]
    assert StatisticsStore.open(run / "statistics.zarr").missing() == ()

    status = command(dashboard, "jobs", "status", str(run))
    found = json.loads(status.stdout)
    assert found["status"] == "SUCCEEDED"
    assert found["job"].endswith("-2")
    assert found["run"] == str(run)
    listed = command(dashboard, "jobs", "list").stdout
    assert listed.index("FAILED") < listed.index("SUCCEEDED")
    assert found["job"][:12] in listed
    logs = command(dashboard, "jobs", "logs", found["job"])
    assert "checkpoint:" in logs.stdout


# Longer than the commands that look at it take to start.
LONG = {"calibration__windows": 400, "calibration__ranges": 200}


@pytest.mark.parametrize("config_file", [LONG], indirect=True, ids=["long"])
def test_a_job_is_not_waited_for_and_stopped(dashboard, config_file, tmp_path):
    submitted = submit(dashboard, config_file, "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    again = submit(dashboard, config_file, "--no-wait")
    assert again.stdout.strip() == job  # it is under way: no second one
    stopped = command(dashboard, "jobs", "stop", job)
    assert stopped.stdout.strip() == "STOPPED"
    done = submit(dashboard, config_file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "does not take this request"),
        ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "wrong"}, "does not take this request"),
    ],
)
def test_a_wrong_token_is_refused(dashboard, config_file, change, message):
    address, environment, program = dashboard
    changed = {k: v for k, v in {**environment, **change}.items() if v}
    refused = submit((address, changed, program), config_file)
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


def test_relative_paths_are_refused(dashboard, config_file):
    refused = submit(dashboard, config_file, "--set", "output.path=runs/x")
    assert refused.returncode == 2
    assert "output.path=runs/x is a relative path" in refused.stderr
