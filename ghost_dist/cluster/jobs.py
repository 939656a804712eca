"""Runs as Ray jobs: submitted with their whole configuration, found again by their RUN folder.

The package itself goes with a job, for its driver and its ranks: the cluster needs the libraries
alone. A job is ``ghost-dist recover`` on the cluster, so what holds there holds here: a job that
failed is submitted again by the same command and continues.
"""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import re
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import ghost_dist
from ghost_dist.config import Config
from ghost_dist.config_file import config_yaml
from ghost_dist.errors import ClusterError, ConfigError

_PROBE_S, _WAIT_S = 10.0, 60.0
_PREFIX = "ghost-dist"
_UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)


class Jobs:
    """The jobs of one cluster, by the address of its dashboard, such as ``http://head:8265``.

    A cluster that asks for no token is refused unless allowed: whoever reaches its ports can run
    code on it (CVE-2023-48022).
    """

    def __init__(self, address: str, *, allow_unauthenticated: bool = False) -> None:
        self.address = address if "://" in address else f"http://{address}"
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: expected the dashboard's address, such as http://head:8265."
            )
        self._check_authentication(allow_unauthenticated)
        try:
            self._client = JobSubmissionClient(self.address)
        except Exception as error:  # Ray raises several kinds, each with a message of its own
            raise ConfigError(
                f"The cluster at {self.address} does not take this request: {error} Set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to its token."
            ) from error

        sdk, job_sdk = "dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"
        for name in (sdk, job_sdk, "_private.runtime_env.packaging"):
            # Uploads and closed sockets are no news to a user; Ray sets these levels itself.
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)

    def submit(
        self, config: Config, *, python: str = "python", env: Mapping[str, str] | None = None
    ) -> tuple[str, bool]:
        """Submit a run, unless a job of the same RUN is under way: its id, and whether it is new.

        Paths are those of the cluster's nodes, so they must be absolute; ``python`` is looked up in
        the PATH of Ray on the head node; names in ``env`` that secrets have are refused.
        """
        _check_paths(config)
        _check_secrets(env or {})
        earlier = self._ours(_name(config.output.path))
        for job in earlier:
            if job.status in _UNDER_WAY:
                return str(job.submission_id), False
        name = f"{_name(config.output.path)}-{len(earlier) + 1}"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.yaml").write_bytes(config_yaml(config))
            Path(folder, "requirements.txt").write_text("\n".join(_requirements(config)))
            package = str(Path(ghost_dist.__file__).parent)
            parts = {"working_dir": folder, "py_modules": [package], "excludes": ["__pycache__"]}
            variables = {"env_vars": dict(env)} if env else {}
            self._client.submit_job(
                entrypoint=f"{shlex.quote(python)} -m ghost_dist.job",
                submission_id=name,
                runtime_env={**parts, **variables},
                metadata={"run": config.output.path},
            )
        return name, True

    def find(self, job: str) -> str:
        """The submission id of a job, given that or the path of its RUN folder."""
        if job.startswith("/") and (of_run := self._ours(_name(job))):
            return str(of_run[-1].submission_id)
        ids = [str(known.submission_id) for known in self._client.list_jobs()]
        if job in ids:
            return job
        known = ", ".join(sorted(name for name in ids if name.startswith(_PREFIX))) or "none"
        raise ConfigError(f"There is no job {job} at {self.address}. Jobs of ghost-dist: {known}.")

    def listed(self) -> list[dict[str, Any]]:
        """Jobs of ghost-dist, oldest first, each as :meth:`status` begins."""
        return [_described(job) for job in self._ours()]

    def status(self, job: str) -> dict[str, Any]:
        """How a job fares: the content of its ``recover --status``, and what Ray knows."""
        info = self._client.get_job_info(job)
        lines = ["", *filter(str.strip, self._client.get_job_logs(job).splitlines())]
        about = {**_described(info), "message": info.message, "last_line": lines[-1]}
        # Beside the job's log, which Ray serves in the same way; RUN is on the cluster's disk.
        where = {"node_id": info.driver_node_id or "", "filename": f"job-driver-{job}.json"}
        answer = self._client._do_request(
            "GET", f"/api/v0/logs/file?{urllib.parse.urlencode(where)}"
        )
        return about | (json.loads(answer.text) if answer.status_code == 200 else {})

    def stop(self, job: str) -> str:
        """Ask a job to stop and wait for it; what it has finished is kept. Returns its status."""
        self._client.stop_job(job)
        return self._wait(job)

    def logs(self, job: str) -> str:
        return str(self._client.get_job_logs(job))

    def follow(self, job: str, show: Callable[[str], None]) -> str:
        """Hand over what a job prints until it ends; returns its status."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                show(text)

        try:
            asyncio.run(tail())
            # The log may end a moment before the job does.
            return self._wait(job)
        except (ConnectionError, RuntimeError, OSError) as error:
            raise ClusterError(
                f"The cluster at {self.address} does not answer any more: {error}. If it comes "
                "back, the same command continues."
            ) from error

    def _wait(self, job: str) -> str:
        until = time.monotonic() + _WAIT_S
        while (status := self._client.get_job_status(job)) in _UNDER_WAY:
            if time.monotonic() > until:
                break
            time.sleep(0.5)
        return str(status)

    def _ours(self, begins: str = _PREFIX) -> list[JobDetails]:
        """Jobs of ghost-dist, oldest first."""
        jobs = self._client.list_jobs()
        ours = [job for job in jobs if (job.submission_id or "").startswith(begins)]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def _check_authentication(self, allow_unauthenticated: bool) -> None:
        """See whether the cluster would take a job from anybody: ask it without a token."""
        url = f"{self.address}/api/jobs/"
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_S):  # http or https, checked before
                open_to_all = True
        except urllib.error.HTTPError as error:
            open_to_all = error.code not in (401, 403)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {self.address} ({getattr(error, 'reason', error)}). "
                "Check the address and port of its dashboard (8265 if not set otherwise), and that "
                "it can be reached."
            ) from error
        if open_to_all and not allow_unauthenticated:
            raise ConfigError(
                f"The cluster at {self.address} takes jobs without a token: whoever reaches this "
                "port can run code on its nodes (CVE-2023-48022). Start it with "
                "RAY_AUTH_MODE=token (docs/launching.md), or pass --allow-unauthenticated if the "
                "network is private."
            )


def _described(job: JobDetails) -> dict[str, Any]:
    """Times in seconds since 1970."""
    return {
        "job": job.submission_id,
        "status": str(job.status),
        "run": (job.metadata or {}).get("run"),
        "started": job.start_time and job.start_time / 1000,
        "ended": job.end_time and job.end_time / 1000,
    }


def _name(run: str) -> str:
    """The jobs of a RUN folder share this beginning of their ids."""
    return f"{_PREFIX}-{hashlib.sha256(run.encode()).hexdigest()[:10]}"


def _requirements(config: Config) -> list[str]:
    """What the package needs for this run, as it was installed here, in the words of pip."""
    extras, engine = [""], config.engine
    if config.evaluation.tasks:
        extras.append("harness")
    if config.on_cluster:
        extras.append("cluster")
    by_deepspeed = engine.kind in ("auto", "tensor_parallel")
    try:
        requirements = importlib.metadata.requires("ghost_dist") or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "submit takes what a job needs from the installed package, and ghost_dist is not "
            f"installed in {sys.executable}. In the checkout: pip install -e '.[cluster]'."
        ) from error
    needed = []
    for requirement in map(Requirement, requirements):
        marker, requirement.marker = requirement.marker, None
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and (requirement.name != "deepspeed" or by_deepspeed):
            needed.append(str(requirement))
    return needed


def _check_secrets(env: Iterable[str]) -> None:
    """Nothing that Ray would show: environments of jobs stand in logs of every node."""
    for name in env:
        if re.search("(TOKEN|KEY|SECRET|PASSWORD)$", name.upper()):
            raise ConfigError(
                f"--env {name}: Ray writes the environment of a job into its logs, in clear, and "
                "shows it to all who may ask for jobs. Put the secret into a file of the head that "
                "only you can read, and give its path where the library takes one (for the Hub "
                "--env HF_TOKEN_PATH=FILE), or set it where the head is started."
            )


def _check_paths(config: Config) -> None:
    """A job starts in a folder of its own, so a relative path would mean another file there."""
    given = {
        "output.path": config.output.path,
        "output.callback": config.output.callback,
        "selection.layer_times": config.selection.layer_times,
    }
    here = {"model.path": config.model.path, "calibration.source": config.calibration.source}
    here |= {
        f"calibration.sources[{number}]": path
        for number, path in enumerate(config.calibration.sources)
    }
    here |= {f"evaluation.corpora.{k}": path for k, path in config.evaluation.corpora.items()}
    here |= {f"evaluation.tasks[{n}]": task for n, task in enumerate(config.evaluation.tasks)}
    given |= {name: path for name, path in here.items() if Path(path).exists()}
    for name, path in given.items():
        if path and not path.startswith("/"):
            raise ConfigError(
                f"{name}={path} is a relative path, which means another file in the job's folder "
                "on the cluster. Give an absolute path that all nodes of the cluster see."
            )
