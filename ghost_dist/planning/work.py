"""What a stage does, in the units that rates are measured in, and the seconds it makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ghost_dist.planning.model_sizes import LayerSizes
from ghost_dist.planning.rates import Rates


@dataclass(frozen=True)
class FitWork:
    """Fits of one kind."""

    kind: str
    size: int
    steps: int  # ridges times folds and final fits, over all fits
    fits: int  # each with its fixed part
    step_flops: int

    def seconds(self, rates: Rates) -> float:
        """By the measured curves; never less than the steps alone."""
        step = rates.step[self.kind].at(self.size)
        fixed = max(0.0, rates.fit[self.kind].at(self.size) - rates.fit_steps * step)
        return self.fits * fixed + self.steps * step


@dataclass
class Work:
    """One stage's work on one process; what several replicas share is divided by the caller."""

    read_bytes: int = 0  # from the files; of them cached_bytes from the page cache
    cached_bytes: int = 0
    load_bytes: int = 0
    load_tensors: int = 0
    # Tokens through each, once for every time
    layers: list[tuple[LayerSizes, int]] = field(default_factory=list)
    window_length: int = 0
    forwards: float = 0.0
    head_tokens: int = 0
    loss_tokens: int = 0
    divergence_tokens: int = 0
    head_flops: int = 0
    # Kind -> tokens, FLOPs of products
    sums: dict[str, tuple[int, int]] = field(default_factory=dict)
    fits: list[FitWork] = field(default_factory=list)
    commits: int = 0
    commit_bytes: int = 0
    store_read_bytes: int = 0
    written_bytes: int = 0  # of the checkpoint
    moved_bytes: int = 0  # streams between device and host
    processes: int = 0
    other_s: float = 0.0  # measured elsewhere
    overlaps: bool = False  # whether reading goes on while layers are computed

    @property
    def model_flops(self) -> int:
        """Of layers and head."""
        return self.head_tokens * self.head_flops + sum(
            tokens * layer.flops(self.window_length) for layer, tokens in self.layers
        )

    @property
    def flops(self) -> int:
        """Of the model, the sums and the fits."""
        sums = sum(flops for _, flops in self.sums.values())
        return self.model_flops + sums + sum(fit.steps * fit.step_flops for fit in self.fits)

    def seconds(self, rates: Rates, compute: str) -> dict[str, float]:
        """Seconds by what they go into; their sum is the stage's."""
        uncached = self.read_bytes - self.cached_bytes
        matmul = rates.matmul[compute]
        forward = sum(
            # Layers that were too large to be measured go by the rate of plain products.
            tokens * (rates.layer_s.get(of.kind) or of.flops(self.window_length) / matmul)
            for of, tokens in self.layers
        )
        forward += self.forwards * rates.forward_s
        forward += self.head_tokens * rates.head_s
        forward += self.loss_tokens * rates.loss_s
        forward += self.divergence_tokens * rates.divergence_s
        read = uncached / rates.read
        load = self.load_bytes / rates.load + self.load_tensors * rates.load_tensor_s
        if self.overlaps:
            # Reading, and what is read turned into weights, on threads of their own.
            read, load = max(0.0, max(read, self.load_bytes / rates.to_device) - forward), 0.0
        parts = {
            "read": read,
            "load": load,
            "forward": forward,
            "sums": sum(
                flops / rates.products[kind] + tokens * rates.sums_s[kind]
                for kind, (tokens, flops) in self.sums.items()
            ),
            "fit": sum(fit.seconds(rates) for fit in self.fits),
            "store": self.commits * rates.commit_s
            + self.commit_bytes / rates.commit
            + self.store_read_bytes / rates.store_read,
            "write": self.written_bytes / rates.write,
            "move": self.moved_bytes / rates.to_device,
            "processes": self.processes * rates.process_s,
            "other": self.other_s,
        }
        return {name: seconds for name, seconds in parts.items() if seconds > 0}


def merged(sums: dict[str, tuple[int, int]], kind: str, tokens: int, flops: int) -> None:
    """Add tokens and FLOPs of one kind of sums to a stage's."""
    known_tokens, known_flops = sums.get(kind, (0, 0))
    sums[kind] = (known_tokens + tokens, known_flops + flops)
