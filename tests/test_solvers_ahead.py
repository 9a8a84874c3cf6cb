"""GMRES with dimensions computed ahead of the host: the numbers of the run that asks after every product."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ide_snn.solvers import Gmres, LinearProblem, Outcome, Solution, solve
from ide_snn.solvers.ahead import PATIENCE, Ahead, Foresight
from ide_snn.solvers.layout import Layout
from ide_snn.solvers.runs import Terms


def system(
    groups: int, n: int, norm: float = 0.7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(A [G, N, N] with ||A|| = `norm` in every group, b [G, N])."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(groups, n, n, dtype=torch.float64, generator=generator)
    matrix *= norm / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    return matrix.to(dtype), torch.randn(groups, n, dtype=torch.float64, generator=generator).to(dtype)


def problem(matrix: Tensor, b: Tensor) -> LinearProblem:
    return LinearProblem(lambda v: torch.einsum("gij,gj->gi", matrix, v), b)


def both(matrix: Tensor, b: Tensor, solver: Gmres, foresight: Foresight) -> tuple[Solution, Solution]:
    """(the solution of the run that asks after every product, the other one)."""
    asked = problem(matrix, b)
    return solve(asked, solver), solve(dataclasses.replace(asked, ahead=Ahead(foresight)), solver)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 6),
    n=st.integers(1, 30),
    norm=st.sampled_from([0.0, 0.3, 0.9, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tol=st.sampled_from([1e-1, 1e-2, 1e-3]),
    max_steps=st.integers(1, 12),
    restart=st.integers(1, 12),
    dimensions=st.integers(1, 9),
)
@example(groups=2, n=8, norm=1.5, dtype=torch.float32, tol=1e-1, max_steps=8, restart=8, dimensions=1)
@example(groups=6, n=8, norm=1.5, dtype=torch.float32, tol=1e-1, max_steps=7, restart=1, dimensions=1)
@example(groups=2, n=8, norm=1.5, dtype=torch.float32, tol=1e-3, max_steps=8, restart=12, dimensions=8)
def test_whatever_was_foreseen_the_numbers_are_the_same(
    groups: int, n: int, norm: float, dtype: torch.dtype, tol: float, max_steps: int, restart: int, dimensions: int
) -> None:
    foresight = Foresight()
    foresight.dimensions = dimensions
    matrix, b = system(groups, n, norm, dtype, seed=n)
    solver = Gmres(tol, max_steps=max_steps, restart=restart)
    expected, found = both(matrix, b, solver, foresight)
    assert found.outcome == expected.outcome
    assert (found.stats.steps, found.stats.products) == (expected.stats.steps, expected.stats.products)
    # single numbers of a v may be small beside it, and are as exact as the whole
    apart = (found.value - expected.value).norm(dim=1) / expected.value.norm(dim=1)
    assert float(apart.max()) < 3e-3
    left = (b + torch.einsum("gij,gj->gi", matrix, found.value) - found.value).norm(dim=1) / b.norm(dim=1)
    length = float((found.value.norm(dim=1) / b.norm(dim=1)).max())
    rounding = 100 * torch.finfo(dtype).eps * length  # up to which a residual is trusted that no product has confirmed
    near = {"rtol": 1e-2, "atol": 1e-6 + rounding}
    torch.testing.assert_close(found.stats.residual, expected.stats.residual, **near)
    torch.testing.assert_close(left.double(), found.stats.residual, **near)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_the_right_hand_side_does_not_matter(scale: float) -> None:
    matrix, b = system(3, 20)
    expected = both(matrix, b, Gmres(1e-3), Foresight())[1]
    found = both(matrix, b * scale, Gmres(1e-3), Foresight())[1]
    assert found.outcome is Outcome.converged
    torch.testing.assert_close(found.value / scale, expected.value, rtol=1e-4, atol=1e-5)


def test_groups_of_zeros_and_nan() -> None:
    matrix, b = system(4, 20)
    b[1], b[2, 3] = 0, torch.nan
    expected, found = both(matrix, b, Gmres(1e-3), Foresight())
    assert found.outcome is expected.outcome is Outcome.nonfinite
    assert found.value[1].tolist() == [0.0] * 20
    assert bool(found.value[2].isnan().any())
    torch.testing.assert_close(found.value, expected.value, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_tight_tolerance_is_judged_on_a_product() -> None:
    matrix, b = system(3, 40, norm=0.95)
    expected, found = both(matrix, b, Gmres(3e-6, max_steps=80), Foresight())
    assert found.outcome is expected.outcome is Outcome.converged
    assert found.stats.max_residual <= 3e-6


def test_products_are_those_foreseen_and_more_where_more_are_needed() -> None:
    matrix, b = system(3, 50)
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return torch.einsum("gij,gj->gi", matrix, v)

    foresight = Foresight()
    foresight.dimensions = 2
    ahead = LinearProblem(product, b, ahead=Ahead(foresight))
    needed = solve(ahead, Gmres(1e-3)).stats.products
    assert needed > 4
    assert len(calls) == {5: 2 + 4 + 6, 6: 2 + 4 + 6, 7: 2 + 4 + 6 + 9, 8: 2 + 4 + 6 + 9}[needed]
    calls.clear()
    solve(ahead, Gmres(1e-3))
    assert len(calls) == needed == foresight.dimensions


def test_foresight_grows_at_once_and_shrinks_with_patience() -> None:
    foresight = Foresight()
    foresight.learn(7)
    assert foresight.dimensions == 7
    for number in range(PATIENCE):
        assert foresight.dimensions == 7
        foresight.learn(3 if number else 5)
    assert foresight.dimensions == 5
    foresight.learn(6)
    assert foresight.dimensions == 6


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_an_attempt_never_waits_for_the_host(tol: float) -> None:
    """On tensors without numbers: whoever asks for one fails."""
    with FakeTensorMode():
        matrix, b = torch.empty(5, 30, 30), torch.empty(5, 30)
        terms = Terms(tol, torch.finfo(b.dtype).eps)
        layout = Layout.of(b)
        run = Ahead(Foresight()).attempt(lambda v: torch.einsum("gij,gj->gi", matrix, v), layout, b, terms, 6)
        assert [tuple(x.shape) for x in run] == [(5, 30), (5, 30), (3 * 5 + 2,)]
        with pytest.raises(DataDependentOutputException):
            bool(run[2][-1])
