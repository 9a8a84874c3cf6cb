"""What a solve that cannot succeed returns: budgets, divergence, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from linear_systems import (
    SHAPE,
    TOL,
    N,
    both_couplings,
    every_dtype,
    every_solver,
    solver,
    system,
    with_spectrum,
)

from ide_snn.solvers import SOLVERS, FixedPoint, Outcome


@pytest.mark.parametrize("budget", [1, 4, 7])
@pytest.mark.parametrize("name", [*SOLVERS, "gmres restarted"])
def test_max_steps_is_kept(name: str, budget: int) -> None:
    problem = system([0.9, 0.95, 0.95])
    options = {"restart": 3} if name.endswith("restarted") else {}
    solution = problem.solve(solver(name.split()[0], 1e-14, budget, **options), trace=True)
    assert solution.outcome is Outcome.max_steps
    assert solution.stats.steps == budget
    trace = solution.stats.trace
    assert trace is not None
    evaluations = 1 + (budget if "gmres" not in name else math.ceil(budget / 3) if options else 1)
    assert len(trace) == evaluations
    starts_from_zero = "gmres" in name
    assert trace[0] == pytest.approx(1.0 if starts_from_zero else float(problem.residual(problem.rhs).max()))
    assert problem.calls == solution.stats.products == budget + (evaluations - 1 if starts_from_zero else 1)
    torch.testing.assert_close(problem.residual(solution.value), solution.stats.residual)
    assert "raise max_steps" in solution.message


def test_divergence_returns_the_best_iterate_and_leaves_others_alone() -> None:
    problem = with_spectrum(torch.linspace(-1.5, 0.5, N, dtype=torch.float64))
    assert problem.solve(FixedPoint(1e-8, max_steps=9)).outcome is Outcome.diverged  # worse than at the start
    problem.matrix[1] /= 3  # this sample is a contraction
    for scale in (1.0, 1e8):  # slowly, or beyond all floats before sample 1 is solved
        problem.matrix[0] *= scale
        solution = problem.solve(FixedPoint(1e-8, max_steps=100), trace=True)
        assert solution.outcome is Outcome.diverged
        residual = problem.residual(solution.value)
        torch.testing.assert_close(solution.stats.residual, residual, rtol=1e-6, atol=1e-9)
        assert float(residual[1]) <= 1e-8
        assert bool((residual <= problem.residual(problem.rhs) * (1 + 1e-12)).all())
        assert "damping" in solution.message


@every_solver
@every_dtype
@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_products(name: str, dtype: torch.dtype, start: int, value: float) -> None:
    """The best finite iterate of that sample comes back; the other samples are solved all the same."""
    problem = system([0.5, 0.8, 0.8], dtype)
    problem.poison = start, value
    solution = problem.solve(solver(name, TOL[dtype]))
    assert solution.outcome is Outcome.nonfinite
    assert bool(solution.value.isfinite().all())
    residual = problem.residual(solution.value)
    assert float(residual[[0, 2]].max()) <= 1.2 * TOL[dtype]
    assert float(residual[1]) <= float(problem.residual(problem.rhs)[1]) * 1.001
    if start == 3 and name != "gmres":
        assert float(residual[1]) < float(problem.residual(problem.rhs)[1]) * 0.9
    assert solution.stats.products == problem.calls


@every_solver
@both_couplings
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("warm", [False, True])
def test_nan_in_the_right_hand_side_comes_back(name: str, coupled: bool, value: float, warm: bool) -> None:
    """The original replaced it by 0 in silence."""
    problem = system([0.5, 0.8, 0.8], coupled=coupled)
    problem.rhs[1, 0, 0, 0] = value
    solution = problem.solve(solver(name), torch.zeros(SHAPE, dtype=torch.float64) if warm else None)
    assert solution.outcome is Outcome.nonfinite
    assert not bool(solution.value[1].isfinite().all())
    if not coupled:
        assert float(problem.residual(solution.value)[[0, 2]].max()) <= 1e-10
