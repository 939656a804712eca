"""Spectra of matrices whose spectra are known."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import spectra, spectrum_of


def rotation(width):
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for i in range(0, width, 2):
        matrix[i, i + 1], matrix[i + 1, i] = 1.0, -1.0
    return matrix


@pytest.mark.parametrize(
    ("matrix_CC", "share", "largest", "rank"),
    [
        (torch.diag(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)), 0.0, 3.0, 2),
        (2 * rotation(6), 1.0, 2.0, 6),
        (rotation(4) + torch.eye(4, dtype=torch.float64), 0.5, 2**0.5, 4),
        (torch.zeros(3, 3, dtype=torch.float64), 0.0, 0.0, 0),
    ],
)
def test_share_norm_and_rank(matrix_CC, share, largest, rank):
    found = spectrum_of(matrix_CC)
    assert found.antisymmetric_share == pytest.approx(share)
    assert found.singular_values[0] == pytest.approx(largest)
    assert list(found.singular_values) == sorted(found.singular_values, reverse=True)
    norm = float(matrix_CC.norm()) / len(matrix_CC) ** 0.5
    assert found.relative_norm == pytest.approx(norm)
    assert found.effective_rank == rank


def test_of_a_run_is_that_of_its_operator_and_is_computed_once(runs):
    run = RunRecord(runs["spans"])
    (runs["spans"] / "report.json").unlink()
    found = spectra(run)
    assert set(found) == {f"[{start}, {stop})" for start, stop in run.spans}
    for span, matrices in found.items():
        start, stop = span.strip("[)").split(", ")
        weight_CC = load_file(runs["spans"] / "operators" / f"{start}-{stop}.safetensors")["linear"]
        change_CC = weight_CC - torch.eye(48, dtype=torch.float64)
        expected = torch.linalg.svdvals(change_CC).tolist()
        assert matrices["M"].singular_values == pytest.approx(expected, abs=1e-7 * expected[0])
    stored = json.loads((runs["spans"] / "report.json").read_text())
    for row in stored["spectra"].values():
        row["M"]["relative_norm"] = 77.0
    (runs["spans"] / "report.json").write_text(json.dumps(stored))
    assert all(s["M"].relative_norm == 77.0 for s in spectra(run).values())
    (runs["spans"] / "report.json").write_text("{")
    assert spectra(run) == found
