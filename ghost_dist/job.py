"""What ``ghost-dist submit`` runs on the head node: ``recover``, if Python there has what it needs.

The package comes with the job and its libraries do not, so nothing of it is imported before they
were looked for, which takes no second.
"""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement  # what Ray itself needs

from ghost_dist import __version__

CONFIG, REQUIREMENTS = "config.yaml", "requirements.txt"  # in the job's folder


def unmet(requirements: Iterable[str]) -> dict[str, str]:
    """Those of ``requirements``, as pip writes them, that are not met here, and what is there."""
    found = {}
    for requirement in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            found[str(requirement)] = version or "not installed"
    return found


def main() -> None:
    """Recover by ``config.yaml`` of this folder; what it is at stands beside Ray's log of it."""
    if missing := unmet(Path(REQUIREMENTS).read_text().splitlines()):
        install = shlex.join([sys.executable, "-m", "pip", "install", *missing])
        lines = [f"  {requirement} ({has})" for requirement, has in missing.items()]
        sys.exit(
            f"error: ghost_dist {__version__} came with the job, but {sys.executable} on "
            f"{platform.node()} lacks what it needs:\n{chr(10).join(lines)}\nInstall it on all "
            f"nodes of the cluster, in the Python that Ray runs with:\n  {install}\nIf another "
            "interpreter of the head has it: ghost-dist submit --python INTERPRETER."
        )
    from ghost_dist.cli import main as command

    log = Path(os.readlink("/proc/self/fd/1"))
    sys.argv = ["ghost-dist", "recover", CONFIG]  # as the run records it
    command(["recover", CONFIG, "--status", str(log.with_suffix(".json"))])


if __name__ == "__main__":
    main()
