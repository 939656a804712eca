"""What a run has solved, and its operators as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.export.operator_files import load_healed, load_operator, save_operator
from ghost_dist.spans import Span


@dataclass(frozen=True)
class Solution:
    """What was solved."""

    operator: str
    operators: dict[Span, Repair]  # float64; a plain cut is a repair without parts
    healed: dict[int, Tensor]  # new down_proj weights by layer of the uncut model
    folds: tuple[int, ...]  # that any of these was fitted on
    files: dict[str, str]  # the sha256 of each
    healed_files: dict[str, str]
    record: dict[str, Any]  # fits, candidates and healing as plain values

    @staticmethod
    def load(folder: Path, spans: Sequence[Span], recorded: Mapping[str, Any]) -> Solution:
        """As the record of ``solve`` describes it; CorruptStoreError where a file is damaged."""
        files, healed_files = recorded["files"], recorded["healed"]
        return Solution(
            operator=recorded["operator"],
            operators=load_operators(folder, spans, files),
            healed={int(la): load_healed(folder, int(la), sha) for la, sha in healed_files.items()},
            folds=tuple(recorded["folds"]),
            files=files,
            healed_files=healed_files,
            record={key: recorded[key] for key in ("chosen", "candidates", "fits", "healing")},
        )


def save_operators(folder: Path, operators: Mapping[Span, Repair]) -> dict[str, str]:
    """The sha256 of each file, by span; a plain cut has none."""
    folder.mkdir(exist_ok=True)
    return {
        str(span): save_operator(folder, span, repair)
        for span, repair in operators.items()
        if repair.parts()
    }


def load_operators(
    folder: Path, spans: Sequence[Span], files: Mapping[str, str]
) -> dict[Span, Repair]:
    """Inverse of :func:`save_operators`."""
    return {
        span: load_operator(folder, span, files[str(span)]) if str(span) in files else Repair()
        for span in spans
    }
