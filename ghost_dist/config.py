"""Typed configuration of a run: its sections and their checks; ``config_file.py`` reads it.

A configuration is frozen once it is resolved; it is written to ``RUN/config.yaml`` and a run only
continues under an equal one. Unknown keys are errors that name the nearest known key. What depends
on the model (number of layers, hidden size) is checked where the model's headers are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ghost_dist.amounts import parse_amount, parse_size, parse_target, shown
from ghost_dist.engine_config import ClusterConfig, EngineConfig, Section
from ghost_dist.ridge import Ridge
from ghost_dist.spans import Span, Sublayer, check_units, parse_spans, parse_sublayers

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Criterion = Literal["search", "paper"]
OperatorName = Literal["ghost", "ghost-joint", "fold", "norm-linear", "none"]
_SHARES_TOLERANCE = 1e-6


class ModelConfig(Section):
    """Where the model is and how it is computed."""

    path: str = Field(min_length=1)
    """Local Hugging Face checkpoint folder (safetensors), or a hub id."""
    dtype: Dtype = "auto"
    """Compute dtype; auto: the checkpoint's on a GPU; on a CPU float32, or bfloat16 where it has
    instructions for it (AVX512-BF16, AMX) and the checkpoint is in bfloat16. A RUN keeps it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its default branch."""
    trust_remote_code: bool = False
    """Let a tokenizer that comes as Python code run. Model code from a checkpoint is never run."""


class CalibrationConfig(Section):
    """Which text the statistics are taken over."""

    source: str = Field(default="c4", min_length=1)
    """A .txt, .jsonl, .jsonl.gz or .parquet file, a folder of them, or a dataset
    ``NAME[:CONFIG[:SPLIT]]``, which is streamed; c4: allenai/c4."""
    sources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    """Several sources with their shares of the windows, in the place of ``source``, such as
    ``{web.jsonl: 0.75, code.txt: 0.25}``. What is chosen is judged on each in turn, fitted on the
    others; of one source, on pieces that are unlike the rest of it."""
    windows: int = Field(default=32, ge=1)
    """Number of windows; none holds padding."""
    window_length: int = Field(default=2048, ge=2)
    """Tokens per window."""
    sampling: Literal["spread", "beginning"] = "spread"
    """spread: windows from evenly spaced places of the whole of a file or folder. beginning: the
    first tokens of a file; a folder through a shuffle buffer, as datasets of the hub always are."""
    seed: int = 0
    """Places of spread windows; order of the documents of a ``datasets`` source."""
    special_tokens: bool = False
    """Whether the tokenizer adds its own special tokens (BOS, EOS) to every document."""
    window_bos: Literal["auto"] | bool = "auto"
    """Whether each window, also in evaluation, begins with the BOS token; auto: of Gemma, which is
    at a loss without it."""
    ranges: int | None = Field(default=None, ge=1)
    """Window ranges, the unit of commit and retry; null: one per fold,
    two where a fold has more than 65,536 tokens."""

    @field_validator("sources")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if value and abs(sum(value.values()) - 1) > _SHARES_TOLERANCE:
            raise ValueError(
                f"the shares are of all windows and sum to {sum(value.values()):g}: "
                "give some that sum to 1"
            )
        return value

    @property
    def windows_of(self) -> dict[str, int]:
        """Windows of every source, in order."""
        shares = self.sources or {self.source: 1.0}
        ends = [0, *(round(share * self.windows) for share in accumulate(shares.values()))]
        return {source: b - a for source, (a, b) in zip(shares, pairwise(ends), strict=True)}


def _as_span(pair: Any) -> Span:
    if isinstance(pair, Span):
        return pair
    if isinstance(pair, Sequence) and len(pair) == 2 and all(type(i) is int for i in pair):
        return Span(*pair)
    raise ValueError(f"{shown(pair)} is not a [start, stop] pair of whole numbers")


class SelectionConfig(Section):
    """Which layers are removed."""

    criterion: Criterion = "search"
    """search: least KL divergence of the recovered model where the dense one is sure, searched for
    layer by layer, with operators in place; paper: the published code's score of one span, along
    the sequence, never the first or the last start: much cheaper."""
    remove: Annotated[int, Field(ge=1)] | str | None = None
    """How much to remove: layers (``7``), a share of all parameters (``20%``), or bytes of the
    exported checkpoint (``4GB``, ``512MiB``); net of the operators that come back."""
    target: str | None = None
    """In the place of ``remove``, what should come out: ``speedup 1.3`` times dense, of a request
    or of its ``prefill`` or ``decode`` (``speedup 1.3 decode``); at most ``kv 60%`` of the cache; a
    checkpoint of at most ``bytes 20GB``."""
    layer_times: str | None = None
    """For targets of speed, a file with what ``ghost-dist plan MODEL --target-speedup 1.3 --json``
    printed on the machine that will serve; null: layers are timed on this run's device."""
    pareto: tuple[int | str, ...] = ()
    """search: other sizes and targets, as ``remove`` or ``target`` takes them (``2,20%,kv 60%``),
    that are searched for too and stand in one table with the chosen one. In the same RUN another
    one can then be chosen by ``remove`` or ``target``, and is not searched for again."""
    spans: tuple[Annotated[Span, BeforeValidator(_as_span)], ...] | None = None
    """Explicit half-open spans, ``[[11, 18]]`` or ``11:18``, also several, also at 0 or up to the
    last layer; in the place of remove and target."""
    sublayers: tuple[str, ...] = ()
    """Explicit attentions and MLPs of layers that stay, ``attention:5,mlp:7``, beside ``spans`` or
    alone; in the place of remove and target."""
    max_spans: int | None = Field(default=None, ge=1)
    """search: most separate spans to remove; null: any number. paper removes one."""
    effort: Literal["quick", "normal", "thorough"] | Annotated[int, Field(ge=1)] = "normal"
    """search: normal removes layers one at a time and then exchanges them for 0.6 times as long, by
    an eighth of the calibration text (of 65,536 tokens at most); quick looks at the 12 likeliest
    layers each time, and exchanges for a quarter as long; thorough exchanges for three times as
    long, by a quarter. Or a number of evaluations (of a choice of layers on a window)."""
    protect: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers that stay whatever the criterion says."""

    @field_validator("remove", "target")
    @classmethod
    def _readable(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, str):
            (parse_size if field.field_name == "remove" else parse_target)(value)
        return value

    @field_validator("pareto", mode="before")
    @classmethod
    def _read_pareto(cls, value: Any) -> Any:
        text = value if isinstance(value, str) else shown(value)
        listed = value if isinstance(value, list | tuple) else text.split(",")
        return [parse_amount(one.strip() if isinstance(one, str) else shown(one)) for one in listed]

    @property
    def points(self) -> tuple[SelectionConfig, ...]:
        """The same for each of ``pareto`` in the place of what is chosen."""
        names = ["remove" if str(point)[0].isdigit() else "target" for point in self.pareto]
        none: dict[str, Any] = {"remove": None, "target": None, "pareto": ()}
        of = zip(names, self.pareto, strict=True)
        return tuple(self.model_copy(update={**none, name: point}) for name, point in of)

    @property
    def wanted(self) -> str:
        """What is chosen, in words: ``7``, ``20%`` or ``kv 60%``."""
        return self.target or str(self.remove)

    @field_validator("spans", mode="before")
    @classmethod
    def _read_spans(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, Sequence):
            raise ValueError("expected a list of [start, stop] pairs, or 11:18")
        return parse_spans(value) if isinstance(value, str) else value

    @field_validator("sublayers", mode="before")
    @classmethod
    def _read_sublayers(cls, value: Any) -> Any:
        listed = value if isinstance(value, list | tuple) else [value or ""]
        text = ",".join(one if isinstance(one, str) else shown(one) for one in listed)
        return tuple(map(str, parse_sublayers(text)))

    @property
    def halves(self) -> tuple[Sublayer, ...]:
        """``sublayers``, as they are given."""
        return parse_sublayers(",".join(self.sublayers))

    def removal(self, num_layers: int) -> tuple[tuple[Span, ...], tuple[Sublayer, ...]]:
        """What is said to go, checked against a model of so many layers."""
        return check_units(self.spans or (), self.halves, num_layers)

    @property
    def given(self) -> bool:
        """Whether what goes is said, and not chosen."""
        return self.spans is not None or bool(self.sublayers)

    @property
    def searches(self) -> bool:
        """Whether layers are searched for."""
        return not self.given and self.criterion == "search"

    @property
    def most_spans(self) -> int | None:
        """Most separate spans to remove; None: any number."""
        return self.max_spans or (None if self.criterion == "search" else 1)

    @model_validator(mode="after")
    def _spans_or_number(self) -> SelectionConfig:
        units = "sublayers" if self.spans is None else "spans"
        ways = {"remove": self.remove, "target": self.target, units: self.given or None}
        said = [name for name, value in ways.items() if value is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say what is removed: give one of them")
        if not said:
            raise ValueError(
                "say which layers go: spans (--spans 11:18), their number (--remove 7), or what "
                "is wanted (--target-speedup 1.3, --target-kv 60%, --target-bytes 20GB)"
            )
        if self.spans is not None and not self.spans:
            raise ValueError("spans is empty; give at least one [start, stop]")
        self.removal(1 << 30)  # the model is not known yet
        if (self.max_spans or 1) > 1 and self.criterion == "paper":
            raise ValueError(
                f"max_spans={self.max_spans} needs criterion=search; paper removes one span"
            )
        if self.pareto and not self.searches:
            raise ValueError("pareto needs criterion=search, and spans and sublayers left out")
        return self


class OperatorConfig(Section):
    """What takes the place of the removed layers."""

    name: Literal["auto"] | OperatorName = "auto"
    """auto: what ``choose`` prefers of ghost-joint and fold (ghost, where the layer before the gap
    does not allow them) and none; ghost: x -> x W (the paper); ghost-joint: that and a new
    down_proj before the gap; fold: only that; norm-linear: x -> x + rmsnorm(x) N; none: no
    operator."""
    ridge: Ridge = "auto"
    """auto: chosen on held-out windows; ``{relative: 1e-4}``, times the median of the Gram's
    diagonal; ``{absolute: 1e-6}``, as it is (the paper's)."""
    folds: int = Field(default=4, ge=2)
    """Folds of cross-validation of one source; of several, each is a fold, of two each is two. With
    refine.steps the last fold is only used for evaluation."""
    features: Literal["auto", "stream", "stream+norm"] = "auto"
    """ghost: regress on x, or on [x, rmsnorm(x)] with a matrix for each; auto: what ``choose``
    prefers."""
    choose: Literal["kl", "residual"] = "kl"
    """How settings that are auto are chosen: kl, by the divergence from the dense model on held-out
    windows; residual, by the held-out residual at the boundary."""
    refit: Literal["auto", "parallel", "sequential"] = "auto"
    """sequential: each later span is fitted on the stream of the already recovered model; auto:
    where it lowers the KL divergence on held-out windows (``choose: kl``, and at least 8 tokens for
    each regressor)."""
    dtype: Literal["model", "float32"] = "model"
    """Dtype of what acts at the boundary in the exported checkpoint; model: the checkpoint's."""

    @model_validator(mode="after")
    def _fitting_together(self) -> OperatorConfig:
        if self.features == "stream+norm" and self.name != "ghost":
            raise ValueError(f"features=stream+norm needs name=ghost, not {self.name}")
        if self.choose == "kl" and self.folds < 3:
            raise ValueError(
                f"choose=kl holds out one of {self.folds} folds and fits on the others, which need "
                "at least 2: give folds >= 3, or choose=residual"
            )
        return self


class RefineConfig(Section):
    """Distillation: only the operators are trained, against the dense model."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0: none."""
    batch: int = Field(default=8, ge=1)
    """Windows per step."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Peak of AdamW's learning rate; 3 % warm-up, then cosine to 0."""
    every: int = Field(default=25, ge=1)
    """Steps between two evaluations of the held-out loss; the state is saved then."""
    patience: int = Field(default=8, ge=1)
    """Evaluations without improvement before it stops."""


class EvaluationConfig(Section):
    """What the dense, the pruned and the recovered model are compared on."""

    corpora: dict[str, str] = Field(default_factory=dict)
    """Name of each corpus to its text file or dataset; wikitext2, ptb and c4 as value: windows as
    the paper takes them."""
    windows: int | None = Field(default=None, ge=1)
    """Windows of each corpus, from its beginning; null: all whole windows."""
    window_length: int = Field(default=2048, ge=2)
    """Tokens per window."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-evaluation-harness: its names, paper for the paper's nine, or YAML files of tasks
    and folders of them. Needs the extra harness."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompts of tasks; null: as each task says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Documents of each task, from its beginning; null: all."""

    @field_validator("corpora")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"corpus name {name!r} may hold letters, digits, - and _ only")
        return value


class ExportConfig(Section):
    """How the recovered checkpoint is written."""

    max_shard_bytes: int = Field(default=5_000_000_000, ge=1)
    """Largest safetensors shard, bytes; a larger single tensor has a shard of its own."""


class OutputConfig(Section):
    """Where the run goes."""

    path: str = Field(min_length=1)
    """The RUN folder: statistics, operators, checkpoint, result.json."""
    callback: str | None = None
    """FILE.py:FUNCTION, which is called with each [event](cluster.md#your-own-callback), and waited
    for."""


class Config(Section):
    """A whole run. Sections and fields are documented in ``docs/configuration.md``."""

    model: ModelConfig
    calibration: CalibrationConfig = CalibrationConfig()
    selection: SelectionConfig
    operator: OperatorConfig = OperatorConfig()
    refine: RefineConfig = RefineConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        if self.engine.compile and self.on_cluster:
            raise ValueError(
                "engine.compile=true is for models that run in this process (engine.kind=resident "
                "or streaming), not for a cluster: leave it out"
            )
        wanted = self.needs_whole_model
        if self.engine.kind == "streaming" and wanted is not None:
            raise ValueError(
                f"{wanted[0]} runs the whole model again and again, which engine.kind=streaming "
                f"never holds: give {wanted[1]}, or engine.kind=resident"
            )
        if self.engine.reduction == "all-reduce" and not self.on_cluster:
            raise ValueError(
                "engine.reduction=all-reduce is between replicas of a cluster, and this run has "
                "one process: set engine.replicas or cluster.address, or reduction=ordered"
            )
        pieces = self.folds // max(1, len(self.calibration.sources))
        for name, count in self.calibration.windows_of.items() if self.calibration.sources else ():
            if count < pieces:
                raise ValueError(
                    f"calibration.sources: the share of {name} is {count} of "
                    f"{self.calibration.windows} windows, and it needs {pieces}: raise it, or "
                    "calibration.windows"
                )
        if self.selection.sublayers and self.refine.steps > 0:
            raise ValueError(
                "refine.steps trains the operators of whole layers, and attentions and MLPs are "
                "removed by themselves: give refine.steps=0"
            )
        if (self.judges_behind_the_fit or self.operator.refit == "sequential") and self.folds < 3:
            raise ValueError(
                "operator.refit=sequential and refine.steps hold out one of "
                f"{self.operator.folds} folds, and the others, which are fitted on, must be at "
                "least 2: give operator.folds >= 3"
            )
        return self

    @property
    def folds(self) -> int:
        sources = len(self.calibration.sources)
        return {0: self.operator.folds, 1: self.operator.folds, 2: 4}.get(sources, sources)

    @property
    def left_out(self) -> tuple[tuple[int, ...], ...]:
        """Folds that are left out of a fit together: those of a source, or of one source each."""
        sources = len(self.calibration.sources)
        step = sources if sources > 1 else self.folds
        return tuple(tuple(range(first, self.folds, step)) for first in range(step))

    @property
    def left_out_names(self) -> tuple[str, ...]:
        sources = self.calibration.sources
        return (
            tuple(sources)
            if len(sources) > 1
            else tuple(f"piece {f + 1}" for f in range(self.folds))
        )

    @property
    def needs_whole_model(self) -> tuple[str, str] | None:
        """A setting that layer streaming cannot do, and what it can; None: there is none."""
        if self.refine.steps > 0:
            return f"refine.steps={self.refine.steps}", "0"
        return ("evaluation.tasks", "[]") if self.evaluation.tasks else None

    @property
    def judges_behind_the_fit(self) -> bool:
        """Whether what comes behind the fit is judged by held-out windows: one fold is kept off."""
        return bool(self.selection.sublayers) or self.refine.steps > 0

    @property
    def on_cluster(self) -> bool:
        """Whether the windows are run by Ray actors and not by this process."""
        engine = self.engine
        return (
            engine.kind == "tensor_parallel"
            or engine.ranks > 1
            or engine.replicas != 1
            or self.cluster.address is not None
        )
