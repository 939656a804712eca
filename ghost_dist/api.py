"""Runs from Python: what the commands do, with the same names and the same RUN folders.

    import ghost_dist

    plan = ghost_dist.plan("meta-llama/Llama-3.1-8B", remove=7, out="RUN")
    run = ghost_dist.recover("meta-llama/Llama-3.1-8B", remove=7, out="RUN")
    model = run.load_model(dtype="bfloat16", device_map="auto")

A call that was stopped, by whatever, is continued by the same call; so is one of the command line.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.config import Config
from ghost_dist.config_file import Spans, make_config
from ghost_dist.errors import ConfigError, RunFolderError
from ghost_dist.export.operator_files import load_operator as _load_operator
from ghost_dist.pipeline.recover import recover as _recover
from ghost_dist.planning.plan import Plan, plan_run
from ghost_dist.progress import Reporter
from ghost_dist.report.record import RunRecord
from ghost_dist.run_folder import recover_command
from ghost_dist.spans import Span, parse_spans


@dataclass(frozen=True)
class RecoveredRun:
    """A finished run, by its RUN folder."""

    path: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        """Content of ``result.json``; its keys are in the documentation of the configuration.

        Raises
        ------
        RunFolderError
            If the run is not finished.
        """
        result = RunRecord(self.path).result
        if result is None:
            raise RunFolderError(
                f"The run in {self.path} is not finished. Continue it: {recover_command(self.path)}"
            )
        return result

    @property
    def checkpoint(self) -> Path:
        """The recovered Hugging Face checkpoint."""
        return self.path / "checkpoint"

    @property
    def spans(self) -> tuple[Span, ...]:
        """What was removed, of the uncut model's layers."""
        return tuple(Span(start, stop) for start, stop in self.result["spans"])

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """By corpus: ``dense``, ``pruned`` and ``recovered``; empty if none was named."""
        return dict(self.result["perplexity"])

    def operator(self, span: Span | Sequence[int] | str | None = None) -> Repair:
        """As :func:`load_operator`."""
        return load_operator(self.path, span)

    def load_model(self, **arguments: Any) -> Any:
        """The recovered causal LM in plain transformers.

        ``arguments`` go to ``AutoModelForCausalLM.from_pretrained``. ``trust_remote_code`` is set:
        the one file of code in the checkpoint is the one that this package wrote.
        """
        return self._loaded("AutoModelForCausalLM", arguments)

    def load_tokenizer(self, **arguments: Any) -> Any:
        """Its tokenizer; ``arguments`` go to ``AutoTokenizer.from_pretrained``."""
        return self._loaded("AutoTokenizer", arguments)

    def _loaded(self, name: str, arguments: Mapping[str, Any]) -> Any:
        import transformers

        given = {"trust_remote_code": True, **arguments}
        return getattr(transformers, name).from_pretrained(self.checkpoint, **given)


def recover(
    model: str | Path | Config,
    *,
    out: str | Path | None = None,
    remove: int | str | None = None,
    spans: Spans | None = None,
    operator: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> RecoveredRun:
    """Prune layers, repair the cut in closed form, export and evaluate; continues a stopped run.

    In this process, or on Ray where the configuration needs it (``engine.tensor_parallel``,
    ``engine.replicas``, ``cluster.address``).

    Parameters
    ----------
    model, out, remove, spans, operator, settings
        As for :func:`make_config`; or a configuration that is made already, and nothing else.
    progress
        Whether stages and warnings are told on standard error.

    Raises
    ------
    GhostDistError
        Whatever cannot be done, by its own class; what is finished is kept, and the same call
        continues.

    Examples
    --------
    With a text file and the model that comes with the package:

    >>> run = recover(
    ...     PICO,
    ...     spans="5:10",
    ...     out=folder / "RUN",
    ...     settings={
    ...         "calibration.source": str(text),
    ...         "calibration.windows": 16,
    ...         "calibration.window_length": 256,
    ...         "operator.features": "stream",
    ...         "operator.choose": "residual",
    ...     },
    ...     progress=False,
    ... )
    >>> run.spans, run.result["operator"]
    ((Span(start=5, stop=10),), 'ghost-joint')
    >>> run.load_model().num_parameters()
    5977920
    """
    config = _config(model, out, remove, spans, operator, settings)
    reporter = None if progress else Reporter(console=Console(quiet=True))
    runner(config)(config, reporter)
    return RecoveredRun(Path(config.output.path).expanduser())


def plan(
    model: str | Path | Config,
    *,
    out: str | Path | None = None,
    remove: int | str | None = None,
    spans: Spans | None = None,
    operator: str | None = None,
    settings: Mapping[str, Any] | None = None,
    measure_again: bool = False,
) -> Plan:
    """What :func:`recover` with the same arguments would read, hold, compute and take.

    Reads headers only, and measures this machine for some seconds unless that is remembered.

    Parameters
    ----------
    model, out, remove, spans, operator, settings
        As for :func:`recover`.
    measure_again
        Do not use the remembered rates.

    Raises
    ------
    ConfigError
        If the run cannot fit; says what is needed, what is there, and what would fit.
    """
    config = _config(model, out, remove, spans, operator, settings, runs=False)
    return plan_run(config, measure_again=measure_again)


def load_run(path: str | Path) -> RecoveredRun:
    """A finished run by its RUN folder.

    Raises
    ------
    RunFolderError
        If it is no RUN folder, or the run is not finished.
    """
    run = RecoveredRun(Path(path).expanduser())
    _ = run.result
    return run


def load_operator(run: str | Path, span: Span | Sequence[int] | str | None = None) -> Repair:
    """The operator of a removed span, as solved: float64, rows are tokens, matrices (in, out).

    Parameters
    ----------
    run
        A RUN folder, finished or at least solved.
    span
        ``(11, 18)``, ``"11:18"`` or a Span; may be left out if only one was removed.

    Raises
    ------
    ConfigError
        If the span is not one of the run's.
    CorruptStoreError
        If the file is not the one that was solved.

    Examples
    --------
    >>> operator = load_operator(folder / "RUN")
    >>> {name: (tuple(part.shape), part.dtype) for name, part in operator.parts().items()}
    {'linear': ((192, 192), torch.float64), 'down': ((448, 192), torch.float64)}
    """
    record = RunRecord(Path(run).expanduser())
    files = record.operator_files
    removed = tuple(Span(start, stop) for start, stop in record.spans)
    if span is None or isinstance(span, str):
        named = removed if span is None else parse_spans(span)
        wanted = named[0] if len(named) == 1 else None
    else:
        wanted = span if isinstance(span, Span) else Span(*span)
    if wanted not in removed:
        raise ConfigError(
            f"span={span} is not one of those that the run in {run} removed: "
            f"{', '.join(map(str, removed)) or 'none is chosen yet'}."
        )
    if str(wanted) not in files:
        if record.stages["solve"]:
            return Repair()  # a plain cut
        raise ConfigError(f"The run in {run} has no operators yet. Continue it with recover.")
    return _load_operator(*files[str(wanted)])


def runner(config: Config) -> Callable[..., dict[str, Any]]:
    """:func:`ghost_dist.pipeline.recover.recover`, or the same on Ray where that is needed."""
    if not config.on_cluster:
        return _recover
    check_ray("engine.tensor_parallel, engine.replicas and cluster.address need")
    from ghost_dist.cluster.session import recover_on_cluster

    return recover_on_cluster


def check_ray(who_needs: str) -> None:
    """Raise a ConfigError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"{who_needs} the package ray, which is not installed. In the checkout: "
            "pip install -e '.[cluster]'"
        )


def _config(model: str | Path | Config, *arguments: Any, runs: bool = True) -> Config:
    names = ("out", "remove", "spans", "operator", "settings")
    given = {n: a for n, a in zip(names, arguments, strict=True) if a is not None}
    if not isinstance(model, Config):
        return make_config(model, runs=runs, **given)
    if given:
        raise ConfigError(
            f"A whole configuration was given, and {', '.join(given)} beside it. Put "
            f"{'them' if len(given) > 1 else 'it'} into make_config."
        )
    return model
