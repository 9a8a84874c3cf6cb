"""Spectrum ends of J, norms of the feedback and solver traces, against dense linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from networks import KINDS, example_input, small_block, warmed_up
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, FixedPoint, Gmres, NeuronParams
from ide_snn.analysis import block_spectrum, feedback_norms, observe, residual_per_step, solver_residuals
from ide_snn.analysis.residuals import cotangents
from ide_snn.analysis.spectrum import largest_eigenvalue, largest_singular_value
from ide_snn.equilibrium import dense_jacobian
from ide_snn.optimizations import get_constraint, raw_weight
from ide_snn.solvers import SOLVERS, LinearProblem


def wide_block() -> FeedbackSNN:
    """More neurons than are looked at densely."""
    stage = nn.Linear(6, 80)
    nn.init.uniform_(stage.bias, 0.2, 1.2)
    feedback = Connection(nn.Linear(80, 80, bias=False), constraint="spectral_operator", bound=0.8)
    return FeedbackSNN(input=stage, feedback=feedback, neuron=NeuronParams(1.0, 1.0), time_steps=20).double()


def block_and_input(kind: str) -> tuple[FeedbackSNN, Tensor]:
    if kind == "wide":
        return wide_block(), torch.randn(3, 6, dtype=torch.float64)
    return warmed_up(small_block(kind, time_steps=20)), example_input(kind, 3)


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_spectrum_is_that_of_the_dense_jacobian(kind: str) -> None:
    block, x = block_and_input(kind)
    spectrum = block_spectrum(observe(block, x).sites[0], samples=8)
    block.eval()
    for i in range(3):
        rates, f = block.linearisation_point(x[i : i + 1])
        dense = dense_jacobian(f.linearise(rates, "running").matvec, rates)
        assert spectrum.eigenvalue[i] == pytest.approx(float(torch.linalg.eigvals(dense).abs().max()), rel=1e-4)
        assert spectrum.norm[i] == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-4)
        assert spectrum.eigenvalue[i] <= spectrum.norm[i] * (1 + 1e-6)
    assert len(spectrum.norm) == 3
    if len(block.layers):
        assert spectrum.norm_bound is None
    else:
        assert 0 < max(spectrum.norm) <= spectrum.norm_bound * (1 + 1e-6)
        assert spectrum.norm_bound == pytest.approx(spectrum.feedback.operator / block.neuron.v_threshold)


@pytest.mark.parametrize("n", [1, 2, 100])
def test_ends_of_a_random_matrix(n: int) -> None:
    matrix, like = torch.randn(n, n, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)
    found = largest_eigenvalue(lambda v: v @ matrix.t(), like)
    assert found == pytest.approx(float(torch.linalg.eigvals(matrix).abs().max()), rel=1e-4)
    found = largest_singular_value(lambda v: v @ matrix.t(), lambda v: v @ matrix, like)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-4)
    assert largest_eigenvalue(torch.zeros_like, like) == 0
    assert largest_singular_value(torch.zeros_like, torch.zeros_like, like) == 0


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
def test_feedback_norms(kind: str) -> None:
    block, x = block_and_input(kind)
    block.eval()
    norms = feedback_norms(block, x[:1])
    op = block.feedback.op
    channel = 1 if isinstance(op, nn.ConvTranspose2d) else 0
    matrix = op.weight.detach().transpose(0, channel).flatten(1)
    assert norms.matrix == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    # the constraint bounds the operator by its own, independent machinery
    constraint = get_constraint(op)
    with torch.no_grad():
        raw = raw_weight(op)
        scale = constraint.alpha.clamp(-constraint.bound, constraint.bound) / constraint.norm(raw)
        assert norms.operator == pytest.approx(float(scale * constraint.exact_norm(raw)), rel=1e-4)
    assert norms.constraint == "SpectralOperator"
    if isinstance(op, nn.Linear):
        assert norms.operator == pytest.approx(norms.matrix, rel=1e-4)


def test_feedback_norms_of_an_own_module_and_of_zeros() -> None:
    linear = nn.Linear(8, 8).double()
    own = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=nn.Sequential(linear, nn.Identity()))
    norms = feedback_norms(own.eval(), example_input("fc", 1))
    assert norms.operator == pytest.approx(float(torch.linalg.matrix_norm(linear.weight.detach(), 2)), rel=1e-4)
    assert (norms.matrix, norms.constraint) == (None, None)
    nn.init.zeros_(linear.weight)
    zero = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=linear)
    norms = feedback_norms(zero.eval(), example_input("fc", 1))
    assert (norms.matrix, norms.operator) == (0, 0)


def test_cotangent_is_that_of_the_cross_entropy() -> None:
    block, x = block_and_input("wide")
    out = nn.Linear(80, 5).double()
    model = nn.Sequential(block, out)
    labels = torch.tensor([0, 3, 1])
    observation = observe(model, x)
    found = cotangents(observation, labels)[""]
    error = observation.output.softmax(1) - nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(found, error @ out.weight.detach() / 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(cotangents(observation, labels)[""], found)


def test_cotangents_of_blocks_in_a_row() -> None:
    first, second, out = small_block("fc"), wide_block(), nn.Linear(80, 5).double()
    second.input = Connection(nn.Linear(8, 80)).double()
    model = nn.Sequential(warmed_up(first), second, out).eval()
    x, labels = example_input("fc", 3), torch.tensor([0, 3, 1])
    found = cotangents(observe(model, x), labels)
    assert list(found) == ["0_", "1_"]
    rates = first(x).detach().requires_grad_()
    nn.functional.cross_entropy(out(second(rates)), labels).backward()
    torch.testing.assert_close(found["0_"], rates.grad)


def test_residuals_of_the_neumann_series_and_of_gmres() -> None:
    matrix = torch.randn(2, 30, 30, dtype=torch.float64)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2, keepdim=True)
    rhs = torch.randn(2, 30, dtype=torch.float64)

    def matvec(v: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", matrix, v)

    problem = LinearProblem(matvec, rhs)
    outcome, neumann = residual_per_step(problem, FixedPoint(tol=1e-6, max_steps=100))
    power, expected = rhs, []
    for _ in neumann:
        power = matvec(power)  # b - (I - A) v_k = A^(k+1) b after k steps
        expected.append(float((power.norm(dim=1) / rhs.norm(dim=1)).max()))
    assert outcome == "converged"
    assert neumann == pytest.approx(expected, rel=1e-6)
    outcome, gmres = residual_per_step(problem, Gmres(tol=1e-6, max_steps=30))
    assert outcome == "converged"
    assert len(gmres) - 1 < len(neumann)  # products
    assert gmres[0] == 1  # of v = 0
    assert all(a <= b * (1 + 1e-9) for a, b in zip(gmres[1:], neumann, strict=False))
    for k in (1, 3):  # the least residual over the Krylov space of dimension k
        worst = 0.0
        for a, b in zip(matrix, rhs, strict=True):
            system = torch.eye(30, dtype=torch.float64) - a
            krylov = torch.stack([torch.linalg.matrix_power(a, j) @ b for j in range(k)], dim=1)
            y = torch.linalg.lstsq(system @ krylov, b[:, None]).solution
            worst = max(worst, float((b[:, None] - system @ krylov @ y).norm() / b.norm()))
        assert gmres[k] == pytest.approx(worst, rel=1e-6)


def test_every_solver_is_tried_with_the_configured_tolerance() -> None:
    block = wide_block()
    block.solver = Gmres(tol=1e-4, max_steps=25)
    model = nn.Sequential(block, nn.Linear(80, 5).double())
    observation = observe(model, torch.randn(3, 6, dtype=torch.float64))
    traces = solver_residuals(observation, torch.tensor([0, 3, 1]))[""]
    assert [each.solver for each in traces] == list(SOLVERS)
    assert [each.solver for each in traces if each.configured] == ["gmres"]
    assert all("tol=0.0001, max_steps=25" in each.settings for each in traces)
    assert len({round(trace.residual[0], 12) for trace in traces}) == 2
    for each in traces:
        assert (each.residual[0] == 1) == (each.solver == "gmres")  # which starts from 0, the others from b
        assert (each.outcome == "converged") == (each.residual[-1] <= 1e-4)
        assert all(math.isfinite(value) for value in each.residual)
    assert traces[-1].outcome == "converged"
