"""The connection to Ray: joins a cluster or starts one on this machine, and knows its nodes."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.cluster.collect import CollectOnCluster
from ghost_dist.cluster.fit import FitOnCluster
from ghost_dist.cluster.leases import Node, Shape
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.scoring import scoring_on_cluster
from ghost_dist.config import Config
from ghost_dist.errors import ClusterError, ConfigError
from ghost_dist.pipeline import layer_times
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.recover import Stage, recover
from ghost_dist.pipeline.searching import Scorer
from ghost_dist.pipeline.targets import Times
from ghost_dist.progress import Reporter

_PROBE_S = 10.0


class Session(ExitStack):
    """Ray for one run; a context manager, and the ``Workers`` of the pipeline."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def device(self) -> torch.device:
        """GPUs if the cluster has any and the configuration does not ask for the CPU."""
        self._connect()
        wanted = self._config.engine.device.partition(":")[0]
        gpus = sum(node.gpus for node in self.nodes())
        if wanted == "cuda" and not gpus:
            raise ConfigError(
                "engine.device=cuda, but no node of the Ray cluster has a GPU that Ray knows of. "
                "Start the nodes with --num-gpus, or set engine.device=cpu."
            )
        return torch.device("cuda" if gpus and wanted != "cpu" else "cpu")

    def request_seconds(
        self, config: Config, source: Checkpoint, architecture: Architecture
    ) -> Times:
        """Of layers, on one device as a rank has it."""
        gpus, cluster = int(self.device().type == "cuda"), self._config.cluster
        self._shape(gpus).check_room(self.nodes(), 1)
        asked = {"num_cpus": cluster.cpus_per_rank, "num_gpus": gpus, "max_retries": 0}
        task = ray.remote(layer_times.request_seconds).options(**asked)
        found = task.remote(config, source, architecture)
        try:
            times: Times = ray.get(found, timeout=cluster.wait_s + cluster.progress_timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            ray.cancel(found, force=True)
            raise ClusterError(
                "The seconds of layers for selection.target could not be measured on the cluster "
                f"({type(error).__name__}: {error}). The same command tries again; selection."
                "remove needs none."
            ) from error
        return times

    def begin(
        self, inputs: RunInputs, reporter: Reporter
    ) -> tuple[CollectOnCluster, FitOnCluster, Scorer | None]:
        """All on the same replicas; a driver that alone has a GPU scores by itself."""
        self._connect()
        shape = self._shape(int(inputs.worker_device.type == "cuda"))
        pool = Pool(inputs, reporter, shape, self.nodes)
        self.callback(pool.release)
        alone = inputs.device.type == "cuda" and inputs.worker_device.type == "cpu"
        scorer = None if alone else partial(scoring_on_cluster, pool)
        return CollectOnCluster(pool), FitOnCluster(pool), scorer

    def _shape(self, gpus: int) -> Shape:
        engine, cpus = self._config.engine, self._config.cluster.cpus_per_rank
        setting = f"engine.{'data' if engine.data_parallel > 1 else 'tensor'}_parallel"
        return Shape(engine.ranks, cpus, gpus, setting)

    def nodes(self) -> list[Node]:
        def of(node: dict[str, Any]) -> Node:
            name, has = node["NodeManagerHostname"], node["Resources"]
            return Node(name, has.get("CPU", 0.0), has.get("GPU", 0.0), node["NodeID"])

        return [of(node) for node in ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self._config.cluster.address or os.environ.get("RAY_ADDRESS")
        _check_address(address)
        try:
            ray.init(
                address=address or "local",
                namespace="ghost_dist",
                log_to_driver=False,
                configure_logging=False,
                **({} if address else {"include_dashboard": False}),
            )
        except Exception as error:  # Ray raises several kinds, some of no class of their own
            if address is None:
                raise ClusterError(
                    f"Ray did not start on this machine: {error} The same command tries again; "
                    "what Ray wrote is in /tmp/ray/session_latest/logs."
                ) from error
            raise ConfigError(
                f"The Ray cluster at {address} cannot be used: {error}. Check "
                "cluster.address, that the head node runs (ray status), and that RAY_AUTH_MODE and "
                "RAY_AUTH_TOKEN_PATH are those of the cluster."
            ) from error
        self.callback(ray.shutdown)


def recover_on_cluster(
    config: Config, reporter: Reporter | None = None, *, again: Stage | None = None
) -> dict[str, Any]:
    with Session(config) as session:
        return recover(config, reporter, again=again, workers=session)


def _check_address(address: str | None) -> None:
    """Refuse at once what Ray would try for minutes."""
    if address is None or ":" not in address:
        return
    if "://" in address:
        raise ConfigError(
            f"cluster.address={address}: the driver has to be a process of the cluster, to which "
            "HOST:PORT or auto connects it. From elsewhere: ghost-dist submit CONFIG --address "
            "http://HEAD:8265."
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"No Ray cluster answers at cluster.address={address} ({error}). Give HOST:PORT of its "
            "head (port 6379 if not set otherwise), and see that it runs: ray status."
        ) from error
