"""The main job: from a checkpoint to a recovered checkpoint, in one process, resumable."""

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ghost_dist import __version__
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.config import Config
from ghost_dist.config_file import (
    config_from_tree,
    config_tree,
    config_yaml,
    decisive_tree,
    lay,
    parse_set,
)
from ghost_dist.devices import gpu_name
from ghost_dist.durable import fingerprint, json_bytes, write_bytes
from ghost_dist.errors import ConfigError, GhostDistError
from ghost_dist.export.model_card import CARD, model_card
from ghost_dist.export.operator_files import Solution
from ghost_dist.pipeline.bench_serving import SERVING
from ghost_dist.pipeline.collecting import Collect
from ghost_dist.pipeline.engine import ENGINE, record_engine, with_engine
from ghost_dist.pipeline.exporting import RESULT, Export
from ghost_dist.pipeline.fitting import FitSpans
from ghost_dist.pipeline.inputs import RunInputs, open_inputs, with_absolute_paths
from ghost_dist.pipeline.layer_times import request_seconds
from ghost_dist.pipeline.searching import Scorer, search_shape
from ghost_dist.pipeline.stages import Stages
from ghost_dist.pipeline.targets import Times, keep_times, kept_times
from ghost_dist.progress import Reporter, callback_of
from ghost_dist.report.page import write_report
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import spectra
from ghost_dist.report.verdict import no_better_than_cut, sentences, sources_apart
from ghost_dist.run_folder import STAGES, RunFolder
from ghost_dist.spans import pairs_of

Stage = Literal["select", "calibrate", "solve", "export", "evaluate"]
_LIBRARIES = ("torch", "transformers", "datasets", "zarr", "safetensors", "numpy")


class Workers(Protocol):
    """Other processes, perhaps of other machines, that run the windows of a run."""

    def device(self) -> torch.device:
        """The kind of device that they compute on."""

    def request_seconds(
        self, config: Config, source: Checkpoint, architecture: Architecture
    ) -> Times:
        """As ``layer_times.request_seconds``, on one of their devices."""

    def begin(
        self, inputs: RunInputs, reporter: Reporter
    ) -> tuple[Collect, FitSpans, Scorer | None]:
        """What fills the stores of one run, fits its spans and scores the removals of a search.

        ``release`` of the first is for all of them; no scorer: this process is better at it.
        """


def recover(
    config: Config,
    reporter: Reporter | None = None,
    *,
    again: Stage | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Run every stage that is not done yet and write ``RUN/result.json``; returns its content.

    ``again``: do this stage again although it is done, and stop after it; stages before it are done
    first where they are missing. Before ``export`` only the outputs of that stage are returned.
    ``workers``: who runs the windows; None: this process. What cannot be done is a GhostDistError
    of a class of its own; what is finished is kept, and the same call continues.
    """
    if config.on_cluster and workers is None:
        raise ConfigError(
            "This configuration needs Ray (engine.tensor_parallel, data_parallel, replicas or "
            "cluster.address): call ghost_dist.cluster.session.recover_on_cluster."
        )
    config, reporter = with_absolute_paths(config), reporter or Reporter()
    callback = [callback_of(path)] if (path := config.output.callback) else []
    with RunFolder(config) as run, ExitStack() as beside:
        reporter = Reporter(run.events, reporter.console, [*reporter.listeners, *callback])
        program, *arguments = sys.argv
        command = shlex.join([Path(program).name, *arguments])
        reporter.event("run-start", version=__version__, command=command)
        inputs = _opened(config, run, reporter, again, workers)
        if again is not None:
            run.forget(again)
        collect = fit_spans = scorer = None
        if workers is not None:
            collect, fit_spans, scorer = workers.begin(inputs, reporter)
        ahead = again in (None, "export") and not run.outputs("export")
        export = beside.enter_context(Export(inputs, run, reporter, ahead=ahead))
        stages = Stages(inputs, run, reporter, again, collect, fit_spans, export, scorer)
        tokens = stages.tokens()
        run.begin()
        record_engine(inputs, run)
        keep_times(run, inputs.amount.times)
        if inputs.amount.described:
            reporter.say(inputs.amount.described)
        spans = stages.select(tokens)
        if spans:
            reporter.say(f"removing layers {', '.join(map(str, spans))}")
        if stages.cut.sublayers:
            reporter.say(f"removing {', '.join(map(str, stages.cut.sublayers))}")
        if again == "select":
            return {"spans": pairs_of(spans)}
        if again not in ("export", "evaluate"):  # they need operators, and those are solved
            stages.calibrate(tokens, spans)
        statistics = stages.statistics(tokens, spans)
        if again == "calibrate":
            stages.flush()
            return {"ranges": len(statistics.ranges)}
        solution = stages.solve(tokens, spans)
        operator, candidates = (solution.record[key] for key in ("operator", "candidates"))
        no_better = no_better_than_cut(candidates, {})
        for said in [*sentences(no_better, operator), *sources_apart(candidates)]:
            reporter.warn(said)
        if again == "solve":
            stages.flush()
            return {"operator": operator, "fit": solution.record["fits"]}
        solution = stages.refine(tokens, solution)
        with ThreadPoolExecutor(1) as thread:  # for the report, which says what goes wrong there
            thread.submit(lambda: spectra(RunRecord(run.path), inputs.fit_device))
            stages.export(solution)
        evaluation = stages.evaluate(solution)
        reporter.tell_taken()
        stages.flush()
        result = _result(inputs, run, solution, evaluation, statistics.fingerprint)
        for file in (run.checkpoint / RESULT, run.result):
            write_bytes(file, json_bytes(result))
        card = model_card(inputs.source, config, stages.as_exported(solution), result)
        write_bytes(run.checkpoint / CARD, card.encode())
        reporter.event("run-end", perplexity=result["perplexity"])
        _report(run, inputs.device, reporter)
        return result


def _opened(
    config: Config,
    run: RunFolder,
    reporter: Reporter,
    again: Stage | None,
    workers: Workers | None,
) -> RunInputs:
    """The inputs of a run and its engine, all of them checked."""
    with reporter.waiting("opening the model and the texts"):
        inputs = open_inputs(
            config,
            reporter,
            evaluates=again not in ("select", "calibrate", "solve") or not run.outputs(ENGINE),
            worker_device=None if workers is None else workers.device,
            times=kept_times(run.path),
            measure=request_seconds if workers is None else workers.request_seconds,
        )
    if inputs.config.selection.searches:
        search_shape(inputs)  # refused before any work
    return with_engine(inputs, run, reporter)


def _report(run: RunFolder, device: torch.device, reporter: Reporter) -> None:
    """Write ``RUN/report.html``; whatever goes wrong there, the run is finished and stays so."""
    try:
        page = write_report([run.path], device=device)
    except Exception as error:
        reporter.warn(
            f"The report could not be written ({type(error).__name__}: {error}). The run itself is "
            f"finished and whole. Again: ghost-dist report {shlex.quote(str(run.path))}"
        )
    else:
        reporter.say(f"report: {page}")


def _result(
    inputs: RunInputs,
    run: RunFolder,
    solution: Solution,
    evaluation: dict[str, Any],
    statistics: str,
) -> dict[str, Any]:
    records = {stage: run.outputs(stage) for stage in STAGES}
    exported, solved = open_checkpoint(run.checkpoint), solution.record
    spans = solution.variant.spans
    trained, device = records["refine"], f"{platform.machine()} CPU, "
    device += f"threads: {torch.get_num_threads()}"
    if inputs.device.type == "cuda":
        device = gpu_name(inputs.device)
    config, aim = inputs.config, inputs.amount.aim
    result = {
        "spans": pairs_of(spans),
        "sublayers": records["select"]["sublayers"],
        "num_layers": inputs.architecture.num_layers,
        "target": {"target": aim.wanted, "predicted": aim.predicted(spans)}
        if aim and config.selection.target
        else None,
        "operator": solved["operator"],
        "ridge": [fit["ridge"] for fit in solved["fits"]],
        "fit": solved["fits"],
        "chosen": solved["chosen"],
        "candidates": solved["candidates"],
        "gaps": solved["gaps"],
        # Held-out losses of a refinement, None where there was none.
        "refine": {key: trained[key] for key in ("losses", "improved")} if trained else None,
        "selection": {
            key: records["select"][key]
            for key in ("scores", "search", "pareto")
            if key in records["select"]
        },
        **{key: evaluation[key] for key in ("perplexity", "agreement", "tasks", "samples")},
        # Not of records before 2026-12.
        **{key: evaluation.get(key, {}) for key in ("generation", "probes")},
        "unasked": evaluation.get("unasked", []),
        "no_better_than_cut": no_better_than_cut(solved["candidates"], evaluation["perplexity"]),
        "parameters": {
            "before": inputs.source.num_parameters,
            "after": exported.num_parameters,
        },
        "bytes": {"before": inputs.source.nbytes, "after": exported.nbytes},
        "timings_s": {stage: record["seconds"] for stage, record in records.items() if record},
        **_gpu_idle(records),
        "peak_bytes": {
            kind: max(record[f"peak_{kind}_bytes"] for record in records.values() if record)
            for kind in ("device", "host")
        },
        "tokens": records["tokens"]["num_tokens"],
        "reload_max_abs_difference": records["export"]["reload_max_abs_difference"],
        "versions": {
            "ghost_dist": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "device": device,
        "fingerprint": fingerprint(
            {
                "statistics": statistics,
                "operators": solution.files,
                "config": decisive_tree(config),
            }
        ),
    }
    serving = run.record(SERVING, result["fingerprint"])  # measured before, of the same model
    return result if serving is None else {**result, SERVING: serving}


def _gpu_idle(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Share of the time without work for the GPU, of each stage and of all; nothing on a CPU."""
    watched = {name: record for name, record in records.items() if "gpu_idle" in record}
    if not watched:
        return {}
    seconds = sum(record["seconds"] for record in watched.values())
    idle = sum(record["seconds"] * record["gpu_idle"] for record in watched.values())
    shares = {name: record["gpu_idle"] for name, record in watched.items()}
    return {"gpu_idle": {**shares, "all": round(idle / max(seconds, 1e-9), 3)}}


OPEN_FIELDS: dict[Stage, tuple[str, ...]] = {
    "select": ("selection",),
    "calibrate": ("operator", "refine"),
    "solve": ("operator", "refine"),
    "export": ("operator.dtype", "export"),
    "evaluate": ("evaluation",),
}
"""What may be changed with a stage: fields that no earlier stage depends on."""


def run_stage_again(
    path: Path,
    stage: Stage,
    assignments: Sequence[str],
    reporter: Reporter | None = None,
    runner: Callable[[Config], Callable[..., dict[str, Any]]] = lambda _: recover,
) -> dict[str, Any]:
    """Do a stage again, with changes to the fields in :data:`OPEN_FIELDS`.

    Earlier stages are only run where they are missing. The changed configuration becomes the
    run's own, so ``recover`` afterwards redoes what depends on it and nothing else. ``runner``
    gives what does it: :func:`recover`, or the same on a cluster.
    """
    stored = RunFolder.stored_config(path)
    config = _changed(stored, stage, assignments)
    if config == stored:
        return runner(config)(config, reporter, again=stage)
    _store(path, stored, config)
    try:
        return runner(config)(config, reporter, again=stage)
    except GhostDistError:
        _store(path, config, stored)  # what cannot be done does not stay in the run
        raise


def _store(path: Path, old: Config, new: Config) -> None:
    with RunFolder(old):  # nobody else works on it while its configuration is replaced
        write_bytes(path / "config.yaml", config_yaml(new))


def _changed(stored: Config, stage: Stage, assignments: Sequence[str]) -> Config:
    tree, overrides = config_tree(stored), dict(map(parse_set, assignments))
    lay(tree, overrides)
    config = with_absolute_paths(config_from_tree(tree))
    for key in overrides:
        open_fields = (*OPEN_FIELDS[stage], "output.callback")
        if not any(f"{key}.".startswith(f"{field}.") for field in open_fields):
            allowed = ", ".join(f"{field}.*" for field in OPEN_FIELDS[stage])
            raise ConfigError(
                f"--set {key} cannot be changed with {stage}: earlier stages depend on it "
                f"({allowed} can). Start another RUN with recover."
            )
    return config
