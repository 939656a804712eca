"""How far the cut models are from the dense one, and what they score in tasks."""

from __future__ import annotations

from collections.abc import Callable

from ghost_dist.evaluation.task_rows import shots_and_examples, task_rows
from ghost_dist.report import text
from ghost_dist.report.markup import Html, el, section, table
from ghost_dist.report.record import RunRecord


def agreement(run: RunRecord) -> Html | None:
    """KL divergence and top-1 agreement of both cut models with the dense one."""
    if not run.agreement:
        return None
    intervals = run.agreement_intervals
    rows = []
    for corpus, of_corpus in run.agreement.items():
        for variant, figures in of_corpus.items():
            kl, top1 = text.number(figures["kl"]), text.percent(figures["top1"], 1)
            cells = [kl, top1]
            if intervals:
                pairs = intervals[corpus][variant]
                cells = [kl, _between(pairs["kl"], text.number)]
                cells += [top1, _between(pairs["top1"], lambda share: text.percent(share, 1))]
            rows.append((f"{corpus}, {variant}", *cells))
    said = (
        "KL divergence of the next-token distribution from the dense model's, in nats per token, "
        "and the share of positions where both have the same likeliest token."
    )
    titles = ["Text, model", "KL", "Same token"]
    if intervals:
        titles = ["Text, model", "KL", "95 % interval", "Same token", "95 % interval"]
    return section(
        "agreement",
        "Agreement with the dense model",
        el("p", said),
        table(titles, rows, "Agreement with the dense model"),
    )


def tasks(run: RunRecord) -> Html | None:
    """Metrics of lm-evaluation-harness for the three models."""
    if not run.tasks:
        return None
    rows = [(name, metric, *cells) for name, metric, cells in task_rows(run.tasks)]
    titles = ["Task", "Metric", "Dense", "Pruned", "Recovered"]
    about = shots_and_examples(run.tasks)
    said = f"By lm-evaluation-harness, with the standard error it gives; {about}."
    return section(
        "tasks",
        "Tasks",
        el("p", said),
        table(titles, rows, "Results of tasks", numbers=(2, 3, 4)),
    )


def _between(pair: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    return "" if pair is None else f"{shown(pair[0])} {text.DASH} {shown(pair[1])}"
