"""One stage of a run done again, on what its RUN folder already holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghost_dist.config import Config
from ghost_dist.config_file import config_from_tree, config_tree, config_yaml, parse_set, set_field
from ghost_dist.durable import write_bytes
from ghost_dist.errors import ConfigError, GhostDistError
from ghost_dist.pipeline.inputs import with_absolute_paths
from ghost_dist.pipeline.recover import Stage, recover
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder

OPEN_FIELDS: dict[Stage, tuple[str, ...]] = {
    "select": ("selection",),
    "calibrate": ("operator", "refine"),
    "solve": ("operator", "refine"),
    "export": ("operator.dtype", "export"),
    "evaluate": ("evaluation",),
}
"""What may be changed with a stage: fields that no earlier stage depends on."""


def run_stage_again(
    path: Path,
    stage: Stage,
    assignments: Sequence[str],
    reporter: Reporter | None = None,
    run: Callable[..., dict[str, Any]] = recover,
) -> dict[str, Any]:
    """Do a stage again, with changes to the fields in :data:`OPEN_FIELDS`.

    Earlier stages are only run where they are missing. The changed configuration becomes the
    run's own, so ``recover`` afterwards redoes what depends on it and nothing else. ``run`` is what
    does it: :func:`recover`, or the same on a cluster.
    """
    stored = RunFolder.stored_config(path)
    config = _changed(stored, stage, assignments)
    if config == stored:
        return run(config, reporter, again=stage)
    _store(path, stored, config)
    try:
        return run(config, reporter, again=stage)
    except GhostDistError:
        _store(path, config, stored)  # what cannot be done does not stay in the run
        raise


def _store(path: Path, old: Config, new: Config) -> None:
    with RunFolder(old):  # nobody else works on it while its configuration is replaced
        write_bytes(path / "config.yaml", config_yaml(new))


def _changed(stored: Config, stage: Stage, assignments: Sequence[str]) -> Config:
    tree, keys = config_tree(stored), []
    for assignment in assignments:
        key, value = parse_set(assignment)
        set_field(tree, key, value)
        keys.append(key)
    config = with_absolute_paths(config_from_tree(tree))
    for key in keys:
        if not any(f"{key}.".startswith(f"{field}.") for field in OPEN_FIELDS[stage]):
            allowed = ", ".join(f"{field}.*" for field in OPEN_FIELDS[stage])
            raise ConfigError(
                f"--set {key} cannot be changed with {stage}: earlier stages depend on it "
                f"({allowed} can). Start another RUN with recover."
            )
    return config
