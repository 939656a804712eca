"""From stored sums to the operators of a run: candidates, the choice among them, the final fit."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghost_dist.calibration.split import check_held_out, fold_of_range, spread
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import Config
from ghost_dist.errors import ConfigError, SingularGramError
from ghost_dist.evaluation.scores import Scores, window_scores
from ghost_dist.pipeline.candidates import (
    FINE_SHIFTS,
    Candidate,
    candidates_of,
    least,
    not_far_behind,
    samples_of,
    searches_ridge,
    stored_kind,
    strongest_ridge,
    tries_refit,
)
from ghost_dist.pipeline.fitting import FitHere, FitJob, FitSpans, Fitted, Outcome, on_curve
from ghost_dist.pipeline.inputs import RunInputs, open_causal_lm
from ghost_dist.pipeline.kept_scores import KeptScores
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.refitting import walk_behind
from ghost_dist.pipeline.walking import Walk
from ghost_dist.progress import Reporter
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.down_proj import SingularOperatorError
from ghost_dist.solver.least_squares import Detail, Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import sums_key
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan

HELD_OUT_TOKENS = 16384
"""Tokens that a choice by KL is judged by, where there are as many."""
REFIT_ERRORS = 1.0
"""Standard errors by which fits on the recovered stream must be better to be taken."""

_OfCandidate = dict[Span, Fitted] | SingularGramError | SingularOperatorError
"""What a candidate became at every span, or why it cannot be fitted."""


@dataclass(frozen=True)
class Solved:
    """Operators of all spans and how they were found."""

    candidate: Candidate
    operators: dict[Span, Repair]
    fits: dict[Span, Fit | None]  # None where nothing is fitted
    folds: tuple[int, ...]  # that any of these was fitted on
    table: list[dict[str, Any]]  # every candidate: residual per span, KL, whether it was chosen
    refit: dict[str, Any] | None = None  # fits on the recovered stream against those on the dense


class Solver:
    """Fits candidates of one run from its store, which holds what the configured operators need.

    ``model``: the uncut causal LM on the run's device, if it is loaded already. ``fit_spans``: who
    fits from the store; None: this process. ``kept``: where scores outlive a stop; None: nowhere.
    """

    def __init__(
        self,
        inputs: RunInputs,
        spans: tuple[Span, ...],
        store: StatisticsStore,
        tokens: TokenWindows,
        reporter: Reporter,
        model: Any = None,
        fit_spans: FitSpans | None = None,
        kept: KeptScores | None = None,
    ) -> None:
        self._inputs, self._spans, self._store = inputs, spans, store
        self._tokens, self._reporter = tokens, reporter
        self._fit_spans = fit_spans or FitHere(
            inputs.source,
            inputs.architecture,
            inputs.config.folds,
            inputs.fit_device,
            inputs.fit_room,
            inputs.loaded.clear,
        )
        self._model, self._kept = model, kept

    def solve(self) -> Solved:
        """Fit what the configuration asks for, choose, and fit the choice once more.

        On all windows; but where something behind the fit is judged by held-out windows (gaps of
        half a layer, training), the last fold is left out of it all. What is said of a refit on the
        recovered stream is of fits without that fold, whose ridges it has then on all windows.
        """
        inputs, spans = self._inputs, self._spans
        config = inputs.config.operator
        candidates = candidates_of(config, spans, inputs.refittable)
        chosen, table, seen = self._choose(candidates)
        folds = tuple(range(inputs.config.folds))
        sequential, refit, first = config.refit == "sequential" and len(spans) > 1, None, None
        parts = (inputs.architecture, inputs.refittable)
        if tries_refit(config, chosen, spans, int(self._tokens.tokens.size), *parts):
            fitted = self._final(chosen, seen, folds[:-1])
            first = self._walk(fitted, chosen)
            refit = self._compared(fitted, first)
            sequential = refit["taken"]
        judged = inputs.config.judges_behind_the_fit
        if judged:
            folds = folds[:-1]
        elif sequential and first is None:
            fitted = self._final(chosen, seen, folds[:-1])
            first = self._walk(fitted, chosen)
        fitted, walk = self._final(chosen, seen, folds), None
        if sequential:
            known = first.fits if first is not None and not judged else None
            walk = self._walk(fitted, chosen, known)
        operators = {span: one.repair for span, one in fitted.items()}
        fits = {span: one.fit for span, one in fitted.items()}
        fits |= {
            span: on_curve(fit, seen[span]) for span, fit in fits.items() if fit and span in seen
        }
        if walk is not None:
            operators, fits = walk.operators, {**fits, **(first or walk).fits}
        return Solved(
            candidate=chosen,
            operators=operators,
            fits=fits,
            folds=folds,
            table=table,
            refit=refit,
        )

    def _final(
        self, chosen: Candidate, seen: Mapping[Span, Fit], folds: tuple[int, ...]
    ) -> dict[Span, Fitted]:
        """The chosen candidate on some folds."""
        with self._reporter.stage("solve", len(self._spans), "spans") as advance:
            pairs = [(_around(chosen, seen.get(span)), span) for span in self._spans]
            outcomes = self._from_store(pairs, folds, advance)
            return dict(zip(self._spans, map(_fitted, outcomes), strict=True))

    def _walk(
        self,
        fitted: Mapping[Span, Fitted],
        chosen: Candidate,
        known: Mapping[Span, Fit | None] | None = None,
    ) -> Walk:
        model = None if self._inputs.streaming else self._causal_lm()
        folds = [fold for _, fold in sorted((w, fold) for fold, w in self.windows_by_fold())]
        tokens = self._tokens.tokens
        return walk_behind(
            self._inputs, tokens, folds, model, self._reporter, fitted, chosen, known
        )

    def _compared(self, fitted: Mapping[Span, Fitted], walk: Walk) -> dict[str, Any]:
        """Fits on the dense and on the recovered stream, on windows that none of them has seen."""
        judge = self._inputs.config.folds - 1
        again = {s: replace(one, repair=walk.operators[s]) for s, one in fitted.items()}
        tried = [dict(fitted), again]
        _, parallel, sequential = self._scores(tried, [judge], "compare refit", all_windows=True)
        gains = parallel.kl - sequential.kl
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        found = {
            "kl_parallel": finite(float(parallel.kl.mean())),
            "kl_sequential": finite(float(sequential.kl.mean())),
            "standard_error": finite(float(error)),
            "taken": bool(gains.mean() > REFIT_ERRORS * error),
        }
        self._reporter.say(
            f"refit on the recovered stream: KL of the candidates {sequential.kl.mean():.4f}, "
            f"without {parallel.kl.mean():.4f} (nats, on calibration text left out of the fit)"
        )
        return found

    def fit(self, candidate: Candidate, span: Span, folds: Sequence[int] | None = None) -> Fitted:
        """One candidate at one span, on the given folds or on all."""
        picked = tuple(range(self._inputs.config.folds) if folds is None else folds)
        return _fitted(self._from_store([(candidate, span)], picked, lambda _: None)[0])

    def _from_store(
        self,
        pairs: Sequence[tuple[Candidate, Span]],
        picked: tuple[int, ...],
        advance: Callable[[int], None],
        detail: Detail = "all",
        dtype: torch.dtype | None = None,
    ) -> list[Outcome]:
        refittable = self._inputs.refittable
        jobs = [
            FitJob(candidate.at(span, refittable), span, picked, detail, dtype)
            for candidate, span in pairs
        ]
        return self._fit_spans(self._store, jobs, advance)

    def _choose(
        self, candidates: list[Candidate]
    ) -> tuple[Candidate, list[dict[str, Any]], dict[Span, Fit]]:
        """The best of several candidates, a row for each, and the fits by which the best one was
        chosen; one alone is not looked at."""
        if len(candidates) == 1:
            return candidates[0], [{**candidates[0].described(), "chosen": True}], {}
        tried, config = list(candidates), self._inputs.config.operator
        table, scores, found = self._rate(tried)
        best = least(table, scores)
        # Around the best one the ridge is looked at more closely.
        if searches_ridge(config) and tried[best].kind() is not None:
            near = [replace(tried[best], shift=tried[best].shift + d) for d in FINE_SHIFTS]
            rows, more, fine = self._rate(near, float(scores[best][0]))
            tried, table = [*tried, *near], [*table, *rows]
            scores, found = [*scores, *more], [*found, *fine]
            best = least(table, scores)
        best = strongest_ridge(tried, table, scores, best) if config.choose == "kl" else best
        for number, row in enumerate(table):
            row["chosen"] = number == best
        of_best = found[best]
        assert not isinstance(of_best, Exception), "what failed is never the best"
        return tried[best], table, {s: one.fit for s, one in of_best.items() if one.fit is not None}

    def _rate(
        self, candidates: Sequence[Candidate], than: float = math.inf
    ) -> tuple[list[dict[str, Any]], list[Tensor], list[_OfCandidate]]:
        """A row for each candidate, what it is ranked by, KL divergence on every source, or piece
        of one, that was left out of the fit, or residual of every span, and its first fits.

        What is far behind on the first source, behind another or ``than``, is dropped there.
        """
        config = self._inputs.config
        everything = tuple(range(config.folds))
        if config.operator.choose != "kl":
            found = self._fit_all(candidates, everything)
            rows = self._rows(candidates, found)
            residuals = [
                # By definition 1 where nothing is fitted: the plain cut.
                torch.tensor([1.0 if r is None else r for r in row.get("residual", ())])
                for row in rows
            ]
            return rows, residuals, found
        names, first = config.left_out_names, list[_OfCandidate]()
        rows, scores = list[dict[str, Any]](), list[Tensor]()
        running = list(range(len(candidates)))
        for number, (name, judges) in enumerate(zip(names, config.left_out, strict=True)):
            others = tuple(fold for fold in everything if fold not in judges)
            tried = [candidates[i] for i in running]
            found = self._fit_all(tried, others, [first[i] for i in running] if first else None)
            what = "compare" if math.isinf(than) else "compare ridges"
            piece = f"{what} {number + 1}/{len(names)}"
            judged = partial(self._scores, found, judges, piece)
            dense, *of_tried = self._kept.of(tried, judges, judged) if self._kept else judged()
            found = [_without_repairs(one) for one in found]
            new = self._rows(tried, found)
            if not number:
                first, rows = found, [{**row, "left_out": []} for row in new]
                scores = [torch.full((len(names),), math.inf) for _ in rows]
            for i, row, one in zip(running, new, of_tried, strict=True):
                if "failed" in row:
                    rows[i]["failed"] = row["failed"]
                scores[i][number] = float(one.kl.mean())
                rows[i]["left_out"].append(
                    {
                        "source": name,
                        "kl": finite(float(one.kl.mean())),
                        "perplexity": finite(one.perplexity),
                        "dense": finite(dense.perplexity),
                    }
                )
            if not number:
                running = not_far_behind(candidates, scores, than)
        for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
            if "failed" in row:
                del row["left_out"]
                continue
            row["kl"] = finite(float(score.mean() if i in running else score[0]))
            if i not in running:
                row["dropped"] = True
        return rows, scores, first

    def _fit_all(
        self,
        candidates: Sequence[Candidate],
        picked: tuple[int, ...],
        first: Sequence[_OfCandidate] | None = None,
    ) -> list[_OfCandidate]:
        """Fits of every candidate by span, or why it cannot be fitted.

        ``first``: the same on other folds, whose ridges are taken.
        """
        pairs = [
            (_with_ridge_of(candidate, like, span), span)
            for candidate, like in zip(candidates, first or [{}] * len(candidates), strict=True)
            for span in self._spans
        ]
        # Nothing is said of fits on other folds again: their ridges are those of the first.
        detail: Detail = "residual" if first is None else "map"
        dtype = self._inputs.dtype  # in which the model that they are judged in computes
        with self._reporter.stage("try candidates", len(pairs), "fits") as advance:
            outcomes = iter(self._from_store(pairs, picked, advance, detail, dtype))
        fitted: list[_OfCandidate] = []
        for _ in candidates:
            of_span = [next(outcomes) for _ in self._spans]
            failed = [one for one in of_span if isinstance(one, Exception)]
            done = [one for one in of_span if isinstance(one, Fitted)]
            fitted.append(failed[0] if failed else dict(zip(self._spans, done, strict=True)))
        # The plain cut always can be had, but is no answer to a fit that fails.
        errors = [one for one in fitted if isinstance(one, Exception)]
        if len(errors) == sum(candidate.kind() is not None for candidate in candidates) > 0:
            raise errors[0]
        return fitted

    def _rows(
        self, candidates: Sequence[Candidate], fitted: Sequence[_OfCandidate]
    ) -> list[dict[str, Any]]:
        """A row of every candidate."""
        table: list[dict[str, Any]] = []
        for candidate, found in zip(candidates, fitted, strict=True):
            row = candidate.described()
            if isinstance(found, Exception):
                row["failed"] = str(found)
            else:
                fits = [found[span].fit for span in self._spans]
                row["residual"] = [None if fit is None else fit.residual for fit in fits]
                row["relative_ridge"] = [
                    None if fit is None else fit.relative_ridge for fit in fits
                ]
            table.append(row)
        return table

    def _scores(
        self,
        tried: Sequence[_OfCandidate],
        judges: Sequence[int],
        stage: str = "compare",
        *,
        all_windows: bool = False,
    ) -> list[Scores]:
        """Scores of the dense model and of each candidate on windows of some folds, some or all.

        Those that could not be fitted are the plain cut.

        Raises
        ------
        NotHeldOutError
            If one of them was fitted on one of these.
        """
        variants = [Variant()]
        for found in tried:
            by_span = {} if isinstance(found, Exception) else found
            for span, one in by_span.items():
                check_held_out(one.folds, judges, f"A candidate at {span}")
            repairs = {span: one.repair for span, one in by_span.items()}
            variants.append(Variant(self._spans, repairs))
        inputs = self._inputs
        windows = sorted(window for fold, window in self.windows_by_fold() if fold in judges)
        if not all_windows:
            windows = spread(windows, held_out_tokens(inputs.config) // self._tokens.window_length)
        tokens = self._tokens.tokens[windows]
        model = None if inputs.streaming else self._causal_lm()
        with (
            layers_of(inputs, tokens.shape, len(variants), model=model) as layers,
            self._reporter.stage(stage, int(tokens.size), "tokens") as advance,
        ):
            return window_scores(layers, variants, tokens, batch=inputs.batch, advance=advance)

    def _causal_lm(self) -> Any:
        """The uncut model, loaded only if something must run."""
        return self._model or open_causal_lm(self._inputs)

    def windows_by_fold(self) -> list[tuple[int, int]]:
        """(fold, window) of every calibration window."""
        folds = self._inputs.config.folds
        return [
            (fold_of_range(range_id, folds), window)
            for range_id, windows in enumerate(self._store.plan.ranges)
            for window in windows
        ]


def _fitted(outcome: Outcome) -> Fitted:
    """The fit, or its error raised."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _around(chosen: Candidate, fit: Fit | None) -> Candidate:
    """The candidate, told where its fit on fewer folds found the ridge of least residual."""
    found = fit.relative_ridge if fit is not None and chosen.ridge == "auto" else None
    return replace(chosen, around=found / 10**chosen.shift) if found else chosen


def _with_ridge_of(candidate: Candidate, like: _OfCandidate, span: Span) -> Candidate:
    """A candidate whose ridge at a span is known."""
    fit = None if isinstance(like, Exception) or span not in like else like[span].fit
    if fit is None or candidate.ridge != "auto":
        return candidate
    return replace(candidate, ridge=RelativeRidge(relative=fit.relative_ridge), shift=0.0)


def _without_repairs(found: _OfCandidate) -> _OfCandidate:
    """Fits alone, whose memory is nothing."""
    if isinstance(found, Exception):
        return found
    return {span: replace(one, repair=Repair()) for span, one in found.items()}


def finite(value: float) -> float | None:
    """For a JSON file."""
    return value if math.isfinite(value) else None


def held_out_tokens(config: Config) -> int:
    """Tokens of a source, or a piece of one, that candidates are judged on, about."""
    calibration, times = config.calibration, len(config.left_out)
    most = max(1, HELD_OUT_TOKENS // (times * calibration.window_length))
    return min(most, calibration.windows // times) * calibration.window_length


def check_store(
    plan: StatisticsPlan,
    candidates: Sequence[Candidate],
    spans: Sequence[Span],
    inputs: RunInputs,
) -> None:
    """Refuse statistics that lack what the operators need; says what to run again, and how."""
    for span, kind in samples_of(candidates, spans, inputs.refittable):
        if stored_kind(kind, span, plan.entries) is None:
            have = ", ".join(plan.entries) or "nothing"
            config = inputs.config
            raise ConfigError(
                f"The statistics of this run lack {sums_key(span, kind)}, which "
                f"operator.name={config.operator.name} needs (they have: {have}). Take them "
                f"with: ghost-dist calibrate {shlex.quote(config.output.path)} --set "
                f"operator.name={config.operator.name}"
            )


def fit_row(span: Span, fit: Fit) -> dict[str, Any]:
    """One span's fit as plain values, without those of every channel."""
    row = {"span": [span.start, span.stop], **asdict(fit)}
    del row["r2_channels"]
    return row
