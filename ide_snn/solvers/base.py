"""Problems, verdicts, and the one loop that every solver runs in.

Two kinds of problem:

    linear      v = b + A v        residual r(v) = b + A v - v,  measured as ||r|| / ||b||
    nonlinear   z = f(z)           residual r(z) = f(z) - z,     measured as ||r|| / ||f(z)||

The loop evaluates the true residual of every iterate, decides, and asks the method for the next iterate. A method
that has the images of what its iterate consists of may give the residual as the same combination of them, which for a
linear A is the true one to rounding (GMRES, where tol is far above rounding); a recurrence's estimate of its norm never
decides. Unknowns are handled as [G, N]: one row (group) per sample where samples do not influence each other, a single
row where they do. The residual is relative to each group's own scale, so neither the scale of the loss nor the other
samples of a batch decide how well a sample is solved.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ide_snn.native import Factor
from ide_snn.solvers.krylov import rescaled, residual_
from ide_snn.solvers.layout import Layout
from ide_snn.solvers.problems import FixedPointProblem, LinearProblem, Problem, Rough
from ide_snn.solvers.runs import Array, Run, largest, relative

# A residual that has grown this much over the best one seen will not come back.
DIVERGENCE_FACTOR = 1e4


class Outcome(str, Enum):
    """How a solve ended."""

    converged = "converged"
    max_steps = "max_steps"
    diverged = "diverged"
    nonfinite = "nonfinite"

    def __str__(self) -> str:
        return self.value


ADVICE = {
    Outcome.converged: "every group's residual is below the tolerance",
    Outcome.max_steps: "the steps ran out: raise max_steps, loosen tol, or use solver gmres or anderson",
    Outcome.diverged: "the iteration moves away from the solution: lower damping, or use solver gmres, anderson or "
    "broyden; the norm of the Jacobian may exceed 1 (see constraint, gamma and jacobian_bn)",
    Outcome.nonfinite: "NaN or infinity appeared: look at the loss and its gradient, lower the learning rate",
}


class SolverWarning(UserWarning):
    """A solve did not converge; its best finite iterate was used."""


@dataclass(frozen=True)
class SolveStats:
    """What a solve cost and how well it ended.

    steps: iterations (for GMRES: Krylov dimensions); products: evaluations of A v or f(z), verdict included;
    whole_products: the same, those for some of the groups counted by their share of them;
    residual: relative residual of the returned value per group, [G] on the CPU; trace: the largest one after
    each evaluation, if asked for.
    """

    steps: int
    products: int
    whole_products: float
    residual: Tensor
    trace: tuple[float, ...] | None = None

    @property
    def max_residual(self) -> float:
        return float(self.residual.max()) if self.residual.numel() else 0.0


@dataclass(frozen=True)
class Solution:
    """The best finite iterate, of the shape asked for, and the verdict on it."""

    value: Tensor
    outcome: Outcome
    stats: SolveStats

    @classmethod
    def of(cls, run: Run, value: Tensor, trace: tuple[float, ...] | None = None) -> Solution:
        """The verdict where all groups of a run are solved."""
        stats = SolveStats(run.most, run.most, run.mean, torch.from_numpy(run.norm), trace)
        return cls(value, Outcome.converged, stats)

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return (
            f"{self.outcome} after {self.stats.steps} steps, largest relative residual "
            f"{self.stats.max_residual:.2e}: {ADVICE[self.outcome]}"
        )


@dataclass(frozen=True)
class Advance:
    """The next iterate [G, N], the steps taken to it and the products used.

    left_out: of those products, by their shares of the groups, what was left out for groups that did not need them.
    residual: (r [G, N], ||r|| [G]) where the method has it to rounding without a product of the iterate.
    is_rough: by `LinearProblem.rough`; these steps are not counted against `max_steps`, for the iterate may be no help.
    """

    y: Tensor
    steps: int = 1
    products: int = 0
    left_out: float = 0.0
    residual: tuple[Tensor, Array] | None = None
    is_rough: bool = False


class Method(Protocol):
    """The memory of one solve. Lives as long as the solve.

    A method for linear problems may also have `first(b, budget) -> Advance`: then it starts from y = 0, whose residual
    b [G, N] needs no product and is not to be changed, instead of from y = b.
    """

    def advance(self, y: Tensor, r: Tensor, budget: int) -> Advance:
        """From iterate y with residual r, both [G, N], in at most `budget` steps; r may be overwritten."""
        ...


# A solver may have `at_once(problem, b [G, N])`: a first run from 0 for A in factors, and whether its residuals are
# such that the verdict can be on them; None where it has a better way.
AtOnce = Callable[[LinearProblem, Tensor], tuple[Run, bool] | None]


class Workspace:
    """The problem seen as rows [G, N]."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layout = Layout.of(problem.start, coupled=problem.coupled)
        self.groups, self.unrows = self.layout.groups, self.layout.unrows
        self.native = isinstance(problem, LinearProblem) and problem.native

    def rows(self, x: Tensor) -> Tensor:
        x = self.layout.rows(x)
        return x.contiguous() if self.native else x  # kernels see addresses, not strides

    def image(self, y: Tensor) -> Tensor:
        return self.problem.image(self.unrows(y))

    @cached_property
    def rhs_norm(self) -> Array:
        """||b|| [G] of a linear problem."""
        return _numbers(self.rows(self.problem.start).norm(dim=1))

    @cached_property
    def factors(self) -> tuple[Factor, ...] | None:
        """A as kernels, where the problem has it."""
        factors = self.problem.factors if isinstance(self.problem, LinearProblem) else None
        return None if factors is None else factors()

    def matvec(self, y: Tensor, rough: Rough | None = None) -> Tensor:
        """A y for y [G, N], or that of `rough`."""
        if not isinstance(self.problem, LinearProblem):
            raise TypeError("matvec is defined for linear problems only")
        return self.rows((rough or self.problem).matvec(self.unrows(y)))


class Solver(Protocol):
    """A solver is a value: a frozen dataclass with the settings, and `begin` for one solve's memory."""

    @property
    def tol(self) -> float: ...

    @property
    def max_steps(self) -> int: ...

    def begin(self, work: Workspace) -> Method: ...


def check_settings(solver: Solver) -> None:
    """Raises ValueError for settings no solver can work with."""
    is_number = isinstance(solver.tol, numbers.Real) and not isinstance(solver.tol, bool)
    if not (is_number and math.isfinite(solver.tol) and solver.tol > 0):
        raise ValueError(f"tol must be a positive finite number, got {solver.tol}")
    require_count("max_steps", solver.max_steps)


def require_count(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def solve(
    problem: Problem, solver: Solver, y0: Tensor | None = None, *, trace: bool = False, begun: Run | None = None
) -> Solution:
    """Solves v = b + A v or z = f(z).

    Args:
        problem: what to solve; its tensors are not modified.
        solver: how (`FixedPoint`, `Anderson`, `Broyden`, `Gmres`).
        y0: first iterate; by default the right-hand side (linear; 0 for GMRES) or `problem.start` (nonlinear).
        trace: keep the largest residual after each evaluation.
        begun: a run of GMRES on this problem from 0 to go on from; the verdict on it is on one more product.

    Returns:
        The best finite iterate per group with the verdict on it; the first iterate, or for GMRES the right-hand side,
        where there is none, so a NaN stays a NaN. Nothing is raised for a failed solve: the caller sees `outcome`. A
        group that fails does not end the solve of the others.

    Raises:
        ValueError: for a y0 of another shape, a nonlinear problem for gmres, or a `begun` that is not of this problem.

    One device synchronisation per evaluation: the residuals, which stopping needs; with `LinearProblem.ahead` one per
    run of GMRES.
    """
    if y0 is not None and y0.shape != problem.start.shape:
        raise ValueError(f"y0 has the shape {list(y0.shape)}, the problem {list(problem.start.shape)}")
    at_once: AtOnce | None = getattr(solver, "at_once", None) if y0 is None else None
    if begun is not None and (at_once is None or getattr(problem, "factors", None) is None):
        raise ValueError("a run to go on from is of GMRES, from 0, on a linear problem in factors")
    with torch.no_grad():
        work = Workspace(problem)
        if isinstance(problem, FixedPointProblem):
            return _solve(work, solver, y0, trace)
        found = None
        if problem.factors is not None and at_once is not None:
            if problem.coupled or not problem.native or problem.rhs.dtype != torch.float32:
                raise ValueError("factors are for problems that do not couple samples, with native=True, in float32")
            found = at_once(problem, work.rows(problem.rhs)) if begun is None else (begun, False)
        if found is not None:
            run, has_verdict = found
            if has_verdict and run.worst <= solver.tol:
                return Solution.of(run, work.unrows(run.y), (1.0, run.worst) if trace else None)
        if work.native:
            rhs, unit, norm = rescaled(work.rows(problem.rhs))
            scaled = Workspace(replace(problem, rhs=work.unrows(rhs)))
            scaled.rhs_norm = norm
            unit = _per_group(unit, problem)
        else:
            unit = _unit(problem)
            scaled = Workspace(replace(problem, rhs=problem.rhs / unit))
        start = None
        if found is not None:
            residual = None
            if has_verdict:
                residual = scaled.rows(work.unrows(run.residual) / unit), run.norm * scaled.rhs_norm
            y = scaled.rows(work.unrows(run.y) / unit)
            start = Advance(y, max(run.most, 1), run.most, run.most - run.mean, residual, is_rough=run.rounding > 0)
        solution = _solve(scaled, solver, None if y0 is None else y0 / unit, trace, start)
        return replace(solution, value=solution.value.mul_(unit))  # nobody else has it


def _unit(problem: LinearProblem) -> Tensor:
    """A power of two near the largest |b| of each group, shaped to multiply b; 1 for groups of 0 or NaN.

    Measured in this unit a solve is the same at any scale of b, bit for bit. Without it inner products of small
    cotangents vanish: in float32 a b of 1e-23 would count as solved.
    """
    b = problem.rhs.detach()
    size = b.abs().amax() if problem.coupled else b.abs().unsqueeze(-1).amax(dim=tuple(range(1, b.dim() + 1)))
    mantissa, _ = torch.frexp(size)
    limit = math.frexp(torch.finfo(b.dtype).max)[1] - 2
    unit = (size / mantissa).clamp(2.0**-limit, 2.0**limit)  # exact on every device, as ldexp need not be
    return _per_group(torch.where(size.isfinite() & (size > 0), unit, 1.0), problem)


def _per_group(value: Tensor, problem: LinearProblem) -> Tensor:
    """One number per group, shaped to multiply b."""
    return value.view(()) if problem.coupled else value.view(-1, *(1,) * (problem.rhs.dim() - 1))


def _first_iterate(work: Workspace, y0: Tensor | None) -> Tensor:
    start = work.rows(work.problem.start.detach())
    if y0 is None:
        return start
    y = work.rows(y0.detach())
    if isinstance(work.problem, FixedPointProblem):
        return y
    # b itself where it is the answer (b = 0) or must come back for all to see (NaN)
    scale = start.norm(dim=1)
    return torch.where(((scale > 0) & scale.isfinite())[:, None], y, start)


def _solve(
    work: Workspace, solver: Solver, y0: Tensor | None, keep_trace: bool, begun: Advance | None = None
) -> Solution:
    """`begun`: the first iterate and the way to it, where a method for linear problems has made them from 0."""
    method = solver.begin(work)
    start = _first_iterate(work, y0)
    best, best_residual = start, np.full(work.groups, np.inf)
    progress = _Progress(solver.tol)
    trace: list[float] = []
    now = Advance(start, steps=0)
    steps, rough_steps, products, left_out = 0, 0, 0, 0.0
    first: Callable[[Tensor, int], Advance] | None = getattr(method, "first", None)
    if first is not None and y0 is None:
        now = first(start, solver.max_steps) if begun is None else begun
        progress.first = relative(work.rhs_norm, work.rhs_norm)  # which the method may have found on its way
        trace.append(largest(progress.first))
    while True:
        y, steps, products = now.y, steps + now.steps, products + now.products
        left_out += now.left_out
        rough_steps += now.steps if now.is_rough else 0
        if now.residual is None:
            r, residual = _evaluate(work, y)
            products += 1
            if now.is_rough:
                y, r, residual = _without_what_is_worse_than_nothing(work, y, r, residual)
        else:
            r, residual = now.residual[0], relative(now.residual[1], work.rhs_norm)
        trace.append(largest(residual))
        best, best_residual = _keep_best(best, best_residual, y, residual)
        left = solver.max_steps - (steps - rough_steps)
        outcome = progress.verdict(best_residual, residual, out_of_steps=left <= 0)
        if outcome is not None:
            kept = tuple(trace) if keep_trace else None
            stats = SolveStats(steps, products, products - left_out, torch.from_numpy(best_residual), kept)
            return Solution(work.unrows(best.clone() if best is start else best), outcome, stats)
        now = method.advance(y, r, left)


def _evaluate(work: Workspace, y: Tensor) -> tuple[Tensor, Array]:
    """The residual r [G, N] of the iterate y, and its relative norm [G]."""
    if work.native:
        r, absolute = residual_(work.rows(work.problem.start), y, work.matvec(y))
        scale = work.rhs_norm
    elif isinstance(work.problem, LinearProblem):
        r = work.rows(work.image(y)) - y
        absolute, scale = _numbers(r.norm(dim=1)), work.rhs_norm
    else:
        image = work.rows(work.image(y))
        r = image - y
        absolute, scale = _numbers(torch.stack([r.norm(dim=1), image.norm(dim=1)]))
    return r, relative(absolute, scale)


def _without_what_is_worse_than_nothing(
    work: Workspace, y: Tensor, r: Tensor, residual: Array
) -> tuple[Tensor, Tensor, Array]:
    """The rough iterate y with its residual; 0, whose residual is b, for groups that it leaves further from solved."""
    worse = ~(residual < 1) & np.isfinite(work.rhs_norm)
    if not worse.any():
        return y, r, residual
    chosen = torch.from_numpy(worse).to(y.device)[:, None]
    b = work.rows(work.problem.start)
    return torch.where(chosen, 0.0, y), torch.where(chosen, b, r), np.where(worse, work.rhs_norm > 0, residual)


def _numbers(x: Tensor) -> Array:
    """On the host, in float64: what decisions are made on."""
    return x.detach().double().cpu().numpy()


def _keep_best(best: Tensor, best_residual: Array, y: Tensor, residual: Array) -> tuple[Tensor, Array]:
    better = residual < best_residual  # False for NaN
    if better.all():
        return y, residual
    if not better.any():
        return best, best_residual
    chosen = torch.from_numpy(better).to(y.device)[:, None]
    return torch.where(chosen, y, best), np.where(better, residual, best_residual)


class _Progress:
    """Decides when a solve is over, group by group; all arrays are [G]."""

    def __init__(self, tol: float) -> None:
        self.tol = tol
        self.first: Array | None = None
        self.nonfinite = self.diverged = np.zeros((), dtype=bool)

    def verdict(self, best: Array, now: Array, *, out_of_steps: bool) -> Outcome | None:
        """The outcome if the solve is over, else None, from the best relative residuals and the present ones."""
        self.first = now if self.first is None else self.first
        unsolved = best > self.tol
        if not unsolved.any():
            return Outcome.converged
        # a group keeps the failure seen first: what diverges overflows in the end
        self.nonfinite = self.nonfinite | (~np.isfinite(now) & ~self.diverged)
        with np.errstate(over="ignore"):
            worse = now > DIVERGENCE_FACTOR * best
        if out_of_steps:
            worse |= now > self.first * (1 + 1e-4)  # a residual that rounding alone moves stagnates
        self.diverged = self.diverged | (worse & ~self.nonfinite)
        if not out_of_steps and not (self.nonfinite | self.diverged)[unsolved].all():
            return None
        if self.nonfinite[unsolved].any():
            return Outcome.nonfinite
        return Outcome.diverged if self.diverged[unsolved].any() else Outcome.max_steps
