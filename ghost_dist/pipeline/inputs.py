"""Everything a run needs, opened and checked before any work: fail in seconds, not in hours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ghost_dist.calibration.corpora import absolute_source
from ghost_dist.calibration.windows import PUBLISHED, TokenWindows, build_windows, published_windows
from ghost_dist.checkpoint.architecture import (
    Architecture,
    check_cut,
    check_some_cut,
    inspect_architecture,
)
from ghost_dist.checkpoint.halves import check_halves
from ghost_dist.checkpoint.load import (
    load_causal_lm,
    load_tokenizer,
    truncated_config,
)
from ghost_dist.checkpoint.reader import (
    Checkpoint,
    model_fingerprint,
    open_checkpoint,
    resolve_checkpoint,
)
from ghost_dist.config import Config
from ghost_dist.devices import free_bytes, open_device, total_bytes
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.resident import ResidentEngine, check_stream, load_decoder
from ghost_dist.engines.sharding import check_degree
from ghost_dist.errors import RunFolderError
from ghost_dist.evaluation.harness import HarnessTask, open_tasks
from ghost_dist.pipeline.automatic import batch_of, compute_dtype, count_ranges
from ghost_dist.pipeline.candidates import candidates_of, few_tokens, searches_ridge
from ghost_dist.pipeline.fitting import fit_room
from ghost_dist.pipeline.layer_times import request_seconds
from ghost_dist.pipeline.refittable import refittable_layers
from ghost_dist.pipeline.selecting import PaperScores
from ghost_dist.pipeline.targets import Amount, Times, open_amount, rules_of
from ghost_dist.progress import Reporter
from ghost_dist.solver.operators import refits_down
from ghost_dist.spans import Span


@dataclass(frozen=True)
class RunInputs:
    """What a run works on; every field has been checked against the others."""

    config: Config
    source: Checkpoint
    architecture: Architecture
    tokenizer: Any
    model_fingerprint: str
    device: torch.device
    """What this process computes on."""
    fit_device: torch.device
    """What this process fits on, and ..."""
    fit_room: int
    """... bytes of the largest fit there; larger ones go to the CPU. 0: it is the CPU."""
    worker_device: torch.device
    """What the windows are run on: this process's, or the kind that a cluster has."""
    dtype: torch.dtype
    batch: int
    num_ranges: int
    amount: Amount
    """How much goes; its selection is the configuration's."""
    refittable: frozenset[int]
    """Layers whose down_proj can be refitted; empty where nobody asks."""
    evaluation: dict[str, TokenWindows]
    tasks: tuple[HarnessTask, ...]
    """Of lm-evaluation-harness."""
    streaming: bool
    """Whether this process never holds the model, but reads layer after layer: as configured until
    ``engine.with_engine`` has decided."""
    loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The whole uncut model, while it is kept between uses, and ..."""
    keeps: bool = False
    """... that it is, whatever it takes."""

    def at(self, amount: Amount) -> RunInputs:
        """The same where one of the other amounts goes."""
        config = self.config.model_copy(update={"selection": amount.selection})
        amount = replace(amount, others=self.amount.others, times=self.amount.times)
        return replace(self, config=config, amount=amount)

    @property
    def numerics(self) -> dict[str, Any]:
        """What decides the numbers besides model and tokens; part of every fingerprint."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.worker_device.type,
            "batch": self.batch,
            "engine": self.engine_kind,
            "tensor_parallel": self.config.engine.tensor_parallel,
            **({"data_parallel": ranks} if (ranks := self.config.engine.data_parallel) > 1 else {}),
            **({"compiled": True} if self.compiled else {}),
        }

    @property
    def engine_kind(self) -> str:
        """Whole layers (offloaded ones compute the same), or shards."""
        engine = self.config.engine
        if engine.kind in ("resident", "streaming") or not self.config.on_cluster:
            return "resident"
        return "tensor_parallel by deepspeed"

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled: on a GPU, where it is asked for."""
        return self.config.engine.compile and self.worker_device.type == "cuda"


def with_bos(config: Config, architecture: Architecture, warn: Callable[[str], None]) -> Config:
    """Gemma's residual stream is degenerate without BOS, and nothing else would say so."""
    wanted, gemma = config.calibration.window_bos, "gemma" in architecture.model_type
    if gemma and wanted is False:
        warn(
            f"{architecture.model_type} models expect every window to begin with BOS; their "
            "perplexity without it means little. Leave calibration.window_bos at auto."
        )
    begins = gemma if wanted == "auto" else wanted
    calibration = config.calibration.model_copy(update={"window_bos": begins})
    return config.model_copy(update={"calibration": calibration})


def with_absolute_paths(config: Config) -> Config:
    """The configuration of the same local files from any working directory, as RUN keeps it."""
    model = Path(config.model.path).expanduser()
    corpora = {name: absolute_source(text) for name, text in config.evaluation.corpora.items()}
    calibration, path = config.calibration, config.output.callback
    times = config.selection.layer_times
    sources = {absolute_source(text): share for text, share in calibration.sources.items()}
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(model.absolute())} if model.is_dir() else {},
        "calibration": {"source": absolute_source(calibration.source), "sources": sources},
        "selection": {"layer_times": times and absolute_source(times)},
        "evaluation": {"corpora": corpora},
        "output": {"callback": path and absolute_source(path)},
    }
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=fields)
            for name, fields in sections.items()
        }
    )


def open_inputs(
    config: Config,
    reporter: Reporter,
    *,
    any_operator: bool = False,
    evaluates: bool = True,
    worker_device: Callable[[], torch.device] | None = None,
    times: Times | None = None,
    measure: Callable[[Config, Checkpoint, Architecture], Times] = request_seconds,
) -> RunInputs:
    """Open the checkpoint, the tokenizer and the evaluation texts, and check all of the config.

    With ``any_operator`` operators other than the configured one are going to be asked for; texts
    and tasks of the evaluation are only opened where it ``evaluates``.
    ``worker_device`` says what other processes compute on; None: this process runs the windows.
    ``times``: of layers, where they were measured before; else ``measure`` does where they are
    needed.
    """
    source, architecture, amount = open_model(config, times, measure)
    config = with_bos(config, architecture, reporter.warn)
    for note in source.notes:
        reporter.warn(note)
    if worker_device is None:
        device = workers = open_device(config.engine.device)
    else:
        device, workers = open_device("auto"), worker_device()
    count_ranges(config)  # refused before anything is read
    tokenizer = load_tokenizer(source.path, trust_remote_code=config.model.trust_remote_code)
    evaluation = {
        name: _evaluation_windows(config, corpus, tokenizer, architecture.vocab_size)
        for name, corpus in config.evaluation.corpora.items()
        if evaluates
    }
    tasks = open_tasks(
        config.evaluation.tasks if evaluates and not any_operator else (),
        num_fewshot=config.evaluation.num_fewshot,
        limit=config.evaluation.limit,
    )
    chooses = config.selection.searches or searches_ridge(config.operator)
    if len(config.calibration.sources) < 2 and not any_operator and chooses:
        _say_once_that_there_is_one_source(config, reporter)
    refittable = refittable_layers(config, source, architecture, any_operator=any_operator)
    if not any_operator:
        _say_if_few_tokens(config, architecture, refittable, reporter)
    return assembled(
        config,
        source,
        architecture,
        amount,
        device,
        workers,
        tokenizer=tokenizer,
        model_fingerprint=model_fingerprint(source),
        refittable=refittable,
        evaluation=evaluation,
        tasks=tasks,
    )


def assembled(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    amount: Amount,
    device: torch.device,
    workers: torch.device,
    **opened: Any,
) -> RunInputs:
    """The inputs, with what follows from the configuration and the devices; for ``plan`` too."""
    return RunInputs(
        config=config.model_copy(update={"selection": amount.selection}),
        source=source,
        architecture=architecture,
        device=device,
        fit_device=device,
        fit_room=fit_room(device),
        worker_device=workers,
        dtype=compute_dtype(config, source, workers),
        batch=batch_of(config, workers),
        num_ranges=count_ranges(config),
        amount=amount,
        streaming=config.engine.kind == "streaming",
        **opened,
    )


def _evaluation_windows(
    config: Config, corpus: str, tokenizer: Any, vocab_size: int
) -> TokenWindows:
    windows, length = config.evaluation.windows, config.evaluation.window_length
    cut: dict[str, Any] = {"windows": windows, "window_length": length, "vocab_size": vocab_size}
    if corpus in PUBLISHED:
        return published_windows(PUBLISHED[corpus], tokenizer, **cut)
    bos = config.calibration.window_bos is True
    return build_windows(corpus, tokenizer, split="test", window_bos=bos, **cut)


def open_model(
    config: Config,
    times: Times | None = None,
    measure: Callable[[Config, Checkpoint, Architecture], Times] = request_seconds,
) -> tuple[Checkpoint, Architecture, Amount]:
    """Headers and architecture of the model, checked against what is to be removed.

    And how much that is; ``times`` of layers that are known already are not measured again.
    """
    model = config.model
    path = resolve_checkpoint(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    source = open_checkpoint(path)
    architecture = inspect_architecture(source)
    selection = config.selection
    amount = Amount(None, selection)
    if selection.sublayers:
        architecture = with_halves(source, architecture)
    if selection.given:
        spans, halves = selection.removal(architecture.num_layers)
        check_cut(architecture, source.config, spans)
        check_halves(architecture, source.config, spans, halves)
    else:
        amount = open_amount(config, source, architecture, times, measure)
        assert amount.layers is not None
        if selection.criterion == "search":
            for one in (amount, *amount.others):
                rules_of(one, architecture.num_layers)
        else:
            scores = PaperScores(amount.layers, selection.protect, architecture)
            check_some_cut(architecture, source.config, ([span] for span in scores.candidates()))
    if config.engine.tensor_parallel > 1:
        whole = truncated_config(source, architecture, architecture.num_layers)
        check_degree(whole, config.engine.tensor_parallel)
    return source, architecture, amount


def open_engine(inputs: RunInputs, num_layers: int) -> ResidentEngine:
    """The run's engine over layers ``0 .. num_layers - 1``, or over all where they are kept."""
    if not inputs.compiled and keeps_model(inputs):
        decoder = LayerwiseModel(open_causal_lm(inputs), inputs.architecture)
        check_stream(decoder)
        return ResidentEngine(decoder, inputs.batch)
    decoder = load_decoder(
        inputs.source.path, inputs.architecture, num_layers, inputs.dtype, inputs.device
    )
    return ResidentEngine(decoder, inputs.batch, compiled=inputs.compiled)


def open_causal_lm(inputs: RunInputs, *, own: bool = False) -> Any:
    """The whole uncut model with its head, on the run's device; its ``own``: who may change it."""
    model = inputs.loaded.pop("model", None)
    if model is None:
        model = load_causal_lm(inputs.source.path, dtype=inputs.dtype, device=inputs.device)
    if not own and keeps_model(inputs):
        inputs.loaded["model"] = model
    return model


def keeps_model(inputs: RunInputs) -> bool:
    """Whether the model stays on the device between uses: where it takes a quarter at most."""
    if inputs.keeps:
        return True
    room = total_bytes(inputs.device) or free_bytes(inputs.device)
    return 4 * inputs.source.num_parameters * inputs.dtype.itemsize <= room


def disk_needs(
    statistics_bytes: int, num_spans: int, hidden_size: int, checkpoint_bytes: int
) -> dict[str, int]:
    """Bytes that calibration and what follows it write into the RUN folder, by what they are."""
    return {
        "statistics": statistics_bytes,
        "operators": 2 * num_spans * hidden_size * hidden_size * 8,
        "checkpoint": checkpoint_bytes,
    }


def check_disk_space(folder: Path, needs: Mapping[str, int]) -> None:
    """Refuse a run whose files will not fit, before it starts; ``needs`` by what they are."""
    needed = sum(needs.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        parts = ", ".join(f"{name} {nbytes / 1e9:.2f}" for name, nbytes in needs.items())
        raise RunFolderError(
            f"Not enough disk space at {folder}: about {needed / 1e9:.2f} GB needed ({parts}), "
            f"{free / 1e9:.2f} GB free. Free some, choose another --out, or give fewer "
            "calibration.ranges."
        )


def _say_once_that_there_is_one_source(config: Config, reporter: Reporter) -> None:
    """But not of the demo's texts, which lie in RUN and are nobody's choice."""
    run, said = Path(config.output.path).expanduser().absolute(), "There is one source of "
    events = run / "events.jsonl"
    if run in Path(config.calibration.source).parents or (
        events.exists() and said in events.read_text(encoding="utf-8", errors="replace")
    ):
        return
    reporter.warn(
        f"{said}calibration text, so what is chosen is judged on pieces of it, each left out of "
        "the fit, and on no other text. Give several, of the kinds in use: "
        "--set 'calibration.sources={FILE: 0.5, OTHER: 0.5}'."
    )


def _say_if_few_tokens(
    config: Config, architecture: Architecture, refittable: frozenset[int], reporter: Reporter
) -> None:
    """Before the work what the report says behind it; spans still to be found may be any."""
    spans = config.selection.spans or [
        Span(layer + 1, layer + 2)
        for layer in sorted(refittable)
        if layer + 1 < architecture.num_layers
    ]
    if not spans and refits_down(config.operator.name):
        return  # refused once the spans are known
    spans = spans or [Span(0, 1)]
    candidates = candidates_of(config.operator, spans, refittable)
    if few := few_tokens(config.calibration, candidates, spans, architecture, refittable):
        reporter.say(f"note: {few}")
