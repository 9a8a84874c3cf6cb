"""Solves that begin with rough products: wherever these lead, they end as those without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ide_snn import Gmres
from ide_snn.dense import DenseMap
from ide_snn.layers import Affine
from ide_snn.native import Factor
from ide_snn.operators import Operator
from ide_snn.solvers import LinearProblem, Outcome, Rough, Solution, solve
from ide_snn.solvers.base import Workspace

TOL = 1e-2


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))[
        0
    ]
    return (basis @ torch.diag(eigenvalues.double()) @ basis.T).float()


def factors_of(matrix: Tensor) -> tuple[Factor, ...]:
    n = len(matrix)
    layer = Affine(Operator("linear", n, n), matrix.T.contiguous(), None, 1, None, (n,))
    return (DenseMap(layer).adjoint_factor(None),)


def problem(matrix: Tensor, rough: Tensor | None, b: Tensor, *, native: bool) -> LinearProblem:
    """v = b + v M^T, and rough products by another matrix: step by step, or as kernels in one call."""

    def factors() -> tuple[Factor, ...]:
        return factors_of(matrix)

    begins = None
    if rough is not None:
        begins = Rough(lambda v: v @ rough.T, 1e-3, (lambda: factors_of(rough)) if native else None)
    return LinearProblem(lambda v: v @ matrix.T, b, native=native, factors=factors if native else None, rough=begins)


def residuals(matrix: Tensor, b: Tensor, solution: Solution) -> Tensor:
    v, exact = solution.value.double(), b.double()
    return ((exact + v @ matrix.double().T - v).norm(dim=1) / exact.norm(dim=1)).float()


@pytest.mark.parametrize("native", [False, True])
def test_the_first_run_has_steps_of_its_own(native: bool) -> None:
    """J near 1: v is long, so that noise decides; all of max_steps remains for the exact run."""
    matrix = symmetric(1 - torch.logspace(-3, 0, 31))
    b = torch.randn(4, 31, generator=torch.Generator().manual_seed(1))
    rough = matrix + 1e-4 * torch.randn(31, 31, generator=torch.Generator().manual_seed(2))
    solver = Gmres(TOL, max_steps=28)
    plain, found = (solve(problem(matrix, by, b, native=native), solver) for by in (None, rough))
    assert plain.outcome is found.outcome is Outcome.converged
    assert found.stats.steps > solver.max_steps  # both runs are counted
    assert float(residuals(matrix, b, found).max()) <= TOL * 1.01


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", ["useless", "not finite"])
def test_a_rough_run_that_leads_astray_is_forgotten(kind: str, native: bool) -> None:
    matrix = symmetric(torch.linspace(-0.8, 0.6, 40))
    b = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    b[2] = 0
    rough = symmetric(torch.linspace(0.9, 0.99999, 40), seed=1) if kind == "useless" else matrix * torch.nan
    plain, found = (solve(problem(matrix, by, b, native=native), Gmres(TOL)) for by in (None, rough))
    assert found.outcome is Outcome.converged
    torch.testing.assert_close(found.value, plain.value, rtol=1e-4, atol=1e-6)
    assert not bool(found.value[2].any())


def test_a_verdict_is_not_on_a_recurrence_that_began_far_away() -> None:
    """Eigenvalues 0.9999 and -80: the rough run ends at a v of 10^5 ||b||, with a residual of 10^2 ||b||."""
    eigenvalues = torch.cat([torch.full((242,), 0.3), torch.tensor([0.999, 0.9999, -80.0])])
    for seed in range(3):
        matrix = symmetric(eigenvalues, seed)
        b = torch.randn(4, 245, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(245, 245, generator=torch.Generator().manual_seed(seed + 10))
        rough = matrix + 2e-3 * noise / 245**0.5 * 80
        for native in (False, True):
            solution = solve(problem(matrix, rough, b, native=native), Gmres(TOL, max_steps=100))
            assert solution.outcome is Outcome.converged
            assert float(residuals(matrix, b, solution).max()) <= TOL * 1.01


@pytest.mark.parametrize("native", [False, True])
def test_the_rounding_of_a_long_start_is_not_trusted(native: bool) -> None:
    """A run from v_0 knows the residual of v_0 to eps ||v_0||: of a long one the verdict takes a product."""
    matrix = symmetric(torch.linspace(-0.8, 0.6, 40))
    b = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    work = Workspace(problem(matrix, None, b, native=native))
    for length, is_known in ((1.0, True), (1e5, False)):
        start = length * torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
        residual = b + start @ matrix.T - start
        found = Gmres(TOL).begin(work).advance(start, residual, 30)
        assert (found.residual is not None) is is_known
