"""Scores the removals of a search on the ranks of a cluster.

Every rank has a model of its own for it, whole where its device holds it and read layer by layer
elsewhere, and takes a part of each generation. A score is the same whoever computes it, so the
search is too, with any number of replicas and whatever is lost on the way.
"""

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from ghost_dist.cluster.leases import Lease, LeaseQueue
from ghost_dist.cluster.pool import Pool
from ghost_dist.cluster.replica import Replica
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.search_effort import Windows
from ghost_dist.progress import Advance, Reporter
from ghost_dist.solver.removals import Removal, Score


@contextlib.contextmanager
def scoring_on_cluster(
    pool: Pool, inputs: RunInputs, of_search: Windows, reporter: Reporter, scored: Advance
) -> Iterator[Score]:
    """A ``Scorer``: as many ranks as there are, which are given back."""
    search = (uuid.uuid4().hex, ray.put(of_search))
    pool.num_layers = 0
    pool.begin(inputs.config.engine.replicas)

    def score(removals: Sequence[Removal], windows: Sequence[int]) -> list[list[float]]:
        # Neighbours in this order share most of their streams and operators.
        order = sorted(range(len(removals)), key=lambda number: removals[number])
        each = -(-len(order) // (pool.wanted * pool.shape.ranks))
        parts = [order[first : first + each] for first in range(0, len(order), each)]
        found: dict[int, list[float]] = {}

        def asked(replica: Replica, lease: Lease[int]) -> tuple[Any, ...]:
            node = replica.node_ids[lease.worker.rank]
            on_host = sum(r.node_ids.count(node) for r in pool.replicas.values())
            return *search, [removals[number] for number in parts[lease.item]], windows, on_host

        def take(lease: Lease[int], scores: list[list[float]]) -> None:
            scored(len(scores) * len(windows))
            found.update(zip(parts[lease.item], scores, strict=True))

        reporter.doing(f"scoring {len(removals):,}")
        pool.share(LeaseQueue(range(len(parts))), "search_parts", "score", asked, take)
        reporter.doing("")
        return [found[number] for number in range(len(removals))]

    try:
        yield score
    finally:
        pool.release()
