"""The four solvers against dense solves, scipy's sparse solvers and scipy's root finders."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_systems import (
    SHAPE,
    TOL,
    N,
    System,
    accelerated,
    both_couplings,
    every_dtype,
    every_solver,
    nonlinear,
    per_sample,
    solver,
    system,
    with_spectrum,
)
from torch import Tensor

from ide_snn.solvers import (
    Anderson,
    Broyden,
    FixedPoint,
    FixedPointProblem,
    Gmres,
    LinearProblem,
    Outcome,
    solve,
)


@every_solver
@every_dtype
@both_couplings
def test_linear_solutions(name: str, dtype: torch.dtype, coupled: bool) -> None:
    """Against numpy and scipy; the verdict is the true residual of what is returned."""
    problem, tol = system([0.1, 0.5, 0.9], dtype, coupled=coupled), TOL[dtype]
    before = problem.rhs.clone()
    solution = problem.solve(solver(name, tol))
    assert solution.outcome is Outcome.converged
    assert solution.value.dtype == dtype
    error = per_sample(solution.value - problem.exact()) / per_sample(problem.exact())
    assert float(error.max()) < 40 * tol
    sizes = problem.matrix.shape[:2]
    for a, b, v in zip(problem.matrix, problem.rhs.reshape(sizes), solution.value.reshape(sizes), strict=True):
        theirs, failed = scipy.sparse.linalg.gmres(np.eye(len(a)) - a.double().numpy(), b.double().numpy(), rtol=1e-13)
        assert not failed
        np.testing.assert_allclose(v.double().numpy(), theirs, atol=40 * tol * np.abs(theirs).max())
    recomputed = problem.residual(solution.value)
    assert solution.stats.residual.shape == recomputed.shape == (1 if coupled else 3,)
    assert float(recomputed.max()) <= tol * 1.2
    torch.testing.assert_close(solution.stats.residual, recomputed, rtol=0.3, atol=1e-6 if tol > 1e-6 else 1e-14)
    assert solution.stats.products == problem.calls
    assert torch.equal(problem.rhs, before)


SINGULAR = {
    "nothing": torch.eye(4),
    "nilpotent": torch.eye(4) - torch.diag(torch.ones(3), 1),
    "rank three": torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1])),
    "almost": torch.diag(torch.tensor([1 - 1e-7, 0.5, 0.2, 0.1])),
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", SINGULAR)
def test_gmres_does_not_claim_what_a_singular_system_has_not(name: str, native: bool) -> None:
    matrix, rhs = SINGULAR[name], torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 1]])
    problem = LinearProblem(lambda v: v @ matrix.T, rhs, native=native)
    solution = solve(problem, Gmres(tol=1e-3, max_steps=12))
    v, a = solution.value.double(), matrix.double()
    true = (rhs + v @ a.T - v).norm(dim=1) / rhs.norm(dim=1)
    solved = solution.stats.residual <= 1e-3
    assert bool((true[solved] <= 1e-2).all())
    assert (solution.outcome is Outcome.converged) == bool(solved.all())
    assert name == "almost" or solution.outcome is not Outcome.converged
    torch.testing.assert_close(solution.stats.residual, true, rtol=0.2, atol=1e-2)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gmres_knows_the_rounding_of_a_very_long_solution(native: bool, seed: int) -> None:
    """1 - A has an eigenvalue of 1e-7: v is so long that rounding it to float32 alone leaves a residual."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.rand(40, generator=generator, dtype=torch.float64)
    spectrum[0] = 1 - 1e-7
    matrix = (basis @ torch.diag(spectrum) @ basis.T).float()
    rhs = torch.randn(3, 40, generator=generator)
    solution = solve(LinearProblem(lambda v: v @ matrix.T, rhs, native=native), Gmres(tol=1e-3, max_steps=200))
    v, a = solution.value.double(), matrix.double()
    true = (rhs + v @ a.T - v).norm(dim=1) / rhs.norm(dim=1)
    assert bool((solution.stats.residual >= 0.3 * true - 1e-3).all())
    assert solution.outcome is not Outcome.converged or float(true.max()) < 1e-2


@both_couplings
@pytest.mark.parametrize("restart", [2, 30])
def test_gmres_far_above_rounding_needs_no_product_for_its_verdict(coupled: bool, restart: int) -> None:
    """The residual formed from the images that were computed is that of the value returned."""
    problem = system([0.3, 0.6, 0.9], torch.float32, coupled=coupled)
    solution = problem.solve(Gmres(tol=1e-2, restart=restart))
    assert solution.outcome is Outcome.converged
    recomputed = problem.residual(solution.value)
    torch.testing.assert_close(solution.stats.residual, recomputed, rtol=1e-3, atol=1e-6)
    assert float(recomputed.max()) <= 1e-2
    assert solution.stats.products == solution.stats.steps == problem.calls


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), n=st.integers(1, 12), norm=st.floats(0, 0.9), seed=st.integers(0, 2**31))
@every_solver
@both_couplings
def test_random_contractions(name: str, coupled: bool, batch: int, n: int, norm: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups, size = (1, batch * n) if coupled else (batch, n)
    matrix = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    matrix *= norm / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    rhs = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    problem = System(matrix, rhs)
    solution = problem.solve(solver(name, 1e-8))
    assert solution.outcome is Outcome.converged
    assert float(problem.residual(solution.value).max()) <= 1.01e-8
    assert solution.stats.products == problem.calls


@every_solver
def test_the_solution_does_not_depend_on_the_memory_layout(name: str) -> None:
    problem = system([0.1, 0.5, 0.9])
    plain = problem.solve(solver(name)).value
    problem.rhs = problem.rhs.to(memory_format=torch.channels_last)
    solution = problem.solve(solver(name), problem.rhs.clone())
    assert solution.value.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(solution.value, plain, rtol=0, atol=1e-9)
    problem.rhs = problem.rhs.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(problem.solve(solver(name)).value, plain, rtol=0, atol=1e-9)


@every_solver
@every_dtype
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("zeros", "coupled"), [([1], False), ([0, 1, 2], False), ([0, 1, 2], True)])
def test_zero_has_the_solution_zero(name: str, dtype: torch.dtype, warm: bool, zeros: list[int], coupled: bool) -> None:
    problem = system([0.9, 0.6, 0.9], dtype, coupled=coupled)
    problem.rhs[zeros] = 0
    solution = problem.solve(solver(name, TOL[dtype]), torch.randn(SHAPE, dtype=dtype) if warm else None)
    assert solution.outcome is Outcome.converged
    assert not bool(solution.value[zeros].any())
    torch.testing.assert_close(solution.value.double(), problem.exact(), rtol=0, atol=200 * TOL[dtype])


@every_solver
@every_dtype
def test_scale_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """The original's tolerance was absolute and over the whole batch: the loss's scale changed its gradients."""
    problem, tol = system([0.5, 0.8, 0.9], dtype), 1e-2
    rhs, reference = problem.rhs, problem.solve(solver(name, tol))
    for factors in ([1e-6] * 3, [1e6] * 3, [1e6, 1.0, 1e-6], [1e-6, 1e6, 1.0], [1e-30] * 3, [1.0, 1e-25, 1e25]):
        factor = torch.tensor(factors, dtype=dtype).view(3, 1, 1, 1)
        problem.rhs = rhs * factor
        solution = problem.solve(solver(name, tol))
        assert solution.outcome is Outcome.converged
        assert solution.stats.steps == reference.stats.steps
        torch.testing.assert_close(solution.value / factor, reference.value, rtol=1e-3 * tol, atol=1e-3 * tol)
        torch.testing.assert_close(solution.stats.residual, reference.stats.residual, rtol=1e-3, atol=1e-6)


@every_solver
def test_permuting_the_samples_permutes_the_solution(name: str) -> None:
    problem, order = system([0.1, 0.5, 0.9]), [2, 0, 1]
    other = System(problem.matrix[order], problem.rhs[order])
    one, two = (p.solve(solver(name, 1e-6)) for p in (problem, other))
    torch.testing.assert_close(two.value, one.value[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(two.stats.residual, one.stats.residual[order], rtol=1e-3, atol=1e-12)


@accelerated
@every_dtype
def test_expanding_maps_are_solved(name: str, dtype: torch.dtype) -> None:
    """Eigenvalues down to -1.3, where the plain iteration runs away."""
    problem = with_spectrum(torch.linspace(-1.3, 0.3, N, dtype=torch.float64))
    problem = System(problem.matrix.to(dtype), problem.rhs.to(dtype))
    solution = problem.solve(solver(name, TOL[dtype]))
    assert solution.outcome is Outcome.converged
    torch.testing.assert_close(solution.value.double(), problem.exact(), rtol=0, atol=100 * TOL[dtype])
    assert problem.solve(FixedPoint(TOL[dtype])).outcome is Outcome.diverged


@every_solver
def test_strongly_negative_spectrum(name: str) -> None:
    """What training makes of the feedback; the plain iteration needs damping there."""
    problem = with_spectrum(torch.linspace(-6, 0.2, N, dtype=torch.float64))
    solution = problem.solve(solver(name, **({"damping": 0.25} if name == "fixed_point" else {})))
    assert solution.outcome is Outcome.converged
    torch.testing.assert_close(solution.value, problem.exact(), rtol=0, atol=1e-8)


@every_solver
@pytest.mark.parametrize("kind", ["zero", "nilpotent", "rank one", "multiple of one"])
def test_exhausted_krylov_spaces(name: str, kind: str) -> None:
    """Few products reach the exact solution, at different counts in the samples of one batch."""
    matrix = system([0.8, 0.8, 0.8]).matrix
    matrix[0] = {
        "zero": torch.zeros(N, N, dtype=torch.float64),
        "nilpotent": torch.diag(torch.tensor([3.0, 2.0, 0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64), 1),
        "rank one": torch.randn(N, 1, dtype=torch.float64) @ torch.full((1, N), 0.02, dtype=torch.float64),
        "multiple of one": -0.5 * torch.eye(N, dtype=torch.float64),
    }[kind]
    problem = System(matrix, torch.randn(SHAPE, dtype=torch.float64))
    for coefficients in (problem, System(matrix[:1].expand(3, N, N), problem.rhs)):
        solution = coefficients.solve(solver(name))
        assert solution.outcome is Outcome.converged
        torch.testing.assert_close(solution.value, coefficients.exact(), rtol=0, atol=1e-8)
    assert name != "gmres" or solution.stats.steps <= 3


@pytest.mark.parametrize(("name", "memory"), [("gmres", "restart"), ("anderson", "memory"), ("broyden", "memory")])
def test_little_memory_suffices(name: str, memory: str) -> None:
    problem = system([0.3, 0.6, 0.8])
    solution = problem.solve(solver(name, **{memory: 2}))
    assert solution.outcome is Outcome.converged
    torch.testing.assert_close(solution.value, problem.exact(), rtol=0, atol=1e-8)


@nonlinear
@every_dtype
@both_couplings
def test_nonlinear_fixed_points(name: str, dtype: torch.dtype, coupled: bool) -> None:
    """Against scipy.optimize.root, sample by sample or as one."""
    problem, tol = system([0.3, 0.6, 0.8], coupled=coupled), TOL[dtype]
    shape = (problem.matrix.shape[0], -1)

    def f(z: Tensor) -> Tensor:
        rows = z.reshape(*shape, 1)
        return ((problem.matrix.to(z) @ rows).reshape(z.shape) + problem.rhs.to(z)).sin()

    solution = solve(FixedPointProblem(f, torch.rand(SHAPE, dtype=dtype), coupled=coupled), solver(name, tol))
    assert solution.outcome is Outcome.converged

    def equation(z: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(z).reshape(SHAPE)
        return (f(tensor) - tensor).flatten().numpy()

    root = scipy.optimize.root(equation, np.zeros(3 * N), tol=1e-13)
    np.testing.assert_allclose(solution.value.flatten().numpy(), root.x, atol=20 * tol * np.abs(root.x).max())
    image = f(solution.value)
    residual = (image - solution.value).reshape(shape).norm(dim=1) / image.reshape(shape).norm(dim=1)
    torch.testing.assert_close(solution.stats.residual, residual.double(), rtol=0.3, atol=1e-7)
    assert float(residual.max()) <= 1.2 * tol


@nonlinear
@pytest.mark.parametrize("drive", [-5.0, 0.4])
def test_silent_neurons_are_a_fixed_point(name: str, drive: float) -> None:
    """f(z) = 0 at z != 0 is no failure: there the quotient of norms has no value, one step on it is solved."""
    drives = torch.tensor([[-5.0, -5.0], [-5.0, drive]])
    problem = FixedPointProblem(lambda z: (0.3 * z + drives).clamp(0, 1), torch.rand(2, 2))
    solution = solve(problem, solver(name, 1e-5))
    assert solution.outcome is Outcome.converged
    expected = torch.tensor([[0, 0], [0, max(drive, 0) / 0.7]])
    torch.testing.assert_close(solution.value, expected, rtol=1e-4, atol=1e-6)
    solve(problem, solver(name, 1e-3), y0 := solution.value.clone()).value.fill_(7)
    torch.testing.assert_close(y0, expected, rtol=1e-4, atol=1e-6)  # what comes back belongs to the caller


def test_gmres_refuses_nonlinear_problems() -> None:
    with pytest.raises(ValueError, match="use fixed_point, anderson or broyden"):
        solve(FixedPointProblem(torch.sin, torch.ones(2, 3)), Gmres())


@every_solver
def test_the_first_iterate(name: str) -> None:
    problem = system([0.1, 0.5, 0.9])
    given_y0, y0 = problem.exact(), problem.exact()
    solution = problem.solve(solver(name), y0)
    assert (solution.stats.steps, problem.calls, solution.stats.trace) == (0, 1, None)
    assert torch.equal(y0, given_y0)
    problem.matrix.zero_()
    problem.solve(solver(name)).value.zero_()  # what comes back belongs to the caller
    assert bool(problem.rhs.any())
    with pytest.raises(ValueError, match=r"y0 has the shape \[3, 12\], the problem \[3, 2, 3, 2\]"):
        problem.solve(solver(name), torch.zeros(3, N))
    empty = solve(LinearProblem(lambda v: v, torch.zeros(0, 2)), solver(name))
    assert (empty.outcome, empty.value.shape) == (Outcome.converged, (0, 2))


@every_solver
def test_settings_are_values(name: str) -> None:
    one, other = solver(name), solver(name)
    assert (one, hash(one)) == (other, hash(other))
    assert one != solver(name, tol=1e-3)
    with pytest.raises(FrozenInstanceError):
        one.tol = 1.0
    for tol in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tol must be a positive finite number"):
            solver(name, tol=tol)
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, got 0"):
        solver(name, max_steps=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FixedPoint, {"damping": 0.0}, r"damping must lie in \(0, 1\], got 0"),
        (FixedPoint, {"damping": 1.1}, r"damping must lie in \(0, 1\], got 1.1"),
        (Anderson, {"memory": 0}, "memory must be a whole number"),
        (Anderson, {"mixing": 0.0}, r"mixing must lie in \(0, 1\]"),
        (Broyden, {"memory": 0}, "memory must be a whole number"),
        (Gmres, {"restart": 2.5}, "restart must be a whole number"),
    ],
)
def test_impossible_settings_are_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
