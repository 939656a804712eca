"""The actor of one rank of a replica: runs and writes its part of ranges, and later fits spans.

It decides nothing. A rank that died is never restarted: its process group died with it. The driver
kills the whole replica and builds another one.
"""

import datetime as dt
import faulthandler
import gc
import importlib.metadata
import os
import platform
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from rich.console import Console

from ghost_dist import __version__
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.peers import Peers
from ghost_dist.checkpoint.reader import Checkpoint, model_fingerprint, open_checkpoint
from ghost_dist.cluster.running_sums import (
    ReduceSpec,
    ReplicaGroup,
    RunningSums,
    gather_columns,
    host_meeting,
    reduce_folds,
)
from ghost_dist.devices import begin, free_bytes, release_cached
from ghost_dist.engines.offloaded_rows import OffloadedEngine
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.engines.tensor_parallel import open_tensor_parallel
from ghost_dist.errors import CheckpointError, CorruptStoreError, ReductionError, RunFolderError
from ghost_dist.pipeline.collectors import Collectors, RangeTimes, sums_of_range
from ghost_dist.pipeline.engine import holds_search
from ghost_dist.pipeline.fitting import FitHere, FitJob, Outcome, fit_room
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import open_offloaded_engine
from ghost_dist.pipeline.search_effort import Windows
from ghost_dist.pipeline.searching import scoring
from ghost_dist.progress import Reporter
from ghost_dist.solver.removals import Removal, Score
from ghost_dist.statistics.store import StatisticsStore, WrittenBlock
from ghost_dist.statistics.sums import ColumnBlock, Sums

COMPARED = ("torch", "transformers", "zarr", "numpy", "ray")
"""Libraries whose versions must be the same on all nodes, besides ghost_dist and Python."""


@dataclass(frozen=True)
class EngineSpec:
    inputs: RunInputs  # without what a rank reads by itself, and what it does not need
    num_layers: int  # layers to load; 0: none, the rank only fits
    range_windows: int  # of the largest range


@dataclass(frozen=True)
class StoreOfRun:
    """The driver's store, as the ranks find it."""

    path: Path
    plan_fingerprint: str

    def open(self) -> StatisticsStore:
        where = f"node {socket.gethostname()}"
        advice = "RUN must lie on a file system that all nodes share: choose such an --out."
        try:
            store = StatisticsStore.open(self.path)
        except CorruptStoreError as error:
            message = f"{self.path} is not seen from {where} ({error}) {advice}"
            raise RunFolderError(message) from error
        if store.plan_fingerprint != self.plan_fingerprint:
            raise RunFolderError(f"{self.path} is of another run on {where}. {advice}")
        return store


@dataclass(frozen=True)
class Work:
    """One store to fill; the same for all leases of a stage."""

    store: StoreOfRun
    tokens: Tokens
    collectors: Collectors
    keep: bool  # the running sums of committed ranges, by fold


@dataclass(frozen=True)
class Place:
    node: str
    address: str
    port: int  # free when it was asked for
    pid: int
    log: str  # what it writes to standard error
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """What must be the same wherever a run computes."""
    python = platform.python_version().rpartition(".")[0]
    found = {name: importlib.metadata.version(name) for name in COMPARED}
    return {"python": python, "ghost_dist": __version__, **found}


class Rank:
    """One rank. Writing and heartbeats have threads of their own, the rest take turns."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._heartbeat = ("", 0)
        self._engine: ResidentEngine | OffloadedEngine | None = None
        self._inputs: RunInputs  # once it is loaded
        self._device = torch.device("cpu")
        self._work: tuple[StoreOfRun, bool, StatisticsStore] | None = None
        self._unwritten: dict[str, tuple[StatisticsStore, dict[str, Sums]]] = {}
        self._running: RunningSums | None = None
        self._unacknowledged: dict[str, dict[str, Sums]] = {}
        self._meeting: Any = None
        self._fits: tuple[StoreOfRun, StatisticsStore, FitHere] | None = None
        self._search: tuple[str, Score] | None = None
        self._scoring = ExitStack()  # holds the model of a search
        self._block = ColumnBlock()
        faulthandler.register(signal.SIGUSR1, file=2)  # cluster/failures.py asks for it
        if threading.current_thread() is threading.main_thread():
            # A notice of preemption: nothing here is worth saving, and nothing half is committed.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

    def place(self) -> Place:
        """Where this rank is, and a port that is free there."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return Place(
            node=socket.gethostname(),
            address=ray.util.get_node_ip_address(),
            port=port,
            pid=os.getpid(),
            log=os.path.realpath("/proc/self/fd/2"),  # a file of Ray
            versions=versions(),
        )

    def load(self, address: str, port: int, spec: EngineSpec) -> tuple[int, float | None]:
        """Join the replica's world and load this rank's part: its bytes, and its conformance."""
        inputs, engine = spec.inputs, spec.inputs.config.engine
        torch.set_num_threads(inputs.config.cluster.cpus_per_rank)
        self._block = ColumnBlock(self._rank, engine.ranks)
        if inputs.worker_device.type == "cuda":
            self._device = torch.device("cuda", 0)
        device = self._device
        begin(device)
        self._inputs = inputs = replace(inputs, source=_open_checkpoint(inputs), device=device)
        if engine.kind in ("auto", "tensor_parallel") or engine.ranks > 1:
            self._join(address, port)
        path, architecture, num_layers = inputs.source.path, inputs.architecture, spec.num_layers
        if not num_layers:
            return 0, None
        if engine.kind == "streaming":
            self._engine = open_offloaded_engine(
                inputs,
                num_layers,
                windows=-(-spec.range_windows // engine.ranks),
                peers=Peers(self._rank, engine.ranks),
                free=self._free_everywhere(),
            )
        elif engine.kind == "resident":
            decoder = load_decoder(path, architecture, num_layers, inputs.dtype, device)
            self._engine = ResidentEngine(decoder, inputs.batch)
        else:
            self._engine = open_tensor_parallel(
                path,
                architecture,
                num_layers=num_layers,
                dtype=inputs.dtype,
                device=device,
                degree=engine.ranks,
                batch=inputs.batch,
            )
        return self._engine.parameter_bytes, self._engine.conformance

    def _join(self, address: str, port: int) -> None:
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._block.count),
            # Ray gives an actor one GPU, which is number 0 to it whatever its number on the node.
            LOCAL_RANK="0",
        )
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            # The driver is first: it looks at ranks that NCCL would abort.
            timeout=dt.timedelta(seconds=self._timeout_s + 10),
        )

    def run(self, work: Work, range_id: int, attempt: str) -> RangeTimes:
        """Run a range from zero, to the device's end; its sums wait on the host for ``write``."""
        assert self._engine is not None, "run comes after load"
        self._heartbeat = (attempt, 0)
        if self._work is None or self._work[:2] != (work.store, work.keep):
            self._work = (work.store, work.keep, work.store.open())
            self._running = RunningSums(self._inputs.config.folds) if work.keep else None
        store = self._work[2]
        windows = store.plan.ranges[range_id]
        given = (work.tokens, windows, work.collectors, self._advance, self._block)
        with torch.inference_mode():
            sums, times = sums_of_range(self._engine, *given)
            # Here and not in write: a copy from the device would queue behind the next range.
            on_host = {name: part.to(torch.device("cpu")) for name, part in sums.items()}
        self._unwritten[attempt] = (store, on_host)
        return times

    @ray.method(concurrency_group="write")  # type: ignore[untyped-decorator]
    def write(self, range_id: int, attempt: str) -> WrittenBlock:
        """Write this rank's columns of a range that was run, while the next one runs."""
        store, sums = self._unwritten.pop(attempt)
        written = store.write_block(range_id, attempt, sums, self._block)
        if self._running is not None:
            self._unacknowledged[attempt] = sums
        return written

    @ray.method(concurrency_group="write")  # type: ignore[untyped-decorator]
    def acknowledge(self, range_id: int, attempt: str, committed: bool) -> None:
        """Add a range that was written to the running sums if it was committed, else forget it."""
        sums = self._unacknowledged.pop(attempt)
        if committed:
            assert self._running is not None
            self._running.add(range_id, attempt, sums)

    def unload(self) -> None:
        """Drop the model, so that the sums have the device's memory; its world stays."""
        if isinstance(self._engine, OffloadedEngine):
            self._engine.model.close()
        self._engine = self._work = None
        gc.collect()
        release_cached(self._device)  # the driver may run its model there between two fits

    def host(self, task: str) -> int:
        """Open a store where the ranks of several replicas meet; its port on this node."""
        self._heartbeat = (task, 0)
        self._meeting = host_meeting(ray.util.get_node_ip_address(), self._timeout_s)
        return int(self._meeting.port)

    def score(
        self,
        task: str,
        name: str,
        of_search: Windows,
        removals: Sequence[Removal],
        windows: Sequence[int],
        on_host: int,
    ) -> list[list[float]]:
        """Scores of removals by this rank alone, with a model of its own that stays.

        ``name``: of the search. ``on_host``: ranks on the same host, this one among them.
        """
        self._heartbeat = (task, 0)
        if self._search is None or self._search[0] != name:
            self._scoring.close()
            inputs = self._inputs
            inputs = replace(inputs, streaming=inputs.streaming or not holds_search(inputs))
            quiet = Reporter(console=Console(quiet=True))
            opened = scoring(inputs, of_search, quiet, advance=self._advance, on_host=on_host)
            self._search = (name, self._scoring.enter_context(opened))
        return self._search[1](removals, windows)

    def reduce(self, task: str, place: StoreOfRun, spec: ReduceSpec) -> None:
        """Sum what all replicas have kept; what this rank is to own is held for :meth:`fit`."""
        self._heartbeat = (task, 0)
        running, self._running = self._running or RunningSums(self._inputs.config.folds), None
        if running.kept != dict(spec.kept):
            raise ReductionError(
                f"This rank has kept ranges {sorted(running.kept.items())}, but the driver counts "
                f"on {sorted(spec.kept.items())}."
            )
        store, fits = self._fits_of(place)
        for range_id in spec.read:
            attempt = store.committed_attempt(range_id)
            running.add(range_id, attempt, store.read(range_id, block=self._block))
            self._advance(1)
        group = ReplicaGroup(spec, self._block, self._device, self._timeout_s)
        folds = reduce_folds(running, group, store, self._advance)
        group.close()
        for key, owner in spec.gather:
            whole = gather_columns(folds, key, self._block, owner, self._device)
            if whole is not None:
                fits.hold(key, whole)
            self._advance(1)

    def fit(self, task: str, place: StoreOfRun, jobs: Sequence[FitJob]) -> list[Outcome]:
        """Fit jobs of one span, from what this rank holds or from the store."""
        self._heartbeat = (task, 0)
        store, fits = self._fits_of(place)
        outcomes = fits(store, jobs, self._advance)
        on_host = [one if isinstance(one, Exception) else one.on_host() for one in outcomes]
        del outcomes
        release_cached(self._device)
        return on_host

    @ray.method(concurrency_group="heartbeat")  # type: ignore[untyped-decorator]
    def heartbeat(self) -> tuple[str, int]:
        """The attempt or task at hand, and how many tokens, fits, ranges or arrays are done."""
        return self._heartbeat

    @ray.method(concurrency_group="heartbeat")  # type: ignore[untyped-decorator]
    def collectives(self) -> bytes:
        """What torch's flight recorder has of this rank, a pickle."""
        c10d: Any = torch._C._distributed_c10d  # NCCL has a recorder of its own, where it is built
        nccl = self._device.type == "cuda"
        return bytes(c10d._dump_nccl_trace() if nccl else c10d._dump_fr_trace())

    @property
    def _timeout_s(self) -> float:
        return self._inputs.config.cluster.progress_timeout_s

    def _advance(self, amount: int) -> None:
        task, done = self._heartbeat
        self._heartbeat = (task, done + amount)

    def _fits_of(self, place: StoreOfRun) -> tuple[StatisticsStore, FitHere]:
        if self._fits is None or self._fits[0] != place:
            inputs = self._inputs
            room = inputs.fit_room or fit_room(self._device)  # 0: the driver has no GPU
            of_run = (inputs.source, inputs.architecture, inputs.config.folds)
            self._fits = (place, place.open(), FitHere(*of_run, self._device, room))
        return self._fits[1:]

    def _free_everywhere(self) -> int:
        """Bytes that are free on the devices of all ranks, which must decide alike; collective."""
        free = torch.tensor([free_bytes(self._device)], device=self._device)
        if self._block.count > 1:
            dist.all_reduce(free, dist.ReduceOp.MIN)
        return int(free)


def _open_checkpoint(inputs: RunInputs) -> Checkpoint:
    """What the driver has opened, as this node sees it."""
    path, where = inputs.source.path, f"on node {socket.gethostname()}"
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist {where}. Every node must have the checkpoint at this path: put "
            "it on a file system that all of them share, or copy it there."
        )
    found = open_checkpoint(path)
    if model_fingerprint(found) != inputs.model_fingerprint:
        raise CheckpointError(
            f"{path} {where} is another checkpoint than the driver has there. Copy the same one to "
            "every node."
        )
    return found


def remote_rank(rank: int, kind: type[Rank] = Rank, **options: Any) -> Any:
    """An actor handle of a new :class:`Rank`; options as of ``ray.remote``."""
    actor = ray.remote(
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
        concurrency_groups={"heartbeat": 1, "write": 1},
    )(kind)
    return actor.options(**options).remote(rank)
