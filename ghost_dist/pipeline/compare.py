"""Selections and operators side by side on one model: one table from one set of statistics.

All spans that the selections find take their sums in one pass over the calibration windows, and one
model in memory is evaluated with every repair in turn. Rows are
written as they are done, so a stopped comparison continues, and one that asks for more only does
what is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rich.console import Console

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import layer_sizes
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import Config, Criterion, OperatorConfig, OperatorName
from ghost_dist.durable import fingerprint, write_bytes, write_json
from ghost_dist.errors import ConfigError, SingularGramError
from ghost_dist.evaluation.bootstrap import interval, resampled_perplexities
from ghost_dist.evaluation.scores import corpus_scores
from ghost_dist.pipeline.candidates import candidates_of, samples_of
from ghost_dist.pipeline.collecting import CollectHere, open_store, plan_of
from ghost_dist.pipeline.collectors import SpanCollectors
from ghost_dist.pipeline.engine import with_engine
from ghost_dist.pipeline.inputs import RunInputs, open_inputs, with_absolute_paths
from ghost_dist.pipeline.offloading import evaluation_shape, layers_of
from ghost_dist.pipeline.searching import search_spans
from ghost_dist.pipeline.solving import Solved, Solver
from ghost_dist.pipeline.stages import Stages, train
from ghost_dist.pipeline.targets import Amount, check_remove
from ghost_dist.progress import Reporter
from ghost_dist.report.page import write_comparison
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.down_proj import SingularOperatorError
from ghost_dist.solver.operators import OPERATORS
from ghost_dist.spans import Span, pairs_of
from ghost_dist.statistics.span_sums import Regressors
from ghost_dist.statistics.store import StatisticsStore

Row = Literal["default", "refine", "ghost+norm"] | OperatorName
"""``default``: as configured; ``refine``: the same followed by training."""

Selection = Criterion | Literal["search-unrepaired"]
"""``search-unrepaired``: a search that judges plain cuts, as EvoPress does."""

SELECTIONS: tuple[Selection, ...] = (*get_args(Criterion), "search-unrepaired")
TRAINING_FREE: tuple[Row, ...] = (*OPERATORS, "ghost+norm", "default")
ROWS: tuple[Row, ...] = (*TRAINING_FREE, "refine")
DEFAULT_REFINE_STEPS = 300


@dataclass(frozen=True)
class _Cut:
    selection: str
    remove: int
    spans: tuple[Span, ...]


def compare(
    config: Config,
    removes: Sequence[int],
    rows: Sequence[Row],
    selections: Sequence[Selection],
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Fill and write ``OUT/compare.json``, ``.md`` and ``.html``; returns what the first holds.

    ``config`` is what all rows share; criterion, number of layers, operator and features come from
    ``selections``, ``removes`` and ``rows``. ``dense`` is perplexity by corpus; each of ``rows``
    has ``selection``, ``remove``, ``spans``, ``operator``, ``perplexity``, ``intervals``, ``kl``,
    ``residual``, ``parameters``, ``added_flops``. ``intervals`` are by corpus: what 95 % of
    resampled evaluation windows give for the perplexity, and for its ratio to the least of all
    rows with as many layers removed. What is finished is kept if another row fails.
    """
    if config.on_cluster:
        raise ConfigError(
            "compare runs in one process: leave engine.tensor_parallel and engine.replicas at 1 "
            "and cluster.address unset."
        )
    if "refine" in rows and config.engine.kind == "streaming":
        raise ConfigError(
            "engine.kind=streaming: the row refine trains operators on a model that is held whole. "
            "Leave it out, or set engine.kind=resident on a machine that can."
        )
    config, reporter = with_absolute_paths(config), reporter or Reporter()
    with RunFolder(config) as run:
        reporter = Reporter(run.events, reporter.console)
        inputs = open_inputs(config, reporter, any_operator=True)
        if not inputs.evaluation:
            raise ConfigError(
                "compare needs a text to compare on: --set 'evaluation.corpora={name: FILE}'"
            )
        for remove in removes:
            check_remove(remove, inputs.architecture.num_layers, config.selection.protect)
        whole = "the row refine" if "refine" in rows else None
        inputs = with_engine(inputs, run, reporter, whole=whole)
        tokens = Stages(inputs, run, reporter).tokens()
        run.begin()
        table = _Table(inputs, run, tokens, reporter)
        cuts = [table.select(*chosen) for chosen in itertools.product(selections, removes)]
        wanted = [(cut, row) for cut in cuts for row in rows]
        if missing := [(cut, row) for cut, row in wanted if table.find(cut, row) is None]:
            table.fill(missing)
        return table.write(wanted)


def _outcome(
    inputs: RunInputs, cut: _Cut, solved: Solved, operators: Mapping[Span, Repair]
) -> dict[str, Any]:
    """What a row says of its repair; its KL is that of the choice, if nothing came behind it."""
    numbers, _ = layer_sizes(inputs.source, inputs.architecture)
    removed = sum(numbers[i] for span in cut.spans for i in range(span.start, span.stop))
    kl = None
    if operators is solved.operators:
        [kl] = [row.get("kl") for row in solved.table if row["chosen"]]
    added = sum(repair.added_parameters for repair in operators.values())
    return {
        **_scored(inputs, Variant(cut.spans, operators)),
        "kl": kl,
        "residual": [fit.residual for fit in solved.fits.values() if fit is not None],
        "relative_ridge": [fit.relative_ridge for fit in solved.fits.values() if fit is not None],
        "chosen": solved.candidate.described(),
        "parameters": inputs.source.num_parameters - removed + added,
        "added_flops": 2 * added,  # per token
    }


def _scored(inputs: RunInputs, variant: Variant) -> dict[str, dict[str, Any]]:
    """By corpus: its perplexity, and the nats of a token in every window."""
    with layers_of(inputs, evaluation_shape(inputs), 1) as layers:
        found = corpus_scores(layers, [variant], inputs.evaluation, batch=inputs.batch)
    return {
        "perplexity": {name: of_corpus.perplexity for name, [of_corpus] in found.items()},
        "nats": {
            name: (of_corpus.nats * len(of_corpus.nats) / of_corpus.num_tokens).tolist()
            for name, [of_corpus] in found.items()
        },
    }


class _Table:
    """Rows by what they are of; every row is on the disk once it is there."""

    def __init__(
        self, inputs: RunInputs, run: RunFolder, tokens: TokenWindows, reporter: Reporter
    ) -> None:
        self._inputs, self._run, self._tokens, self._reporter = inputs, run, tokens, reporter
        self._of = fingerprint(
            {
                "model": inputs.model_fingerprint,
                "tokens": tokens.fingerprint,
                "evaluation": {n: w.fingerprint for n, w in inputs.evaluation.items()},
                "figures": ["perplexity", "nats"],
                **inputs.numerics,
            }
        )

    def select(self, criterion: Selection, remove: int) -> _Cut:
        """The spans of a criterion and a number of layers."""
        inputs, run, update = self._inputs, self._run, dict[str, Any]()
        if criterion == "search-unrepaired":
            update = {"operator": OperatorConfig(name="none")}
        elif criterion != "search":
            scored = {"criterion": criterion, "remove": remove, "spans": None}
            update = {"selection": inputs.config.selection.model_copy(update=scored)}
        config = inputs.config.model_copy(update=update)
        inputs = replace(inputs, config=config, amount=Amount(remove, config.selection))
        if "selection" in update:
            path = run.path / f"selection-{criterion}-{remove}.zarr"
            spans, _ = Stages(inputs, run, self._reporter).by_paper(self._tokens, path)
        else:
            spans, _ = search_spans(inputs, self._tokens, run, self._reporter)
        return _Cut(criterion, remove, spans)

    def fill(self, missing: Sequence[tuple[_Cut, Row]]) -> None:
        """Take the sums that the missing rows need, and compute these rows."""
        inputs, tokens, folder = self._inputs, self._tokens, self._run.path
        samples: set[tuple[Span, Regressors]] = set()
        usable: list[tuple[_Cut, Row]] = []
        for cut, row in missing:
            try:
                candidates = candidates_of(self._operator(row), cut.spans, inputs.refittable)
            except ConfigError as error:
                self._add(cut, row, {"refused": str(error)})
                continue
            usable.append((cut, row))
            samples |= set(samples_of(candidates, cut.spans, inputs.refittable))
        ordered = sorted((s, k) for s, k in samples if k != "stream" or (s, "joint") not in samples)
        collectors = SpanCollectors(ordered, inputs.architecture)
        name = f"statistics-{fingerprint(collectors.entries)[:12]}.zarr"
        store = open_store(folder / name, plan_of(inputs, tokens, collectors), self._reporter)
        if ordered:
            CollectHere(inputs, self._reporter, folder)(store, tokens, collectors, "calibrate")
        if self._run.record("compare-dense", self._of) is None:
            dense = _scored(replace(inputs, keeps=True), Variant())["perplexity"]
            self._run.finish("compare-dense", self._of, dense)
        with self._reporter.stage("compare", len(usable), "rows") as advance:
            for cut, row in usable:
                if self.find(cut, row) is None:  # another criterion may have found the same spans
                    self._add(cut, row, self._computed(cut, row, store))
                advance(1)

    def _computed(self, cut: _Cut, row: Row, store: StatisticsStore) -> dict[str, Any]:
        """What a row holds, or under ``refused`` why it cannot be had; the others still can."""
        inputs, tokens = replace(self._inputs, config=self._config(row), keeps=True), self._tokens
        quiet = Reporter(console=Console(quiet=True))  # rows are many; the table has its own bar
        try:
            solved = Solver(inputs, cut.spans, store, tokens, quiet).solve()
        except (SingularGramError, SingularOperatorError) as error:
            return {"refused": str(error)}
        operators = solved.operators
        if row == "refine" and any(r.parts() for r in operators.values()):
            name = "-".join(f"{span.start}-{span.stop}" for span in cut.spans)
            state = self._run.path / f"refine-{name}.pt"
            identity = {
                "refine": inputs.config.refine.model_dump(mode="json"),
                "operator": solved.candidate.described(),
                "tokens": tokens.fingerprint,
                "model": inputs.model_fingerprint,
                "spans": name,
                **inputs.numerics,
            }
            variant = Variant(cut.spans, operators)
            refined = train(inputs, variant, tokens, solved.folds, state, identity, quiet)
            operators = refined.operators
            state.unlink(missing_ok=True)
        return _outcome(inputs, cut, solved, operators)

    def _config(self, row: Row) -> Config:
        """What a row is: only that of training trains, with as many steps as are configured."""
        config = self._inputs.config
        steps = (config.refine.steps or DEFAULT_REFINE_STEPS) if row == "refine" else 0
        refine = config.refine.model_copy(update={"steps": steps})
        return config.model_copy(update={"operator": self._operator(row), "refine": refine})

    def _operator(self, row: Row) -> OperatorConfig:
        update: dict[str, Any] = {}
        if row == "ghost+norm":
            update = {"name": "ghost", "features": "stream+norm"}
        elif row not in ("default", "refine"):
            update = {"name": row, "features": "stream"}
        return OperatorConfig.model_validate(
            {**self._inputs.config.operator.model_dump(), **update}
        )

    def find(self, cut: _Cut, row: Row) -> dict[str, Any] | None:
        return self._run.record(self._key(cut, row), self._of)

    def _add(self, cut: _Cut, row: Row, outcome: dict[str, Any]) -> None:
        self._run.finish(self._key(cut, row), self._of, outcome)

    def write(self, wanted: Sequence[tuple[_Cut, Row]]) -> dict[str, Any]:
        """Write and return what was asked for."""
        rows = [
            {
                "selection": cut.selection,
                "remove": cut.remove,
                "spans": pairs_of(cut.spans),
                "operator": row,
                **(self.find(cut, row) or {}),
            }
            for cut, row in wanted
        ]
        _add_intervals(rows)
        table: dict[str, Any] = {"dense": self._run.outputs("compare-dense"), "rows": rows}
        write_json(self._run.path / "compare.json", table)
        write_bytes(self._run.path / "compare.md", markdown(**table).encode())
        write_comparison(table, self._run.path / "compare.html")
        return table

    def _key(self, cut: _Cut, row: Row) -> str:
        config = self._operator(row).model_dump(mode="json")
        refine = self._inputs.config.refine.model_dump(mode="json") if row == "refine" else None
        return f"compare-{fingerprint([pairs_of(cut.spans), row, config, refine])[:24]}"


def _add_intervals(rows: Sequence[dict[str, Any]]) -> None:
    """In the place of the nats of windows, which are drawn alike for all rows."""
    measured = [row for row in rows if "refused" not in row]
    for row in measured:
        row["intervals"] = {}
    nats = [row.pop("nats") for row in measured]
    for corpus in nats[0] if nats else ():
        resampled = resampled_perplexities(
            {str(i): of_row[corpus] for i, of_row in enumerate(nats)}, tokens_per_window=1
        )
        for i, row in enumerate(measured):
            alike = [j for j, other in enumerate(measured) if other["remove"] == row["remove"]]
            best = min(alike, key=lambda j: measured[j]["perplexity"][corpus])
            of_best = resampled[str(i)] / resampled[str(best)]
            row["intervals"][corpus] = {
                "perplexity": _plain(interval(resampled[str(i)])),
                "of_best": [1.0, 1.0] if i == best else _plain(interval(of_best)),
            }


def _plain(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def markdown(dense: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    corpora = list(dense)
    titles = [
        *("layers", "selection", "spans", "operator"),
        *(title for name in corpora for title in (f"perplexity {name}", "of the best, 95 %")),
        *("KL", "residual", "parameters", "added MFLOP / token"),
    ]
    lines = [
        "Dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + "\n",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        spans = ", ".join(f"[{start}, {stop})" for start, stop in row["spans"])
        cells = [str(row["remove"]), row["selection"], spans, row["operator"]]
        if "refused" in row:
            cells += ["-"] * (len(titles) - len(cells))
        else:
            kl = row["kl"]
            for name in corpora:
                between = row["intervals"][name]["of_best"]
                cells.append(f"{row['perplexity'][name]:.2f}")
                cells.append("-" if between is None else f"{between[0]:.3f} to {between[1]:.3f}")
            cells.append("-" if kl is None else f"{kl:.3f}")
            cells.append(", ".join(f"{r:.3f}" for r in row["residual"]) or "-")
            cells += [f"{row['parameters']:,}", f"{row['added_flops'] / 1e6:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
