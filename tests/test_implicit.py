"""The gradient: finite differences, dense linear algebra, unrolling, and what a user relies on."""

from __future__ import annotations

import pytest
import torch
from networks import EXACT, KINDS, example_input, small_block, warmed_up
from torch import Tensor, nn
from torch.func import functional_call

from ide_snn import Anderson, FixedPoint, Gmres, Implicit, Outcome, SolverWarning, Unrolled
from ide_snn.equilibrium import dense_jacobian
from ide_snn.implicit import attach_gradient


class AtEquilibrium(nn.Module):
    """The block with its simulation replaced by the solved equilibrium; the gradient code is the same."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        rates, solution = self.block.equilibrium(x, Anderson(tol=1e-12, max_steps=500))
        assert solution.outcome is Outcome.converged
        return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [Implicit(), Implicit(jacobian_at="f"), Unrolled(60)], ids=str)
def test_gradient_equals_finite_differences_at_the_equilibrium(kind: str, gradient) -> None:
    net = AtEquilibrium(warmed_up(small_block(kind, gradient=gradient))).eval()
    names, values = zip(*net.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    x = example_input(kind, batch=2).requires_grad_()
    inputs = (x, *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_unrolled_agrees_with_implicit(kind: str, training: bool) -> None:
    """Statistics of the batch throughout, as the unrolled gradient has them."""
    gradients = []
    for gradient in (Implicit(jacobian_bn="batch"), Unrolled(200)):
        torch.manual_seed(3)
        block = warmed_up(small_block(kind, gradient=gradient)).train(training)
        x = example_input(kind).requires_grad_()
        rates, f = block.linearisation_point(x)
        # unrolling moves its linearisation point: start where it does not move
        with torch.no_grad():
            for _ in range(500):
                rates = f(rates, "batch")
        value = attach_gradient(rates, f, gradient, EXACT)
        assert torch.equal(value, rates)
        (
            value * torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
        ).sum().backward()
        gradients.append([p.grad for p in block.parameters()] + [x.grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time_steps", [None, 10])
def test_gradient_of_input_equals_dense_solve(kind: str, time_steps: int | None) -> None:
    """dL/dx = (df/dx)^T (I - J^T)^-1 g, for constant input and for frames with their time weights."""
    block = warmed_up(small_block(kind, input_has_time=time_steps is not None)).eval()
    x = example_input(kind, batch=2, time_steps=time_steps).requires_grad_()
    rates = block(x)
    g = torch.randn_like(rates)
    (gradient,) = torch.autograd.grad(rates, x, g)

    at, f = block.linearisation_point(x)
    dense = dense_jacobian(f.linearise(at, "running", "autograd").matvec, at)
    v = torch.linalg.solve(torch.eye(len(dense), dtype=torch.float64) - dense.t(), g.flatten()).view_as(g)
    (expected,) = torch.autograd.grad(f(at, "running"), x, v)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.abs().sum() > 0
    if time_steps is not None:  # later frames weigh more: lambda^(T-t)
        weights = 0.95 ** torch.arange(time_steps - 1, -1, -1, dtype=torch.float64)
        ratio = gradient.flatten(1) / gradient[-1].flatten()
        active = gradient[-1].flatten() != 0
        torch.testing.assert_close(ratio[:, active], weights[:, None].expand_as(ratio[:, active]))


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_scale_of_the_loss_only_scales_the_gradient(statistics: str) -> None:
    """The original's tolerance was absolute: a smaller loss got a worse gradient."""
    solver = Gmres(tol=1e-3)
    block = warmed_up(small_block("multilayer", solver=solver, gradient=Implicit(jacobian_bn=statistics)))
    start = {k: v.clone() for k, v in block.state_dict().items()}
    x = example_input("multilayer")
    gradients = []
    for scale in (1.0, 2.0**-40):
        block.load_state_dict(start)
        block.zero_grad()
        (block(x).square().sum() * scale).backward()
        gradients.append([p.grad.clone() / scale for p in block.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_other_samples_do_not_change_a_samples_gradient() -> None:
    """The original's tolerance was for the whole batch, whose largest gradients decided.

    The feedback is long enough here for samples of small gradients to need steps of their own.
    """
    block = warmed_up(small_block("conv", constraint="none", solver=Gmres(tol=1e-2))).eval()
    with torch.no_grad():
        block.feedback.op.weight.mul_(4)
    x = example_input("conv", batch=6).requires_grad_()
    weight = torch.tensor([1.0, 1e3, 1e-3, 10.0, 5.0, 0.0], dtype=torch.float64)
    (together,) = torch.autograd.grad((block(x).square().sum((1, 2, 3)) * weight).sum(), x)
    block.solver = EXACT
    for i in range(6):
        alone = x[i : i + 1].detach().requires_grad_()
        (expected,) = torch.autograd.grad((block(alone).square().sum((1, 2, 3)) * weight[i]).sum(), alone)
        error = (together[i] - expected[0]).norm()
        assert error <= 3e-2 * expected.norm()


def test_nan_stays_visible() -> None:
    """The original replaced NaN by 0."""
    block = small_block("fc")
    solutions = []
    block.register_solve_hook(solutions.append)
    rates = block(example_input("fc"))
    with pytest.warns(SolverWarning, match="nonfinite"):
        rates.backward(torch.full_like(rates, torch.nan))
    assert solutions[0].outcome is Outcome.nonfinite
    assert block.input.op.weight.grad.isnan().any()


def test_failed_solve_warns_with_the_remedy_and_uses_the_best_iterate() -> None:
    block = warmed_up(small_block("conv", solver=FixedPoint(tol=1e-12, max_steps=2)))
    solutions = []
    handle = block.register_solve_hook(solutions.append)
    with pytest.warns(SolverWarning, match=r"max_steps.*raise max_steps"):
        block(example_input("conv")).square().sum().backward()
    (solution,) = solutions
    assert solution.outcome is Outcome.max_steps
    assert 0 < solution.stats.max_residual < 1
    handle.remove()
    with pytest.warns(SolverWarning):
        block(example_input("conv")).square().sum().backward()
    assert len(solutions) == 1


@pytest.mark.parametrize("kind", ["fc", "multilayer"])
@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("power", [1, 2])
def test_double_backward_raises(kind: str, precision: str, compile: bool | None, power: int) -> None:
    """With a loss that is linear in the rates, too, whose cotangent has no graph."""
    block = small_block(kind, precision=precision, solver=Gmres(1e-4)).float()
    block.compile_ = compile
    x = example_input(kind).float().requires_grad_()
    (g,) = torch.autograd.grad(block(x).pow(power).sum(), x, create_graph=True)
    for leaf in (x, *block.parameters()):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(g.sum(), leaf, allow_unused=True, retain_graph=True)
    first = torch.autograd.grad(block(x).pow(power).sum(), x)[0]
    assert not first.requires_grad


def test_unrolled_gradients_can_be_differentiated_again() -> None:
    block = warmed_up(small_block("fc", gradient=Unrolled(3), batch_norm=False)).eval()
    x, weight = example_input("fc").requires_grad_(), block.feedback.op.parametrizations.weight.original

    def penalty() -> Tensor:
        (g,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
        return g.square().sum()

    (found,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
    middle, step, values = weight.detach().clone(), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(middle + sign * step * direction)
        values.append(penalty().detach())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), (found * direction).sum(), rtol=1e-4, atol=0)


def test_backward_in_evaluation_mode_uses_running_statistics() -> None:
    block = warmed_up(small_block("multilayer", gradient=Implicit(jacobian_bn="batch"))).eval()
    x = example_input("multilayer")
    whole = x.clone().requires_grad_()
    block(whole).square().sum().backward()
    alone = x[:1].clone().requires_grad_()
    block(alone).square().sum().backward()
    torch.testing.assert_close(whole.grad[:1], alone.grad)


def test_settings_are_validated() -> None:
    with pytest.raises(ValueError, match="'running' or 'batch'"):
        Implicit(jacobian_bn="eval")
    with pytest.raises(ValueError, match="'rate' or 'f'"):
        Implicit(jacobian_at="a")
    with pytest.raises(ValueError, match="at least 1"):
        Unrolled(0)
