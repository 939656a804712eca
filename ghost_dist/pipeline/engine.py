"""Which engine a run gets: decided once, before any work, as ``plan`` does, and kept in RUN.

Memory that is free decides how a model is run, never what comes out. So a run goes on with the
engine it began with, whatever is free by then, or says why it cannot.
"""

from dataclasses import replace
from typing import Literal

import torch

from ghost_dist.checkpoint.load import truncated_config
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, device_name, free_bytes
from ghost_dist.engines.memory import EngineChoice, choose_engine
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.engines.sharding import check_degree
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.collectors import SpanCollectors
from ghost_dist.pipeline.cost import Cost, device_needs
from ghost_dist.pipeline.evaluating import evaluate_cost
from ghost_dist.pipeline.exporting import export_cost
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.pipeline.searching import search_cost
from ghost_dist.pipeline.selecting import PaperScores
from ghost_dist.pipeline.solve_cost import solve_cost
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder

ENGINE = "engine"
Kind = Literal["resident", "streaming"]


def with_engine(
    inputs: RunInputs, run: RunFolder, reporter: Reporter, *, whole: str | None = None
) -> RunInputs:
    """Inputs with the engine that this run has, or gets now; :func:`record_engine` notes it.

    ``whole``: what needs the whole model beside the configuration.
    """
    config, known = inputs.config, run.outputs(ENGINE)
    if known and inputs.fit_room:
        inputs = replace(inputs, fit_room=known.get("fit_room", inputs.fit_room))
    if "dtype" in known and config.model.dtype == "auto":  # of the machine that it began on
        inputs = replace(inputs, dtype=getattr(torch, known["dtype"]))
    if config.on_cluster:
        if inputs.streaming:
            return inputs
        began = {"kind": "resident", "driver": inputs.device.type}
        if began.items() <= known.items() if known else _driver_holds(inputs, reporter):
            return inputs
        if config.needs_whole_model is not None:
            return replace(inputs, device=torch.device("cpu"))
        return replace(inputs, streaming=True)
    if config.engine.kind != "auto":
        return inputs
    if whole is None and config.needs_whole_model is not None:
        whole = config.needs_whole_model[0]
    choice = decide(inputs, None if whole is not None else known.get("kind"), whole=whole)
    if not choice.fits:
        reporter.warn(f"{choice.reason}. It may be too large for the last stages.")
    elif choice.kind == "streaming":
        reporter.say(f"layers are read one by one: {choice.reason}")
    return replace(inputs, streaming=choice.kind == "streaming")


def record_engine(inputs: RunInputs, run: RunFolder) -> None:
    """Note what :func:`with_engine` decided, once the folder is bound to the run."""
    kind = "streaming" if inputs.streaming else "resident"
    record = {"kind": kind, "driver": inputs.device.type, "fit_room": inputs.fit_room}
    run.finish(ENGINE, "", record | {"dtype": str(inputs.dtype).removeprefix("torch.")})


def decide(
    inputs: RunInputs, kind: Kind | None = None, *, whole: str | None = None
) -> EngineChoice:
    """The engine of a run in one process, of an ``engine.kind`` that it began with if it did."""
    try:
        return choose(kind or "auto", shape_of(inputs), whole=whole)
    except ConfigError as error:
        if kind != "resident":
            raise
        raise ConfigError(
            f"This run began with the whole model on {inputs.device} and goes on so, but there is "
            f"no room for it any more: {error} Free memory there, or continue layer after layer, "
            "to the same result: the same command with --set engine.kind=streaming."
        ) from error


def holds_search(inputs: RunInputs) -> bool:
    """Whether the device holds the whole model and what a search needs beside it."""
    run = shape_of(inputs)
    return search_cost(run).resident_bytes(run.sizes) <= SHARE_OF_FREE_MEMORY * run.free_bytes


def _driver_holds(inputs: RunInputs, reporter: Reporter) -> bool:
    """Whether the driver of a cluster can hold the whole model, for what comes last."""
    run = shape_of(inputs)
    costs, free = costs_of(run), run.free_bytes
    needs = {
        name: cost.resident_bytes(run.sizes)
        for name, cost in costs.items()
        if not cost.ranges and not cost.leased
    }
    stage = max(needs, key=lambda name: needs[name])
    if needs[stage] <= SHARE_OF_FREE_MEMORY * free:
        return True
    whole = inputs.config.needs_whole_model
    how = "read the model layer by layer" if whole is None else f"hold it on the CPU ({whole[0]})"
    reporter.say(
        f"the last stages, which the driver runs, {how}: whole it needs {needs[stage] / 1e9:.1f} GB"
        f" ({stage}) on {device_name(inputs.device)}, which has {free / 1e9:.1f} GB free"
    )
    return False


def shape_of(inputs: RunInputs) -> RunShape:
    """The run in numbers, with what is free on its device now."""
    sizes = model_sizes(inputs.source, inputs.architecture, inputs.dtype)
    return RunShape(inputs, sizes, free_bytes(inputs.device))


def costs_of(run: RunShape) -> dict[str, Cost]:
    """What every stage of a run says that it does and holds, in order, but for its tokens."""
    inputs, costs = run.inputs, {}
    selection = inputs.config.selection
    if selection.searches:
        costs["select"] = search_cost(run)
    elif inputs.amount.layers is not None:
        scores = PaperScores(inputs.amount.layers, selection.protect, inputs.architecture)
        costs["select"] = scores.cost(run)
    collectors = SpanCollectors(run.samples, inputs.architecture)
    costs["calibrate"] = collectors.cost(run) if run.samples else Cost()
    costs |= {"solve": solve_cost(run), "export": export_cost(run)}
    if inputs.evaluation:
        costs["evaluate"] = evaluate_cost(run)
    return costs


def choose(
    kind: Literal["auto", "resident", "tensor_parallel", "streaming"],
    run: RunShape,
    *,
    whole: str | None,
) -> EngineChoice:
    """The engine of a run, of ``plan`` too, by what is free on its device."""
    inputs, engine = run.inputs, run.inputs.config.engine
    on_cluster = inputs.config.on_cluster
    model_config = truncated_config(inputs.source, inputs.architecture, run.num_layers)

    def divides(degree: int) -> bool:
        try:
            check_degree(model_config, degree)
        except ConfigError:
            return False
        return True

    needs = device_needs(
        costs_of(run),
        run.sizes,
        run.num_windows,
        ranks=engine.ranks if on_cluster else None,
        degrees=[degree for degree in (2, 4, 8, 16, 32, 64) if divides(degree)],
        degree=engine.tensor_parallel,
        on_cpu=inputs.device.type == "cpu",
    )
    return choose_engine(
        kind,
        on_cluster=on_cluster,
        needs=needs,
        free_bytes=run.free_bytes,
        where=device_name(inputs.device),
        experts=engine.experts,
        whole=whole,
    )
