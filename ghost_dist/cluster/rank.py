"""The actor of one rank of a replica: loads its part of the model, runs ranges, writes its columns.

It decides nothing. A rank that died is never restarted: its process group died with it, and a
restarted actor would have lost the sums of its range. The driver kills the whole replica and builds
another one.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from ghost_dist import __version__
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import load_decoder
from ghost_dist.checkpoint.reader import model_fingerprint, open_checkpoint
from ghost_dist.engines.memory import free_bytes
from ghost_dist.engines.resident import ResidentEngine
from ghost_dist.engines.tensor_parallel import Backend, open_tensor_parallel
from ghost_dist.errors import CheckpointError, CorruptStoreError, RunFolderError
from ghost_dist.pipeline.collectors import Collectors, MakeCollector, sums_of_range
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock
from ghost_dist.statistics.sums import ColumnBlock, Sums

COMPARED = ("torch", "transformers", "zarr", "numpy", "ray")
"""Libraries whose versions must be the same on all nodes, besides ghost_dist and Python."""


@dataclass(frozen=True)
class EngineSpec:
    """What every rank of every replica loads."""

    path: Path
    model_fingerprint: str
    architecture: Architecture
    num_layers: int
    dtype: torch.dtype
    device: str
    batch: int
    degree: int
    sharded: bool
    """Through ``open_tensor_parallel``; False: the resident engine, degree 1."""
    backend: Backend
    trust_remote_code: bool
    threads: int
    timeout_s: float
    """Of a collective: what a rank waits for the others."""


@dataclass(frozen=True)
class Work:
    """One store to fill; the same for all leases of a stage."""

    store: Path
    plan_fingerprint: str
    tokens: Tokens
    collectors: Collectors


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    address: str
    port: int
    """Free when it was asked for."""
    pid: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Loaded:
    """What loading took.

    Attributes
    ----------
    parameter_bytes
        Of this rank.
    conformance
        Largest relative difference of the small random model, sharded against unsharded.
    """

    parameter_bytes: int
    conformance: float | None


@dataclass(frozen=True)
class Beat:
    """An answer to "are you there": the attempt at hand and its tokens so far."""

    attempt: str
    tokens: int


def versions() -> dict[str, str]:
    """What must be the same wherever a run computes."""
    found = {"python": platform.python_version().rpartition(".")[0], "ghost_dist": __version__}
    return {**found, **{name: importlib.metadata.version(name) for name in COMPARED}}


class Rank:
    """One rank; :meth:`write` and :meth:`beat` have threads of their own, the rest take turns."""

    def __init__(self) -> None:
        self._beat = Beat("", 0)
        self._engine: ResidentEngine | None = None
        self._work: tuple[str, StatisticsStore, list[MakeCollector]] | None = None
        self._unwritten: dict[str, tuple[StatisticsStore, dict[str, Sums]]] = {}
        self._block = ColumnBlock()
        if threading.current_thread() is threading.main_thread():
            # A notice of preemption: nothing here is worth saving, and nothing half is committed.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

    def place(self) -> Place:
        """Where this rank is, and a port that is free there."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return Place(
            socket.gethostname(), ray.util.get_node_ip_address(), port, os.getpid(), versions()
        )

    def load(self, rank: int, address: str, port: int, spec: EngineSpec) -> Loaded:
        """Join the replica's torch.distributed world and load this rank's part of the model.

        Raises
        ------
        CheckpointError
            If the checkpoint is not there on this node, or is another one.
        ConfigError, UnsupportedArchitectureError
            As ``open_tensor_parallel``.
        """
        torch.set_num_threads(spec.threads)
        self._block = ColumnBlock(rank, spec.degree)
        self._check_checkpoint(spec)
        device = torch.device(spec.device, 0) if spec.device == "cuda" else torch.device("cpu")
        if not spec.sharded:
            decoder = load_decoder(
                spec.path,
                spec.architecture,
                num_layers=spec.num_layers,
                dtype=spec.dtype,
                device=device,
                trust_remote_code=spec.trust_remote_code,
            )
            self._engine = ResidentEngine(decoder, spec.batch)
            return Loaded(0, None)
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE=str(spec.degree),
            # Ray gives an actor one GPU, which is number 0 to it whatever its number on the node.
            LOCAL_RANK="0",
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=spec.degree,
            timeout=dt.timedelta(seconds=spec.timeout_s),
        )
        engine = open_tensor_parallel(
            spec.path,
            spec.architecture,
            num_layers=spec.num_layers,
            dtype=spec.dtype,
            device=device,
            degree=spec.degree,
            batch=spec.batch,
            backend=spec.backend,
        )
        self._engine = engine
        return Loaded(engine.decoder.parameter_bytes, engine.conformance)

    def run(self, work_id: str, work: Work, range_id: int, attempt: str) -> None:
        """Run a range from zero; its sums wait in host memory for :meth:`write`.

        Raises
        ------
        RunFolderError
            If the run's store is not seen from this node.
        NonFiniteActivationError
            If a stream holds NaN or Inf.
        """
        assert self._engine is not None, "run comes after load"
        self._beat = Beat(attempt, 0)
        if self._work is None or self._work[0] != work_id:
            self._work = (work_id, self._open_store(work), self._passes(work.collectors))
        _, store, passes = self._work
        windows = store.plan.ranges[range_id]

        def advance(tokens: int) -> None:
            self._beat = Beat(attempt, self._beat.tokens + tokens)

        with torch.inference_mode():
            sums = sums_of_range(self._engine, work.tokens, windows, passes, advance)
            # Here and not in write: a copy from the device would queue behind the next range.
            on_host = {name: part.to(torch.device("cpu")) for name, part in sums.items()}
        self._unwritten[attempt] = (store, on_host)

    @ray.method(concurrency_group="write")  # type: ignore[untyped-decorator]
    def write(self, range_id: int, attempt: str) -> WrittenBlock:
        """Write this rank's columns of a range that was run, while the next one runs.

        Raises
        ------
        OSError
            If the disk is full or not writable.
        """
        store, sums = self._unwritten.pop(attempt)
        return store.write_block(range_id, attempt, sums, self._block)

    @ray.method(concurrency_group="beat")  # type: ignore[untyped-decorator]
    def beat(self) -> Beat:
        """What this rank is at; answers while it computes."""
        return self._beat

    def _passes(self, collectors: Collectors) -> list[MakeCollector]:
        assert self._engine is not None
        device = self._engine.device
        free = torch.tensor([free_bytes(device)], device=device)
        if self._block.count > 1:
            dist.all_reduce(free, dist.ReduceOp.MIN)  # all ranks must make the same passes
        return collectors.passes(device, int(free), self._block)

    def _check_checkpoint(self, spec: EngineSpec) -> None:
        where = f"on node {socket.gethostname()}"
        if not spec.path.exists():
            raise CheckpointError(
                f"{spec.path} does not exist {where}. Every node must have the checkpoint at this "
                "path: put it on a file system that all of them share, or copy it there."
            )
        if model_fingerprint(open_checkpoint(spec.path)) != spec.model_fingerprint:
            raise CheckpointError(
                f"{spec.path} {where} is another checkpoint than the driver has there. Copy the "
                "same one to every node."
            )

    def _open_store(self, work: Work) -> StatisticsStore:
        try:
            store = StatisticsStore.open(work.store)
        except CorruptStoreError as error:
            raise RunFolderError(
                f"{work.store} is not seen from node {socket.gethostname()} ({error}) RUN must lie "
                "on a file system that all nodes share: choose such an --out."
            ) from error
        if store.plan_fingerprint != work.plan_fingerprint:
            raise RunFolderError(
                f"{work.store} is of another run on node {socket.gethostname()}. RUN must lie on a "
                "file system that all nodes share: choose such an --out."
            )
        return store


def remote_rank(**options: Any) -> Any:
    """An actor handle of a new :class:`Rank`; options as of ``ray.remote``."""
    actor = ray.remote(
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
        concurrency_groups={"beat": 1, "write": 1},
    )(Rank)
    return actor.options(**options).remote()
