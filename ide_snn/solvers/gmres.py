"""GMRES with restarts, on all groups of a batch at once.

Y. Saad & M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ide_snn.kernels.krylov import normalise_, orthogonalised
from ide_snn.solvers.base import Advance, Workspace, check_settings, require_count
from ide_snn.solvers.krylov import gmres
from ide_snn.solvers.problems import FixedPointProblem, LinearProblem, Rough
from ide_snn.solvers.runs import Array, Run, Terms, largest, relative

LEAST_TOL_TO_NOISE = 5  # of solves that begin with rough products


@dataclass(frozen=True)
class Gmres:
    """Minimises ||b - (1 - A) v|| over the Krylov space, one space per group; linear problems only.

    Args:
        tol: relative residual to reach, per group.
        max_steps: Krylov dimensions at most, over all restarts.
        restart: Krylov dimensions kept before starting anew from the iterate reached.

    An inner run starts from v = 0 and ends when the recurrence predicts a residual below tol. The verdict is on the
    residual itself, r = V (beta e_1 - H c) with the basis V and its images V H = (1 - A) V as they were computed, which
    rounding in the recurrence cannot fake. Where other rounding matters, below tol = sqrt(eps) or for a v so long that
    its own rounding is felt (1 - A nearly singular), it is on one more product. If it falls short another run starts
    from there.

    With `LinearProblem.rough` and a tol of at least 5 times its noise the first run is of rough products. Its residual
    is given with what the noise makes of it added; where that is above tol the verdict is on a product with A, and
    further runs, with max_steps of their own, are as without it. They start where the rough run ended, or from 0 for
    groups that it left with a residual of ||b|| or more.
    """

    tol: float = 1e-3
    max_steps: int = 30
    restart: int = 30

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("restart", self.restart)

    def begin(self, work: Workspace) -> _Restarted:
        if isinstance(work.problem, FixedPointProblem):
            raise ValueError(
                "gmres solves linear problems only; for a nonlinear fixed point use fixed_point, anderson or broyden"
            )
        return _Restarted(self, work)

    def terms(self, dtype: torch.dtype, noise: float = 0) -> Terms:
        """What follows from the tolerance for numbers of this type.

        A run of rough products goes so much below it that a v that is not long has its verdict.
        """
        return Terms(self.tol - min(2 * noise, 0.3 * self.tol), torch.finfo(dtype).eps)

    def at_once(self, problem: LinearProblem, b: Tensor) -> tuple[Run, bool] | None:
        """(the first run for v = b + A v, A in factors, in one call; True where the verdict can be on its residual).

        None where it is to be of rough products that are not in factors.
        """
        rough, dimensions = self.allowed(problem.rough), min(self.restart, self.max_steps)
        factors = problem.factors if rough is None else rough.factors
        if factors is None:
            return None
        terms = self.terms(b.dtype, 0 if rough is None else rough.noise)
        if rough is None:
            run = gmres(factors(), b, terms, dimensions)
            return run, terms.trust(run)
        run = gmres(factors(), b, terms, dimensions, rounding=rough.noise)
        return run, terms.trust(run) and run.worst <= self.tol  # else on A

    def allowed(self, rough: Rough | None) -> Rough | None:
        """Rough products, if the tolerance allows them."""
        return rough if rough is not None and self.tolerates(rough.noise) else None

    def tolerates(self, noise: float) -> bool:
        """True where rough products of this noise are worth a try."""
        return self.tol >= LEAST_TOL_TO_NOISE * noise


class _Restarted:
    def __init__(self, settings: Gmres, work: Workspace) -> None:
        self.settings = settings
        self.work = work
        self.terms = settings.terms(work.problem.start.dtype)

    def first(self, b: Tensor, budget: int) -> Advance:
        work, problem = self.work, self.work.problem
        assert isinstance(problem, LinearProblem)  # see `Gmres.begin`
        rough, ahead = self.settings.allowed(problem.rough), problem.ahead
        if ahead is not None:
            dimensions = min(self.settings.restart, budget)
            run, work.rhs_norm = ahead.run(problem.matvec, work.layout, b.contiguous(), self.terms, dimensions)
            return self._advance(run)
        if rough is None:
            return self._run(None, b, budget)
        terms = self.settings.terms(b.dtype, rough.noise)
        dimensions, matvec = min(self.settings.restart, budget), functools.partial(work.matvec, rough=rough)
        run = _step_by_step(matvec, b, terms, dimensions, None, work.rhs_norm)
        norm = run.norm + rough.noise * run.longest
        is_sure = terms.trust(run) and largest(norm) <= self.settings.tol
        residual = (run.residual, norm * work.rhs_norm) if is_sure else None
        return Advance(run.y, max(run.most, 1), run.most, 0, residual, is_rough=True)

    def advance(self, y: Tensor, r: Tensor, budget: int) -> Advance:
        return self._run(y, r, budget)

    def _run(self, y: Tensor | None, r: Tensor, budget: int) -> Advance:
        work, dimensions = self.work, min(self.settings.restart, budget)
        if work.factors is None:
            run = _step_by_step(work.matvec, r, self.terms, dimensions, y, work.rhs_norm)
        else:
            run = gmres(work.factors, r, self.terms, dimensions, y, work.rhs_norm)
        if y is not None:  # whose own rounding is in r
            start = largest(relative(y.norm(dim=1).double().cpu().numpy(), work.rhs_norm))
            run = replace(run, longest=max(run.longest, start))
        return self._advance(run)

    def _advance(self, run: Run) -> Advance:
        work = self.work
        residual = (run.residual, run.norm * work.rhs_norm) if self.terms.trust(run) else None
        return Advance(run.y, max(run.most, 1), run.most, run.most - run.mean, residual)


def _step_by_step(
    matvec: Callable[[Tensor], Tensor], b: Tensor, terms: Terms, dimensions: int, start: Tensor | None, rhs: Array
) -> Run:
    """`vectors.gmres` for any A, device and type."""
    space = _Krylov(b, dimensions, terms.passes, terms.noise)
    for _ in range(dimensions):
        predicted = space.extend(matvec(space.vectors[-1]))
        if not ((predicted > terms.enough * rhs) & (predicted < np.inf)).any():
            break
    y, residual, *norms = space.finish(start)
    norm, length = (relative(absolute, rhs) for absolute in norms)
    products = len(space.vectors) - 1
    return Run(y, residual, norm, largest(norm), largest(length), products, products)


class _Krylov:
    """The space spanned by r, (1 - A) r, ... per group, and the smallest residual in it.

    By torch operations and, for the small least-squares problem, numpy: any device and type.
    """

    def __init__(self, r: Tensor, dimensions: int, passes: int, noise: float) -> None:
        basis, beta = normalise_(r.clone())
        self.vectors, self.passes, self.noise = [basis], passes, noise
        self.problem = _LeastSquares(beta.double().cpu().numpy(), dimensions, noise)

    def extend(self, image: Tensor) -> Array:
        """Takes A q_k of the last basis vector q_k; returns the residual norm [G] that is left."""
        vector, column = orthogonalised(self.vectors[-1] - image, self.vectors, self.passes, self.noise)
        self.vectors.append(vector)
        return self.problem.append(column.double().cpu().numpy())

    def finish(self, y: Tensor | None) -> tuple[Tensor, Tensor, Array, Array]:
        """y (None: 0) + the combination of the basis with the smallest residual, that residual, and the norms [G] of
        the residual and of the sum.

        Once, at the end: the basis is overwritten.
        """
        y = torch.zeros_like(self.vectors[0]) if y is None else y.clone()
        solution, rest = (
            torch.from_numpy(numbers).to(device=y.device, dtype=y.dtype)[..., None]
            for numbers in (self.problem.solution(), self.problem.remainder())
        )
        r = self.vectors[-1].mul_(rest[-1])
        for of_y, of_r, q in zip(solution, rest[:-1], self.vectors[:-1], strict=True):
            y.addcmul_(of_y, q)
            r.addcmul_(of_r, q)
        norm, length = torch.stack([r.norm(dim=1), y.norm(dim=1)]).double().cpu().numpy()
        return y, r, norm, length


class _LeastSquares:
    """min ||beta e_1 - H y|| per group by Givens rotations, in float64 on the host: H is at most 31 x 30."""

    def __init__(self, beta: Array, dimensions: int, noise: float) -> None:
        groups, self.noise = beta.shape[0], noise
        self.r: Array = np.zeros((dimensions, dimensions, groups))  # upper triangular factor, [row, column, G]
        self.right: Array = np.zeros((dimensions + 1, groups))
        self.right[0] = beta
        self.rotations: list[tuple[Array, Array]] = []

    def append(self, column: Array) -> Array:
        """Adds a column [k + 1, G] of H; returns the residual norm [G] of the least-squares problem."""
        k = len(self.rotations)
        column, size = column.copy(), np.linalg.norm(column, axis=0)
        for i, (cos, sin) in enumerate(self.rotations):
            upper, lower = column[i].copy(), column[i + 1].copy()
            column[i], column[i + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        radius = np.hypot(column[k], column[k + 1])
        # An image in the span of those before it reduces nothing: its coefficient is 0, and all that is left stays.
        useless = radius <= self.noise * size
        safe = np.where(useless, 1.0, radius)
        cos, sin = np.where(useless, 0.0, column[k] / safe), np.where(useless, 1.0, column[k + 1] / safe)
        radius = np.where(useless, 0.0, radius)
        self.rotations.append((cos, sin))
        self.r[:k, k], self.r[k, k] = column[:k], radius
        self.right[k + 1] = -sin * self.right[k]
        self.right[k] = cos * self.right[k]
        return np.abs(self.right[k + 1])

    def solution(self) -> Array:
        """Coefficients c [k, G] by back substitution; a useless direction gets 0."""
        k = len(self.rotations)
        y: Array = np.zeros((k, self.right.shape[1]))
        for i in reversed(range(k)):
            rest = self.right[i] - np.einsum("jg,jg->g", self.r[i, i + 1 : k], y[i + 1 :])
            pivot = self.r[i, i]
            y[i] = np.where(pivot != 0, rest / np.where(pivot != 0, pivot, 1.0), 0.0)
        return y

    def remainder(self) -> Array:
        """Coefficients beta e_1 - H c [k + 1, G] of the residual in the basis: the rotations, turned back."""
        k = len(self.rotations)
        t: Array = np.zeros((k + 1, self.right.shape[1]))
        t[k] = self.right[k]
        for i, (cos, sin) in reversed(list(enumerate(self.rotations))):
            t[i], t[i + 1] = -sin * t[i + 1], cos * t[i + 1]
        return t
