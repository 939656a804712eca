"""What a RUN folder says of its run, finished or not: everything that a report is made of."""

import contextlib
import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from ghost_dist.config_file import INSTEAD, shown_tree
from ghost_dist.errors import RunFolderError
from ghost_dist.evaluation.bootstrap import (
    FloatArray,
    interval,
    resampled_means,
    resampled_perplexities,
)
from ghost_dist.run_folder import STAGES, read_record, recover_command, stored
from ghost_dist.solver.operators import operator_of, refits_down

Pair = tuple[float, float]


class RunRecord:
    """A run as it stands on the disk; takes no lock, since files there are whole or absent.

    Figures are those of ``result.json``, which belong together; those of the stages only while
    there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, stored(path, shown_tree)
        self.events = _events(path / "events.jsonl")
        self.result = result = _json(path / "result.json")  # None while the run is not finished
        # Outputs of every stage; empty of one that is not done.
        self.stages = {stage: read_record(path, stage).get("outputs", {}) for stage in STAGES}
        selected, solved, evaluated = (self.stages[of] for of in ("select", "solve", "evaluate"))
        fits, selection = solved.get("fits", []), selected
        last = {**selected, **solved, **evaluated}
        if result is not None:
            last, fits, selection = result, result["fit"], result["selection"]
        # Removed layers (empty before they are chosen), and attentions and MLPs, such as mlp:7.
        self.spans: list[list[int]] = last.get("spans", [])
        self.sublayers: list[str] = last.get("sublayers", [])
        layers = last.get("num_layers", selected.get("num_layers"))
        self.num_layers: int | None = layers  # of the uncut model
        self.operator: str | None = last.get("operator")  # what was fitted
        self.fits: list[dict[str, Any]] = fits  # a row per span
        self.candidates: list[dict[str, Any]] = last.get("candidates", [])
        shown = ("scores", "search", "pareto")
        self.selection: dict[str, Any] = {k: selection[k] for k in shown if k in selection}
        # Corpus to variant to perplexity, and to ``kl`` and ``top1`` against the dense model.
        self.perplexity: dict[str, dict[str, float]] = last.get("perplexity", {})
        self.agreement: dict[str, dict[str, dict[str, float]]] = last.get("agreement", {})
        self.tasks: dict[str, dict[str, Any]] = last.get("tasks", {})  # task to variant to metrics
        self.samples: list[dict[str, Any]] = last.get("samples", [])  # texts, and how models go on
        self.generation: dict[str, Any] = last.get("generation", {})  # ``samples.generation``
        self.unasked: list[str] = last.get("unasked", [])  # sentences
        self.probes: dict[str, Any] = last.get("probes", {})  # ``probes.shares``

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """Last part of the model's path, or its hub id."""
        path = str(self.config["model"]["path"])
        return Path(path).name if Path(path).expanduser().exists() else path

    @property
    def removed(self) -> set[int]:
        return {layer for span in self.spans for layer in range(*span)}

    @property
    def _kind(self) -> str | None:
        """The operator, or of one that is gone another that acts in the same places."""
        return INSTEAD.get(self.operator or "", self.operator)

    @property
    def acting(self) -> bool:
        """Whether something acts at the gaps."""
        found = operator_of(self._kind)
        return found is not None and found.acts

    @property
    def refitted(self) -> list[int]:
        before = refits_down(self._kind)
        return [start - 1 for start, _ in self.spans if start > 0] if before else []

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        return {stage: record for stage, record in self.stages.items() if record}

    @property
    def seconds(self) -> float:
        return math.fsum(record["seconds"] for record in self.done.values())

    @property
    def agreement_intervals(self) -> dict[str, dict[str, dict[str, Pair | None]]]:
        """Corpus to variant to figure to its 95 % interval, where figures of windows are there."""
        record = self.stages["evaluate"]
        if record.get("agreement") != self.agreement or "agreement_per_window" not in record:
            return {}
        return {
            corpus: {
                variant: {name: interval(means) for name, means in resampled_means(found).items()}
                for variant, found in of_corpus.items()
            }
            for corpus, of_corpus in record["agreement_per_window"].items()
        }

    @cached_property
    def resampled(self) -> dict[str, dict[str, FloatArray]]:
        """Corpus to variant to perplexities on resampled windows, where nats were recorded."""
        record = self.stages["evaluate"]
        if record.get("perplexity") != self.perplexity or "nats_per_window" not in record:
            return {}
        return {
            name: resampled_perplexities(nats, record["tokens_per_window"][name])
            for name, nats in record["nats_per_window"].items()
        }

    @property
    def intervals(self) -> dict[str, dict[str, Pair | None]]:
        """Corpus to variant to the 95 % interval of its perplexity."""
        return {
            name: {variant: interval(values) for variant, values in variants.items()}
            for name, variants in self.resampled.items()
        }

    def num_windows(self, corpus: str) -> int | None:
        """Evaluated windows of a corpus, None if they were not recorded."""
        nats = self.stages["evaluate"].get("nats_per_window", {}).get(corpus)
        return None if nats is None else len(nats["dense"])

    def gap_closed(self, corpus: str) -> tuple[float, Pair | None] | None:
        """Share of what pruning cost that recovery gave back, and its interval; None: no cost."""
        value = self.perplexity[corpus]
        if value["pruned"] <= value["dense"]:
            return None
        share = (value["pruned"] - value["recovered"]) / (value["pruned"] - value["dense"])
        drawn = self.resampled.get(corpus)
        if drawn is None or ((cost := drawn["pruned"] - drawn["dense"]) <= 0).any():
            return share, None
        return share, interval((drawn["pruned"] - drawn["recovered"]) / cost)

    @property
    def r2_channels(self) -> list[tuple[list[int], list[float]]]:
        """Span and held-out R2 of every channel that varies, sorted; as the fits are of."""
        rows = self.stages["solve"].get("r2_channels", []) if self._solve_is_current else []
        return [(row["span"], sorted(r2 for r2 in row["r2"] if r2 is not None)) for row in rows]

    @property
    def operator_files(self) -> dict[str, tuple[Path, str]]:
        """Span as text to the file of its operator and its sha256, refined where it was."""
        folder, files = self.path / "operators", self.stages["solve"].get("files", {})
        if self.stages["refine"]:
            folder, files = folder / "refined", self.stages["refine"]["files"]
        if not self._solve_is_current:
            return {}
        return {
            span: (folder / f"{span.strip('[)').replace(', ', '-')}.safetensors", sha256)
            for span, sha256 in files.items()
        }

    @property
    def checkpoint_hashes(self) -> dict[str, str]:
        """File of the checkpoint that says what it is to its sha256."""
        paths = [self.path / "checkpoint" / name for name in ("config.json", "result.json")]
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
            if path.is_file()
        }

    @property
    def warnings(self) -> list[str]:
        """What was warned about while the run worked, each once."""
        found = [e["message"] for e in self.events if e.get("event") == "warning"]
        return list(dict.fromkeys(found))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """An event for each time that the run was started or continued."""
        return [event for event in self.events if event.get("event") == "run-start"]

    @property
    def stale(self) -> list[str]:
        """Stages that were done again after the result was written."""
        if self.result is None:
            return []
        stages = {
            "select": self.stages["select"].get("spans") == self.result["spans"],
            "solve": self._solve_is_current,
            "evaluate": all(
                self.stages["evaluate"].get(key, {}) == self.result.get(key, {})
                for key in ("perplexity", "tasks")
            ),
        }
        return [name for name, current in stages.items() if not current]

    @property
    def out_of_date(self) -> list[str]:
        """What is not of the newest stages, or not there yet, and the command that renews it."""
        again = recover_command(self.path)
        if self.stale:
            what = "The result is" if self.stale == ["evaluate"] else "Checkpoint and result are"
            return [f"{what} older than {', '.join(self.stale)}. To renew: {again}"]
        return [f"Not done yet: {', '.join(self.missing)}. To go on: {again}"] * bool(self.missing)

    @property
    def missing(self) -> list[str]:
        """Stages that are not done, of a run that is not finished."""
        if self.result is not None:
            return []
        wanted = [s for s in STAGES if s != "refine" or self.config["refine"]["steps"]]
        if not self.config["evaluation"]["corpora"] and not self.config["evaluation"]["tasks"]:
            wanted.remove("evaluate")
        return [stage for stage in wanted if not self.stages[stage]]

    @property
    def _solve_is_current(self) -> bool:
        return self.result is None or self.stages["solve"].get("fits") == self.result["fit"]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return {**json.loads(path.read_bytes())}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:  # the last of what is no object
        raise RunFolderError(
            f"{path} cannot be read: {error}. Run recover again; it writes what is missing."
        ) from error


def _events(path: Path) -> list[dict[str, Any]]:
    """Events; a line cut short by a kill is left out, it is the last of its session."""
    events = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]
