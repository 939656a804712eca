"""From stored sums to the operators of a run: candidates, the choice among them, the final fit."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ghost_dist.calibration.split import check_held_out, spread
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import Config
from ghost_dist.errors import ConfigError
from ghost_dist.evaluation.scores import Scores, window_scores
from ghost_dist.pipeline.candidates import (
    FINE_SHIFTS,
    Candidate,
    Tried,
    candidates_of,
    least,
    not_far_behind,
    searches_ridge,
    stored_kind,
    strongest_ridge,
    tries_refit,
)
from ghost_dist.pipeline.fitting import FitHere, FitJob, FitSpans, Fitted, Outcome, on_curve
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.kept_scores import KeptScores
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.texts import windows_of_folds
from ghost_dist.pipeline.walking import Walk, walk_behind
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import Detail, Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors, sums_key
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan

HELD_OUT_TOKENS = 16384
"""Tokens that a choice by KL is judged by, where there are as many."""
REFIT_ERRORS = 1.0
"""Standard errors by which fits on the recovered stream must be better to be taken."""


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

    ``fit_spans``: who fits from the store; None: this process. ``kept``: where scores outlive a
    stop; None: nowhere.
    """

    def __init__(
        self,
        inputs: RunInputs,
        spans: tuple[Span, ...],
        store: StatisticsStore,
        tokens: TokenWindows,
        reporter: Reporter,
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
        self._kept = kept
        self._walk = partial(walk_behind, inputs, tokens, reporter)

    def solve(self) -> Solved:
        """Fit what the configuration asks for, choose, and fit the choice once more.

        On all windows; but where something behind the fit is judged by held-out windows (gaps of
        half a layer, training), the last fold is left out of it all. What is said of a refit on the
        recovered stream is of fits without that fold, whose ridges it has then on all windows.
        """
        inputs, spans, config = self._inputs, self._spans, self._inputs.config.operator
        chosen, table = self._choose(candidates_of(config, spans, inputs.refittable))
        candidate, folds = chosen.candidate, tuple(range(inputs.config.folds))
        sequential = config.refit == "sequential" and len(spans) > 1
        parts = (inputs.architecture, inputs.refittable)
        tries = tries_refit(config, candidate, spans, int(self._tokens.tokens.size), *parts)
        judged = inputs.config.judges_behind_the_fit
        walk = again = refit = None
        if judged or tries or sequential:
            fitted = self._final(chosen, folds[:-1])
        if tries or sequential:
            walk = self._walk(fitted, candidate)
        if tries and walk is not None:
            refit = self._compared(fitted, walk)
            walk = walk if refit["taken"] else None
        if judged:
            folds = folds[:-1]
        else:
            fitted = self._final(chosen, folds)
            again = self._walk(fitted, candidate, walk.fits) if walk is not None else None
        operators = {span: one.repair for span, one in fitted.items()}
        fits = {span: one.fit for span, one in fitted.items()}
        for span, first in chosen.fits.items():
            if (fit := fits[span]) is not None:
                fits[span] = on_curve(fit, first)
        if walk is not None:
            operators, fits = (again or walk).operators, {**fits, **walk.fits}
        return Solved(
            candidate=candidate,
            operators=operators,
            fits=fits,
            folds=folds,
            table=table,
            refit=refit,
        )

    def _final(self, chosen: Tried, folds: tuple[int, ...]) -> dict[Span, Fitted]:
        """The chosen candidate on some folds."""
        with self._reporter.stage("solve", len(self._spans), "spans") as advance:
            around = [_around(chosen.candidate, chosen.fits.get(span)) for span in self._spans]
            pairs = list(zip(around, self._spans, strict=True))
            outcomes = self._fit_spans(self._store, self._jobs(pairs, folds), advance)
            return dict(zip(self._spans, map(_fitted, outcomes), strict=True))

    def _compared(self, fitted: Mapping[Span, Fitted], walk: Walk) -> dict[str, Any]:
        """Fits on the dense and on the recovered stream, on windows that none of them has seen."""
        judge = self._inputs.config.folds - 1
        again = {s: replace(one, repair=walk.operators[s]) for s, one in fitted.items()}
        tried = [fitted, again]
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
        picked = range(self._inputs.config.folds) if folds is None else folds
        jobs = self._jobs([(candidate, span)], picked)
        return _fitted(self._fit_spans(self._store, jobs, lambda _: None)[0])

    def _jobs(
        self,
        pairs: Sequence[tuple[Candidate, Span]],
        picked: Sequence[int],
        detail: Detail = "all",
        dtype: torch.dtype | None = None,
    ) -> list[FitJob]:
        refittable = self._inputs.refittable
        return [
            FitJob(candidate.at(span, refittable), span, tuple(picked), detail, dtype)
            for candidate, span in pairs
        ]

    def _choose(self, candidates: list[Candidate]) -> tuple[Tried, list[dict[str, Any]]]:
        """The best of several candidates, and a row for each; one alone is not looked at."""
        tried, config = list(map(Tried, candidates)), self._inputs.config.operator
        best = tried[0]
        if len(candidates) > 1:
            self._rate(tried)
            best = least(tried)
            # Around the best one the ridge is looked at more closely.
            if searches_ridge(config) and best.candidate.kind() is not None:
                shifts = [best.candidate.shift + d for d in FINE_SHIFTS]
                near = [Tried(replace(best.candidate, shift=shift)) for shift in shifts]
                self._rate(near, float(best.scores[0]))
                tried += near
                best = least(tried)
            best = strongest_ridge(tried, best) if config.choose == "kl" else best
        for one in tried:
            one.row["chosen"] = one is best
        return best, [one.row for one in tried]

    def _rate(self, tried: Sequence[Tried], than: float = math.inf) -> None:
        """Fit candidates, and score them by KL divergence on every source, or piece of one, that
        was left out of the fit, or by residual of every span.

        What is far behind on the first source, behind another or ``than``, is dropped there.
        """
        config = self._inputs.config
        if config.operator.choose != "kl":
            self._fit_all(tried, range(config.folds))
            for one in tried:
                # By definition 1 where nothing is fitted: the plain cut.
                residuals = one.row.get("residual", ())
                one.scores = torch.tensor([1.0 if r is None else r for r in residuals])
            return
        names, running = config.left_out_names, tried
        what = "compare" if math.isinf(than) else "compare ridges"
        for number, (name, judges) in enumerate(zip(names, config.left_out, strict=True)):
            dense, *scores = self._judged(running, judges, f"{what} {number + 1}/{len(names)}")
            for one, score in zip(running, scores, strict=True):
                if not number:
                    one.scores = torch.full((len(names),), math.inf)
                kl = one.scores[number] = float(score.kl.mean())
                one.row.setdefault("left_out", []).append(
                    {
                        "source": name,
                        "kl": finite(kl),
                        "perplexity": finite(score.perplexity),
                        "dense": finite(dense.perplexity),
                    }
                )
            if not number:
                running = not_far_behind(tried, than)
        for one in tried:
            if "failed" in one.row:
                del one.row["left_out"]
                continue
            one.row["kl"] = finite(float(one.scores.mean() if one in running else one.scores[0]))
            if one not in running:
                one.row["dropped"] = True

    def _judged(self, tried: Sequence[Tried], judges: Sequence[int], stage: str) -> list[Scores]:
        """Scores of the dense model and of candidates on some folds, fitted on the others."""
        others = [fold for fold in range(self._inputs.config.folds) if fold not in judges]
        judged = partial(self._scores, self._fit_all(tried, others), judges, stage)
        candidates = [one.candidate for one in tried]
        return self._kept.of(candidates, judges, judged) if self._kept else judged()

    def _fit_all(self, tried: Sequence[Tried], picked: Sequence[int]) -> list[dict[Span, Fitted]]:
        """Fits by span of every candidate, none of what cannot be fitted.

        The first ones say how good they are; on other folds their ridges are taken.
        """
        spans = self._spans
        first = not any(one.fits or "failed" in one.row for one in tried)
        pairs = [
            (one.candidate.with_ridge_of(one.fits.get(span)), span)
            for one in tried
            for span in spans
        ]
        detail: Detail = "residual" if first else "map"
        dtype = self._inputs.dtype  # in which the model that they are judged in computes
        with self._reporter.stage("try candidates", len(pairs), "fits") as advance:
            jobs = self._jobs(pairs, picked, detail, dtype)
            outcomes = iter(self._fit_spans(self._store, jobs, advance))
        found, errors = [], []
        for one in tried:
            of_span = {span: next(outcomes) for span in spans}
            fitted = {s: outcome for s, outcome in of_span.items() if isinstance(outcome, Fitted)}
            failed = [outcome for outcome in of_span.values() if isinstance(outcome, Exception)]
            found.append({} if failed else fitted)
            if failed:
                one.row["failed"] = str(failed[0])
                errors.append(failed[0])
            elif first:
                fits = [fitted[span].fit for span in spans]
                one.fits = {span: fit for span, fit in zip(spans, fits, strict=True) if fit}
                one.row["residual"] = [fit and fit.residual for fit in fits]
                one.row["relative_ridge"] = [fit and fit.relative_ridge for fit in fits]
        # The plain cut always can be had, but is no answer to a fit that fails.
        if len(errors) == sum(one.candidate.kind() is not None for one in tried) > 0:
            raise errors[0]
        return found

    def _scores(
        self,
        tried: Sequence[Mapping[Span, Fitted]],
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
        for by_span in tried:
            for span, one in by_span.items():
                check_held_out(one.folds, judges, f"A candidate at {span}")
            repairs = {span: one.repair for span, one in by_span.items()}
            variants.append(Variant(self._spans, repairs))
        inputs = self._inputs
        windows = windows_of_folds(inputs, self._tokens, judges)
        if not all_windows:
            windows = spread(windows, held_out_tokens(inputs.config) // self._tokens.window_length)
        tokens = self._tokens.tokens[windows]
        with (
            layers_of(inputs, tokens.shape, len(variants)) as layers,
            self._reporter.stage(stage, int(tokens.size), "tokens") as advance,
        ):
            return window_scores(layers, variants, tokens, batch=inputs.batch, advance=advance)


def _fitted(outcome: Outcome) -> Fitted:
    """The fit, or its error raised."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _around(chosen: Candidate, fit: Fit | None) -> Candidate:
    """The candidate, told where its fit on fewer folds found the ridge of least residual."""
    found = fit.relative_ridge if fit is not None and chosen.ridge == "auto" else None
    return replace(chosen, around=found / 10**chosen.shift) if found else chosen


def finite(value: float) -> float | None:
    """For a JSON file."""
    return value if math.isfinite(value) else None


def held_out_tokens(config: Config) -> int:
    """Tokens of a source, or a piece of one, that candidates are judged on, about."""
    calibration, times = config.calibration, len(config.left_out)
    most = max(1, HELD_OUT_TOKENS // (times * calibration.window_length))
    return min(most, calibration.windows // times) * calibration.window_length


def check_store(
    plan: StatisticsPlan, samples: Sequence[tuple[Span, Regressors]], inputs: RunInputs
) -> None:
    """Refuse statistics that lack what the operators need; says what to run again, and how."""
    for span, kind in samples:
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
