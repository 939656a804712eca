"""ghost_dist: training-free recovery of layer-pruned large language models.

``recover``, ``plan``, ``load_run``, ``load_operator``, ``make_config`` and ``RecoveredRun`` are
those of :mod:`ghost_dist.api`, which is imported when one of them is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghost_dist.api import RecoveredRun, load_operator, load_run, plan, recover
    from ghost_dist.config_file import make_config

__version__ = "0.1.0"
__all__ = [
    "RecoveredRun",
    "__version__",
    "load_operator",
    "load_run",
    "make_config",
    "plan",
    "recover",
]


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: ``ghost-dist --help`` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ghost_dist import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
