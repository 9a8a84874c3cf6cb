"""The gradient of a block whose value is a vector of rates near the fixed point of f.

The value is what it is (simulated rates, or a solved equilibrium); its gradient is that of the fixed point:

    (I - J^T) v = dL/da,  J = df/da        dL/dtheta = (df/dtheta)^T v        dL/dx = (df/dx)^T v

f is applied once, differentiably; the chain rule through it does the right-hand sides.
Source: Xiao et al., NeurIPS 2021, section 4.3.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ide_snn import memory
from ide_snn.chain import UNROLLED, attach_written_out, has_written_out_gradient
from ide_snn.equilibrium import AutogradLinearisation, EquilibriumMap, Linearisation
from ide_snn.neurons import sigma
from ide_snn.once import differentiable_once
from ide_snn.precision import products_rounded, without_autocast
from ide_snn.simulation import EVENT_PATHS
from ide_snn.solvers import ADVICE, Outcome, Solution, Solver, SolverWarning, solve

SolveHook = Callable[[Solution], None]


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation.

    Args:
        jacobian_bn: statistics of the chain's batch norms in J while training: "running" (those of the simulated
            dynamics; samples stay independent) or "batch" (what f's own derivative says; couples the samples,
            and ||J|| can exceed 1).
        jacobian_at: take J at the rates, or at f of the rates (with f's own statistics).

    In evaluation mode f and J use running statistics whatever is chosen.
    """

    jacobian_bn: Literal["running", "batch"] = "running"
    jacobian_at: Literal["rate", "f"] = "rate"

    def __post_init__(self) -> None:
        if self.jacobian_bn not in ("running", "batch"):
            raise ValueError(f"jacobian_bn must be 'running' or 'batch', got {self.jacobian_bn!r}")
        if self.jacobian_at not in ("rate", "f"):
            raise ValueError(f"jacobian_at must be 'rate' or 'f', got {self.jacobian_at!r}")


@dataclass(frozen=True)
class Unrolled:
    """Differentiate `steps` fixed-point steps a <- f(a) from the rates: memory grows with steps.

    An independent check of `Implicit`: at the fixed point it sums the first `steps` terms of the Neumann
    series of (I - J^T)^-1, J with f's own statistics (`jacobian_bn="batch"`).
    """

    steps: int = 30

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"unrolled steps must be at least 1, got {self.steps}")


Gradient = Implicit | Unrolled
GRADIENTS = {"implicit": Implicit, "unrolled": Unrolled}


def attach_gradient(
    rates: Tensor,
    f: EquilibriumMap,
    gradient: Gradient,
    solver: Solver,
    hooks: tuple[SolveHook, ...] = (),
    response: Tensor | None = None,
) -> Tensor:
    """A tensor with the value of `rates` [B, *] and the gradient of f's fixed point.

    Updates the running statistics of the chain's batch norms that are in training mode, once.

    The application of f that the parameters' gradient needs serves the solve, too, where J is to be taken at the rates
    with f's own statistics; otherwise f is applied once more, before the running statistics are updated:

        J at the rates, no batch norm, event-driven         both written out (`chain`)
        J at the rates, no batch norm, known connections    the slopes of f's application
        J at the rates, batch statistics, or own modules    the graph of f's application
        J at the rates, running statistics, event-driven    the slopes of another one; the first products are shared
        anything else                                       another one (`_jacobian`)

    Args:
        rates: the point; carries no graph.
        f: the equilibrium map of this forward.
        gradient: how to differentiate.
        solver: for the linear system of `Implicit`.
        hooks: called with the `Solution` of every backward solve.
        response: K_fb rates + b of the feedback where the simulation has it (`Rates.mean_response`); overwritten.
    """
    if isinstance(gradient, Unrolled):
        z = f(rates, "batch", update_running=True)
        for _ in range(gradient.steps - 1):
            z = f(z, "batch")
        return rates + (z - z.detach())
    couples = gradient.jacobian_bn == "batch" and f.couples_samples
    # Where f's own application at the rates has the Jacobian that is wanted, it serves the solve too: its graph
    # (batch statistics, own modules), or just its activations (known connections).
    shared = gradient.jacobian_at == "rate" and (couples or not f.couples_samples)
    by_graph = shared and (couples or not f.is_known)
    solved = functools.partial(_solved, f, couples, solver, hooks)
    if shared and has_written_out_gradient(f):
        return attach_written_out(rates, f, solved, response)
    by_events = f.path in EVENT_PATHS and not by_graph
    # J with running statistics where f's own application has the batch's: they have their first products in common
    both = by_events and not shared and not couples and gradient.jacobian_at == "rate" and torch.is_grad_enabled()
    jacobian = None if shared or both else _jacobian(rates, f, gradient, response)
    # (as a leaf the point collects a gradient nobody reads: one product, the price of sharing the graph)
    point = rates.detach().requires_grad_(by_graph)
    if by_events:
        frozen = [link.frozen for link in f.chain] if both else []  # before the running statistics are updated
        image, slopes, known = f.rates_and_slopes(point, response, also_frozen=both)
        if frozen:
            slopes = f.frozen_rates(rates, known)[1]
        jacobian = f.linearise_with(slopes) if jacobian is None else jacobian
    else:
        activations = f.activations(point, "batch", update_running=True)
        image = sigma(activations[-1])
        if jacobian is None:
            jacobian = AutogradLinearisation(point, image) if by_graph else f.linearise_by(activations)
    if not image.requires_grad:
        return rates
    splice: Tensor = _FixedPointGradient.apply(image, rates, jacobian, solved)
    return splice


def _jacobian(rates: Tensor, f: EquilibriumMap, gradient: Implicit, response: Tensor | None) -> Linearisation | None:
    """J where it was asked for, with the running statistics that the simulation used: before f updates them."""
    if not torch.is_grad_enabled():
        return None
    if gradient.jacobian_at == "rate":
        return f.linearise(rates, gradient.jacobian_bn, response=response)
    with torch.no_grad():
        image = f(rates, "batch").to(rates.dtype)
    return f.linearise(image, gradient.jacobian_bn)


class _FixedPointGradient(torch.autograd.Function):
    """Forward: the rates. Backward: dL/da -> v = (I - J^T)^-1 dL/da, handed on to f(a)."""

    @staticmethod
    def forward(
        ctx: Any,
        _image: Tensor,
        rates: Tensor,
        jacobian: Linearisation,
        solved: Callable[[Linearisation, Tensor], Tensor],
    ) -> Tensor:
        ctx.jacobian, ctx.solved = jacobian, solved
        ctx.channels_last = rates.dim() == 4 and rates.is_contiguous(memory_format=torch.channels_last)
        return memory.clone(rates)  # a view would refuse in-place operations behind the block

    @staticmethod
    @differentiable_once("an equilibrium", UNROLLED)
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.channels_last:  # as the slopes: every product would convert it
            cotangent = cotangent.contiguous(memory_format=torch.channels_last)
        return ctx.solved(ctx.jacobian, cotangent), None, None, None


def _solved(
    f: EquilibriumMap,
    coupled: bool,
    solver: Solver,
    hooks: tuple[SolveHook, ...],
    jacobian: Linearisation,
    g: Tensor,
) -> Tensor:
    """v with (I - J^T) v = g; tells the hooks, and everybody if it failed."""
    with products_rounded(f.precision, g.device), without_autocast(g.device.type):
        solution = solve(f.adjoint_problem(jacobian, g, coupled=coupled), solver)
    report(solution, solver, hooks)
    return solution.value


def report(solution: Solution, solver: Solver, hooks: Iterable[SolveHook]) -> None:
    """Tells the hooks of a solve, and everybody if it failed."""
    for hook in hooks:
        hook(solution)
    if solution.outcome is not Outcome.converged:
        warn_about(solution.outcome, solver)


def warn_about(outcome: Outcome, solver: Solver) -> None:
    """Says that a solve failed. The text has no measured numbers, so that Python shows it once, not per step."""
    warnings.warn(
        f"{type(solver).__name__} ended with outcome {outcome} (tol {solver.tol:g}, max_steps {solver.max_steps}) and "
        f"its best finite iterate was used. {ADVICE[outcome]}",
        SolverWarning,
        stacklevel=2,
    )
