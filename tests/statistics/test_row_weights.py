"""Row treatments against their definitions, and that they look at nothing but the window."""

import pytest
import torch

from ghost_dist.errors import ConfigError
from ghost_dist.statistics.span_sums import CLIP_MULTIPLE, row_weights

T, C = 9, 4


def stream(dtype=torch.float32):
    """Rows of norms 1, 2, ..., 9 in a shuffled order, the first one a sink of norm 500."""
    y = torch.randn(T, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = torch.tensor([500, 3, 7, 1, 9, 5, 2, 8, 4], dtype=torch.float64)
    return (y / y.norm(dim=1, keepdim=True) * norms[:, None]).to(dtype)


def test_none_and_drop_first():
    assert row_weights("none", stream()) is None
    assert row_weights("drop-first", stream()).tolist() == [0] + [1] * (T - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inverse_norm_makes_every_row_of_rms_one(dtype):
    y = stream(dtype)
    weights = row_weights("inverse-norm", y)
    assert weights.dtype == torch.float64
    scaled = y.double() * weights[:, None]
    torch.testing.assert_close(scaled.square().mean(1), torch.ones(T, dtype=torch.float64))


def test_inverse_norm_of_a_zero_row_is_zero():
    y = stream()
    y[4] = 0
    weights = row_weights("inverse-norm", y)
    assert weights[4] == 0
    assert torch.isfinite(weights).all()


def test_clip_bounds_the_norms_and_leaves_the_others():
    weights = row_weights("clip", stream())
    # The median of 500, 3, 7, 1, 9, 5, 2, 8, 4 is 5, so the bound is 10: only the sink is above.
    assert CLIP_MULTIPLE == 2
    torch.testing.assert_close(weights[0].item(), 10 / 500)
    assert weights[1:].tolist() == [1.0] * (T - 1)


@pytest.mark.parametrize("treatment", ["inverse-norm", "clip"])
def test_a_weight_belongs_to_its_row_not_to_its_place(treatment):
    order = torch.tensor([4, 8, 0, 3, 2, 7, 6, 1, 5])
    assert torch.equal(
        row_weights(treatment, stream()[order]), row_weights(treatment, stream())[order]
    )


def test_unknown_treatment_is_named():
    with pytest.raises(ConfigError, match="inverse_norm.*inverse-norm"):
        row_weights("inverse_norm", stream())
