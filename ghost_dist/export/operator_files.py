"""Operators on disk: one float64 safetensors file per span, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.durable import replacing
from ghost_dist.errors import CorruptStoreError
from ghost_dist.spans import Span, Sublayer, parse_sublayers

_ADVICE = "ghost-dist recover RUN/config.yaml makes it again from what is stored."


def load_operator(path: Path, sha256: str) -> Repair:
    """One of :func:`save_operators`; CorruptStoreError if its sha256 is not the one given."""
    parts, description = read_parts(path, sha256)
    return Repair.from_parts(parts, float(description["norm_eps"]))


def save_output(folder: Path, sublayer: Sublayer, weight_FC: Tensor) -> str:
    """Write ``folder/PART-LAYER.safetensors``, a new weight (in, C); returns its sha256."""
    form = "what ends the attention or MLP of this layer of the uncut model, in by out"
    description: dict[str, object] = {"layer": sublayer.layer, "part": sublayer.part, "form": form}
    return _save(output_path(folder, sublayer), {"output": weight_FC}, description)


def output_path(folder: Path, sublayer: Sublayer) -> Path:
    return folder / f"{sublayer.part}-{sublayer.layer}.safetensors"


def operator_path(folder: Path, span: Span) -> Path:
    return folder / f"{span.start}-{span.stop}.safetensors"


def _save(path: Path, parts: dict[str, Tensor], description: dict[str, object]) -> str:
    tensors = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
    # One entry only: safetensors writes several in random order, and the file must be bitwise so.
    metadata = {"ghost_dist": json.dumps(description)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_parts(path: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file by name; errors as for :func:`load_operator`."""
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise CorruptStoreError(f"Operator {path} is not the one that was solved. {_ADVICE}")
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            description = json.loads(file.metadata()["ghost_dist"])
    except (OSError, SafetensorError, ValueError) as error:
        raise CorruptStoreError(f"Operator {path} cannot be read: {error}. {_ADVICE}") from error
    return parts, description


@dataclass(frozen=True)
class Solution:
    """What was solved."""

    variant: Variant  # the recovered model, its matrices as solved: float64
    files: list[dict[str, str]]  # the sha256 of all that it consists of, for fingerprints
    record: Mapping[str, Any]  # the stage's, of plain values

    @staticmethod
    def load(folder: Path, cut: Variant, recorded: Mapping[str, Any]) -> Solution:
        """As the record of ``solve`` describes it; CorruptStoreError where a file is damaged."""
        files, output_files = recorded["files"], recorded["outputs"]
        outputs = {
            one: read_parts(output_path(folder, one), sha)[0]["output"]
            for text, sha in output_files.items()
            for one in parse_sublayers(text)
        }
        operators = load_operators(folder, cut.spans, files)
        variant = replace(cut, operators=operators, outputs=outputs)
        return Solution(variant, [files, output_files], recorded)


def save_operators(folder: Path, operators: Mapping[Span, Repair]) -> dict[str, str]:
    """Write ``START-STOP.safetensors``; the sha256 of each, by span; a plain cut has none."""
    folder.mkdir(exist_ok=True)
    form = (
        "x @ linear + rmsnorm(x) @ norm_linear; "
        "down replaces the down_proj of layer start - 1, in by out"
    )
    files = {}
    for span, repair in operators.items():
        if parts := repair.parts():
            of = {"span": [span.start, span.stop], "form": form, "norm_eps": repair.norm_eps}
            files[str(span)] = _save(operator_path(folder, span), parts, of)
    return files


def load_operators(
    folder: Path, spans: Sequence[Span], files: Mapping[str, str]
) -> dict[Span, Repair]:
    """Inverse of :func:`save_operators`."""
    found = dict.fromkeys(spans, Repair())
    for span in spans:
        if str(span) in files:
            found[span] = load_operator(operator_path(folder, span), files[str(span)])
    return found
