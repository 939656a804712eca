"""Tasks of EleutherAI's lm-evaluation-harness on models in memory, through its own API.

``lm_eval`` (the extra ``harness``) is imported inside functions, as that takes seconds. Tasks are
opened, with their data, before a run starts; each is then run on one model at a time.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ghost_dist.errors import ConfigError, GhostDistError

PAPER = "paper"
PAPER_TASKS = (
    *("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "openbookqa"),
    *("rte", "copa", "race"),
)
"""The nine tasks of arXiv 2605.15491, all without examples; it reports the mean of their acc."""

_SUFFIXES = (".yaml", ".yml")


class HarnessError(GhostDistError):
    """A task failed while it was run."""


@dataclass(frozen=True, eq=False)
class HarnessTask:
    """An opened task, or a group of tasks that the harness reports as one."""

    name: str
    fingerprint: str  # of its configuration, its documents, and the harness's version
    num_fewshot: int | None  # examples in the prompt; None: as the task says
    limit: int | None  # documents; None: all
    loaded: list[Any]  # this and the next: the harness's own objects
    manager: Any


def open_tasks(
    names: Sequence[str], *, num_fewshot: int | None, limit: int | None
) -> tuple[HarnessTask, ...]:
    """Find every task and load its data.

    Names: of the harness, ``paper``, YAML files of tasks or folders of them (with a ``/``).
    """
    if not names:
        return ()
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.tasks needs the package lm_eval, which is not installed. In the "
            "checkout: pip install -e '.[harness]'; or leave evaluation.tasks empty."
        )
    wanted = [task for name in names for task in (PAPER_TASKS if name == PAPER else _files(name))]
    local = all(name.endswith(_SUFFIXES) for name in wanted)
    with _quiet():
        manager = _manager(local)
        tasks = [_open(manager, name, num_fewshot, limit) for name in wanted]
    for name, times in Counter(task.name for task in tasks).items():
        if times > 1:
            raise ConfigError(
                f"evaluation.tasks names the task {name} twice, and the results of the two "
                "could not be told apart. Name it once, or rename one (task: in its YAML file)."
            )
    return tuple(tasks)


def run_task(
    task: HarnessTask, model: Any, tokenizer: Any, *, batch: int
) -> dict[str, dict[str, Any]]:
    """Run a task on a causal LM, ``batch`` sequences per forward.

    Returns, by name of a row (of a group the group's, else of each task), ``metrics`` (see
    :func:`_metrics`), ``examples`` and ``shots``; numbers that are not finite are None.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            own = copy.deepcopy(tokenizer)  # it is given a padding token
            harness_model = HFLM(model, tokenizer=own, backend="causal", batch_size=batch)
            found = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=task.loaded,
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=1000,  # for the standard error of metrics that have no formula
                log_samples=False,
                task_manager=task.manager,
            )
    except Exception as error:  # tasks are programs of many authors
        raise HarnessError(
            f"Task {task.name} failed in lm_eval: {type(error).__name__}: {error}. Tasks that are "
            "done are kept. If memory ran out, give a smaller engine.batch; else leave the task "
            "out of evaluation.tasks."
        ) from error
    rows = found.get("groups") or found["results"]
    return {
        name: {
            "metrics": _metrics(figures, found["higher_is_better"].get(name) or {}),
            "examples": counted and int(counted["effective"]),
            "shots": shots if isinstance(shots := found["n-shot"].get(name), int) else None,
        }
        for name, figures in rows.items()
        for counted in [found["n-samples"].get(name)]  # None: a group, whose tasks have their own
    }


@functools.cache
def _manager(local: bool) -> Any:
    """What finds tasks; the index of the harness's own names takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not local)


def _files(name: str) -> list[str]:
    """The task files of a path; a name that is no path as it is."""
    path = Path(name).expanduser()
    if name.endswith(_SUFFIXES):
        if not path.is_file():
            raise ConfigError(f"evaluation.tasks: there is no file {name} (from {Path.cwd()}).")
        return [str(path.resolve())]
    if "/" not in name:
        return [name]
    if not path.is_dir():
        raise ConfigError(
            f"evaluation.tasks: there is no folder {name} (from {Path.cwd()}). Give a name of the "
            "harness, a YAML file of a task, or a folder of them."
        )
    # By the harness's habit, files that begin with an underscore are included by others.
    files = [f for f in sorted(path.iterdir()) if f.suffix in _SUFFIXES and f.name[0] != "_"]
    if not files:
        raise ConfigError(f"evaluation.tasks: the folder {name} holds no YAML file of a task.")
    return [str(file.resolve()) for file in files]


def _open(manager: Any, name: str, num_fewshot: int | None, limit: int | None) -> HarnessTask:
    if not name.endswith(_SUFFIXES) and name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"Did you mean {near[0]}?" if near else "lm_eval ls tasks lists its names."
        raise ConfigError(
            f"evaluation.tasks names {name!r}, which lm_eval "
            f"{importlib.metadata.version('lm_eval')} does not know. {hint} A task of your own is "
            "named by its YAML file."
        )
    try:
        found = manager.load([name])
        # A group comes with the groups inside it, and runs them; a tag is a list of tasks.
        loaded = list(found["groups"].values())[:1] or list(found["tasks"].values())
        if not loaded:
            raise ConfigError(f"evaluation.tasks: {name} names no task (task: NAME).")
        digest = _fingerprint(found["tasks"], limit)
    except ConfigError:
        raise
    except Exception as error:  # YAML, templates, the hub, the network: each has its own
        raise ConfigError(
            f"evaluation.tasks: {name} cannot be opened ({type(error).__name__}: {error}). If its "
            "data are on the hub and there is no network here, open it once where there is one "
            "and bring the cache (HF_HOME), or name a task on local files."
        ) from error
    names = list(found["groups"]) or list(found["tasks"])
    title = names[0] if len(names) == 1 or name.endswith(_SUFFIXES) else name
    return HarnessTask(title, digest, num_fewshot, limit, loaded, manager)


def _fingerprint(tasks: dict[str, Any], limit: int | None) -> str:
    """Hex sha256 of what decides a task's result besides the model."""
    digest = hashlib.sha256(importlib.metadata.version("lm_eval").encode())
    for name, task in tasks.items():
        for part in ([name, task.dump_config()], *islice(task.eval_docs, limit)):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _metrics(figures: dict[str, Any], higher: dict[str, bool | None]) -> dict[str, dict[str, Any]]:
    """Metrics of a row, whose keys are ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``."""
    found = {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        better = {True: "higher", False: "lower", None: None}[higher.get(metric)]
        stderr = figures.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = {"value": _number(value), "stderr": _number(stderr), "better": better}
    return found


def _number(value: Any) -> float | None:
    """A finite number; the harness writes ``N/A`` where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log to errors, and its bars to terminals."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        log.setLevel(level)
