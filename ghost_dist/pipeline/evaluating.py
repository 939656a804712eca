"""What the evaluate stage measures: perplexity, agreement, tasks, probes, and texts continued."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.durable import fingerprint
from ghost_dist.engines.sweep import layers_run
from ghost_dist.evaluation.harness import run_task
from ghost_dist.evaluation.probes import probe, shares
from ghost_dist.evaluation.samples import continued, generation, printable, prompts
from ghost_dist.evaluation.scores import Scores, corpus_scores
from ghost_dist.evaluation.task_rows import VARIANTS
from ghost_dist.pipeline.cost import Cost
from ghost_dist.pipeline.inputs import RunInputs, open_causal_lm
from ghost_dist.pipeline.offloading import evaluation_shape, layers_of
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.spans import pairs_of

NOT_USED: dict[str, Any] = {"tasks": {}, "samples": [], "generation": {}, "probes": {}}
_STREAMED = "Layers are read one by one, so texts were not continued and probes not asked."
_TOO_SHORT = "Probes that were left out, since the model has too few positions: {}."


class Evaluation:
    """Measures the three variants, on one model in memory or read layer by layer.

    ``recovered`` is in the dtypes of the checkpoint, ``decisive`` what decides it, as plain values.
    """

    def __init__(
        self,
        inputs: RunInputs,
        run: RunFolder,
        reporter: Reporter,
        recovered: Variant,
        decisive: Mapping[str, Any],
    ) -> None:
        self._inputs, self._run, self._reporter = inputs, run, reporter
        self._recovered = recovered
        shared = {"model": inputs.model_fingerprint, **inputs.numerics}
        halves = {"sublayers": list(map(str, recovered.sublayers))} if recovered.sublayers else {}
        cut = {**shared, "spans": pairs_of(recovered.spans), **halves}
        decided = {"dense": shared, "pruned": cut, "recovered": {**cut, **decisive}}
        self._fingerprints = {name: fingerprint(value) for name, value in decided.items()}

    def measure(self) -> dict[str, Any]:
        """All figures, as the record of the stage holds them."""
        inputs = self._inputs
        if inputs.streaming:
            return {**_figures(self._scores(inputs)), **NOT_USED, "unasked": [_STREAMED]}
        try:
            figures = _figures(self._scores(replace(inputs, keeps=True)))
        except BaseException:
            inputs.loaded.clear()  # what goes on has the room
            raise
        return {**figures, **self._used(open_causal_lm(inputs, own=True))}

    def _scores(self, inputs: RunInputs) -> dict[str, list[Scores]]:
        corpora = inputs.evaluation
        if not corpora:
            return {}
        variants = [Variant(), self._recovered.cut, self._recovered]
        shape = evaluation_shape(inputs)
        with (
            layers_of(inputs, shape, len(variants)) as layers,
            self._reporter.stage("evaluate", math.prod(shape), "tokens") as advance,
        ):
            return corpus_scores(layers, variants, corpora, batch=inputs.batch, advance=advance)

    def _used(self, model: Any) -> dict[str, Any]:
        """Tasks, probes and samples; the model is uncut before and the recovered one after."""
        inputs = self._inputs
        tasks: dict[str, dict[str, Any]] = {}
        asked = prompts(inputs.evaluation)
        works: dict[str, Callable[[], Any]] = {
            "answers probes": lambda: probe(model, inputs.tokenizer)
        }
        if asked:
            works["continues texts"] = lambda: continued(model, torch.stack([x for _, x in asked]))
        said: dict[str, dict[str, Any]] = {what: {} for what in works}
        for variant in VARIANTS:
            if variant == "pruned":
                remove_layers(model, inputs.architecture, self._recovered.spans)
                insert_operators(model, inputs.architecture, self._recovered.cut)
            if variant == "recovered":
                insert_operators(model, inputs.architecture, self._recovered)
            for what in list(said):
                try:
                    with self._reporter.waiting(f"{variant} model {what}"):
                        said[what][variant] = works[what]()
                except Exception as error:  # all else that is measured is there
                    self._reporter.warn(f"No model {what}: {type(error).__name__}: {error}")
                    del said[what]
            for row, figures in self._tasks(model, variant).items():
                tasks.setdefault(row, {})[variant] = figures
        goes_on = said.get("continues texts", {})
        first = asked[: len(dict(asked))] if goes_on else []  # of each text, before the others

        def decode(ids: torch.Tensor) -> str:
            return printable(inputs.tokenizer.decode(ids))

        samples = [
            {
                "text": name,
                "prompt": decode(ids),
                "ids": ids.tolist(),
                **{variant: decode(found[number]) for variant, found in goes_on.items()},
            }
            for number, (name, ids) in enumerate(first)
        ]
        answers = said.get("answers probes", {})
        short = [name for name, right in answers.get("dense", {}).items() if not right]
        return {
            "tasks": tasks,
            "samples": samples,
            "generation": generation(goes_on) if goes_on else {},
            "probes": shares(answers),
            "unasked": [_TOO_SHORT.format(", ".join(short))] if short else [],
        }

    def _tasks(self, model: Any, variant: str) -> dict[str, dict[str, Any]]:
        """Row to figures; recorded task by task, so that a stage that is stopped goes on there."""
        inputs = self._inputs
        found: dict[str, dict[str, Any]] = {}
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
            found |= done[identity]
        return found


def evaluate_cost(run: RunShape) -> Cost:
    """Of :meth:`Evaluation.measure`, without tasks."""
    inputs, sizes = run.inputs, run.sizes
    windows, length = evaluation_shape(inputs)
    variants = [Variant(), Variant(run.spans), run.variant(run.candidates[0])]
    cost = Cost(
        below=run.num_layers,
        whole=True,
        head=True,
        batch=inputs.batch,
        length=length,
        scored=len(variants) * windows * length,
        batch_bytes=len(variants) * sizes.stream_bytes(inputs.batch * length),
        running_bytes=len(variants) * sizes.stream_bytes(windows * length),
    )
    cost.pass_tokens(layers_run(variants, run.num_layers), windows * length)
    return cost


def _figures(scores: Mapping[str, list[Scores]]) -> dict[str, Any]:
    """By corpus and variant: means, and what they are means of."""
    by_name = {
        corpus: dict(zip(VARIANTS, of_corpus, strict=True)) for corpus, of_corpus in scores.items()
    }

    def figures(of_one: Callable[[Scores], Any], but: str = "") -> dict[str, dict[str, Any]]:
        return {
            corpus: {name: of_one(one) for name, one in of_corpus.items() if name != but}
            for corpus, of_corpus in by_name.items()
        }

    return {
        "perplexity": figures(lambda one: one.perplexity),
        "agreement": figures(
            lambda one: {"kl": float(one.kl.mean()), "top1": float(one.top1.mean())}, "dense"
        ),
        "nats_per_window": figures(lambda one: one.nats.tolist()),
        "agreement_per_window": figures(
            lambda one: {"kl": one.kl.tolist(), "top1": one.top1.tolist()}, "dense"
        ),
        "tokens_per_window": {
            corpus: of_corpus["dense"].num_tokens // len(of_corpus["dense"].kl)
            for corpus, of_corpus in by_name.items()
        },
    }
