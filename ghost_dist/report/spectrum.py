"""What an operator does to the stream beyond passing it on: the spectrum of ``M = W - I``.

Legend: C hidden width. Computed from the operator files, float64, and kept in ``RUN/report.json``
under the sha256 of the file, since it takes O(C^3): about a minute at C = 8192 on many cores.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ghost_dist.durable import write_json
from ghost_dist.export.operator_files import read_parts
from ghost_dist.report.record import RunRecord

FORMAT = 1


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix that acts at a boundary: M = W - I, or N where it acts on rmsnorm(x)."""

    singular_values: list[float]  # largest first
    antisymmetric_share: float
    """``||(M - M')/2||^2 / ||M||^2``, Frobenius norms: 0 only stretches, 1 only rotates."""
    relative_norm: float  # ``||M|| / ||I||``

    @property
    def effective_rank(self) -> int:
        """Singular values that hold 90 % of the sum of squares."""
        sums = torch.tensor(self.singular_values, dtype=torch.float64).square().cumsum(0)
        return int((sums < 0.9 * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0

    @property
    def rank_in_words(self) -> str:
        return f"{self.effective_rank} of {len(self.singular_values)}"


def spectrum_of(matrix_CC: Tensor) -> Spectrum:
    energy = float(matrix_CC.square().sum())
    half_CC = (matrix_CC - matrix_CC.T) / 2
    # By eigenvalues: a third of the time of an SVD on a GPU, to 1e-8 of the largest.
    squares = torch.linalg.eigvalsh(matrix_CC.T @ matrix_CC).clamp(min=0)
    return Spectrum(
        singular_values=squares.sqrt().flip(0).tolist(),
        antisymmetric_share=float(half_CC.square().sum()) / energy if energy > 0 else 0.0,
        relative_norm=(energy / matrix_CC.shape[0]) ** 0.5,
    )


def spectra(run: RunRecord, device: torch.device | None = None) -> dict[str, dict[str, Spectrum]]:
    """Span to matrix (``M``, ``N``) to its spectrum; spans without a matrix are left out."""
    cache = run.path / "report.json"
    try:
        content = json.loads(cache.read_bytes())
        stored: dict[str, Any] = content["spectra"] if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        stored = {}  # computed again
    found, files = {}, run.operator_files
    for path, sha256 in files.values():
        found[sha256] = (
            stored[sha256]
            if sha256 in stored
            else {
                name: asdict(spectrum_of(matrix_CC.to(device or "cpu")))
                for name, matrix_CC in _matrices(read_parts(path, sha256)[0]).items()
            }
        )
    if found != stored:
        with contextlib.suppress(OSError):  # a RUN that may only be read has no cache
            write_json(cache, {"format": FORMAT, "spectra": found})
    return {
        span: {name: Spectrum(**row) for name, row in found[sha256].items()}
        for span, (_, sha256) in files.items()
        if found[sha256]
    }


def _matrices(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What acts at the boundary, by name."""
    found = {}
    if "linear" in parts:
        weight_CC = parts["linear"].double()
        found["M"] = weight_CC - torch.eye(weight_CC.shape[0], dtype=torch.float64)
    if "norm_linear" in parts:
        found["N"] = parts["norm_linear"].double()
    return found
