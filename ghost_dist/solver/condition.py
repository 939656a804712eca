"""How well a least squares is conditioned, estimated from its Cholesky factor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def condition_number(gram_ZZ: Tensor, penalty_Z: Tensor | float, factor_ZZ: Tensor) -> float:
    """Estimate of the 2-norm condition number of ``G + diag(penalty)`` by subspace iteration.

    8 steps of 16 vectors towards the largest eigenvalues and, through the Cholesky factor, towards
    the smallest: O(16 Z^2) each, against O(Z^3) for all eigenvalues. Both converge from inside, so
    the estimate is a lower bound, in practice within a few per cent.
    """
    size = gram_ZZ.shape[0]
    generator = torch.Generator().manual_seed(0)
    start_Zv = torch.randn(size, min(size, 16), generator=generator, dtype=torch.float64)
    penalty_Z1 = torch.as_tensor(penalty_Z, device=gram_ZZ.device).reshape(-1, 1)

    def largest(apply: Callable[[Tensor], Tensor]) -> Tensor:
        basis_Zv = start_Zv.to(gram_ZZ.device)
        for _ in range(8):
            basis_Zv = torch.linalg.qr(apply(basis_Zv))[0]
        norm: Tensor = torch.linalg.matrix_norm(apply(basis_Zv), 2)
        return norm

    of_matrix = largest(lambda v_Zv: gram_ZZ @ v_Zv + penalty_Z1 * v_Zv)
    of_inverse = largest(lambda v_Zv: torch.cholesky_solve(v_Zv, factor_ZZ))
    return float(of_matrix * of_inverse)
