"""How well variants of a model predict windows, and how far they are from the first one.

Logits are computed in the model's dtype, of a few tokens at a time, since those of a window may be
larger than the model's layers; they are turned into nats in float32 and added up in float64. A
window of T tokens predicts its last T - 1 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens, TokenWindows
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.sweep import AtEnd, sweep
from ghost_dist.errors import GhostDistError
from ghost_dist.evaluation.bootstrap import FloatArray
from ghost_dist.progress import Advance

# Shapes: B windows of a batch, T tokens of a window, W all windows, V entries of the vocabulary.

_LOGITS_AT_ONCE = 1 << 25  # entries: 128 MiB in float32
# On a CPU what its caches hold, and positions enough to read the head for: 2.4 times as fast
_LOGITS_OF_CPU, _POSITIONS_OF_CPU = 1 << 21, 128
_FIGURES = 5  # nats, divergence, agreed, weighted divergence, weights


class NonFiniteLossError(GhostDistError):
    """The loss of a window is NaN or Inf, so no perplexity of it would mean anything."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One variant on some windows; arrays are float64 of shape (W,)."""

    nats: FloatArray  # negative log-likelihood of the last T - 1 tokens of each window
    kl: FloatArray  # mean ``KL(first variant || this)`` of the T next-token distributions, nats
    top1: FloatArray  # share of the T positions where both have the same likeliest token
    num_tokens: int  # predicted ones, of all windows
    # As ``kl``, each position by ``exp(-H)``, H the entropy there of the first variant
    sure_kl: FloatArray

    @property
    def perplexity(self) -> float:
        nats_per_token = math.fsum(self.nats) / self.num_tokens
        return math.exp(nats_per_token) if nats_per_token < 700 else math.inf

    def __getitem__(self, part: slice) -> Scores:
        nats = self.nats[part]
        num_tokens = self.num_tokens // len(self.nats) * len(nats)
        return Scores(nats, self.kl[part], self.top1[part], num_tokens, self.sure_kl[part])


def window_scores(
    model: LayerwiseModel,
    variants: Sequence[Variant],
    tokens: Tokens,
    *,
    batch: int,
    advance: Advance = lambda _: None,
) -> list[Scores]:
    """Score variants on windows (int32, (W, T)) in one sweep, compared with the first variant."""
    sums = np.zeros((_FIGURES, len(variants), len(tokens)))

    def tap(part: slice, streams: list[Tensor]) -> None:
        ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(model.device)
        sums[:, :, part] = _batch_sums(model, streams, ids_BT)

    sweep(model, variants, tokens, [AtEnd(tap)], batch=batch, advance=advance)
    length, num_tokens = tokens.shape[1], tokens.size - len(tokens)
    weights = sums[4, 0]  # of the first
    return [
        Scores(nats.copy(), divergence / length, agreed / length, num_tokens, sure / weights)
        for nats, divergence, agreed, sure, _ in zip(*sums, strict=True)
    ]


def corpus_scores(
    model: LayerwiseModel,
    variants: Sequence[Variant],
    corpora: Mapping[str, TokenWindows],
    *,
    batch: int,
    advance: Advance = lambda _: None,
) -> dict[str, list[Scores]]:
    """By corpus, whose windows are of one length: what :func:`window_scores` gives."""
    # Where each layer is read anew, once for all of them.
    groups = [[name] for name in corpora] if model.whole else [list(corpora)]
    found = {}
    for names in groups:
        tokens = np.concatenate([corpora[name].tokens for name in names])
        of_all, first = window_scores(model, variants, tokens, batch=batch, advance=advance), 0
        for name in names:
            part = slice(first, first + corpora[name].num_windows)
            found[name] = [of_variant[part] for of_variant in of_all]
            first = part.stop
    for name, of_corpus in found.items():
        for of_variant in of_corpus:
            bad = np.flatnonzero(~np.isfinite(of_variant.nats))
            if bad.size:
                raise NonFiniteLossError(
                    f"The loss of window {bad[0]} of {corpora[name].source} is not finite (NaN or "
                    "Inf). The weights may be damaged, or the dtype may overflow: try "
                    "model.dtype=float32 or bfloat16."
                )
    return found


def last_logits(
    model: LayerwiseModel, variant: Variant, tokens: Tokens, advance: Advance
) -> Tensor:
    """Logits (W, T, V) of a variant, float32 on the CPU; window by window."""
    found: list[Tensor] = []

    def keep(_: slice, streams: list[Tensor]) -> None:
        for stream_TC in streams[0]:
            found.append(model.logits(stream_TC).float().cpu())

    sweep(model, [variant], tokens, [AtEnd(keep)], batch=1, advance=advance)
    return torch.stack(found)


def logit_pieces(num_positions: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of positions, small enough for their logits."""
    size = max(1, _LOGITS_AT_ONCE // vocab_size)
    if device.type == "cpu":
        size = min(size, max(_POSITIONS_OF_CPU, _LOGITS_OF_CPU // vocab_size))
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


def _batch_sums(model: LayerwiseModel, streams: Sequence[Tensor], ids_BT: Tensor) -> FloatArray:
    """All figures of each window of a batch: (figures, variants, B) float64."""
    device, (num_windows, length) = ids_BT.device, ids_BT.shape
    targets_N = ids_BT.roll(-1, 1).flatten()
    predicts_N = (torch.arange(ids_BT.numel(), device=device) + 1) % length != 0
    sums = torch.zeros((_FIGURES, len(streams), num_windows), dtype=torch.float64, device=device)
    for piece in logit_pieces(ids_BT.numel(), model.architecture.vocab_size, device):
        window = torch.arange(piece.start, piece.stop, device=device) // length

        def add(figure: int, number: int, values_n: Tensor, window: Tensor = window) -> None:
            sums[figure, number].index_add_(0, window, values_n.to(device, torch.float64))

        for number, stream_BTC in enumerate(streams):
            logits_nV = model.logits(stream_BTC.flatten(0, 1)[piece]).float()
            likeliest = logits_nV.argmax(-1)
            got = torch.log_softmax(logits_nV, -1)
            del logits_nV  # no more than four tensors of this size at once
            nats_n = -got.gather(1, targets_N[piece, None])[:, 0]
            add(0, number, nats_n.masked_fill(~predicts_N[piece], 0.0))
            if number == 0:
                dense, expected, chances = likeliest, got, got.exp()
                sure_n = torch.exp((chances * expected).sum(-1))
                add(4, number, sure_n)
            else:
                divergence_n = torch.sub(expected, got, out=got).mul_(chances).sum(-1)
                add(1, number, divergence_n)
                add(3, number, divergence_n * sure_n.to(divergence_n.device))
            add(2, number, likeliest == dense)
    return sums.cpu().numpy()
