"""Scores of candidates on the disk while ``solve`` works: a stop loses one comparison at most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ghost_dist.durable import fingerprint
from ghost_dist.evaluation.bootstrap import FloatArray
from ghost_dist.evaluation.scores import Scores
from ghost_dist.run_folder import RunFolder

_RECORD = "solve-scores"


@dataclass(frozen=True)
class KeptScores:
    """Of the solve with these ``inputs`` (a fingerprint); scores of another one do not count."""

    run: RunFolder
    inputs: str

    def of(
        self, tried: Sequence[object], judges: Sequence[int], score: Callable[[], list[Scores]]
    ) -> list[Scores]:
        """What ``score`` gives for the candidates that were ``tried``, or gave before."""
        kept = self.run.record(_RECORD, self.inputs) or {}
        figures = [field.name for field in fields(Scores)]
        key = fingerprint([repr(list(tried)), list(judges), figures])
        if key in kept:
            return [Scores(*map(_from_plain, of_one)) for of_one in kept[key]]
        scores = score()
        plain = [[_plain(getattr(one, name)) for name in figures] for one in scores]
        self.run.finish(_RECORD, self.inputs, {**kept, key: plain})
        return scores

    @property
    def count(self) -> int:
        """Comparisons that are kept."""
        return len(self.run.record(_RECORD, self.inputs) or {})

    def forget(self) -> None:
        """Once it is solved."""
        self.run.forget(_RECORD)


def _plain(figure: FloatArray | int) -> str | int:
    return figure if isinstance(figure, int) else figure.tobytes().hex()


def _from_plain(plain: str | int) -> Any:
    return plain if isinstance(plain, int) else np.frombuffer(bytes.fromhex(plain), np.float64)
