"""``recover`` with the windows run by Ray actors; everything else is the same pipeline."""

from __future__ import annotations

from typing import Any

from ghost_dist.cluster.session import Session
from ghost_dist.config import Config
from ghost_dist.pipeline.recover import Stage, recover
from ghost_dist.progress import Reporter


def recover_on_cluster(
    config: Config, reporter: Reporter | None = None, *, again: Stage | None = None
) -> dict[str, Any]:
    """As :func:`ghost_dist.pipeline.recover.recover`, on the cluster of ``config.cluster``.

    Raises
    ------
    ConfigError
        If the cluster cannot be reached or has no room for the replicas.
    ClusterError
        If replicas are lost without progress more often than ``config.cluster`` allows.
    """
    with Session(config) as session:
        return recover(config, reporter, again=again, workers=session)
