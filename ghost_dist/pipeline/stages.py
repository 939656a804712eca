"""tokens -> select -> calibrate -> solve -> refine -> export -> evaluate, one function each.

A stage whose record names the fingerprint of its present inputs is done and is not run again; its
outputs enter the fingerprint of the next. Nothing that a later stage needs lives only in memory.
"""

import contextlib
import shutil
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ghost_dist.calibration.windows import TokenWindows, load_windows, save_windows
from ghost_dist.checkpoint.architecture import check_cut, exported_sizes
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config_file import config_tree
from ghost_dist.devices import release_cached
from ghost_dist.durable import fingerprint
from ghost_dist.errors import ConfigError, CorruptStoreError
from ghost_dist.export.operator_files import Solution, load_operators, save_operators
from ghost_dist.pipeline.candidates import candidates_of, samples_of
from ghost_dist.pipeline.collecting import Collect, CollectHere, open_store, plan_of
from ghost_dist.pipeline.collectors import SpanCollectors
from ghost_dist.pipeline.evaluating import NOT_USED, Evaluation
from ghost_dist.pipeline.exporting import Export, file_sizes
from ghost_dist.pipeline.fitting import FitSpans
from ghost_dist.pipeline.gaps import close_gaps, nothing_solved
from ghost_dist.pipeline.inputs import RunInputs, check_disk_space, disk_needs, open_causal_lm
from ghost_dist.pipeline.kept_scores import KeptScores
from ghost_dist.pipeline.searching import Scorer, search_spans
from ghost_dist.pipeline.selecting import PaperScores
from ghost_dist.pipeline.solving import Solved, Solver, check_store, finite, fit_row
from ghost_dist.pipeline.stage_records import StageRecords
from ghost_dist.pipeline.texts import calibration_windows, unlike, windows_of_folds
from ghost_dist.progress import Reporter
from ghost_dist.refine.distill import Refined, distill
from ghost_dist.run_folder import RunFolder
from ghost_dist.spans import Span, Sublayer, pairs_of, parse_sublayers
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.store import remove_store
from ghost_dist.statistics.store_plan import StatisticsPlan, stored_plan


class Stages:
    """The stages of one run, on an opened RUN folder and checked inputs.

    ``again``: stage that is done again. ``collect``, ``fit_spans``, ``scorer``: who fills the
    stores, who fits from them, and who scores removals; None: this process. ``export``: who
    writes the checkpoint.
    """

    def __init__(
        self,
        inputs: RunInputs,
        run: RunFolder,
        reporter: Reporter,
        again: str | None = None,
        collect: Collect | None = None,
        fit_spans: FitSpans | None = None,
        export: Export | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        self._inputs, self._run, self._reporter, self._export = inputs, run, reporter, export
        self._again = again
        self._collect = collect or CollectHere(inputs, reporter, run.path)
        self._fit_spans, self._scorer = fit_spans, scorer
        self._store: StoreAtHand | None = None
        self._stage = StageRecords(inputs, run, reporter)
        self.cut = Variant()  # what goes; known behind select

    def tokens(self) -> TokenWindows:
        """Calibration windows: packed once, then read back, so that a resume sees the same."""
        inputs, calibration = self._inputs, self._inputs.config.calibration
        wanted = {
            "calibration": calibration.model_dump(mode="json"),
            "model": inputs.model_fingerprint,
        }

        def load(recorded: dict[str, Any]) -> TokenWindows:
            windows = load_windows(self._run.tokens)
            if windows.fingerprint != recorded["fingerprint"]:
                raise CorruptStoreError(
                    f"{self._run.tokens} does not hold the tokens that this run began with."
                )
            return windows

        with self._stage("tokens", wanted, load) as stage:
            if stage.todo:
                needed = calibration.windows * calibration.window_length
                with self._reporter.stage("calibration text", needed, "tokens") as advance:
                    windows = calibration_windows(inputs, advance)
                for said in unlike(windows, inputs.evaluation):
                    self._reporter.warn(said)
                save_windows(self._run.tokens, windows)
                num_tokens = int(windows.tokens.size)
                stage.outputs = {"fingerprint": windows.fingerprint, "num_tokens": num_tokens}
        packed: TokenWindows = stage.found
        return packed

    def select(self, tokens: TokenWindows) -> tuple[Span, ...]:
        """The spans to remove: as given, or as the criterion finds them.

        A search judges with operators if there will be any. But a run that gets others by a later
        stage keeps its layers.
        """
        inputs, path = self._inputs, self._run.path / "selection.zarr"
        wanted = {
            "selection": config_tree(inputs.config)["selection"],
            "model": inputs.model_fingerprint,
            "tokens": tokens.fingerprint,
            "folds": inputs.config.folds,
            **inputs.numerics,
        }

        with self._stage("select", wanted) as stage:
            if stage.todo:
                stage.outputs = self._selected(tokens, path)
        recorded = stage.found
        remove_store(path)  # all is in the record
        spans = tuple(Span(start, stop) for start, stop in recorded["spans"])
        self.cut = Variant(spans, sublayers=parse_sublayers(",".join(recorded["sublayers"])))
        without = {one.layer for one in self.cut.sublayers if one.part == "mlp"}
        self._inputs = replace(inputs, refittable=inputs.refittable - without)
        return spans

    def _selected(self, tokens: TokenWindows, path: Path) -> dict[str, Any]:
        inputs, selection = self._inputs, self._inputs.config.selection
        scores: dict[str, Any] = {}
        halves: tuple[Sublayer, ...] = ()
        if selection.given:
            spans, halves = selection.removal(inputs.architecture.num_layers)
        elif selection.searches:
            given = (inputs, tokens, self._run, self._reporter, self._scorer)
            spans, scores = search_spans(*given)
            release_cached(inputs.device)  # of a cluster, its ranks begin there now
        else:
            spans, scores = self.by_paper(tokens, path)
            check_cut(inputs.architecture, inputs.source.config, spans)
        return {
            "spans": pairs_of(spans),
            "sublayers": list(map(str, halves)),
            "num_layers": inputs.architecture.num_layers,
            **scores,
        }

    def by_paper(self, tokens: TokenWindows, path: Path) -> tuple[tuple[Span, ...], dict[str, Any]]:
        """The span, and the scores behind the choice, from sums in a store of their own."""
        inputs, protect = self._inputs, self._inputs.config.selection.protect
        assert inputs.amount.layers is not None
        scores = PaperScores(inputs.amount.layers, protect, inputs.architecture)
        plan = plan_of(inputs, tokens, scores, inputs.config.folds)
        store = open_store(path, plan, self._reporter, renew=True)
        self._collect(store, tokens, scores, "select")
        span, by_start = scores.decide(store)
        return (span,), {"scores": by_start}

    def statistics(self, tokens: TokenWindows, spans: tuple[Span, ...]) -> StatisticsPlan:
        """What the run's statistics count: those that are there, if they are of the same inputs.

        Sums are neither read nor made: who only looks at later stages does without them.
        """
        inputs, sums = self._inputs, self._sums(spans)
        plan = plan_of(inputs, tokens, sums)
        found = None if self._again == "calibrate" else stored_plan(self._run.statistics)
        if found is not None and replace(found, entries=plan.entries) == plan:
            renewed = (ConfigError,) if inputs.amount.others else ()  # those of another amount
            with contextlib.suppress(*renewed):
                check_store(found, sums.samples, inputs)
                return found
        return plan

    def _sums(self, spans: tuple[Span, ...]) -> SpanCollectors:
        """What the configured operators are fitted from."""
        inputs = self._inputs
        candidates = candidates_of(inputs.config.operator, spans, inputs.refittable)
        samples = samples_of(candidates, spans, inputs.refittable)
        return SpanCollectors(samples, inputs.architecture)

    def calibrate(self, tokens: TokenWindows, spans: tuple[Span, ...]) -> StoreAtHand:
        """Sums of every range of windows, each committed once; damaged ones are run again."""
        if self._store is not None:
            return self._store
        inputs, path, sums = self._inputs, self._run.statistics, self._sums(spans)
        plan = self.statistics(tokens, spans)
        renew = self._again == "calibrate" or bool(inputs.amount.others)
        store = open_store(path, plan, self._reporter, renew=renew)
        missing = store.missing() if sums.samples else ()
        if sums.samples and (there := len(plan.ranges) - len(missing)):
            self._reporter.taken(f"sums of {there} of {len(plan.ranges)} ranges")

        if missing:
            self._run.forget("calibrate")
        else:  # a kill may have come between the last commit and this
            shutil.rmtree(self._run.path / "streams-calibrate", ignore_errors=True)
        with self._stage("calibrate", {"plan": plan.fingerprint}) as stage:
            if stage.todo:
                nbytes = len(missing) * sums.stored_bytes(plan.blocks)
                of_layers = exported_sizes(inputs.source, inputs.architecture)
                cut = sum(of_layers[layer] for layer in self.cut.removed)
                kept, width = inputs.source.bytes_once_read - cut, inputs.architecture.hidden_size
                if self._again in ("calibrate", "solve"):
                    kept = 0  # nothing is exported this time
                check_disk_space(self._run.path, disk_needs(nbytes, len(spans), width, kept))
                if self._export is not None:
                    self._export.copy(self.cut)
                if sums.samples:
                    self._collect(store, tokens, sums, "calibrate", to_fit=True)
                ranges = len(plan.ranges) if sums.samples else 0  # a plain cut needs none
                stage.outputs = {"ranges": ranges, "ranges_this_time": len(missing)}
        self._store = store
        return store

    def solve(self, tokens: TokenWindows, spans: tuple[Span, ...]) -> Solution:
        """Operators of all spans from the stored sums, and how well each fits."""
        inputs, config = self._inputs, self._inputs.config.operator
        wanted = {
            "plan": self.statistics(tokens, spans).fingerprint,
            **self._removed,
            "operator": config.model_dump(mode="json", exclude={"dtype"}),
            "judges_behind_the_fit": inputs.config.judges_behind_the_fit,
            "tokens": tokens.fingerprint,
            "reduction": inputs.config.engine.reduction,
        }
        kept = KeptScores(self._run, fingerprint(wanted))

        load = partial(Solution.load, self._run.operators, self.cut)
        try:
            with self._stage("solve", wanted, load) as stage:
                if stage.todo:
                    store = self.calibrate(tokens, spans)
                    if kept.count:
                        self._reporter.taken(f"comparisons of candidates: {kept.count}")
                    solved = nothing_solved(inputs.config.folds)
                    if spans:
                        who = (self._reporter, self._fit_spans, kept)
                        solved = Solver(inputs, spans, store, tokens, *who).solve()
                    stage.outputs = self._solved(tokens, solved)
            kept.forget()
            solution: Solution = stage.found
            return solution
        finally:
            self._collect.release()  # not before: who ran the windows may fit the spans
            if self._store is not None:
                self._store.release()

    def _solved(self, tokens: TokenWindows, solved: Solved) -> dict[str, Any]:
        """Operators in their files, gaps of half a layer closed, and what is said of them."""
        folder, fits = self._run.operators, {s: fit for s, fit in solved.fits.items() if fit}
        variant = replace(self.cut, operators=solved.operators)
        return {
            "operator": solved.candidate.operator,
            "chosen": solved.candidate.described(),
            "candidates": solved.table,
            "fits": [fit_row(span, fit) for span, fit in fits.items()],
            "r2_channels": [
                {"span": [span.start, span.stop], "r2": [finite(r2) for r2 in fit.r2_channels]}
                for span, fit in fits.items()
            ],
            "folds": solved.folds,
            "files": save_operators(folder, solved.operators),
            "refit": solved.refit,
            **close_gaps(self._inputs, variant, tokens, folder, self._reporter),
        }

    def flush(self) -> None:
        """Wait until the statistics are on the disk."""
        if self._store is not None:
            self._store.flush()

    def refine(self, tokens: TokenWindows, solution: Solution) -> Solution:
        """Train the operators against the dense model, where the configuration asks for it."""
        inputs, config = self._inputs, self._inputs.config.refine
        if config.steps == 0:
            self._run.forget("refine")  # of a configuration that had steps
            return solution
        if inputs.config.operator.name == "auto" and solution.record["operator"] == "none":
            self._run.forget("refine")
            self._reporter.warn(
                "The plain cut was chosen (operator.name=auto), so there is no operator to train: "
                "refine.steps does nothing. Name an operator, such as operator.name=ghost."
            )
            return solution
        folder = self._run.operators / "refined"
        wanted = {
            "refine": config.model_dump(mode="json"),
            "operators": solution.files,
            "tokens": tokens.fingerprint,
            "spans": pairs_of(self.cut.spans),
            **inputs.numerics,
        }

        def load(recorded: dict[str, Any]) -> Solution:
            operators = load_operators(folder, self.cut.spans, recorded["files"])
            variant = replace(solution.variant, operators=operators)
            return replace(solution, variant=variant, files=[recorded["files"], solution.files[1]])

        state = self._run.path / "refine.pt"
        with self._stage("refine", wanted, load) as stage:
            if stage.todo:
                folds = solution.record["folds"]
                given = (solution.variant, tokens, folds, state, wanted, self._reporter)
                refined = train(inputs, *given)
                files = save_operators(folder, refined.operators)
                losses = [{**look, "loss": finite(look["loss"])} for look in refined.losses]
                stage.outputs = {"files": files, "losses": losses, "improved": refined.improved}
        state.unlink(missing_ok=True)
        refinement: Solution = stage.found
        return refinement

    def export(self, solution: Solution) -> None:
        """Write the recovered checkpoint; a fresh process reloads it before it gets its name.

        While it does so the recovered model is evaluated, if there are no tasks, which take long.
        """
        inputs, recovered = self._inputs, self.as_exported(solution)
        wanted = {
            "model": inputs.model_fingerprint,
            **self._removed,
            "operators": solution.files,
            "operator_dtype": str(self._operator_dtype),
            "export": inputs.config.export.model_dump(mode="json"),
            **inputs.numerics,
        }
        if file_sizes(self._run.checkpoint) != self._run.outputs("export").get("files"):
            self._run.forget("export")
        assert self._export is not None
        with self._stage("export", wanted) as stage:
            if stage.todo:
                beside = partial(self.evaluate, solution) if not inputs.tasks else None
                stage.outputs = self._export.write(recovered, beside)
        self._export.end()

    def evaluate(self, solution: Solution) -> dict[str, Any]:
        """Perplexity, agreement with the dense model and tasks of the three variants."""
        inputs = self._inputs
        dtype = str(self._operator_dtype)
        decisive = {"operators": solution.files, "operator_dtype": dtype}
        wanted = {
            "model": inputs.model_fingerprint,
            **self._removed,
            **decisive,
            "corpora": {name: w.fingerprint for name, w in inputs.evaluation.items()},
            "tasks": [[t.name, t.fingerprint, t.num_fewshot, t.limit] for t in inputs.tasks],
            **inputs.numerics,
        }
        if not inputs.evaluation and not inputs.tasks:
            return {"perplexity": {}, "agreement": {}, **NOT_USED}
        given = (inputs, self._run, self._reporter, self.as_exported(solution), decisive)
        with self._stage("evaluate", wanted) as stage:
            if stage.todo:
                stage.outputs = Evaluation(*given).measure()
        measured: dict[str, Any] = stage.found
        return measured

    def as_exported(self, solution: Solution) -> Variant:
        """The recovered model in the dtypes of the checkpoint."""
        return solution.variant.stored(self._inputs.source.dtype, self._operator_dtype)

    @property
    def _removed(self) -> dict[str, Any]:
        """What goes, in what is wanted of a stage."""
        cut = self.cut
        return {"spans": pairs_of(cut.spans), "sublayers": list(map(str, cut.sublayers))}

    @property
    def _operator_dtype(self) -> torch.dtype:
        wide = self._inputs.config.operator.dtype == "float32"
        return torch.float32 if wide else self._inputs.source.dtype


def train(
    inputs: RunInputs,
    recovered: Variant,
    tokens: TokenWindows,
    folds: Collection[int],
    state: Path,
    identity: dict[str, Any],
    reporter: Reporter,
) -> Refined:
    """Train the operators of a variant on some folds; the last one says what is best."""
    return distill(
        open_causal_lm(inputs),
        inputs.architecture,
        recovered,
        tokens.tokens,
        windows_of_folds(inputs, tokens, folds),
        windows_of_folds(inputs, tokens, [inputs.config.folds - 1]),
        inputs.config.refine,
        batch=inputs.batch,
        state=state,
        fingerprint=fingerprint(identity),
        reporter=reporter,
    )
