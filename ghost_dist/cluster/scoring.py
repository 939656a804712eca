"""Scores the removals of a search on the ranks of a cluster.

Every rank has a model of its own for it, whole where its device holds it and read layer by layer
elsewhere, and takes a part of each generation. A score is the same whoever computes it, so the
search is too, with any number of replicas and whatever is lost on the way.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial

import ray

from ghost_dist.cluster.leases import Lease, LeaseQueue, Worker
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.search_effort import Windows
from ghost_dist.progress import Advance
from ghost_dist.solver.removals import Removal


class ScoreOnCluster:
    """The ``Score`` of one search; a context manager that gives the replicas back."""

    def __init__(self, pool: Pool, windows: Windows, scored: Advance) -> None:
        self._pool, self._search = pool, (uuid.uuid4().hex, ray.put(windows))
        self._scored = scored
        pool.num_layers = 0
        wanted = pool.inputs.config.engine.replicas
        pool.begin(1 if wanted == "auto" else wanted)

    def __enter__(self) -> ScoreOnCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.release()

    def __call__(self, removals: Sequence[Removal], windows: Sequence[int]) -> list[list[float]]:
        """``Scores.sure_kl`` per removal and window, from as many ranks as there are."""
        # Neighbours in this order share most of their streams and operators.
        order = sorted(range(len(removals)), key=lambda number: removals[number])
        each = -(-len(order) // (self._pool.wanted * self._pool.shape.ranks))
        parts = [order[first : first + each] for first in range(0, len(order), each)]
        queue: LeaseQueue[int] = LeaseQueue(range(len(parts)))
        found: dict[int, list[float]] = {}

        def take(lease: Lease[int], scores: list[list[float]]) -> None:
            queue.finished(lease, time.monotonic())
            self._pool.progressed(lease.worker.replica)
            if parts[lease.item][0] not in found:
                self._scored(len(scores) * len(windows))
            found.update(zip(parts[lease.item], scores, strict=True))

        def give(replica: Replica) -> None:
            for rank in replica.free_ranks:
                lease = queue.lease(Worker(replica.number, rank), time.monotonic())
                if lease is not None:
                    some = [removals[number] for number in parts[lease.item]]
                    node = replica.node_ids[rank]
                    on_host = sum(r.node_ids.count(node) for r in self._pool.replicas.values())
                    asked = (*self._search, some, windows, on_host)
                    replica.ask(rank, "score", lease.attempt, *asked, then=partial(take, lease))

        doing = self._pool.reporter.doing
        doing(f"scoring {len(removals):,}")
        self._pool.work_off(queue, give, "search_parts", ranks=self._pool.shape.ranks)
        doing("")
        return [found[number] for number in range(len(removals))]
