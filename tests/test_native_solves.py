"""Linear solves by compiled kernels: verdicts, scales, restarts, samples that are done before the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import example_input, small_block, warmed_up
from torch import Tensor

from ide_snn import Gmres, native
from ide_snn.solvers import LinearProblem, Outcome, solve
from ide_snn.solvers.vectors import NativeKrylov

REASON = native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_a_native_solve_is_the_same_at_any_scale_of_the_right_hand_side(scale: float) -> None:
    generator = torch.Generator().manual_seed(8)
    matrix, rhs = 0.05 * torch.randn(64, 64, generator=generator), torch.randn(3, 64, generator=generator)
    values = [
        solve(LinearProblem(lambda v: v @ matrix.T, rhs * s, native=True), Gmres(tol=1e-4)).value / s
        for s in (1.0, scale)
    ]
    assert torch.equal(*values)


def test_the_verdict_of_a_native_solve_with_restarts_is_on_what_it_returns() -> None:
    generator = torch.Generator().manual_seed(9)
    matrix = 0.7 * torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    rhs = torch.randn(6, 40, generator=generator)
    solution = solve(LinearProblem(lambda v: v @ matrix.T, rhs, native=True), Gmres(tol=1e-2, max_steps=60, restart=2))
    found = (rhs + solution.value @ matrix.T - solution.value).norm(dim=1) / rhs.norm(dim=1)
    torch.testing.assert_close(solution.stats.residual, found.double(), rtol=1e-3, atol=1e-6)
    assert solution.outcome is Outcome.converged
    assert solution.stats.steps > 4


def test_a_native_solve_of_a_tensor_without_strides() -> None:
    """Gradients of sums arrive expanded."""
    for shape in ((5, 12), (3, 4, 5, 5)):
        factor = torch.rand(shape, generator=torch.Generator().manual_seed(3)) / 2
        rhs = torch.ones(()).expand(shape)
        solution = solve(LinearProblem(lambda v, factor=factor: v * factor, rhs, native=True), Gmres(tol=1e-5))
        torch.testing.assert_close(solution.value, 1 / (1 - factor), rtol=1e-4, atol=1e-4)


def test_a_native_krylov_space_that_is_exhausted_gets_a_zero_direction() -> None:
    """The first group is an eigenvector, the second is not."""
    r = torch.tensor([[3.0, 0.1, 0.7], [1.0, 2.0, 4.0]])
    factors = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.5, 0.9]])
    space = NativeKrylov(r, 3, 1, 1e-6)
    left = space.extend(space.newest * factors)
    assert bool((space.newest[0] == 0).all())
    assert float(space.newest[1].norm()) == pytest.approx(1)
    assert left[0] < 1e-6 < left[1]


def test_native_gmres_solves_as_torch_and_as_linear_algebra() -> None:
    generator = torch.Generator().manual_seed(6)
    matrix = 0.8 * torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q
    rhs = torch.randn(5, 60, generator=generator)
    rhs[2] = 0
    solutions = [
        solve(LinearProblem(lambda v: v @ matrix.T, rhs, native=flag), Gmres(tol=1e-5, max_steps=60))
        for flag in (False, True)
    ]
    exact = torch.linalg.solve(torch.eye(60) - matrix, rhs.T).T
    for solution in solutions:
        assert solution.outcome is Outcome.converged
        torch.testing.assert_close(solution.value, exact, rtol=0, atol=3e-4)
    assert solutions[0].stats.products == solutions[1].stats.products


def samples_of_growing_difficulty(groups: int, n: int) -> tuple[LinearProblem, Tensor, list[int]]:
    """v = b + A_g v per sample with norms of A_g from 0 to 0.8; (the problem, its solution, samples per product)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(groups, n, n, generator=generator)
    a = a / torch.linalg.matrix_norm(a, 2)[:, None, None] * torch.linspace(0, 0.8, groups)[:, None, None]
    b = torch.randn(groups, n, generator=generator)
    sizes: list[int] = []

    def product(of: Tensor) -> Callable[[Tensor], Tensor]:
        def matvec(v: Tensor) -> Tensor:
            sizes.append(len(v))
            return torch.einsum("gij,gj->gi", of, v)

        return matvec

    problem = LinearProblem(product(a), b, native=True, of_samples=lambda index: product(a[index]))
    return problem, torch.linalg.solve(torch.eye(n) - a, b), sizes


@pytest.mark.parametrize("restart", [30, 3])
def test_solved_samples_take_no_part_in_further_products(restart: int) -> None:
    groups = 23
    problem, exact, sizes = samples_of_growing_difficulty(groups, 40)
    solution = solve(problem, Gmres(tol=1e-3, max_steps=60, restart=restart))
    stats = solution.stats
    assert solution.outcome is Outcome.converged
    assert stats.products == len(sizes)
    assert stats.whole_products == pytest.approx(sum(sizes) / groups)
    if restart == 30:
        assert sizes[0] == groups
        assert sizes == sorted(sizes, reverse=True)
        assert set(sizes) == {23, 18, 12, 6}
        assert stats.whole_products < 0.7 * stats.products
    residual = problem.rhs + problem.matvec(solution.value) - solution.value
    relative = residual.norm(dim=1) / problem.rhs.norm(dim=1)
    assert float(relative.max()) < 1e-3
    torch.testing.assert_close(stats.residual.float(), relative, rtol=1e-2, atol=1e-6)
    together = solve(replace(problem, of_samples=None), Gmres(tol=1e-3, max_steps=60, restart=restart))
    assert together.stats.whole_products == together.stats.products == stats.products
    assert float((solution.value - exact).norm() / exact.norm()) < 3e-3
    assert float((together.value - exact).norm() / exact.norm()) < 3e-3


def test_a_sample_that_is_not_finite_leaves_the_others_alone() -> None:
    problem, exact, _ = samples_of_growing_difficulty(9, 20)
    rhs = problem.rhs.clone()
    rhs[4, 7] = math.nan
    solution = solve(replace(problem, rhs=rhs), Gmres(tol=1e-3))
    assert solution.outcome is Outcome.nonfinite
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert bool(solution.value[4].isnan().any())
    assert float((solution.value - exact)[others].norm() / exact[others].norm()) < 3e-3


@pytest.mark.parametrize("kind", ["fc", "conv", "multilayer"])
def test_a_jacobian_of_some_samples_is_that_of_all(kind: str) -> None:
    block = warmed_up(small_block(kind, precision="exact", solver=Gmres(1e-3))).float()
    with torch.no_grad():
        rates, f = block.linearisation_point(example_input(kind).float())
    jacobian = f.linearise(rates, "running")
    index = torch.tensor([len(rates) - 1, 0])
    v = torch.randn(rates.shape)
    v = v.to(memory_format=torch.channels_last) if v.dim() == 4 else v
    expected, found = jacobian.rmatvec(v)[index], jacobian.of_samples(index).rmatvec(v[index])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
