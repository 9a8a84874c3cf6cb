"""Linear systems that the solvers are tried on, with their exact solutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ide_snn.solvers import SOLVERS, LinearProblem, Solution, solve

SHAPE = (3, 2, 3, 2)  # [B, C, H, W]: three samples of N = 12 unknowns
N = 12
TOL = {torch.float64: 1e-10, torch.float32: 1e-5}
every_solver = pytest.mark.parametrize("name", list(SOLVERS))
accelerated = pytest.mark.parametrize("name", ["anderson", "broyden", "gmres"])
nonlinear = pytest.mark.parametrize("name", ["fixed_point", "anderson", "broyden"])
every_dtype = pytest.mark.parametrize("dtype", list(TOL))
both_couplings = pytest.mark.parametrize("coupled", [False, True])


def solver(name: str, tol: float = 1e-10, max_steps: int = 400, **options: Any):
    return SOLVERS[name](tol=tol, max_steps=max_steps, **options)


@dataclass
class System:
    """v = b + A v with A [B, N, N] per sample, or [1, B N, B N] coupling them; counts its products."""

    matrix: Tensor
    rhs: Tensor
    calls: int = 0
    poison: tuple[int, float] | None = None  # from which product on what stands in sample 1

    @property
    def coupled(self) -> bool:
        return self.matrix.shape[0] == 1 and self.rhs.shape[0] != 1

    def product(self, v: Tensor) -> Tensor:
        assert v.shape == self.rhs.shape
        self.calls += 1
        rows = v.reshape(self.matrix.shape[0], -1, 1)
        product = (self.matrix @ rows).reshape(v.shape)
        if self.poison is not None and self.calls >= self.poison[0]:
            product[1, 0, 0, 0] = self.poison[1]
        return product

    def solve(self, settings: Any, y0: Tensor | None = None, *, trace: bool = False) -> Solution:
        self.calls = 0
        return solve(LinearProblem(self.product, self.rhs, coupled=self.coupled), settings, y0, trace=trace)

    def exact(self) -> Tensor:
        """numpy's dense solve."""
        a = self.matrix.double().numpy()
        b = self.rhs.double().reshape(a.shape[0], -1, 1).numpy()
        return torch.from_numpy(np.linalg.solve(np.eye(a.shape[1]) - a, b)).reshape(self.rhs.shape)

    def residual(self, v: Tensor) -> Tensor:
        """||b - (I - A) v|| / ||b|| per group, in float64."""
        a = self.matrix.double()
        b, v = (x.double().reshape(a.shape[0], -1) for x in (self.rhs, v))
        return (b + (a @ v[..., None])[..., 0] - v).norm(dim=1) / b.norm(dim=1)


def system(norms: list[float], dtype: torch.dtype = torch.float64, *, coupled: bool = False) -> System:
    """Random matrices with the given 2-norms, one per sample; coupled: one matrix with the largest of them."""
    groups, size = (1, 3 * N) if coupled else (3, N)
    matrix = torch.randn(groups, size, size, dtype=torch.float64)
    scale = torch.tensor([max(norms)] if coupled else norms, dtype=torch.float64)
    matrix *= (scale / torch.linalg.matrix_norm(matrix, 2))[:, None, None]
    return System(matrix.to(dtype), torch.randn(SHAPE, dtype=dtype))


def with_spectrum(eigenvalues: Tensor) -> System:
    """Symmetric matrices with these eigenvalues."""
    q = torch.linalg.qr(torch.randn(3, N, N, dtype=torch.float64)).Q
    return System(q @ torch.diag(eigenvalues) @ q.mT, torch.randn(SHAPE, dtype=torch.float64))


def per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
