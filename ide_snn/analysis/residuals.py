"""How the linear system of the backward pass, (I - J^T) v = dL/da, is solved: residual after every step.

dL/da is the cotangent that the cross entropy sends to the block; J is taken at the simulated rates with running
statistics. A step is one product with J^T (GMRES: one Krylov dimension).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ide_snn.analysis.observe import Observation, Site, call_prefix, evaluation_mode
from ide_snn.block import FeedbackSNN
from ide_snn.monitor import feedback_blocks
from ide_snn.precision import products_rounded
from ide_snn.solvers import SOLVERS, Gmres, LinearProblem, Solver, solve

__all__ = ["SolverTrace", "cotangents", "residual_per_step", "solver_residuals"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SolverTrace:
    """One solver on one batch.

    Attributes:
        solver: its name in `SOLVERS`.
        settings: as text.
        configured: whether it is the block's own.
        outcome: of the whole solve.
        residual: ||b - (I - J^T) v|| / ||b||, the worst sample's, after 0, 1, 2, ... steps. GMRES starts from v = 0,
            where it is 1, the others from v = b.
        tol: the tolerance it stops at.
        first_products: products with J^T behind `residual[0]`: none for GMRES, one for the others; each step takes one.
    """

    solver: str
    settings: str
    configured: bool
    outcome: str
    residual: list[float]
    tol: float
    first_products: int

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__}


def solver_residuals(
    observation: Observation, labels: Tensor, loss: Loss = F.cross_entropy
) -> dict[str, list[SolverTrace]]:
    """Every solver on the linear system of every block, for one batch; by prefix.

    The block's own solver is used as configured, the others with its tolerance and number of steps.
    """
    traces: dict[str, list[SolverTrace]] = {}
    found = cotangents(observation, labels, loss)
    for site in observation.sites:
        problem, precision = _problem(site, found[site.prefix]), site.block.precision
        own = site.block.solver
        traces[site.prefix] = []
        for name, kind in SOLVERS.items():
            solver: Solver = own if isinstance(own, kind) else kind(tol=own.tol, max_steps=own.max_steps)
            with products_rounded(precision, site.x.device):
                outcome, residual = residual_per_step(problem, solver)
            traces[site.prefix].append(
                SolverTrace(
                    *(name, repr(solver), isinstance(own, kind), outcome, residual, solver.tol),
                    first_products=0 if kind is Gmres else 1,
                )
            )
    return traces


def residual_per_step(problem: LinearProblem, solver: Solver) -> tuple[str, list[float]]:
    """(outcome, largest relative residual after 0, 1, 2, ... steps).

    A solver that forms its iterate only at the end (GMRES) is run anew for every number of steps.
    """
    solution = solve(problem, solver, trace=True)
    trace = list(solution.stats.trace or ())
    steps = solution.stats.steps
    if len(trace) != steps + 1:
        shorter = [solve(problem, replace(solver, max_steps=k)) for k in range(1, steps)]  # type: ignore[type-var]
        trace = [trace[0], *(s.stats.max_residual for s in shorter), *([trace[-1]] if steps else [])]
    return str(solution.outcome), trace


def cotangents(observation: Observation, labels: Tensor, loss: Loss = F.cross_entropy) -> dict[str, Tensor]:
    """dL/da at the output of every block call, in evaluation mode, by prefix; no parameter's `.grad` is touched."""
    model = observation.model
    blocks = feedback_blocks(model)
    outputs: dict[str, Tensor] = {}
    calls = {prefix: itertools.count(1) for prefix in blocks}

    def keep(prefix: str) -> Callable[[FeedbackSNN, Any, Tensor], Tensor]:
        def hook(_block: FeedbackSNN, _inputs: Any, output: Tensor) -> Tensor:
            kept = output if output.requires_grad else output.detach().requires_grad_()
            outputs[call_prefix(prefix, next(calls[prefix]))] = kept
            return kept.clone()  # the model may go on to change it in place

        return hook

    handles = [block.register_forward_hook(keep(prefix)) for prefix, block in blocks.items()]
    try:
        with evaluation_mode(model), torch.enable_grad():
            value = loss(model(observation.x), labels)
            gradients = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(outputs.items(), gradients, strict=True)
    return {name: torch.zeros_like(output) if g is None else g for (name, output), g in pairs}


def _problem(site: Site, cotangent: Tensor) -> LinearProblem:
    with evaluation_mode(site.block), torch.no_grad():
        rates, f = site.block.linearisation_point(site.x)
        return f.adjoint_problem(f.linearise(rates, "running"), cotangent)
