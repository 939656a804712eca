"""tokens -> select -> calibrate -> solve -> export -> evaluate, one function each.

A stage whose record names the fingerprint of its present inputs is done and is not run again; its
outputs enter the fingerprint of the next. Nothing that a later stage needs lives only in memory.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ghost_dist.calibration.split import assign_ranges, fold_of_range
from ghost_dist.calibration.windows import TokenWindows, build_windows, load_windows, save_windows
from ghost_dist.checkpoint.load import load_causal_lm, load_decoder
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.config import config_tree, fingerprint
from ghost_dist.durable import fsync_folder
from ghost_dist.engines.resident import ResidentEngine
from ghost_dist.errors import CorruptStoreError
from ghost_dist.evaluation.perplexity import perplexity
from ghost_dist.export.operator_files import Operator, load_operator, rounded, save_operator
from ghost_dist.export.rewrite import export_checkpoint
from ghost_dist.export.verify import verify_reload
from ghost_dist.pipeline.inputs import RunInputs, check_disk_space
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.ridge import fit_ghost
from ghost_dist.solver.selection import most_similar_span
from ghost_dist.spans import Span, check_spans
from ghost_dist.statistics.collect import CosineCollector, SpanCollector
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsPlan, StatisticsStore

STAGES = ("tokens", "select", "calibrate", "solve", "export", "evaluate")
FEW_TOKENS_PER_CHANNEL = 4.0
VERIFY_TOKENS = 256


@dataclass(frozen=True)
class Solution:
    """What was solved: operators (float64), how each fits, and the sha256 of each file."""

    operators: dict[Span, Operator]
    fits: list[dict[str, Any]]
    files: dict[str, str]


class Stages:
    """The stages of one run, on an opened RUN folder and checked inputs."""

    def __init__(self, inputs: RunInputs, run: RunFolder, reporter: Reporter) -> None:
        self._inputs, self._run, self._reporter = inputs, run, reporter

    def tokens(self) -> TokenWindows:
        """Calibration windows: packed once, then read back, so that a resume sees the same."""
        inputs, calibration = self._inputs, self._inputs.config.calibration
        wanted = {"calibration": calibration.model_dump(mode="json"), "model": self._model}

        def work() -> dict[str, Any]:
            needed = calibration.windows * calibration.window_length
            with self._reporter.stage("calibration text", needed, "tokens") as advance:
                done = 0

                def on_progress(tokens: int, _: int) -> None:
                    nonlocal done
                    advance(tokens - done)
                    done = tokens

                windows = build_windows(
                    calibration.source,
                    inputs.tokenizer,
                    windows=calibration.windows,
                    window_length=calibration.window_length,
                    seed=calibration.seed,
                    special_tokens=calibration.special_tokens,
                    window_bos=calibration.window_bos,
                    vocab_size=inputs.architecture.vocab_size,
                    on_progress=on_progress,
                )
                advance(needed - done)
            save_windows(self._run.tokens, windows)
            return {"fingerprint": windows.fingerprint, "num_tokens": int(windows.tokens.size)}

        recorded = self._stage("tokens", wanted, work)
        windows = load_windows(self._run.tokens)
        if windows.fingerprint != recorded["fingerprint"]:
            raise CorruptStoreError(
                f"{self._run.tokens} does not hold the tokens this run began with. Remove the RUN "
                "folder and start over."
            )
        return windows

    def select(self, tokens: TokenWindows) -> tuple[Span, ...]:
        """The spans to remove: as given, or the span of least change by per-token cosine."""
        inputs, selection = self._inputs, self._inputs.config.selection
        wanted = {
            "selection": config_tree(inputs.config)["selection"],
            "model": self._model,
            "tokens": tokens.fingerprint,
            **inputs.numerics,
        }

        def work() -> dict[str, Any]:
            if selection.spans is not None:
                spans = check_spans(selection.spans, inputs.architecture.num_layers)
                return {"spans": [[s.start, s.stop] for s in spans], "scores": None}
            assert selection.remove is not None
            collector = CosineCollector(
                inputs.architecture.num_layers, selection.remove, inputs.device
            )
            engine = self._engine(collector.boundaries[-1])
            with self._reporter.stage("select", int(tokens.tokens.size), "tokens") as advance:
                engine.run(tokens.tokens, range(tokens.num_windows), collector, advance)
            scores = collector.result()
            span = most_similar_span(scores, selection.remove)
            return {"spans": [[span.start, span.stop]], "scores": list(scores)}

        recorded = self._stage("select", wanted, work)
        return tuple(Span(start, stop) for start, stop in recorded["spans"])

    def calibrate(self, tokens: TokenWindows, spans: tuple[Span, ...]) -> StatisticsStore:
        """Moments of every range of windows, each committed once; damaged ones are run again."""
        inputs = self._inputs
        ranges = assign_ranges(tokens.num_windows, inputs.num_ranges)
        plan = StatisticsPlan(
            inputs={"model": self._model, "tokens": tokens.fingerprint, **inputs.numerics},
            hidden_size=inputs.architecture.hidden_size,
            spans=tuple((s.start, s.stop) for s in spans),
            ranges=tuple(tuple(windows) for windows in ranges),
            window_length=tokens.window_length,
        )
        store = StatisticsStore(self._run.statistics, plan)
        store.sweep()
        for range_id, reason in store.damaged().items():
            self._reporter.warn(f"{reason} It is discarded and run again.")
            store.discard(range_id)
        missing = store.missing()

        def work() -> dict[str, Any]:
            check_disk_space(inputs, self._run.path, len(spans), len(missing))
            done = sum(len(ranges[i]) for i in store.committed()) * tokens.window_length
            total = int(tokens.tokens.size)
            engine = self._engine(max(span.stop for span in spans))
            with self._reporter.stage("calibrate", total, "tokens", done) as advance:
                for range_id in missing:
                    collector = SpanCollector(spans, engine.hidden_size, engine.device)
                    engine.run(tokens.tokens, ranges[range_id], collector, advance)
                    store.commit(range_id, collector.result())
                    self._reporter.event("range-committed", range=range_id)
            return {"ranges": len(ranges), "ranges_this_time": len(missing)}

        if missing:
            self._run.forget("calibrate")
        self._stage("calibrate", {"plan": store.plan_fingerprint}, work)
        return store

    def solve(self, store: StatisticsStore) -> Solution:
        """Operators of all spans from the stored moments, and how well each fits."""
        config = self._inputs.config.operator
        spans = tuple(Span(*pair) for pair in store.plan.spans)
        wanted = {
            "plan": store.plan_fingerprint,
            "operator": config.model_dump(mode="json", exclude={"dtype"}),
        }

        def work() -> dict[str, Any]:
            if config.name == "none":
                return {"fits": [], "files": {}}
            fits, files = [], {}
            with self._reporter.stage("solve", len(spans), "spans") as advance:
                folds = self._folds(store)
                for span in spans:
                    moments = [fold[span].to(self._inputs.device) for fold in folds]
                    operator_CC, fit = fit_ghost(span, moments, config.ridge)
                    operator = Operator(operator_CC.cpu())
                    files[str(span)] = save_operator(self._run.operators, span, operator)
                    fits.append({"span": [span.start, span.stop], **asdict(fit)})
                    if fit.tokens_per_channel < FEW_TOKENS_PER_CHANNEL:
                        self._reporter.warn(
                            f"Span {span}: {fit.num_tokens} tokens for {store.plan.hidden_size} "
                            f"channels is {fit.tokens_per_channel:.1f} per channel; below 4 the "
                            "operator depends on the ridge. Raise calibration.windows."
                        )
                    advance(1)
            return {"fits": fits, "files": files}

        recorded = self._stage("solve", wanted, work)
        operators = {
            span: load_operator(self._run.operators, span, recorded["files"][str(span)])
            for span in spans
            if config.name != "none"
        }
        return Solution(operators, recorded["fits"], recorded["files"])

    def export(self, spans: tuple[Span, ...], solution: Solution) -> None:
        """Write the recovered checkpoint; a fresh process reloads it before it gets its name."""
        inputs, config = self._inputs, self._inputs.config
        operators = self._as_exported(solution)
        wanted = {
            "model": self._model,
            "spans": [[s.start, s.stop] for s in spans],
            "operators": solution.files,
            "operator_dtype": str(self._operator_dtype),
            "export": config.export.model_dump(mode="json"),
            **inputs.numerics,
        }
        unverified = self._run.path / "checkpoint.unverified"
        replaced = self._run.path / "checkpoint.replaced"

        def work() -> dict[str, Any]:
            shutil.rmtree(unverified, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
            try:
                with self._reporter.stage("export", inputs.source.nbytes, "bytes") as advance:
                    export_checkpoint(
                        inputs.source,
                        inputs.architecture,
                        spans,
                        operators,
                        unverified,
                        max_shard_bytes=config.export.max_shard_bytes,
                        extra_files={"config.yaml": self._run.path / "config.yaml"},
                        advance=advance,
                    )
                difference = self._verify(unverified, spans, operators)
                # An older checkpoint loses its name before it is removed: a kill in the middle of
                # the removal must not leave half of it under the name of a whole one.
                if self._run.checkpoint.exists():
                    self._run.checkpoint.rename(replaced)
                unverified.rename(self._run.checkpoint)
                fsync_folder(self._run.path)
            finally:
                shutil.rmtree(unverified, ignore_errors=True)
                shutil.rmtree(replaced, ignore_errors=True)
            return {"reload_max_abs_difference": difference}

        if not (self._run.checkpoint / "config.json").exists():
            self._run.forget("export")
        self._stage("export", wanted, work)

    def evaluate(self, spans: tuple[Span, ...], solution: Solution) -> dict[str, dict[str, float]]:
        """Perplexity of the dense, the pruned and the recovered model on every corpus."""
        inputs = self._inputs
        operators = self._as_exported(solution)
        wanted = {
            "model": self._model,
            "spans": [[s.start, s.stop] for s in spans],
            "operators": solution.files,
            "operator_dtype": str(self._operator_dtype),
            "corpora": {name: w.fingerprint for name, w in inputs.evaluation.items()},
            **inputs.numerics,
        }

        def work() -> dict[str, Any]:
            values: dict[str, dict[str, float]] = {name: {} for name in inputs.evaluation}
            model = self._causal_lm()
            for variant in ("dense", "pruned", "recovered"):
                if variant == "pruned":
                    remove_layers(model, inputs.architecture, spans)
                if variant == "recovered":
                    insert_operators(model, inputs.architecture, spans, operators)
                for name, windows in inputs.evaluation.items():
                    total = int(windows.tokens.size)
                    with self._reporter.stage(f"{variant} on {name}", total, "tokens") as advance:
                        result = perplexity(
                            model,
                            windows,
                            batch=inputs.batch,
                            device=inputs.device,
                            on_progress=advance,
                        )
                    values[name][variant] = result.value
            return {"perplexity": values}

        if not inputs.evaluation:
            return {}
        outputs = self._stage("evaluate", wanted, work)
        found: dict[str, dict[str, float]] = outputs["perplexity"]
        return found

    @property
    def _model(self) -> str:
        return self._inputs.model_fingerprint

    def _engine(self, num_layers: int) -> ResidentEngine:
        inputs = self._inputs
        decoder = load_decoder(
            inputs.source.path,
            inputs.architecture,
            num_layers=num_layers,
            dtype=inputs.dtype,
            device=inputs.device,
            trust_remote_code=inputs.config.model.trust_remote_code,
        )
        return ResidentEngine(decoder, inputs.batch)

    def _causal_lm(self) -> Any:
        inputs = self._inputs
        return load_causal_lm(
            inputs.source.path,
            dtype=inputs.dtype,
            device=inputs.device,
            trust_remote_code=inputs.config.model.trust_remote_code,
        )

    def _folds(self, store: StatisticsStore) -> list[dict[Span, Moments]]:
        """Moments of each fold: its ranges summed in id order."""
        folds = self._inputs.config.operator.folds
        ids = range(len(store.plan.ranges))
        return [
            store.total([i for i in ids if fold_of_range(i, folds) == fold])
            for fold in range(folds)
        ]

    @property
    def _operator_dtype(self) -> torch.dtype:
        return (
            torch.float32
            if self._inputs.config.operator.dtype == "float32"
            else self._inputs.source.dtype
        )

    def _as_exported(self, solution: Solution) -> dict[Span, Operator]:
        return {s: rounded(o, self._operator_dtype) for s, o in solution.operators.items()}

    def _verify(self, folder: Path, spans: tuple[Span, ...], operators: Any) -> float:
        """Compare logits of the exported folder, in a fresh process, with the recovered model."""
        inputs = self._inputs
        tokens = load_windows(self._run.tokens).tokens[:2, :VERIFY_TOKENS]
        model = self._causal_lm()
        remove_layers(model, inputs.architecture, spans)
        insert_operators(model, inputs.architecture, spans, operators)
        return verify_reload(folder, model, tokens, dtype=inputs.dtype, device=inputs.device)

    def _stage(
        self, name: str, wanted: dict[str, Any], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run a stage unless it is done; returns its outputs with seconds and peak bytes."""
        inputs = fingerprint(wanted)
        recorded = self._run.record(name, inputs)
        if recorded is not None:
            return recorded
        cuda = self._inputs.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._inputs.device)
        began = time.monotonic()
        outputs = work()
        outputs["seconds"] = round(time.monotonic() - began, 3)
        outputs["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        outputs["peak_device_bytes"] = (
            torch.cuda.max_memory_allocated(self._inputs.device) if cuda else 0
        )
        self._run.finish(name, inputs, outputs)
        return self._run.outputs(name)  # as a later process will read it
