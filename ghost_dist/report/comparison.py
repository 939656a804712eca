"""Several runs side by side: figures, and in which fields they differ."""

from collections.abc import Sequence
from typing import Any

from ghost_dist.evaluation.bootstrap import interval
from ghost_dist.evaluation.task_rows import VARIANTS
from ghost_dist.report import text
from ghost_dist.report.figures import Bar, Bars
from ghost_dist.report.record import RunRecord
from ghost_dist.report.verdict import remarks


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What templates/comparison.html.j2 shows."""
    names = _names(runs)
    corpora = [c for c in runs[0].perplexity if all(c in run.perplexity for run in runs)]
    comparable = _same_windows(runs, corpora)
    return {
        "title": _title(runs, names, corpora if comparable else []),
        "comparable": comparable,
        "corpora": [
            (c, _bars(runs, names, c, comparable), _paired(runs, names, c) if comparable else None)
            for c in corpora
        ],
        "names": names,
        "runs": runs,
        "differences": _differences(runs),
        "remarks": [
            (name, one) for name, run in zip(names, runs, strict=True) for one in remarks(run)
        ],
    }


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Folder names, with as much of the path as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]


def _title(runs: Sequence[RunRecord], names: Sequence[str], corpora: Sequence[str]) -> str:
    """The best run of those that measured the same, else what is compared."""
    title = f"{len(runs)} runs compared"
    best = {names[_best(runs, corpus)] for corpus in corpora}
    if len(best) > 1:
        return f"{title}; none is best on every text"
    return f"{title}; {best.pop()} has the lowest perplexity" if best else title


def _best(runs: Sequence[RunRecord], corpus: str) -> int:
    return min(range(len(runs)), key=lambda i: runs[i].perplexity[corpus]["recovered"])


def _same_windows(runs: Sequence[RunRecord], corpora: Sequence[str]) -> bool:
    """Whether the dense model has the same perplexity everywhere: same model, same windows."""
    return all(
        abs(run.perplexity[c]["dense"] / runs[0].perplexity[c]["dense"] - 1) < 1e-3
        and run.num_windows(c) == runs[0].num_windows(c)
        for run in runs
        for c in corpora
    )


def _bars(runs: Sequence[RunRecord], names: Sequence[str], corpus: str, comparable: bool) -> Bars:
    rows = []
    for name, run in zip(names, runs, strict=True):
        values, intervals = run.perplexity[corpus], run.intervals.get(corpus, {})
        for variant in VARIANTS:
            common = variant == "dense" and comparable
            if not common or run is runs[0]:
                label = variant if common else f"{name}, {variant}"
                rows.append(Bar(label, variant, values[variant], intervals.get(variant)))
    return Bars(rows)


def _paired(
    runs: Sequence[RunRecord], names: Sequence[str], corpus: str
) -> tuple[str, list[tuple[str, str, str]]]:
    """The best run, and the others' recovered perplexities over its, windows drawn alike."""
    best = _best(runs, corpus)
    least, reference = runs[best].perplexity[corpus]["recovered"], runs[best].resampled.get(corpus)
    rows = []
    for name, run in zip(names, runs, strict=True):
        mine, pair = run.resampled.get(corpus), None
        if reference is not None and mine is not None:
            pair = interval(mine["recovered"] / reference["recovered"])
        between = text.DASH if pair is None else f"{pair[0]:.3f} {text.DASH} {pair[1]:.3f}"
        rows.append((name, f"{run.perplexity[corpus]['recovered'] / least:.3f}", between))
    del rows[best]
    return names[best], rows


def _differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Fields whose values are not all alike, and these."""
    fields: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for section, values in run.config.items():
            for name, value in values.items():
                fields.setdefault(f"{section}.{name}", [text.DASH] * len(runs))[number] = str(value)
    del fields["output.path"]
    return {field: values for field, values in fields.items() if len(set(values)) > 1}
