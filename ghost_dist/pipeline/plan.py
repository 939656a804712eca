"""``ghost-dist plan``: a run's bytes, FLOPs and seconds from headers, and the engine it gets.

Reads ``config.json``, the safetensors headers and, where there is a tokenizer, some text; of the
weights nothing, except that a first look at a machine reads pieces of the files to see how fast
they come. What the headers do not say is assumed, and said in the plan's notes.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ghost_dist.calibration.windows import build_windows
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import load_tokenizer
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.devices import device_name, free_bytes, host_free_bytes, open_device
from ghost_dist.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    UnsupportedArchitectureError,
)
from ghost_dist.pipeline.automatic import compute_dtype
from ghost_dist.pipeline.candidates import candidates_of, few_tokens
from ghost_dist.pipeline.engine import choose
from ghost_dist.pipeline.fitting import fit_room
from ghost_dist.pipeline.inputs import disk_needs, open_model, refittable_layers
from ghost_dist.pipeline.sizing import run_shape
from ghost_dist.pipeline.stage_plans import StagePlan, cluster_note, plan_stages
from ghost_dist.planning.engine_choice import EngineChoice
from ghost_dist.planning.memory import streams_bytes
from ghost_dist.planning.model_sizes import model_sizes
from ghost_dist.planning.probe import ProbeSpec, measure
from ghost_dist.planning.probe_files import existing_folder
from ghost_dist.planning.rates import Rates, store_rates, stored_rates
from ghost_dist.planning.run_shape import RunShape
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import fit_bytes
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors

TOKENS_PER_BYTE = 0.25
"""Of text whose tokens cannot be counted."""
_COUNTED_BYTES = 64 << 20  # texts up to here are cut into tokens to know their number


@dataclass(frozen=True)
class Plan:
    """What ``ghost-dist plan`` says."""

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
    rates: Rates  # what the seconds come from

    def tree(self) -> dict[str, Any]:
        """Plain values, as ``--json`` prints them."""
        tree = dataclasses.asdict(self)
        tree["spans"] = [[span.start, span.stop] for span in self.spans]
        tree["seconds"] = sum(stage.seconds for stage in self.stages)
        tree["flops"] = sum(stage.flops for stage in self.stages)
        return tree


def plan_run(
    config: Config, reporter: Reporter | None = None, *, measure_again: bool = False
) -> Plan:
    """Plan a run as ``recover`` takes it, or refuse it with the bytes needed and free."""
    reporter = reporter or Reporter()
    source, architecture, remove = open_model(config)
    notes = [*source.notes]
    folder = existing_folder(Path(config.output.path))
    device = open_device(config.engine.device)
    dtype = compute_dtype(config, source, device)
    sizes = model_sizes(source, architecture, dtype)
    try:
        refittable = refittable_layers(config, source, architecture)
    except UnsupportedArchitectureError:
        refittable = frozenset(architecture.down_projections)
        notes.append("no small model of the family could be built; taken to allow ghost-joint")
    tokens_s, evaluation = _texts(config, source, architecture, notes)
    run = run_shape(
        config,
        source,
        architecture,
        sizes,
        device,
        remove=remove,
        refittable=refittable,
        evaluation_tokens=evaluation,
    )
    if not run.spans_known:
        notes.append(
            "the spans are not known before they are selected; reckoned with "
            f"{', '.join(map(str, run.spans))}, the costliest that {remove} layers can be"
        )
    if config.selection.searches:
        notes.append("select is reckoned with all of its budget; a search may end before")
    candidates = candidates_of(config.operator, run.spans, refittable)
    if few := few_tokens(config.calibration, candidates, run.spans, architecture, refittable):
        notes.append(few)
    whole = config.needs_whole_model
    choice = choose(
        config.engine.kind,
        config,
        source,
        architecture,
        run,
        device,
        whole=None if whole is None else whole[0],
    )
    largest = max((sample.nbytes for sample in run.samples), default=0)
    if device.type == "cuda" and fit_bytes(run.folds * largest, run.folds) > fit_room(device):
        notes.append("the largest fits need more than all memory of the device: the CPU fits")
    disk = _disk(config, run, choice, folder)
    spec = _probe_spec(config, source, architecture, run, device, dtype, folder)
    rates = None if measure_again else stored_rates(spec.key())
    if rates is None:
        reporter.say("measuring this machine (once; plan --measure does it again) ...")
        rates = measure(spec)
        store_rates(spec.key(), rates)
    if config.on_cluster:
        notes.append(cluster_note(config, choice))
    if rates.read_from != "checkpoint":
        notes.append(
            f"the checkpoint's files hold no data; reading was measured on {rates.read_from}"
        )
    return Plan(
        model=config.model.path,
        num_layers=architecture.num_layers,
        spans=run.spans,
        spans_known=run.spans_known,
        dtype=str(dtype).removeprefix("torch."),
        batch=run.batch,
        device=device_name(device),
        free_device_bytes=free_bytes(device),
        free_host_bytes=host_free_bytes(),
        free_disk_bytes=shutil.disk_usage(folder).free,
        engine=choice,
        stages=plan_stages(config, source, run, choice, rates, dtype, device, tokens_s),
        disk_bytes=disk,
        notes=tuple(notes),
        rates=rates,
    )


def _texts(
    config: Config, source: Checkpoint, architecture: Architecture, notes: list[str]
) -> tuple[float, dict[str, int]]:
    """Seconds that calibration's tokens take, and the number of tokens of every corpus."""
    calibration, evaluation = config.calibration, config.evaluation
    try:
        tokenizer = load_tokenizer(source.path, trust_remote_code=config.model.trust_remote_code)
    except CheckpointError:
        tokenizer = None
        notes.append("there is no tokenizer: stage tokens is not predicted")

    def windows_of(
        text: str,
        windows: int | None,
        length: int,
        sampling: Literal["beginning", "spread"] = "beginning",
    ) -> int | None:
        path = Path(text).expanduser()
        if tokenizer is None or not path.is_file() or path.stat().st_size > _COUNTED_BYTES:
            return None
        try:
            return build_windows(
                text,
                tokenizer,
                windows=windows,
                window_length=length,
                seed=calibration.seed,
                special_tokens=False,
                window_bos=False,
                sampling=sampling,
                vocab_size=architecture.vocab_size,
            ).num_windows
        except CalibrationError:
            return None

    began = time.perf_counter()
    few = max(1, min(calibration.windows, (1 << 16) // calibration.window_length))
    found = windows_of(calibration.source, few, calibration.window_length, calibration.sampling)
    tokens_s = (time.perf_counter() - began) * calibration.windows / few
    if tokenizer is not None and found is None:
        notes.append(f"stage tokens is not predicted: {calibration.source} is not a local file")
    tokens: dict[str, int] = {}
    for name, text in evaluation.corpora.items():
        length = evaluation.window_length
        counted = windows_of(text, evaluation.windows, length)
        if counted is None:
            counted = evaluation.windows
        if counted is None:
            file = Path(text).expanduser()
            nbytes = file.stat().st_size if file.is_file() else 1 << 20
            counted = max(1, int(nbytes * TOKENS_PER_BYTE) // length)
            notes.append(f"corpus {name} is taken for {counted} windows of {length} tokens")
        tokens[name] = counted * length
    if evaluation.tasks:
        notes.append("evaluation.tasks are not predicted")
    return (tokens_s if found is not None else 0.0), tokens


def _disk(config: Config, run: RunShape, choice: EngineChoice, folder: Path) -> dict[str, int]:
    """What the RUN folder holds when it is largest; refused where there is no room for it."""
    needs = disk_needs(
        run.num_ranges,
        run.samples_stored_bytes,
        len(run.spans),
        run.sizes.hidden_size,
        run.kept_stored_bytes,
    )
    if run.selection is not None and run.selection.stops_of:
        # Removed once the spans are known.
        sums = run.folds * len(run.selection.stops_of) * run.selection.start_stored_bytes
        needs["statistics"] = max(needs["statistics"], sums)
    if choice.kind == "streaming" and not config.on_cluster:
        needs["streams"] = max(streams_bytes(run, stage) for stage in choice.device_bytes)
    free = shutil.disk_usage(folder).free
    needed = sum(needs.values())
    if needed > free:
        parts = ", ".join(f"{name} {nbytes / 1e9:.2f}" for name, nbytes in needs.items())
        fewer = (
            f"give fewer calibration.ranges (now {run.num_ranges}; {run.folds} are enough), "
            if run.num_ranges > run.folds
            else ""
        )
        raise ConfigError(
            f"The run needs about {needed / 1e9:.2f} GB of disk at {folder} ({parts}), but "
            f"{free / 1e9:.2f} GB are free. Choose another --out, {fewer}or a smaller operator "
            "(operator.name=ghost)."
        )
    return needs


def _probe_spec(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    run: RunShape,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> ProbeSpec:
    inner = max(run.inner_sizes.values(), default=0)
    kinds: dict[Regressors, int] = {sample.kind: inner for sample in run.samples}
    if config.operator.heal and inner:
        kinds["joint"] = inner
    selection = run.selection
    columns: int | None = 0
    if selection is not None and selection.stops_of:
        columns = selection.columns
    return ProbeSpec(
        checkpoint=source,
        architecture=architecture,
        sizes=run.sizes,
        device=device,
        dtype=dtype,
        batch=run.batch,
        window_length=run.window_length,
        inner_sizes=kinds,
        columns=columns,
        folder=folder,
    )
