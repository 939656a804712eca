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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ghost_dist.calibration.windows import build_windows
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import (
    load_tokenizer,
    truncated_config,
)
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.devices import (
    SHARE_OF_FREE_MEMORY,
    device_name,
    free_bytes,
    host_free_bytes,
    open_device,
)
from ghost_dist.engines.tensor_parallel import check_degree
from ghost_dist.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    UnsupportedArchitectureError,
)
from ghost_dist.pipeline.candidates import (
    FINE_SHIFTS,
    NEEDS_DOWN_PROJ,
    SHIFTS,
    candidates_of,
    few_tokens,
    samples_of,
    searches_ridge,
)
from ghost_dist.pipeline.inputs import (
    batch_of,
    compute_dtype,
    count_ranges,
    disk_needs,
    open_model,
    refittable_layers,
)
from ghost_dist.pipeline.searching import search_shape
from ghost_dist.pipeline.selecting import Selector
from ghost_dist.pipeline.solving import num_judges
from ghost_dist.planning.engine_choice import DeviceNeeds, EngineChoice, choose_engine
from ghost_dist.planning.memory import asked_bytes, device_needs, host_bytes, streams_bytes
from ghost_dist.planning.model_sizes import ModelSizes, model_sizes
from ghost_dist.planning.probe import ProbeSpec, measure
from ghost_dist.planning.probe_files import cached_share, existing_folder
from ghost_dist.planning.rates import Rates, store_rates, stored_rates
from ghost_dist.planning.run_shape import RunShape, SampleShape, SearchShape, SelectionShape
from ghost_dist.planning.stage_work import Cache, work_of_stages
from ghost_dist.planning.work import Work
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import RIDGE_GRID
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors
from ghost_dist.statistics.sum_costs import moments_bytes, num_regressors, saved_by_strips

TOKENS_PER_BYTE = 0.25
"""Of text whose tokens cannot be counted."""
KEPT_BY_SHARDING = 0.8
"""Share of the forward's rate that ranks keep that wait for each other; assumed, not measured."""
_COUNTED_BYTES = 64 << 20  # texts up to here are cut into tokens to know their number


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes
    ----------
    name
        As in ``result.json``.
    seconds, parts
        Predicted, and what they go into.
    flops, read_bytes, written_bytes
        Products; bytes of the checkpoint read; bytes written.
    device_bytes, host_bytes
        At most, beside what libraries take.
    streams
        Where activations wait between layers (streaming): device, host or disk; else empty.
    """

    name: str
    seconds: float
    parts: Mapping[str, float]
    flops: int
    read_bytes: int
    written_bytes: int
    device_bytes: int
    host_bytes: int
    streams: str


@dataclass(frozen=True)
class Plan:
    """What ``ghost-dist plan`` says.

    Attributes
    ----------
    model, num_layers, spans, spans_known, dtype, batch
        What is run.
    device, free_device_bytes, free_host_bytes, free_disk_bytes
        Where.
    engine
        What runs it, and why.
    stages
        In order.
    disk_bytes
        Of the RUN folder when it is largest, by what they are.
    notes
        What was assumed.
    rates
        What the seconds come from.
    """

    model: str
    num_layers: int
    spans: tuple[Span, ...]
    spans_known: bool
    dtype: str
    batch: int
    device: str
    free_device_bytes: int
    free_host_bytes: int
    free_disk_bytes: int
    engine: EngineChoice
    stages: tuple[StagePlan, ...]
    disk_bytes: Mapping[str, int]
    notes: tuple[str, ...]
    rates: Rates

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
    """Plan a run.

    Parameters
    ----------
    config
        The whole run, as ``recover`` takes it.
    reporter
        Where it says that it measures.
    measure_again
        Measure the machine although it was measured before.

    Raises
    ------
    ConfigError
        If the run cannot fit: with the bytes needed, the bytes free, and what would fit.
    GhostDistError
        As ``recover`` raises before it works.
    """
    reporter = reporter or Reporter()
    source, architecture, remove = open_model(config)
    notes = [*source.notes]
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
            f"{', '.join(map(str, run.spans))}, the dearest that {remove} layers can be"
        )
    if config.selection.searches:
        notes.append("select is reckoned with all of its budget; a search may end before")
    candidates = candidates_of(config.operator, run.spans, refittable)
    if few := few_tokens(config.calibration, candidates, run.spans, architecture, refittable):
        notes.append(few)
    folder = existing_folder(Path(config.output.path))
    choice = choose(
        config.engine.kind,
        config,
        source,
        architecture,
        run,
        device,
        whole=None if config.needs_whole_model is None else config.needs_whole_model[0],
    )
    disk = _disk(config, run, choice, folder)
    spec = _probe_spec(config, source, architecture, run, device, dtype, folder)
    rates = None if measure_again else stored_rates(spec.key())
    if rates is None:
        reporter.say("measuring this machine (once; plan --measure does it again) ...")
        rates = measure(spec)
        store_rates(spec.key(), rates)
    stages = _stages(config, source, run, choice, rates, dtype, device, tokens_s, notes)
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
        stages=stages,
        disk_bytes=disk,
        notes=tuple(notes),
        rates=rates,
    )


def run_shape(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    sizes: ModelSizes,
    device: torch.device,
    *,
    remove: int | None,
    refittable: frozenset[int],
    evaluation_tokens: Mapping[str, int],
) -> RunShape:
    """The run in numbers: of ``plan``, and of ``recover`` before it begins.

    Parameters
    ----------
    config, source, architecture, sizes
        Of the run.
    device
        Of the windows.
    remove
        Number of layers to remove, where no spans are given.
    refittable
        Layers whose down_proj can be refitted.
    evaluation_tokens
        Of each corpus.
    """
    calibration, operator = config.calibration, config.operator
    spans = config.selection.spans
    known = spans is not None
    if spans is None:
        assert remove is not None
        spans = _dearest_spans(
            remove, config.selection.most_spans or remove, architecture.num_layers
        )
    candidates = candidates_of(operator, spans, refittable)
    samples = samples_of(candidates, spans, refittable)
    num_tokens = calibration.windows * calibration.window_length
    c = architecture.hidden_size
    width = 0 if operator.name in ("none", "fold", "replaceme") else c
    forms = 1 + any(c.features == "stream+norm" for c in candidates)
    searched = searches_ridge(operator)
    by_kl = operator.choose == "kl" and len(candidates) > 1
    return RunShape(
        sizes=sizes,
        num_tensors=len(source.tensors),
        num_windows=calibration.windows,
        window_length=calibration.window_length,
        batch=batch_of(config, device),
        num_ranges=count_ranges(config),
        folds=operator.folds,
        selection=_selection(config, remove, architecture, sizes, device),
        spans=tuple(spans),
        spans_known=known,
        samples=tuple(
            _sample(span, kind.regressors, architecture, config.engine.ranks)
            for span, kind in samples
        ),
        searches=_searches(candidates, spans, architecture, refittable),
        ridges=len(RIDGE_GRID) if operator.ridge == "auto" else 1,
        shifts=len(SHIFTS) if searched else 1,
        fine_shifts=len(FINE_SHIFTS) if searched else 0,
        by_kl=by_kl,
        judging_folds=num_judges(num_tokens, operator.folds),
        plain_cut=len(candidates) > 1 and any(c.operator == "none" for c in candidates),
        final_folds=operator.folds - config.judges_behind_the_fit(len(spans)),
        refits=len(spans) - 1 if operator.refit == "sequential" else 0,
        heal=operator.heal,
        first_changed=max(0, spans[0].start - (candidates[0].operator in NEEDS_DOWN_PROJ)),
        inner_sizes=architecture.inner_sizes,
        evaluation_tokens=evaluation_tokens,
        operator_bytes=len(spans) * forms * width * c * source.dtype.itemsize,
    )


def _dearest_spans(remove: int, max_spans: int, num_layers: int) -> tuple[Span, ...]:
    """Spans at the end of the model, as many as are allowed: most layers run, most sums taken."""
    count = max(1, min(max_spans, remove, num_layers - remove))
    stop, left, spans = num_layers, remove, []
    for number in range(count):
        length = -(-left // (count - number))
        spans.append(Span(stop - length, stop))
        stop, left = stop - length - 1, left - length
    return tuple(sorted(spans))


def _inner(architecture: Architecture, span: Span) -> int:
    return architecture.inner_sizes.get(span.start - 1, 0)


def _searches(
    candidates: list[Any],
    spans: tuple[Span, ...],
    architecture: Architecture,
    refittable: frozenset[int],
) -> tuple[SearchShape, ...]:
    """By span and least squares: how many candidates, not counting the shifts of a ridge."""
    searches = []
    for span in spans:
        width, inner = architecture.hidden_size, _inner(architecture, span)
        forms: dict[tuple[Regressors, int], set[Any]] = {}
        for candidate in candidates:
            here = replace(candidate.at(span, refittable), shift=0.0)
            kind = here.kind()
            if kind is not None and kind.regressors != "absolute":
                size = {"fold": inner, "replaceme": width}.get(
                    here.operator, num_regressors(kind.regressors, width, inner)
                )
                forms.setdefault((kind.regressors, size), set()).add(here)
        for (regressors, size), found in forms.items():
            searches.append(SearchShape(span, regressors, size, len(found)))
    return tuple(searches)


def _sample(
    span: Span, regressors: Regressors, architecture: Architecture, blocks: int
) -> SampleShape:
    width, inner = architecture.hidden_size, _inner(architecture, span)
    size = 0 if regressors == "absolute" else num_regressors(regressors, width, inner)
    nbytes = moments_bytes(regressors, width, inner)
    return SampleShape(span, regressors, size, nbytes, nbytes - saved_by_strips(size, blocks))


def _selection(
    config: Config,
    remove: int | None,
    architecture: Architecture,
    sizes: ModelSizes,
    device: torch.device,
) -> SelectionShape | None:
    if remove is None:
        return None
    selector = Selector(config.selection, remove, architecture)
    if config.selection.criterion != "recoverability":
        searches = config.selection.searches
        search = search_shape(config, remove, architecture) if searches else None
        return SelectionShape({}, None, 0, 0, 1, search)
    # Weights are there before the sums: what they leave is what the run will see as free.
    free = free_bytes(device)
    left = free - sizes.decoder_bytes(architecture.num_layers)
    return SelectionShape(
        stops_of=selector.stops_of(),
        columns=selector.columns,
        start_bytes=selector.start_bytes(),
        start_stored_bytes=selector.start_stored_bytes(config.engine.ranks),
        starts_at_once=selector.starts_at_once(left if left > 0 else free),
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
        if tokenizer is None or not _is_small_file(text):
            return None
        try:
            built = build_windows(
                text,
                tokenizer,
                windows=windows,
                window_length=length,
                seed=calibration.seed,
                special_tokens=False,
                window_bos=False,
                sampling=sampling,
                vocab_size=architecture.vocab_size,
            )
        except CalibrationError:
            return None
        return built.num_windows

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


def _is_small_file(text: str) -> bool:
    path = Path(text).expanduser()
    return path.is_file() and path.stat().st_size <= _COUNTED_BYTES


def choose(
    kind: Literal["auto", "resident", "tensor_parallel", "streaming"],
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    run: RunShape,
    device: torch.device,
    *,
    whole: str | None,
) -> EngineChoice:
    """The engine of a run, by what is free on its device now; see ``choose_engine``.

    Raises
    ------
    ConfigError
        If none that is allowed fits.
    """
    model_config = truncated_config(source, architecture, architecture.num_layers)
    degrees = [degree for degree in (2, 4, 8, 16, 32, 64) if _divides(model_config, degree)]
    degree = config.engine.tensor_parallel
    needs = device_needs(run, on_cluster=config.on_cluster, degrees=degrees, degree=degree)
    if device.type == "cpu":
        needs = _with_host(needs, run, _ranks(config))
    return choose_engine(
        kind,
        on_cluster=config.on_cluster,
        needs=needs,
        free_bytes=free_bytes(device),
        where=device_name(device),
        experts=config.engine.experts,
        whole=whole,
    )


def _divides(whole: Any, degree: int) -> bool:
    try:
        check_degree(whole, degree)
    except ConfigError:
        return False
    return True


def _ranks(config: Config) -> int | None:
    """Of a replica; None where there are none."""
    return config.engine.ranks if config.on_cluster else None


def _with_host(needs: DeviceNeeds, run: RunShape, ranks: int | None) -> DeviceNeeds:
    """On a CPU the device's memory is the host's, so what waits there adds to it."""

    def add(by_stage: Mapping[str, int], engine: str) -> dict[str, int]:
        return {
            name: nbytes + host_bytes(run, name, engine, copies=0)
            for name, nbytes in by_stage.items()
        }

    return replace(
        needs,
        resident=add(needs.resident, "resident"),
        tensor_parallel={
            n: add(of_rank, "tensor_parallel") for n, of_rank in needs.tensor_parallel.items()
        },
        streaming={
            held: {
                name: nbytes + (held.experts is not None and asked_bytes(run, name, ranks))
                for name, nbytes in add(by_stage, "streaming").items()
            }
            for held, by_stage in needs.streaming.items()
        },
    )


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


def _stages(
    config: Config,
    source: Checkpoint,
    run: RunShape,
    choice: EngineChoice,
    rates: Rates,
    dtype: torch.dtype,
    device: torch.device,
    tokens_s: float,
    notes: list[str],
) -> tuple[StagePlan, ...]:
    free_host = host_free_bytes()
    keeps = (
        run.sizes.stored_bytes + choice.device_bytes.get("calibrate", 0) * (device.type == "cpu")
        < SHARE_OF_FREE_MEMORY * free_host
    )
    cache = Cache(cached_share(source), keeps)
    works = work_of_stages(
        run,
        choice.kind,
        cache,
        tokens_s,
        keeps_sums=device.type == "cpu",
        prefetch=choice.prefetch,
        experts=choice.experts,
    )
    compute = str(dtype).removeprefix("torch.")
    replicas = 1 if config.engine.replicas == "auto" else config.engine.replicas
    if config.on_cluster:
        notes.append(
            f"cluster: every device is taken to be as fast as this one, {replicas} replicas of "
            + (
                f"{config.engine.ranks} ranks, which share the windows and one reading"
                if choice.kind == "streaming"
                else f"{config.engine.ranks} ranks, which keep {KEPT_BY_SHARDING:.0%} of the "
                "forward's rate where they share a layer"
            )
        )
    plans = []
    for name, work in works.items():
        if not config.on_cluster or name not in ("select", "calibrate"):
            parts = work.seconds(rates, compute)
        elif choice.kind == "streaming":
            ranges = run.folds if name == "select" else run.num_ranges
            ranks = config.engine.ranks
            parts = _streamed_by_replicas(work, ranges, replicas, ranks).seconds(rates, compute)
            parts |= {
                "sums": parts["sums"] / (replicas * ranks),
                "store": parts["store"] / replicas,
            }
        else:
            parts = _shared(work.seconds(rates, compute), config.engine.tensor_parallel, replicas)
        device_bytes = choice.device_bytes.get(name, 0)
        host = 0
        if name in choice.device_bytes and device.type != "cpu":
            copies = 2 if config.on_cluster else 1
            host = host_bytes(run, name, choice.kind, copies=copies)
        streams = ""
        if choice.kind == "streaming" and name in choice.device_bytes:
            waiting = streams_bytes(run, name, _ranks(config))
            streams, device_bytes, host = _place(waiting, device, device_bytes, host, free_host)
        if choice.experts is not None and streams and device.type != "cpu":
            asked = asked_bytes(run, name, _ranks(config))
            if device_bytes + asked <= SHARE_OF_FREE_MEMORY * free_bytes(device):
                device_bytes += asked
            elif host + asked <= SHARE_OF_FREE_MEMORY * free_host:
                host += asked
            else:
                raise ConfigError(
                    f"Stage {name} needs {(host + asked) / 1e9:.2f} GB of host memory, "
                    f"{asked / 1e9:.2f} GB of it for what a layer's experts are asked and answer "
                    f"(engine.experts), but {free_host / 1e9:.2f} GB are free, of which "
                    f"{SHARE_OF_FREE_MEMORY:.0%} may be filled. Take fewer calibration.windows or "
                    "evaluation.windows, or more memory."
                )
        if host > SHARE_OF_FREE_MEMORY * free_host:
            raise ConfigError(
                f"Stage {name} needs {host / 1e9:.2f} GB of host memory, but "
                f"{free_host / 1e9:.2f} GB are free, of which {SHARE_OF_FREE_MEMORY:.0%} may be "
                "filled. Take operator.name=ghost (sums of C^2 instead of (C + F)^2), or more "
                "memory."
            )
        plans.append(_stage_plan(name, work, parts, device_bytes, host, streams))
    return tuple(plans)


def _place(
    nbytes: int, device: torch.device, device_bytes: int, host: int, free_host: int
) -> tuple[str, int, int]:
    """streaming: where activations wait between layers, and the bytes with them."""
    if device_bytes + nbytes <= SHARE_OF_FREE_MEMORY * free_bytes(device):
        return "device", device_bytes + nbytes, host
    if device.type != "cpu" and host + nbytes <= SHARE_OF_FREE_MEMORY * free_host:
        return "host", device_bytes, host + nbytes
    return "disk", device_bytes, host


def _shared(parts: Mapping[str, float], degree: int, replicas: int) -> dict[str, float]:
    """Seconds of what replicas of several ranks share; each reads for itself."""
    keep = KEPT_BY_SHARDING if degree > 1 else 1.0
    divisors = {"forward": replicas * degree * keep, "sums": replicas * degree, "store": replicas}
    return {name: seconds / divisors.get(name, 1) for name, seconds in parts.items()}


def _streamed_by_replicas(work: Work, ranges: int, replicas: int, ranks: int) -> Work:
    """Reading and the forward of the replica with most ranges, each a sweep of its own.

    Its ranks share the windows, and what is read once between them: they are taken to share a disk.
    What is read is set in ``work`` too; its FLOPs stay those of all replicas.
    """
    sweeps = -(-ranges // replicas)
    work.read_bytes *= sweeps
    work.load_bytes *= sweeps
    work.load_tensors *= sweeps
    return replace(
        work,
        layers=[(layer, tokens * sweeps // (ranges * ranks)) for layer, tokens in work.layers],
        forwards=work.forwards * sweeps / (ranges * ranks),
    )


def _stage_plan(
    name: str,
    work: Work,
    parts: Mapping[str, float],
    device_bytes: int,
    host: int,
    streams: str,
) -> StagePlan:
    return StagePlan(
        name=name,
        seconds=sum(parts.values()),
        parts=parts,
        flops=work.flops,
        read_bytes=work.read_bytes,
        written_bytes=work.written_bytes + work.commit_bytes,
        device_bytes=device_bytes,
        host_bytes=host,
        streams=streams,
    )
