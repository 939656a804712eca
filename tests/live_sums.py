"""Sums of a live all-reduce as the ranks hold them, against the ordered ones of the store."""

import os
import time
import weakref

import torch

from ghost_dist.calibration.split import fold_of_range
from ghost_dist.cluster import replica
from ghost_dist.cluster.rank import Rank, remote_rank

EPS = torch.finfo(torch.float64).eps


def use_rank(monkeypatch, kind):
    """Replicas are made of another kind of ranks."""
    monkeypatch.setattr(
        replica, "remote_rank", lambda rank, **options: remote_rank(rank, kind, **options)
    )


def waiting(folder, ranks):
    """A kind of ranks of which none runs a range before so many have loaded the model.

    Each replica has ranges of its own then, however fast the first one is.
    """
    folder.mkdir()

    class RankThatWaits(Rank):
        def load(self, *arguments):
            found = super().load(*arguments)
            (folder / f"loaded-{os.getpid()}").touch()
            return found

        def run(self, *arguments):
            while len(list(folder.glob("loaded-*"))) < ranks:
                time.sleep(0.05)
            return super().run(*arguments)

    return RankThatWaits


def showing(monkeypatch, folder, ranks=1):
    """Ranks leave what they hold after a reduction in a folder, and nothing of the model.

    They wait for ``ranks`` of them.
    """

    class RankThatShows(waiting(folder, ranks)):
        def unload(self):
            parameters = [
                weakref.ref(parameter)
                for layer in self._engine.decoder.layers
                for parameter in layer.parameters()
            ]
            super().unload()
            assert parameters
            assert not any(parameter() is not None for parameter in parameters)

        def reduce(self, *arguments):
            super().reduce(*arguments)
            for key, folds in self._fits[2]._held.items():
                torch.save([{key: fold} for fold in folds], folder / f"{key.replace('/', '-')}.pt")

    use_rank(monkeypatch, RankThatShows)


def within_rounding(folder, store, folds):
    """Check every entry; how many differ, and the largest difference in units of its bound.

    Two orders of adding n numbers differ by (n - 1) eps times the sum of their absolute values at
    most, to first order in eps: each is off by half of that.
    """
    differing, worst, seen = 0, 0.0, []
    for path in sorted(folder.glob("*.pt")):
        for fold, sums in enumerate(torch.load(path, weights_only=False)):
            ids = [i for i in range(len(store.plan.ranges)) if fold_of_range(i, folds) == fold]
            parts = [store.read(i, sums) for i in ids]
            ordered = store.total(ids, sums)
            for entry, found in sums.items():
                seen.append((entry, fold))
                assert found.num_tokens == ordered[entry].num_tokens
                for name, array in found.arrays().items():
                    absolute = sum(part[entry].arrays()[name].abs() for part in parts)
                    difference = (array - ordered[entry].arrays()[name]).abs()
                    bound = (len(ids) - 1) * EPS * absolute
                    assert (difference <= bound).all(), (entry, name)
                    differing += int((difference > 0).sum())
                    worst = max(worst, float((difference / bound.clamp_min(1e-300)).max()))
    assert sorted(seen) == sorted((e, f) for e in store.plan.entries for f in range(folds))
    return differing, worst
