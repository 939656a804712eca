"""Errors that all ranks of a world must see: a rank that went on alone would wait for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from ghost_dist.errors import CheckpointError, ConfigError


@contextlib.contextmanager
def errors_shared() -> Iterator[None]:
    """Raise on every rank what any rank raised inside (errors of one message); collective."""
    own: ConfigError | CheckpointError | None = None
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        own = error
    found: list[tuple[type[ConfigError | CheckpointError], str] | None]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if own is None else (type(own), str(own)))
    if own is not None:
        raise own
    for rank, entry in enumerate(found):
        if entry is not None:
            kind, message = entry
            raise kind(f"{message} (Found by rank {rank}.)")
