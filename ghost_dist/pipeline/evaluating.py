"""What the evaluate stage measures: perplexity, agreement with the dense model, harness tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.durable import fingerprint
from ghost_dist.engines.lanes import Lane
from ghost_dist.evaluation.agreement import WindowScores, score_variants
from ghost_dist.evaluation.harness import run_task
from ghost_dist.pipeline.inputs import RunInputs, open_causal_lm
from ghost_dist.pipeline.streamed import streamed_scores
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.spans import Span

VARIANTS = ("dense", "pruned", "recovered")


class Evaluation:
    """Measures the three variants, on one model in memory or streamed layer by layer.

    Parameters
    ----------
    inputs, run, reporter
        Of the run.
    spans, operators, healed
        What is removed, and what is put in its place, in the dtypes of the checkpoint.
    decisive
        What decides the recovered model, as plain values.
    """

    def __init__(
        self,
        inputs: RunInputs,
        run: RunFolder,
        reporter: Reporter,
        spans: tuple[Span, ...],
        operators: Mapping[Span, Repair],
        healed: Mapping[int, Tensor],
        decisive: Mapping[str, Any],
    ) -> None:
        self._inputs, self._run, self._reporter = inputs, run, reporter
        self._spans, self._operators, self._healed = spans, operators, healed
        shared = {"model": inputs.model_fingerprint, **inputs.numerics}
        cut = {**shared, "spans": [[span.start, span.stop] for span in spans]}
        decided = {"dense": shared, "pruned": cut, "recovered": {**cut, **decisive}}
        self._fingerprints = {name: fingerprint(value) for name, value in decided.items()}

    def measure(self) -> dict[str, Any]:
        """All figures, as the record of the stage holds them."""
        if self._inputs.streaming:
            return {**_figures(self._streamed()), "tasks": {}}
        model = open_causal_lm(self._inputs)
        figures = _figures(self._resident(model))
        return {**figures, "tasks": self._tasks(model)}  # the model is cut here

    def _streamed(self) -> dict[str, list[WindowScores]]:
        inputs = self._inputs
        if not inputs.evaluation:
            return {}
        lanes = [Lane(), Lane(self._spans), Lane(self._spans, self._operators, self._healed)]
        layers = inputs.architecture.num_layers + 1
        with self._reporter.stage("evaluate", layers, "layers") as advance:
            return streamed_scores(inputs, lanes, inputs.evaluation, advance)

    def _resident(self, model: Any) -> dict[str, list[WindowScores]]:
        inputs = self._inputs
        found = {}
        for name, windows in inputs.evaluation.items():
            total = int(windows.tokens.size)
            with self._reporter.stage(f"evaluate on {name}", total, "tokens") as advance:
                found[name] = score_variants(
                    model,
                    inputs.architecture,
                    self._spans,
                    [{}, self._operators],
                    windows,
                    batch=inputs.batch,
                    device=inputs.device,
                    healed=[{}, self._healed],
                    advance=advance,
                )
        return found

    def _tasks(self, model: Any) -> dict[str, dict[str, Any]]:
        """Row to variant to its figures; the model is uncut before and the recovered one after.

        What is done is recorded task by task, so that a stage that is stopped goes on there.
        """
        inputs = self._inputs
        found: dict[str, dict[str, Any]] = {}
        for variant in VARIANTS if inputs.tasks else ():
            if variant == "pruned":
                remove_layers(model, inputs.architecture, self._spans)
            if variant == "recovered":
                insert_operators(
                    model, inputs.architecture, self._spans, self._operators, self._healed
                )
            stage, key = f"tasks-{variant}", self._fingerprints[variant]
            done = self._run.record(stage, key) or {}
            for task in inputs.tasks:
                identity = fingerprint([task.fingerprint, task.num_fewshot, task.limit])
                if identity not in done:
                    # No bar of ours: on a terminal the harness has its own.
                    self._reporter.say(f"{variant} on {task.name}")
                    self._reporter.event("task-start", variant=variant, task=task.name)
                    done[identity] = run_task(task, model, inputs.tokenizer, batch=inputs.batch)
                    self._run.finish(stage, key, done)
                    self._reporter.event("task-end", variant=variant, task=task.name)
                for row, figures in done[identity].items():
                    found.setdefault(row, {})[variant] = figures
        return found


def _figures(scores: Mapping[str, list[WindowScores]]) -> dict[str, Any]:
    """By corpus and variant: means, and what they are means of."""
    by_name = {
        corpus: dict(zip(VARIANTS, of_corpus, strict=True)) for corpus, of_corpus in scores.items()
    }
    return {
        "perplexity": {
            corpus: {name: one.perplexity.value for name, one in of_corpus.items()}
            for corpus, of_corpus in by_name.items()
        },
        "agreement": {
            corpus: {
                name: {"kl": float(one.kl.mean()), "top1": float(one.top1.mean())}
                for name, one in of_corpus.items()
                if name != "dense"
            }
            for corpus, of_corpus in by_name.items()
        },
        "nats_per_window": {
            corpus: {n: one.perplexity.nats_per_window.tolist() for n, one in of_corpus.items()}
            for corpus, of_corpus in by_name.items()
        },
        "agreement_per_window": {
            corpus: {
                name: {"kl": one.kl.tolist(), "top1": one.top1.tolist()}
                for name, one in of_corpus.items()
                if name != "dense"
            }
            for corpus, of_corpus in by_name.items()
        },
        "tokens_per_window": {
            corpus: of_corpus["dense"].perplexity.num_tokens // len(of_corpus["dense"].kl)
            for corpus, of_corpus in by_name.items()
        },
    }
