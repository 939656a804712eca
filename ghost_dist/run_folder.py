"""The RUN folder: who may use it, for which configuration, and which stages are done.

A stage is done when its record (``stages/*.json``) names the fingerprint of its inputs; records are
written last, so a stage killed half way is simply run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ghost_dist.config import Config
from ghost_dist.config_file import (
    AMOUNTS,
    MAY_DIFFER,
    config_tree,
    config_yaml,
    differing_fields,
    load_config,
)
from ghost_dist.durable import create_bytes, read_sealed, sweep_partial, write_bytes, write_sealed
from ghost_dist.errors import ConfigError, RunFolderError, RunMismatchError

Read = TypeVar("Read")
STAGES = ("tokens", "select", "calibrate", "solve", "refine", "export", "evaluate")
_FIRST = {".lock", "events.jsonl", "operators", "stages"}  # before the inputs have been checked


class RunFolder:
    """A RUN folder of a configuration, held by this process; a context that keeps others out."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.output.path).expanduser()
        self.tokens = self.path / "tokens.safetensors"
        self.statistics = self.path / "statistics.zarr"
        self.operators = self.path / "operators"
        self.checkpoint = self.path / "checkpoint"
        self.events = self.path / "events.jsonl"
        self.result = self.path / "result.json"
        self._stages = self.path / "stages"
        self._lock: int | None = None
        self._fresh, self._made = False, list[Path]()  # empty before, and folders made for it

    @staticmethod
    def stored_config(path: Path) -> Config:
        return stored(path, load_config)

    def __enter__(self) -> RunFolder:
        try:
            self._take()
            self.operators.mkdir(exist_ok=True)
            self._stages.mkdir(exist_ok=True)
            self._check_config()
            for folder in (self.path, self._stages, self.operators, self.operators / "refined"):
                sweep_partial(folder)
        except BaseException as error:
            self.__exit__()
            if not isinstance(error, OSError):
                raise
            raise RunFolderError(
                f"The output folder {self.path} cannot be used: {error.strerror or error}. Mend "
                "that and run the same command again, or choose another folder with --out."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        try:
            if self._fresh:
                self._clear()
        finally:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        """Leave nothing of a run that was refused before any work; what others put there stays."""
        if {path.name for path in self.path.iterdir()} - _FIRST:
            return
        for folder in (self.operators, self._stages):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.events, self.path / ".lock"):
            file.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self) -> None:
        """Bind the folder to this configuration, once the inputs have been checked.

        Before that a mistake can be corrected under the same ``--out``.
        """
        path = self.path / "config.yaml"
        if not create_bytes(path, config_yaml(self.config)):
            stored = self.stored_config(self.path)
            # What may change from one call to the next, and is read back by other commands.
            sections = ("evaluation", "selection", "output")
            update = {name: getattr(self.config, name) for name in sections}
            if (changed := stored.model_copy(update=update)) != stored:
                write_bytes(path, config_yaml(changed))

    def record(self, stage: str, inputs: str) -> dict[str, Any] | None:
        """Outputs recorded for a stage with these inputs (a fingerprint), None if not done."""
        record = read_record(self.path, stage)
        return record["outputs"] if record.get("inputs") == inputs else None

    def outputs(self, stage: str) -> dict[str, Any]:
        """Outputs recorded for a stage whatever its inputs; empty if it never finished."""
        return read_record(self.path, stage).get("outputs") or {}

    def finish(self, stage: str, inputs: str, outputs: Mapping[str, Any]) -> None:
        """Record that a stage is done; its output files must be on the disk already."""
        write_sealed(self._stages / f"{stage}.json", {"inputs": inputs, "outputs": dict(outputs)})

    def forget(self, stage: str) -> None:
        (self._stages / f"{stage}.json").unlink(missing_ok=True)

    def _take(self) -> None:
        fresh = not self.path.exists() or not any(self.path.iterdir())
        ours = (self.path / ".lock").exists() or (self.path / "config.yaml").exists()
        if not fresh and not ours:
            raise RunFolderError(
                f"The output folder {self.path} is not empty and is no RUN folder of ghost_dist. "
                "Nothing was changed; choose another one with --out."
            )
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (self.path / ".lock").read_text().strip() or "unknown"
            raise RunFolderError(
                f"Another process ({holder}) works on {self.path}. Wait for it, or stop it; its "
                "finished work is kept either way."
            ) from None
        self._fresh, self._made = fresh, made
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode())

    def _check_config(self) -> None:
        if not (self.path / "config.yaml").exists():
            return
        stored = config_tree(self.stored_config(self.path))
        differing = differing_fields(stored, config_tree(self.config))
        may = (*MAY_DIFFER, *(AMOUNTS if self.config.selection.pareto else ()))
        differing = [line for line in differing if not line.startswith(may)]
        if differing:
            raise RunMismatchError(
                f"{self.path} holds a run of another configuration:\n  "
                + "\n  ".join(differing)
                + "\nUse another --out for this configuration, or the same one to continue."
            )


def recover_command(run: Path) -> str:
    """What continues or renews the run in a folder."""
    return f"ghost-dist recover {shlex.quote(str(run / 'config.yaml'))}"


def stored(path: Path, read: Callable[[Path, Mapping[str, Any]], Read]) -> Read:
    """The configuration of the RUN folder, as ``read`` gives it of a file and overrides."""
    file = path / "config.yaml"
    if not file.is_file():
        raise RunFolderError(f"{path} is not a RUN folder: there is no {file}.")
    try:
        return read(file, {"output.path": str(path)})  # the folder may have been moved
    except ConfigError as error:
        raise RunFolderError(
            f"The configuration of the run in {path} is damaged, or of another version of "
            f"ghost_dist: {error}\nMend {file}; or remove it and run recover with the whole "
            f"configuration and --out {shlex.quote(str(path))}, which keeps what is finished."
        ) from error


def read_record(path: Path, stage: str) -> dict[str, Any]:
    """``inputs`` and ``outputs`` of a stage; empty if it never finished, or is damaged."""
    return read_sealed(path / "stages" / f"{stage}.json") or {}


def done_words(stage: str, outputs: Mapping[str, Any]) -> str | None:
    """A stage that was done before, in words; None: nothing was computed in it, or it says so."""
    searched = outputs.get("search")
    select = searched and f"search ({searched['evaluations']:,} evaluations)"
    return {
        "tokens": "calibration text",
        "select": select or (outputs.get("scores") and "scores of layers"),
        "solve": "operators",
        "refine": "trained operators",
        "export": "checkpoint",
        "evaluate": "evaluation",
    }.get(stage)
