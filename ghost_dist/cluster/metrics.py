"""What a run shows in Ray's metrics (Prometheus, on every node's metrics port)."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, get_args

from ray.util.metrics import Counter, Gauge

from ghost_dist.cluster.leases import LeaseQueue
from ghost_dist.cluster.placement import Failure
from ghost_dist.cluster.replica import Replica, State

EVERY_S = 2.0


class Metrics:
    """Gauges and counters of one run; their names are in ``docs/cluster.md``."""

    def __init__(self) -> None:
        self._ranges = Gauge(
            "ghost_dist_ranges", "Window ranges of the stage, by state.", tag_keys=("state",)
        )
        self._spans = Gauge("ghost_dist_spans", "Spans to fit, by state.", tag_keys=("state",))
        self._replicas = Gauge(
            "ghost_dist_replicas", "Copies of the model, by state.", tag_keys=("state",)
        )
        self._tokens = Gauge("ghost_dist_tokens", "Tokens of the stage that are committed.")
        self._rate = Gauge(
            "ghost_dist_tokens_per_second",
            "Tokens per second of a replica over its range at hand.",
            tag_keys=("replica",),
        )
        self._lost = Counter(
            "ghost_dist_replicas_lost_total", "Replicas lost, by failure.", tag_keys=("failure",)
        )
        self._shown = 0.0

    def show(
        self, queue: LeaseQueue[Any], replicas: Collection[Replica], committed: int | None
    ) -> None:
        """Set the gauges, every EVERY_S seconds at most; of spans where no tokens are given."""
        now = time.monotonic()
        if now - self._shown < EVERY_S:
            return
        self._shown = now
        states = dict.fromkeys(get_args(State), 0)
        for replica in replicas:
            states[replica.state] += 1
            for lease, tokens in replica.under_way:
                if tokens is not None:
                    rate = tokens / max(now - lease.since, 1e-9)
                    self._rate.set(rate, {"replica": str(replica.number)})
        for state, count in states.items():
            self._replicas.set(count, {"state": state})
        items = self._spans if committed is None else self._ranges
        items.set(queue.num_pending, {"state": "pending"})
        items.set(len({lease.item for lease in queue.leases}), {"state": "leased"})
        if committed is not None:
            self._tokens.set(committed)

    def lost(self, failure: Failure) -> None:
        self._lost.inc(1, {"failure": failure})
