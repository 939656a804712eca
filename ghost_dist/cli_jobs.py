"""The commands of Ray jobs: ``ghost-dist submit`` and ``ghost-dist jobs``, and what all share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from ghost_dist.errors import ConfigError, GhostDistError

Json = Annotated[bool, Option("--json", help="For programs.")]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="SECTION.FIELD=VALUE", help="Any configuration field; repeat."),
]
Address = Annotated[
    str | None, Option(envvar="RAY_API_SERVER_ADDRESS", help="Such as http://head:8265.")
]
Unauthenticated = Annotated[
    bool,
    Option(
        "--allow-unauthenticated", help="Use a cluster that takes jobs from anybody who reaches it."
    ),
]
Job = Annotated[str, Argument(metavar="JOB", help="A job's id, or the path of its RUN.")]
app = typer.Typer(help="Look at the Ray jobs of ghost-dist submit, or stop them.")


def show(found: Any, as_json: bool, to_person: Callable[[Any], None]) -> None:
    """What a command found, for programs or for a person."""
    if as_json:
        Console(soft_wrap=True).print_json(data=found)
    else:
        to_person(found)


def submit(
    config_file: Annotated[
        Path, Argument(metavar="CONFIG.yaml", help="The whole run; paths of the cluster.")
    ],
    address: Address = None,
    assignments: Set = None,
    wait: Annotated[bool, Option("--wait/--no-wait", help="Follow its output.")] = True,
    retries: Annotated[int, Option(min=0, help="Submit again this often if it fails.")] = 0,
    python: Annotated[str, Option(help="Interpreter on the head node.")] = "python",
    env: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Of the job, no secret; repeat.")
    ] = None,
    allow_unauthenticated: Unauthenticated = False,
) -> None:
    """Run recover as a Ray job; the same command follows it, or continues it after a failure."""
    from ghost_dist.config_file import load_config, parse_set

    config = load_config(config_file, dict(map(parse_set, assignments or ())))
    variables = dict(item.partition("=")[::2] for item in env or ())
    jobs = _jobs(address, allow_unauthenticated)
    status = ""
    for _ in range(1 + (retries if wait else 0)):
        job, fresh = jobs.submit(config, python=python, env=variables)
        say = Console(stderr=True).print
        say(f"{'submitted' if fresh else 'already running:'} {job}", highlight=False)
        if not wait:
            typer.echo(job)
            return
        try:
            status = jobs.follow(job, lambda text: typer.echo(text, nl=False))
        except SystemExit:
            say(f"{job} goes on. ghost-dist jobs stop {job} stops it.", highlight=False)
            raise
        if status != "FAILED":
            break
    if status != "SUCCEEDED":
        raise GhostDistError(f"Job {job} ended as {status}. The same command continues it.")


@app.command(name="list")
def list_jobs(address: Address = None, unauthenticated: Unauthenticated = False) -> None:
    """The jobs of ghost-dist on a cluster, oldest first."""
    from ghost_dist.report.terminal import print_jobs

    print_jobs(_jobs(address, unauthenticated).listed())


@app.command()
def status(
    job: Job,
    address: Address = None,
    unauthenticated: Unauthenticated = False,
    as_json: Json = False,
) -> None:
    """What a job is doing: stage, replicas, time left, what happened last."""
    from ghost_dist.report.terminal import print_job

    jobs = _jobs(address, unauthenticated)
    show(jobs.status(jobs.find(job)), as_json, print_job)


@app.command()
def logs(job: Job, address: Address = None, unauthenticated: Unauthenticated = False) -> None:
    """Everything a job has printed."""
    jobs = _jobs(address, unauthenticated)
    typer.echo(jobs.logs(jobs.find(job)), nl=False)


@app.command()
def stop(job: Job, address: Address = None, unauthenticated: Unauthenticated = False) -> None:
    """Stop a job; what it has finished is kept."""
    jobs = _jobs(address, unauthenticated)
    typer.echo(jobs.stop(jobs.find(job)))


def _jobs(address: str | None, allow_unauthenticated: bool) -> Any:
    """The jobs of a cluster."""
    if address is None:
        raise ConfigError(
            "Say which cluster: --address http://head:8265, or RAY_API_SERVER_ADDRESS."
        )
    from ghost_dist.api import check_ray

    check_ray("Jobs need")
    from ghost_dist.cluster.jobs import Jobs

    return Jobs(address, allow_unauthenticated=allow_unauthenticated)
