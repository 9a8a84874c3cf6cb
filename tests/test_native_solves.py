"""Linear solves by compiled kernels: verdicts, scales, restarts, samples that are done before the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from networks import example_input, small_block, warmed_up
from torch import Tensor

from ide_snn import Gmres, native
from ide_snn.dense import DenseMap
from ide_snn.equilibrium import AnalyticLinearisation
from ide_snn.layers import Affine
from ide_snn.operators import Operator
from ide_snn.solvers import LinearProblem, Outcome, solve

REASON = native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("in_kernels", [False, True])
@pytest.mark.parametrize("solver", [Gmres(1e-2), Gmres(1e-4, restart=2), Gmres(1e-6)], ids=str)
def test_a_native_solve_is_the_same_at_any_scale_of_the_right_hand_side(
    scale: float, in_kernels: bool, solver: Gmres
) -> None:
    generator = torch.Generator().manual_seed(8)
    matrix, rhs = 0.05 * torch.randn(64, 64, generator=generator), torch.randn(3, 64, generator=generator)
    rhs[1] = 0
    found = []
    for factor in (1.0, scale):
        problem = in_factors([matrix], [torch.ones(3, 64)], rhs * factor)
        found.append(solve(problem if in_kernels else replace(problem, factors=None), solver))
    assert torch.equal(found[0].value, found[1].value / scale)
    assert found[0].outcome is Outcome.converged
    assert torch.equal(found[0].stats.residual, found[1].stats.residual)
    assert found[0].stats.residual[1] == found[0].value[1].norm() == 0


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


def in_factors(weights: Sequence[Tensor], scales: Sequence[Tensor], b: Tensor) -> LinearProblem:
    """v = b + A v with A v = (.. (v * scale_1) W_1 ..) * scale_k) W_k, as a function and as kernels."""

    def product(v: Tensor) -> Tensor:
        for weight, scale in zip(weights, scales, strict=True):
            v = (v * scale) @ weight
        return v

    maps = [DenseMap(Affine(Operator("linear", *w.shape[::-1]), w, None, 1, None, (w.shape[1],))) for w in weights]
    factors = tuple(link.adjoint_factor(scale) for link, scale in zip(maps, scales, strict=True))
    return LinearProblem(product, b, native=True, factors=lambda: factors)


def samples_of_growing_difficulty(groups: int, n: int) -> tuple[LinearProblem, Tensor]:
    """v = b + A_g v per sample with norms of A_g from 0 to 0.8, and its solution."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    scale = torch.linspace(0, 0.8, groups)[:, None] * torch.rand(groups, n, generator=generator)
    b = torch.randn(groups, n, generator=generator)
    exact = torch.linalg.solve(torch.eye(n) - weight.T * scale[:, None, :], b)
    return in_factors([weight], [scale], b), exact


@pytest.mark.parametrize("restart", [30, 3])
def test_every_sample_takes_the_products_that_it_needs(restart: int) -> None:
    groups = 61
    problem, exact = samples_of_growing_difficulty(groups, 40)
    solver = Gmres(tol=1e-3, max_steps=60, restart=restart)
    solution, together = solve(problem, solver), solve(replace(problem, factors=None), solver)
    stats = solution.stats
    assert solution.outcome is Outcome.converged
    residual = problem.rhs + problem.matvec(solution.value) - solution.value
    relative = residual.norm(dim=1) / problem.rhs.norm(dim=1)
    assert float(relative.max()) < 1e-3
    torch.testing.assert_close(stats.residual.float(), relative, rtol=1e-2, atol=1e-6)
    assert float((solution.value - exact).norm() / exact.norm()) < 3e-3
    assert float((together.value - exact).norm() / exact.norm()) < 3e-3
    assert stats.products == together.stats.products == together.stats.whole_products
    if restart == 30:
        alone = [solve(in_factors_of_sample(problem, g), solver).stats.products for g in range(groups)]
        assert stats.whole_products == pytest.approx(sum(alone) / groups)
        assert stats.products == max(alone)
        assert stats.whole_products < 0.8 * stats.products


def in_factors_of_sample(problem: LinearProblem, g: int) -> LinearProblem:
    """The system of one sample, by torch."""

    def product(v: Tensor) -> Tensor:
        return problem.matvec(v.expand(problem.rhs.shape))[g : g + 1]

    return LinearProblem(product, problem.rhs[g : g + 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1e-2, 1e-5]), st.integers(1, 3))
def test_two_dense_factors_of_any_size(n: int, between: int, groups: int, tol: float, threads: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weights = [torch.randn(*shape, generator=generator) for shape in ((n, between), (between, n))]
    weights = [0.7 * w / torch.linalg.matrix_norm(w, 2) for w in weights]
    scales = [torch.rand(groups, size, generator=generator) for size in (n, between)]
    problem = in_factors(weights, scales, torch.randn(groups, n, generator=generator))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        solution = solve(problem, Gmres(tol, max_steps=80))
    finally:
        torch.set_num_threads(before)
    expected = solve(replace(problem, factors=None, native=False), Gmres(1e-6, max_steps=80)).value
    assert solution.outcome is Outcome.converged
    assert float((solution.value - expected).norm() / expected.norm()) < 4 * tol


def test_the_solution_of_a_sample_does_not_depend_on_the_others() -> None:
    """Bit for bit: whatever samples are multiplied with it, and how many leave before it."""
    problem, _ = samples_of_growing_difficulty(50, 200)
    whole = solve(problem, Gmres(tol=1e-3)).value
    for g in (0, 25, 49):
        only = torch.zeros(50, 1)
        only[g] = 1
        value = solve(replace(problem, rhs=problem.rhs * only), Gmres(tol=1e-3)).value
        assert torch.equal(value[g], whole[g])
        assert float(value.abs().sum()) == float(value[g].abs().sum())


def test_a_space_that_is_exhausted_ends_with_the_solution() -> None:
    """The first sample is an eigenvector of its matrix, the second is not."""
    b = torch.tensor([[3.0, 0.1, 0.7], [1.0, 2.0, 4.0]])
    scale = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.5, 0.9]])
    solution = solve(in_factors([torch.eye(3)], [scale], b), Gmres(tol=1e-6, max_steps=3))
    assert solution.outcome is Outcome.converged
    assert solution.stats.whole_products == 2 + 1  # one and three, and one each for the verdict at this tolerance
    torch.testing.assert_close(solution.value, b / (1 - scale), rtol=1e-5, atol=0)


def test_a_sample_that_is_not_finite_leaves_the_others_alone() -> None:
    problem, exact = samples_of_growing_difficulty(9, 20)
    rhs = problem.rhs.clone()
    rhs[4, 7] = math.nan
    solution = solve(replace(problem, rhs=rhs), Gmres(tol=1e-3))
    assert solution.outcome is Outcome.nonfinite
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert bool(solution.value[4].isnan().any())
    assert float((solution.value - exact)[others].norm() / exact[others].norm()) < 3e-3


@pytest.mark.parametrize("kind", ["fc", "conv", "multilayer"])
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_a_solve_in_factors_is_that_with_products_of_the_batch(kind: str, tol: float) -> None:
    block = warmed_up(small_block(kind, precision="exact")).float()
    with torch.no_grad():
        rates, f = block.linearisation_point(example_input(kind).float())
    jacobian = f.linearise(rates, "running")
    assert isinstance(jacobian, AnalyticLinearisation)
    g = torch.randn(rates.shape, generator=torch.Generator().manual_seed(0))
    g = g.to(memory_format=torch.channels_last) if g.dim() == 4 else g
    problem = LinearProblem(jacobian.rmatvec, g, native=True, factors=jacobian.transposed_factors())
    assert problem.factors is not None
    found, expected = (solve(each, Gmres(tol)) for each in (problem, replace(problem, factors=None)))
    assert found.outcome is expected.outcome is Outcome.converged
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-5 if tol < 1e-5 else 2 * tol)
    assert found.value.stride() == expected.value.stride()


def test_a_right_hand_side_in_any_order_in_memory() -> None:
    block = warmed_up(small_block("conv", precision="exact")).float()
    with torch.no_grad():
        rates, f = block.linearisation_point(example_input("conv").float())
    jacobian = f.linearise(rates, "running")
    g = torch.randn(rates.shape, generator=torch.Generator().manual_seed(0)).contiguous()
    v = solve(f.adjoint_problem(jacobian, g), Gmres(1e-3)).value
    assert float((g + jacobian.rmatvec(v) - v).norm() / g.norm()) < 1e-3


def test_the_gradient_of_a_solved_equilibrium_with_batch_norm() -> None:
    gradients, x = [], example_input("multilayer").float()
    reference = warmed_up(small_block("multilayer", solver=Gmres(1e-3))).float().eval()
    for precision in ("float32", "exact"):
        block = copy.deepcopy(reference)
        block.precision = precision
        value, _ = block.equilibrium(x)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        (value * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 5e-3


def test_factors_are_for_what_their_kernels_can_read() -> None:
    problem = in_factors([torch.eye(3)], [torch.full((2, 3), 0.5)], torch.ones(2, 3))
    for wrong in (
        replace(problem, coupled=True),
        replace(problem, native=False),
        replace(problem, rhs=problem.rhs.double()),
    ):
        with pytest.raises(ValueError, match="do not couple samples"):
            solve(wrong, Gmres(1e-3))
