"""Rows with a known answer, shared by the operators' tests."""

from types import SimpleNamespace

import pytest
import torch

from ghost_dist.statistics.moments import Moments


def moments_of(z, y):
    """Moments of rows, by direct float64 products."""
    return Moments(len(z), z.T @ z, z.T @ y, z.sum(0), y.sum(0), (y * y).sum(0))


def in_folds(make, folds, *arrays):
    """``make`` of the rows of each fold, dealt in turn."""
    return [make(*(array[f::folds] for array in arrays)) for f in range(folds)]


def normal(*shape, seed):
    """Standard normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def rows():
    """Functions that make rows and their moments."""
    return SimpleNamespace(moments_of=moments_of, in_folds=in_folds, normal=normal)
