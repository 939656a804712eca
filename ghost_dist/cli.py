"""The ``ghost-dist`` command: arguments to a configuration, a configuration to the pipeline.

Exit codes: 0 done, 1 the work failed, 2 the command or what it names has to be changed, 130 and 143
stopped by Ctrl-C and SIGTERM. Whatever stopped a run, the same command continues it.
"""

import difflib
import itertools
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer import Argument, Option

from ghost_dist import __version__, cli_jobs
from ghost_dist.cli_jobs import Json, Set, show
from ghost_dist.errors import TO_CHANGE, ConfigError, GhostDistError

app = typer.Typer(
    name="ghost-dist",
    help="Recover large language models whose decoder layers were pruned, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, Argument(metavar="RUN", help="A RUN folder made by recover.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"ghost-dist {__version__}")
        raise typer.Exit


Model = Annotated[
    str,
    Argument(
        metavar="MODEL|CONFIG.yaml",
        help="Checkpoint folder, hub id, or a YAML file that holds the whole run.",
    ),
]
Out = Annotated[str | None, Option(help="RUN folder.")]
Remove = Annotated[str | None, Option(help="How much to remove: 7 layers, 20%, or 4GB.")]
Speedup = Annotated[
    str | None, Option("--target-speedup", help='Times dense: 1.3, "1.3 prefill", "1.3 decode".')
]
Kv = Annotated[str | None, Option("--target-kv", help="Of the KV cache that is left: 60%.")]
Bytes = Annotated[str | None, Option("--target-bytes", help="Largest checkpoint: 20GB.")]
Pareto = Annotated[
    str | None, Option(help="Search for these too, in one table with the chosen one: 2,4,20%.")
]
Spans = Annotated[str | None, Option(help="Layers to remove: 11:18 or 3:5,11:18.")]
Operator = Annotated[str | None, Option(help="auto, ghost, ghost-joint, fold, ...")]

_FIELD_OF = {
    "--out": "output.path",
    "--remove": "selection.remove",
    **dict.fromkeys(("--target-speedup", "--target-kv", "--target-bytes"), "selection.target"),
    "--pareto": "selection.pareto",
    "--spans": "selection.spans",
    "--operator": "operator.name",
}
"""What options set in the configuration."""


@app.command()
def recover(
    model: Model,
    out: Out = None,
    remove: Remove = None,
    target_speedup: Speedup = None,
    target_kv: Kv = None,
    target_bytes: Bytes = None,
    pareto: Pareto = None,
    spans: Spans = None,
    operator: Operator = None,
    assignments: Set = None,
    status: Annotated[
        Path | None, Option(metavar="FILE", help="Keep stage and progress in this file, as JSON.")
    ] = None,
) -> None:
    """Prune layers, repair the cut in closed form, export and evaluate; continues a stopped run."""
    targets = {"speedup": target_speedup, "kv": target_kv, "bytes": target_bytes}
    fields = {"out": out, "remove": remove, "spans": spans, "operator": operator}
    config = _run_config(model, assignments, targets, pareto, **fields)
    if not config.on_cluster:
        from ghost_dist.devices import warm_up

        warm_up(config.engine.device)  # beside the imports, which take as long
    from ghost_dist.api import runner
    from ghost_dist.progress import Reporter, StatusFile
    from ghost_dist.report.terminal import print_result

    reporter = Reporter(listeners=[] if status is None else [StatusFile(status)])
    print_result(runner(config)(config, reporter), Path(config.output.path))


@app.command()
def plan(
    model: Model,
    out: Out = None,
    remove: Remove = None,
    target_speedup: Speedup = None,
    target_kv: Kv = None,
    target_bytes: Bytes = None,
    pareto: Pareto = None,
    spans: Spans = None,
    operator: Operator = None,
    assignments: Set = None,
    measure: Annotated[
        bool, Option("--measure", help="Measure this machine again; else as remembered.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What recover would read, hold, compute and take, from headers only; says if it cannot fit."""
    targets = {"speedup": target_speedup, "kv": target_kv, "bytes": target_bytes}
    fields = {"out": out, "remove": remove, "spans": spans, "operator": operator}
    config = _run_config(model, assignments, targets, pareto, runs=False, **fields)
    from ghost_dist import api
    from ghost_dist.report.terminal import print_plan

    show(api.plan(config, measure_again=measure).tree(), as_json, print_plan)


app.command()(cli_jobs.submit)
app.add_typer(cli_jobs.app, name="jobs", no_args_is_help=True)


@app.command()
def compare(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL|CONFIG.yaml",
            help="Checkpoint folder, hub id, or a YAML file with what all rows share.",
        ),
    ],
    remove: Annotated[str, Option(help="Numbers of layers: 7,11.")],
    out: Annotated[str | None, Option(help="Folder of the comparison.")] = None,
    operators: Annotated[
        str, Option(help="Names, comma-separated; all: every one that needs no training.")
    ] = "all",
    selection: Annotated[
        str, Option(help="Criteria, also search-unrepaired, comma-separated; or all.")
    ] = "search",
    assignments: Set = None,
) -> None:
    """One table of perplexities: selections by operators, from one set of statistics."""
    from ghost_dist.pipeline.compare import ROWS, SELECTIONS, TRAINING_FREE
    from ghost_dist.pipeline.compare import compare as run_compare
    from ghost_dist.report.terminal import print_comparison

    numbers = [int(number) for number in remove.split(",") if number.strip().isdigit()]
    if len(numbers) != len(remove.split(",")):
        raise ConfigError(f"--remove {remove}: expected numbers of layers, such as 7,11.")
    config = _run_config(model, assignments, out=out, remove=numbers[0])
    rows = TRAINING_FREE if operators == "all" else _names(operators, ROWS, "--operators")
    criteria = SELECTIONS if selection == "all" else _names(selection, SELECTIONS, "--selection")
    print_comparison(run_compare(config, numbers, rows, criteria), Path(config.output.path))


@app.command()
def report(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Made by recover.")],
    out: Annotated[
        Path | None, Option(help="File; RUN/report.html, or comparison.html for several RUNs.")
    ] = None,
    trace: Annotated[
        Path | None, Option(metavar="FILE", help="Also a trace for Perfetto, of one RUN.")
    ] = None,
) -> None:
    """Write what a run did, finished or not, as one HTML file; or a comparison of several."""
    from ghost_dist.report.page import write_report
    from ghost_dist.report.terminal import print_run
    from ghost_dist.report.trace import write_trace

    if trace is not None and len(runs) > 1:
        raise ConfigError(f"--trace is of one RUN, and {len(runs)} are given: call it for each.")
    if trace is not None and (trace.is_dir() or not trace.absolute().parent.is_dir()):
        raise ConfigError(f"--trace {trace}: give a file, in a folder that exists.")
    page = write_report(runs, out)
    if len(runs) == 1:
        print_run(runs[0])
    if trace is not None:
        write_trace(runs[0], trace)
        typer.echo(f"trace: {trace} (open it at https://ui.perfetto.dev)")
    Console().print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command(name="bench-serving")
def bench_serving(
    run: Run,
    batch: Annotated[int, Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, Option(min=1, help="Tokens of each prompt.")] = 512,
    new: Annotated[int, Option(min=2, help="Tokens generated for each.")] = 64,
    rounds: Annotated[int, Option(min=1, help="Turns of each model.")] = 5,
    as_json: Json = False,
) -> None:
    """Prefill and decode tokens a second: dense, pruned and recovered, taking turns."""
    from ghost_dist.pipeline.bench_serving import bench_serving as measure
    from ghost_dist.report.terminal import print_serving

    _finished(run)
    measured = measure(run, batch=batch, prompt=prompt, new=new, rounds=rounds)
    show(measured, as_json, print_serving)


@app.command()
def push(
    run: Run,
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    private: Annotated[bool, Option("--private", help="If it is made new.")] = False,
    pull_request: Annotated[
        bool, Option("--pull-request", help="Open one, commit nothing.")
    ] = False,
    revision: Annotated[str | None, Option(help="Branch; the default one if not given.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check, and list what would be sent.")
    ] = False,
) -> None:
    """Send the recovered checkpoint of a finished run to the Hugging Face Hub."""
    from ghost_dist.pipeline.push import prepare_upload, upload
    from ghost_dist.report.terminal import print_upload

    what = prepare_upload(run, repo)
    print_upload(what.repo_id, what.files, what.notes)
    if not dry_run:
        typer.echo(upload(what, private=private, pull_request=pull_request, revision=revision))


@app.command()
def demo(
    model: Annotated[
        Literal["pico", "smollm2", "gemma3-270m", "qwen2.5-coder-1.5b"],
        Option("--model", help="pico is shipped; the others come as a Python package."),
    ] = "pico",
    out: Annotated[str | None, Option(help="RUN folder; a temporary one if not given.")] = None,
) -> None:
    """Prune and recover a small model on texts of this Python: two minutes, a real LLM longer."""
    from ghost_dist.demo import run_demo

    run_demo(Path(out) if out is not None else None, model)


@app.command()
def verify(run: Run) -> None:
    """Check a run's statistics, operators and checkpoint; says what is damaged or out of date."""
    from ghost_dist.pipeline.verifying import verify_run

    found = verify_run(run)
    for line in found.lines:
        typer.echo(line)
    if found.damaged:
        raise typer.Exit(1)


def _add_stage(stage: Any) -> None:
    """Define the command that does one stage of a finished or stopped run again."""

    def command(run: Run, assignments: Set = None, as_json: Json = False) -> None:
        from ghost_dist.api import runner
        from ghost_dist.pipeline.recover import run_stage_again
        from ghost_dist.report.terminal import print_stage

        done = run_stage_again(run, stage, assignments or (), runner=runner)
        show(done, as_json, lambda _: print_stage(run, stage))

    command.__doc__ = f"Do the {stage} stage again, on what RUN already holds."
    app.command(name=stage)(command)


for _stage in ("select", "calibrate", "solve", "export", "evaluate"):
    _add_stage(_stage)


@app.command("export-deci")
def export_deci(
    run: Run,
    out: Annotated[Path, Argument(metavar="FOLDER", help="A new or empty folder.")],
) -> None:
    """Write a Llama's recovered checkpoint in DeciLM's layout, for llama.cpp's converter."""
    from ghost_dist.export.deci import export_deci

    export_deci(_finished(run), out)
    typer.echo(
        f"written: {out}\na GGUF of it: python llama.cpp/convert_hf_to_gguf.py {quote(str(out))} "
        "--outfile model.gguf --outtype bf16"
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the ``ghost-dist`` command; never returns."""

    stopped_by: list[int] = []
    given = sys.argv[1:] if arguments is None else arguments

    def stop(number: int, _: Any) -> NoReturn:
        stopped_by.append(number)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        _check_quotes(given)
        app(given)
    except (Exception, SystemExit) as error:
        # The signal may have come inside a cleaning up, which then failed, or inside a wait of Ray,
        # which makes another status of it.
        if stopped_by:
            _fail("stopped. The same command continues.", 128 + stopped_by[0], kind="")
        if isinstance(error, GhostDistError):
            said = _in_options(str(error), given) if isinstance(error, ConfigError) else str(error)
            _fail(said, 2 if isinstance(error, TO_CHANGE) else 1)
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            _fail(
                f"{error.strerror or error}{where}. What was finished is kept; the same command "
                "continues once this is mended.",
                1,
            )
        raise
    sys.exit(0)


def _check_quotes(arguments: Sequence[str]) -> None:
    """Refuse the first part of a value that the shell took apart at its blanks."""
    for option, argument in itertools.pairwise(arguments):
        open_brace = "={" in argument and argument.count("{") > argument.count("}")
        if option == "--set" and open_brace and not argument.endswith("}"):
            raise ConfigError(
                f"{argument} ends within its braces: the shell takes a value apart at blanks. Put "
                f"it in quotes, as in --set 'evaluation.corpora={{name: FILE}}'."
            )


def _finished(run: Path) -> Path:
    """The checkpoint of a finished run; what is out of date there is said on stderr."""
    from ghost_dist.pipeline.bench_serving import finished_checkpoint
    from ghost_dist.report.record import RunRecord

    record = RunRecord(run)
    checkpoint = finished_checkpoint(run)
    for said in record.out_of_date:
        typer.echo(said, err=True)
    return checkpoint


def _run_config(
    model: str,
    assignments: Sequence[str] | None,
    targets: Mapping[str, str | None] | None = None,
    pareto: str | None = None,
    **fields: Any,
) -> Any:
    """The configuration that the arguments of a run make."""
    from ghost_dist.config_file import make_config, parse_set
    from ghost_dist.real_models import REAL_MODELS

    if model in REAL_MODELS and not Path(model).exists():
        raise ConfigError(
            f"{model} is no folder here, but a model of the demo: ghost-dist demo --model {model} "
            f"recovers it; python -m ghost_dist.real_models {model} makes a folder of it."
        )
    settings = dict(map(parse_set, assignments or ()))
    given = [f"{kind} {value}" for kind, value in (targets or {}).items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"One target at a time, and these were given: {', '.join(given)}.")
    if given:
        settings["selection.target"] = given[0]
    if pareto is not None:
        settings["selection.pareto"] = pareto
    config = make_config(model, settings=settings, **fields)
    if fields.get("runs", True):
        _check_texts(config)
    return config


def _check_texts(config: Any) -> None:
    """Refuse texts that are not there, before what takes long to import; tokens in RUN are kept."""
    from ghost_dist.calibration.corpora import check_there

    kept = (Path(config.output.path).expanduser() / "stages" / "tokens.json").exists()
    calibration = () if kept else config.calibration.windows_of
    for source in (*calibration, *config.evaluation.corpora.values()):
        check_there(source)


def _in_options(message: str, arguments: Sequence[str]) -> str:
    """What is said of fields, with the options that set them in this call in their place."""
    lines, given = message.splitlines(), {argument.partition("=")[0] for argument in arguments}
    for option in [option for option in _FIELD_OF if option in given]:
        section, name = (field := _FIELD_OF[option]).split(".")
        # What is said of a whole section names fields without it.
        short = {line: line.startswith(f"{section}: ") for line in lines}
        lines = [
            re.sub(rf"(?<![\w.-]){name if short[line] else re.escape(field)}\b", option, line)
            for line in lines
        ]
    return "\n".join(re.sub(r"^\w+: (?=--)", "", line) for line in lines)


def _names(text: str, known: Sequence[Any], option: str) -> list[Any]:
    """Comma-separated names, all of them known."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"{option} {name!r} is unknown. {hint}")
    return names


def _fail(message: str, code: int, kind: str = "error: ") -> NoReturn:
    Console(stderr=True).print(
        f"{kind}{message}", markup=False, highlight=False, soft_wrap=True, style="red"
    )
    sys.exit(code)
