"""What a stage does and holds: every stage says it beside its own code, in bytes, tokens and FLOPs.

``plan`` turns it into seconds, and ``plan`` and ``recover`` choose the engine by the bytes. Device:
weights, activations of a batch, streams that wait for their partner, sums, temporaries of products,
logits of a piece. These are the tensors that the code holds at the same time; allocators and
libraries come on top, which the 15 % that are left free are for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ghost_dist.checkpoint.weight_reader import BLOCK_BYTES, READERS
from ghost_dist.engines.memory import DeviceNeeds, Residency
from ghost_dist.engines.model_sizes import ModelSizes
from ghost_dist.solver.least_squares import MIXTURES, RIDGE_GRID, step_flops
from ghost_dist.statistics.moments import BLOCK_COLUMNS

SMALL_BYTES = 64 << 20
"""For what is not counted one by one: scores of layers, masks, positions, a fit's small parts."""
AROUND = 5  # ridges that a fit looks at, as a rule, which is told where the best one is
_PINNED_BYTES = 2 * READERS * BLOCK_BYTES  # offloaded: buffers that layers are read into


@dataclass(frozen=True)
class Fits:
    kind: str  # of regressors
    steps: int  # ridges times folds, and final fits
    flops: int  # of a step

    @staticmethod
    def of(kind: str, size: int, targets: int, ridges: int, folds: int) -> Fits:
        """One, with all ridges held out on all folds."""
        return Fits(kind, ridges * folds + 1, step_flops(size, targets))

    @staticmethod
    def of_grid(kind: str, size: int, targets: int, folds: int) -> list[Fits]:
        """One that looks for its ridge; of many targets the grid is tried with few."""
        if targets <= MIXTURES:
            return [Fits.of(kind, size, targets, len(RIDGE_GRID), folds)]
        grid = Fits(kind, len(RIDGE_GRID) * folds, step_flops(size, MIXTURES))
        return [grid, Fits.of(kind, size, targets, AROUND, folds)]


@dataclass(kw_only=True)
class Cost:
    """Of one stage in one process, all windows together."""

    # Weights
    below: int = 0  # embeddings and layers below this boundary are loaded; 0: nothing is
    whole: bool = False  # of an engine that holds the model: all of it, with its head
    head: bool = False  # logits are computed
    reads: int = 1  # sweeps over the layers, where they are read one by one
    # Work
    batch: int = 1  # windows of a forward
    length: int = 1  # tokens of a window
    layers: Counter[int] = field(default_factory=Counter)  # tokens through each
    scored: int = 0  # tokens whose distribution is computed, of all variants
    sums: Counter[str] = field(default_factory=Counter)  # FLOPs by kind of regressors
    fits: list[Fits] = field(default_factory=list)
    # Files
    ranges: int = 0  # of windows, each committed; replicas share them; 0: the driver does it
    leased: bool = False  # to ranks, each of which has a model of its own
    commit_bytes: int = 0  # of all ranges
    sums_read_bytes: int = 0
    written_bytes: int = 0  # of a checkpoint, which a fresh process loads again
    moved_bytes: int = 0  # of streams between device and host
    # Held on the device
    batch_bytes: int = 0  # of streams beside the activations of a batch
    sums_bytes: int = 0  # ranks of a replica share them
    product_bytes: int = 0  # temporaries
    # Held elsewhere
    host_bytes: int = 0
    fit_bytes: int = 0  # of the largest fit; on the device, or on the host
    running_bytes: int = 0  # offloaded: streams that go through a layer
    kept_bytes: int = 0  # offloaded: rows kept until the sums are taken

    def pass_tokens(self, layers: Sequence[int] | range, tokens: int) -> None:
        """Let so many tokens go through layers, as often as they are named."""
        for layer in layers:
            self.layers[layer] += tokens

    def read_bytes(self, sizes: ModelSizes) -> int:
        if self.whole:
            return sizes.stored_bytes
        return sizes.decoder_stored_bytes(self.below) if self.below else 0

    def model_flops(self, sizes: ModelSizes, experts: int | None = None) -> dict[str, int]:
        """Of layers by their kind, and of the ``head``; some ``experts`` at a time: see below."""
        flops = Counter({"head": self.scored * sizes.head_flops})
        for number, tokens in self.layers.items():
            layer = sizes.layers[number]
            flops[layer.kind] += tokens * layer.flops(self.length)
            if experts is not None and layer.experts > experts:
                # What surrounds experts that are held in parts runs twice.
                flops[layer.kind] += tokens * sizes.rest_flops(layer, self.length)
        return flops

    def flops(self, sizes: ModelSizes, experts: int | None = None) -> int:
        fits = sum(fit.steps * fit.flops for fit in self.fits)
        return sum(self.model_flops(sizes, experts).values()) + sum(self.sums.values()) + fits

    def resident_bytes(self, sizes: ModelSizes, degree: int = 1) -> int:
        """Peak on the device of an engine that holds the model, or a rank's share of it."""
        nbytes = self.batch_bytes + self.product_bytes + self.sums_bytes // degree
        if self.head:
            nbytes += sizes.logits_bytes(self.batch * self.length)
        if not self.below:
            return nbytes
        nbytes += sizes.activation_bytes(self.batch * self.length)
        return nbytes + (
            sizes.causal_lm_bytes if self.whole else sizes.decoder_bytes(self.below, degree)
        )

    def offloaded_bytes(self, sizes: ModelSizes, held: Residency) -> int:
        """Peak on the device where layers are read one by one; sums are taken behind the sweep."""
        sums = self.sums_bytes + self.product_bytes
        if not self.below:
            return sums
        return max(sums, sizes.layer_bytes(self.batch * self.length, head=self.head).at_once(held))

    def on_host(self, engine: str, *, copies: int) -> int:
        """What waits in host memory, beside mapped files.

        ``copies`` of the sums of a range are there while it is written: none on a CPU, where they
        are in host memory already, one from a GPU, two on a rank that computes the next range.
        """
        pinned = _PINNED_BYTES if engine == "streaming" and copies else 0
        return copies * self.sums_bytes + self.host_bytes + self.fit_bytes + pinned

    def waiting_bytes(self, windows: int, ranks: int | None) -> int:
        """Offloaded: what waits between two layers, of a replica's ranks that share a range."""
        return int((self.running_bytes + self.kept_bytes) * self._share(windows, ranks))

    def asked_bytes(self, sizes: ModelSizes, windows: int, ranks: int | None) -> int:
        """Offloaded with experts in parts: what a layer's experts are asked, and the answers."""
        answers = 1 + sizes.experts_per_token
        return int(answers * self.running_bytes * self._share(windows, ranks))

    def _share(self, windows: int, ranks: int | None) -> float:
        """Of the windows, how many go through a layer before the next one is read."""
        if ranks is None or not self.ranges:
            return 1.0
        return math.ceil(math.ceil(windows / self.ranges) / ranks) / windows


def product_bytes(regressors: int, targets: int, rows: int) -> int:
    """Temporaries of one product of sums: wide copies of a block of rows, and the product."""
    columns = min(BLOCK_COLUMNS, regressors)
    return (rows * (regressors + 2 * columns + targets) + columns * columns) * 8


def device_needs(
    costs: Mapping[str, Cost],
    sizes: ModelSizes,
    windows: int,
    *,
    ranks: int | None,
    degrees: Sequence[int],
    degree: int,
    on_cpu: bool,
) -> DeviceNeeds:
    """Peak bytes on one device by stage; on a CPU with what waits in host memory.

    ``ranks``: of a replica, and only what replicas share is counted; None: no cluster.
    """
    shared = {name: cost for name, cost in costs.items() if cost.ranges}
    wanted = costs if ranks is None else shared

    def host(cost: Cost, engine: Literal["resident", "streaming"]) -> int:
        return cost.on_host(engine, copies=0) if on_cpu else 0

    def resident(costs: Mapping[str, Cost], degree: int = 1) -> dict[str, int]:
        return {
            name: cost.resident_bytes(sizes, degree) + host(cost, "resident")
            for name, cost in costs.items()
        }

    def offloaded(held: Residency) -> dict[str, int]:
        asked = on_cpu and held.experts is not None
        return {
            name: cost.offloaded_bytes(sizes, held)
            + host(cost, "streaming")
            + (cost.asked_bytes(sizes, windows, ranks) if asked else 0)
            for name, cost in wanted.items()
        }

    ways = [Residency(), *map(Residency, range(1, sizes.experts)), Residency(prefetch=False)]
    return DeviceNeeds(
        resident=resident(wanted),
        tensor_parallel={n: resident(shared, n) for n in sorted({*degrees, degree})},
        degree=degree,
        streaming={held: offloaded(held) for held in ways},
        largest_layer=sizes.largest_layer_bytes,
    )
