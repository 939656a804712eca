"""A stage of a run is done once: told, timed, and recorded with the fingerprint of its inputs."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ghost_dist.devices import peak_bytes, reset_peak, watched_idle
from ghost_dist.durable import fingerprint
from ghost_dist.errors import CorruptStoreError
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import STAGES, RunFolder, done_words


@dataclass
class Doing:
    """A stage within its block."""

    todo: bool = True
    outputs: dict[str, Any] = field(default_factory=dict)  # of what was to be done
    found: Any = None  # behind the block: the outputs as they are recorded, or what they name


class StageRecords:
    """The records of one run's stages."""

    def __init__(self, inputs: RunInputs, run: RunFolder, reporter: Reporter) -> None:
        self._inputs, self._run, self._reporter = inputs, run, reporter
        self._seconds = 0.0  # of all stages so far
        self._told = set[str]()  # stages that were done here, or told as taken from RUN
        texts = inputs.evaluation or inputs.tasks
        wanted = {"refine": inputs.config.refine.steps, "evaluate": texts}
        self._parts = [stage for stage in STAGES if wanted.get(stage, True)]

    @contextlib.contextmanager
    def __call__(
        self,
        name: str,
        wanted: dict[str, Any],
        load: Callable[[dict[str, Any]], Any] = lambda recorded: recorded,
    ) -> Iterator[Doing]:
        """A stage within its block, which does it if that is ``todo``; then all is ``found``.

        ``wanted`` is what decides its outputs. Where ``load`` finds what an earlier process left
        damaged, it is done again. Seconds and peak bytes are recorded, too.
        """
        inputs, doing = fingerprint(wanted), Doing()
        recorded = self._run.record(name, inputs)
        if recorded is not None:
            if name not in self._told and (taken := done_words(name, recorded)):
                self._reporter.taken(taken)
            try:
                doing.found, doing.todo = load(recorded), False
            except CorruptStoreError as error:
                self._reporter.warn(f"{error} It is made again now.")
                self._run.forget(name)
        self._told.add(name)
        if not doing.todo:
            yield doing
            return
        reset_peak(self._inputs.device)
        began, within = time.monotonic(), self._seconds
        part = f"{self._parts.index(name) + 1}/{len(self._parts)} "
        with self._reporter.at(part), watched_idle(self._inputs.device) as idle:
            yield doing
            share = idle()
        seconds = time.monotonic() - began - (self._seconds - within)  # but those of stages within
        self._seconds += seconds
        outputs = {**doing.outputs, "seconds": round(seconds, 3)}
        if share is not None and not self._inputs.config.on_cluster:  # the ranks' GPUs work there
            outputs["gpu_idle"] = round(share, 3)
        outputs["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        outputs["peak_device_bytes"] = peak_bytes(self._inputs.device)
        self._run.finish(name, inputs, outputs)
        try:
            doing.found = load(self._run.outputs(name))  # as a later process will read it
        except CorruptStoreError:
            self._run.forget(name)
            raise
