"""``ghost-dist plan``: a run's bytes, FLOPs and seconds from headers, and the engine it gets.

Of the weights nothing is read, except that a first look at a machine reads pieces of the files to
see how fast they come. What the headers do not say is assumed, and said in the plan's notes.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghost_dist.calibration.windows import TokenWindows, build_windows
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import load_tokenizer
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.devices import device_name, host_free_bytes, host_load, open_device
from ghost_dist.engines.memory import EngineChoice
from ghost_dist.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    RunFolderError,
    UnsupportedArchitectureError,
)
from ghost_dist.pipeline.candidates import few_tokens
from ghost_dist.pipeline.cost import Cost
from ghost_dist.pipeline.engine import choose, costs_of, shape_of
from ghost_dist.pipeline.inputs import (
    RunInputs,
    assembled,
    check_disk_space,
    disk_needs,
    open_model,
    with_absolute_paths,
    with_bos,
)
from ghost_dist.pipeline.refittable import refittable_layers
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.pipeline.searching import search_shape
from ghost_dist.pipeline.targets import Times
from ghost_dist.planning.probe import circumstances, measure
from ghost_dist.planning.rates import Rates, store_rates, stored_rates
from ghost_dist.planning.stage_plans import KEPT_BY_SHARDING, StagePlan, num_replicas, plan_stages
from ghost_dist.progress import Reporter, callback_of
from ghost_dist.spans import Span, pairs_of

TOKENS_PER_BYTE = 0.25  # of text whose tokens cannot be counted
_COUNTED_BYTES = 64 << 20  # texts up to here are cut into tokens to know their number
_BUSY = 0.25  # of the cores
_OFF_BY, _OFF_BY_BUSY = 1.5, 4.0
"""Runs took 0.9 to 1.4 times the seconds of a plan (docs/planning.md); beside other programs one
took a seventh."""


@dataclass(frozen=True)
class Plan:
    model: str
    num_layers: int
    spans: tuple[Span, ...]
    spans_known: bool  # else they are those that cost most
    dtype: str
    batch: int
    device: str
    free_device_bytes: int
    free_host_bytes: int
    free_disk_bytes: int
    engine: EngineChoice
    stages: tuple[StagePlan, ...]
    disk_bytes: Mapping[str, int]  # of RUN when it is largest, by what they are
    notes: tuple[str, ...]  # what was assumed
    off_by: float  # a run may take so many times the seconds planned, or a part of them
    rates: Rates  # what the seconds come from
    layer_times: Times | None  # where a target asks for them

    def tree(self) -> dict[str, Any]:
        tree = dataclasses.asdict(self)
        tree["spans"] = pairs_of(self.spans)
        tree["seconds"] = sum(stage.seconds for stage in self.stages)
        tree["flops"] = sum(stage.flops for stage in self.stages)
        return tree


def plan_run(
    config: Config, reporter: Reporter | None = None, *, measure_again: bool = False
) -> Plan:
    """Plan a run as ``recover`` takes it, or refuse it with the bytes needed and free."""
    reporter = reporter or Reporter()
    if path := with_absolute_paths(config).output.callback:
        callback_of(path)  # refused here as by a run
    inputs, notes, tokens_s = _open(config)
    run = shape_of(inputs)
    costs = costs_of(run)
    if not config.selection.given:
        notes.append(
            "the spans are not known before they are selected; reckoned with "
            f"{', '.join(map(str, run.spans))}, the costliest that {inputs.amount.layers} layers "
            "can be"
        )
    if inputs.amount.described:
        notes.append(inputs.amount.described)
    if config.selection.searches:
        shape = search_shape(inputs)
        notes.append(
            f"select is reckoned with all of its budget, {shape.evaluations:,} evaluations on "
            f"{shape.length} tokens each in about {shape.sweeps} sweeps over the layers; a search "
            "may end before."
            + (" Less: --set selection.effort=quick" * (config.selection.effort != "quick"))
        )
    of_fits = (config.calibration, run.candidates, run.spans, inputs.architecture)
    few = few_tokens(*of_fits, inputs.refittable)
    notes += [few] if few else []
    whole = config.needs_whole_model
    choice = choose(config.engine.kind, run, whole=None if whole is None else whole[0])
    if inputs.fit_room and costs["solve"].fit_bytes > inputs.fit_room:
        notes.append("the largest fits need more than all memory of the device: the CPU fits")
    folder = Path(config.output.path).expanduser().absolute()
    folder = next(path for path in (folder, *folder.parents) if path.is_dir())
    disk = _disk(run, costs, choice, folder)
    key = circumstances(run, costs, folder)
    rates = None if measure_again else stored_rates(key)
    load = host_load()
    if rates is None:
        reporter.say("measuring this machine, for half a minute (remembered if it is idle) ...")
        rates = measure(run, costs, folder)
        if load <= _BUSY:
            store_rates(key, rates)
        else:
            notes.append(
                "the rates were measured beside other programs, may be wrong by far and are not "
                "remembered: plan again when the machine is idle"
            )
    if load > _BUSY:
        notes.append(
            f"other programs use {min(load, 1):.0%} of this machine's cores now; while they do, a "
            "run may take several times as long"
        )
    if config.on_cluster:
        notes.append(_cluster_note(run, choice))
    if rates.read_from != "checkpoint":
        where = rates.read_from
        notes.append(f"the checkpoint's files hold no data; reading was measured on {where}")
    return Plan(
        model=config.model.path,
        num_layers=run.num_layers,
        spans=run.spans,
        spans_known=config.selection.given,
        dtype=str(inputs.dtype).removeprefix("torch."),
        batch=inputs.batch,
        device=device_name(inputs.device),
        free_device_bytes=run.free_bytes,
        free_host_bytes=host_free_bytes(),
        free_disk_bytes=shutil.disk_usage(folder).free,
        engine=choice,
        stages=plan_stages(run, costs, choice, rates, tokens_s),
        off_by=_OFF_BY_BUSY if load > _BUSY else _OFF_BY,
        disk_bytes=disk,
        notes=tuple(notes),
        rates=rates,
        layer_times=inputs.amount.times,
    )


def _open(config: Config) -> tuple[RunInputs, list[str], float]:
    """Inputs as a run has them, as far as headers give them; notes; seconds of stage tokens."""
    source, architecture, amount = open_model(config)
    notes = [*source.notes]
    config = with_bos(config, architecture, notes.append)
    device = open_device(config.engine.device)
    try:
        refittable = refittable_layers(config, source, architecture, reads=False)
    except UnsupportedArchitectureError:
        refittable = frozenset(architecture.down_projections)
        notes.append("no small model of the family could be built; taken to allow ghost-joint")
    tokens_s, evaluation = _texts(config, source, architecture, notes)
    opened: dict[str, Any] = {"refittable": refittable, "evaluation": evaluation, "tasks": ()}
    opened |= {"tokenizer": None, "model_fingerprint": ""}
    inputs = assembled(config, source, architecture, amount, device, device, **opened)
    return inputs, notes, tokens_s


def _texts(
    config: Config, source: Checkpoint, architecture: Architecture, notes: list[str]
) -> tuple[float, dict[str, TokenWindows]]:
    """Seconds that calibration's tokens take, and windows of the corpora's shapes."""
    calibration, evaluation = config.calibration, config.evaluation
    try:
        tokenizer = load_tokenizer(source.path, trust_remote_code=config.model.trust_remote_code)
    except CheckpointError:
        tokenizer = None
        notes.append("there is no tokenizer: stage tokens is not predicted")

    def windows_of(text: str, windows: int | None, length: int, **options: Any) -> int | None:
        path = Path(text).expanduser()
        if tokenizer is None or not path.is_file() or path.stat().st_size > _COUNTED_BYTES:
            return None
        options |= {"windows": windows, "window_length": length, "seed": calibration.seed}
        with contextlib.suppress(CalibrationError):
            found = build_windows(text, tokenizer, vocab_size=architecture.vocab_size, **options)
            return found.num_windows
        return None

    began, length = time.perf_counter(), calibration.window_length
    few = max(1, min(calibration.windows, (1 << 16) // length))
    first = next(iter(calibration.windows_of))
    found = windows_of(first, few, length, sampling=calibration.sampling)
    tokens_s = (time.perf_counter() - began) * calibration.windows / few
    if tokenizer is not None and found is None:
        notes.append(f"stage tokens is not predicted: {first} is not a local file")
    corpora: dict[str, TokenWindows] = {}
    length = evaluation.window_length
    for name, text in evaluation.corpora.items():
        counted = windows_of(text, evaluation.windows, length) or evaluation.windows
        if counted is None:
            file = Path(text).expanduser()
            nbytes = file.stat().st_size if file.is_file() else 1 << 20
            counted = max(1, int(nbytes * TOKENS_PER_BYTE) // length)
            notes.append(f"corpus {name} is taken for {counted} windows of {length} tokens")
        corpora[name] = TokenWindows(np.broadcast_to(np.int32(0), (counted, length)), text)
    if evaluation.tasks:
        notes.append("evaluation.tasks are not predicted")
    return (tokens_s if found is not None else 0.0), corpora


def _disk(
    run: RunShape, costs: Mapping[str, Cost], choice: EngineChoice, folder: Path
) -> dict[str, int]:
    """What the RUN folder holds when it is largest; refused where there is no room for it."""
    inputs = run.inputs
    needs = disk_needs(
        # The sums of a selection are removed once the spans are known.
        max(cost.commit_bytes for cost in costs.values()),
        len(run.spans),
        run.sizes.hidden_size,
        costs["export"].written_bytes,
    )
    if choice.kind == "streaming" and not inputs.config.on_cluster:
        needs["streams"] = max(
            costs[stage].waiting_bytes(run.num_windows, None) for stage in choice.device_bytes
        )
    try:
        check_disk_space(folder, needs)
    except RunFolderError as error:
        ranges = f"{inputs.config.folds} ranges are enough (now {inputs.num_ranges})"
        raise ConfigError(
            f"{error} {ranges}; a smaller operator (operator.name=ghost) has smaller sums."
        ) from error
    return needs


def _cluster_note(run: RunShape, choice: EngineChoice) -> str:
    share = "share the windows and one reading"
    if choice.kind != "streaming":
        share = f"keep {KEPT_BY_SHARDING:.0%} of the forward's rate where they share a layer"
    return (
        f"cluster: every device is taken to be as fast as this one, {num_replicas(run)} replicas "
        f"of {run.inputs.config.engine.ranks} ranks, which {share}"
    )
