"""Operators on disk: one float64 safetensors file per span, written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ghost_dist.checkpoint.surgery import Operator
from ghost_dist.durable import replacing
from ghost_dist.errors import CorruptStoreError
from ghost_dist.spans import Span

__all__ = ["Operator", "load_operator", "operator_path", "rounded", "save_operator"]


def save_operator(folder: Path, span: Span, operator: Operator) -> str:
    """Write ``folder/START-STOP.safetensors``; returns the sha256 of the file."""
    tensors = {"weight": operator.weight_CC.detach().cpu().contiguous()}
    if operator.bias_C is not None:
        tensors["bias"] = operator.bias_C.detach().cpu().contiguous()
    path = operator_path(folder, span)
    # One entry only: safetensors writes several in random order, and the file must be bitwise so.
    metadata = {"ghost_dist": f"span {span.start}:{span.stop}, y = x @ weight + bias"}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_operator(folder: Path, span: Span, sha256: str | None = None) -> Operator:
    """Read what :func:`save_operator` wrote; float64 unless it was saved otherwise.

    Raises
    ------
    CorruptStoreError
        If the file is absent, unreadable, or not the one whose sha256 is given.
    """
    path = operator_path(folder, span)
    advice = "Run solve again; it needs only the stored statistics."
    try:
        if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise CorruptStoreError(f"Operator {path} is not the one that was solved. {advice}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            weight_CC = file.get_tensor("weight")
            bias_C = file.get_tensor("bias") if "bias" in names else None
    except (OSError, SafetensorError) as error:
        raise CorruptStoreError(f"Operator {path} cannot be read: {error}. {advice}") from error
    return Operator(weight_CC, bias_C)


def operator_path(folder: Path, span: Span) -> Path:
    """File of a span's operator."""
    return folder / f"{span.start}-{span.stop}.safetensors"


def rounded(operator: Operator, dtype: torch.dtype) -> Operator:
    """The operator as it is after being stored in ``dtype``."""
    bias_C = None if operator.bias_C is None else operator.bias_C.to(dtype)
    return Operator(operator.weight_CC.to(dtype), bias_C)
