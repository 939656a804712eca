"""What a reader of the figures should know before trusting them, in plain words."""

from __future__ import annotations

import math

from ghost_dist.report import text, verdict
from ghost_dist.report.record import RunRecord
from ghost_dist.solver.least_squares import FEW_TOKENS_PER_REGRESSOR

FEW_WINDOWS = 8
LARGE_CONDITION = 1e12


def remarks(run: RunRecord) -> list[str]:
    """Warnings of the run itself, then what its figures show; each a sentence or two."""
    no_better = verdict.no_better_than_cut(run.candidates, run.perplexity)
    said = verdict.sentences(no_better, run.operator)
    said += [*verdict.sources_apart(run.candidates), *run.warnings]
    if run.missing:
        said.append(
            f"The run is not finished: {text.join_words(run.missing)} still to do. The same "
            "command continues it."
        )
    if run.stale:
        said.append(
            f"{text.join_words(run.stale).capitalize()} was done again after this result was "
            "written; what follows is the older result. Run recover to bring it up to date."
        )
    return list(dict.fromkeys([*said, *_perplexities(run), *_fits(run)]))


def _perplexities(run: RunRecord) -> list[str]:
    found = []
    if run.result is not None and not run.perplexity and not run.tasks:
        found.append(
            "Perplexity was not measured, so nothing here says what the model is worth. Name a "
            "text: ghost-dist evaluate RUN --set 'evaluation.corpora={name: FILE}'."
        )
    for corpus, value in run.perplexity.items():
        windows = run.num_windows(corpus)
        if windows is None:
            found.append(f"{corpus}: nats of each window were not recorded, so no interval.")
        elif windows < FEW_WINDOWS:
            found.append(
                f"{corpus}: only {windows} evaluated window{'s' if windows > 1 else ''}; "
                + ("there is no interval." if windows == 1 else "its interval is a rough guess.")
                + " Raise evaluation.windows."
            )
        helps = value["recovered"] < value["pruned"] and run.operator != "none"
        _, between = run.gap_closed(corpus) or (0.0, None)
        if helps and between is not None and between[0] <= 0:
            found.append(
                f"{corpus}: on other windows of this text the repair might not have helped; the "
                "interval of the share of the gap closed reaches 0."
            )
        if not all(math.isfinite(v) for v in value.values()):
            found.append(f"{corpus}: a perplexity is beyond what can be written as a number.")
    return found


def _fits(run: RunRecord) -> list[str]:
    found = []
    for fit in run.fits:
        span = text.span(fit["span"])
        few = fit["tokens_per_channel"] < FEW_TOKENS_PER_REGRESSOR
        if few and not any("for each regressor" in message for message in run.warnings):
            found.append(
                f"{span}: {fit['tokens_per_channel']:.1f} calibration tokens for each regressor; "
                "below 4 the operator depends on the ridge. Raise calibration.windows."
            )
        if fit["residual"] >= 1:
            found.append(
                f"{span}: on windows it was not fitted on, the operator is no better than the "
                f"plain cut (held-out residual {fit['residual']:.3f})."
            )
        curve = sorted(fit["ridge_curve"])
        if len(curve) > 2 and min(curve, key=lambda point: point[1]) in (curve[0], curve[-1]):
            found.append(
                f"{span}: the held-out residual is least at the end of the ridges tried, so a "
                "better one may lie outside."
            )
        if fit["condition"] > LARGE_CONDITION:
            found.append(
                f"{span}: the condition number of the least squares is "
                f"{text.number(fit['condition'], 2)}; of float64's 16 digits few are left. Give a "
                "larger ridge."
            )
    return found
