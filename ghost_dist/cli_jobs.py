"""Commands of runs that are Ray jobs: ``ghost-dist submit`` and ``ghost-dist jobs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ghost_dist.errors import ConfigError, GhostDistError

jobs_app = typer.Typer(help="Look at the Ray jobs of ghost-dist submit, or stop them.")

Address = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Such as http://head:8265."),
]
Unauthenticated = Annotated[
    bool,
    typer.Option(
        "--allow-unauthenticated", help="Use a cluster that takes jobs from anybody who reaches it."
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or the path of its RUN.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any configuration field; repeat."),
]


def submit(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The whole run; paths of the cluster.")
    ],
    address: Address = None,
    assignments: Set = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow its output.")] = True,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Submit again this often if it fails.")
    ] = 0,
    python: Annotated[
        str, typer.Option("--python", help="Interpreter on the head node.")
    ] = "python",
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Of the job; repeat.")
    ] = None,
    allow_unauthenticated: Unauthenticated = False,
) -> None:
    """Run recover as a Ray job; the same command follows it, or continues it after a failure."""
    from ghost_dist.config_file import load_config, parse_set

    config = load_config(config_file, dict(parse_set(item) for item in assignments or ()))
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


@jobs_app.command()
def status(job: Job, address: Address = None, unauthenticated: Unauthenticated = False) -> None:
    """What a job is doing, as JSON."""
    jobs = _jobs(address, unauthenticated)
    Console().print_json(data=jobs.status(jobs.find(job)))


@jobs_app.command()
def logs(job: Job, address: Address = None, unauthenticated: Unauthenticated = False) -> None:
    """Everything a job has printed."""
    jobs = _jobs(address, unauthenticated)
    typer.echo(jobs.logs(jobs.find(job)), nl=False)


@jobs_app.command()
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
