"""GMRES with restarts, on all groups of a batch at once.

Y. Saad & M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn import native
from ide_snn.solvers.base import FixedPointProblem, Workspace, check_settings, require_count

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gmres:
    """Minimises ||b - (1 - A) v|| over the Krylov space, one space per group; linear problems only.

    Args:
        tol: relative residual to reach, per group.
        max_steps: Krylov dimensions at most, over all restarts.
        restart: Krylov dimensions kept before starting anew from the iterate reached.

    The residual that the recurrence predicts ends an inner run; the loop then evaluates the true residual and
    starts another run if it falls short, so rounding in the recurrence cannot fake convergence.
    """

    tol: float = 1e-3
    max_steps: int = 30
    restart: int = 30

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("restart", self.restart)

    def begin(self, work: Workspace) -> _Arnoldi:
        if isinstance(work.problem, FixedPointProblem):
            raise ValueError(
                "gmres solves linear problems only; for a nonlinear fixed point use fixed_point, anderson or broyden"
            )
        scale = work.problem.scale(work.problem.rhs, work.rows).double().cpu().numpy()
        return _Arnoldi(self, work, scale)


class _Arnoldi:
    def __init__(self, settings: Gmres, work: Workspace, scale: Array) -> None:
        self.settings = settings
        self.work = work
        self.scale = scale  # ||b|| per group

    def advance(self, y: Tensor, r: Tensor, budget: int) -> tuple[Tensor, int, int]:
        dimensions = min(self.settings.restart, budget)
        basis, beta = _normalise(r)
        vectors = [basis]
        # Modified Gram-Schmidt loses orthogonality like eps / residual: one pass is enough until that matters.
        passes = 1 if self.settings.tol > torch.finfo(y.dtype).eps ** 0.5 else 2
        problem = _LeastSquares(beta.double().cpu().numpy(), dimensions)
        extend = _extend_natively if self.work.native else _extend
        for _ in range(dimensions):
            vector, column = extend(vectors, self.work.matvec(vectors[-1]), passes)
            vectors.append(vector)
            predicted = problem.append(column.double().cpu().numpy())
            # A little below tol: the true residual, which decides, differs from the predicted by rounding.
            if (~np.isfinite(predicted) | (predicted <= 0.9 * self.settings.tol * self.scale)).all():
                break
        coefficients = torch.from_numpy(problem.solution()).to(device=y.device, dtype=y.dtype)
        y = y.clone()
        for c, q in zip(coefficients, vectors, strict=False):
            y.addcmul_(c[:, None], q)
        return y, len(vectors) - 1, len(vectors) - 1


def _normalise(w: Tensor) -> tuple[Tensor, Tensor]:
    """w / ||w|| and ||w|| per group; a zero row (the space is exhausted) stays zero."""
    length = w.norm(dim=1)
    return w * torch.where(length > 0, length.reciprocal(), 0.0)[:, None], length


def _extend(vectors: list[Tensor], image: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """The next basis vector, from the image A q_k of the last one, by modified Gram-Schmidt on (1 - A) q_k.

    Returns:
        (q_{k+1} [G, N], column of H [k + 1, G]).
    """
    w = vectors[-1] - image
    total = torch.zeros(len(vectors), w.shape[0], dtype=w.dtype, device=w.device)
    before = w.norm(dim=1)
    for _ in range(passes):
        for i, q in enumerate(vectors):
            h = (q * w).sum(dim=1)
            w = torch.addcmul(w, q, h[:, None], value=-1)
            total[i] += h
    # What is left after cancelling to rounding level is noise, not a direction.
    noise = w.norm(dim=1) <= _noise(w) * before
    vector, length = _normalise(torch.where(noise[:, None], torch.zeros_like(w), w))
    return vector, torch.cat([total, length[None]])


def _extend_natively(vectors: list[Tensor], image: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """`_extend` in one pass over memory per basis vector; overwrites `image`, float32 on a CPU."""
    groups, n = image.shape
    column = torch.empty(len(vectors) + 1, groups)
    pointers = (ctypes.c_void_p * len(vectors))(*(q.data_ptr() for q in vectors))
    counter, kernels = ctypes.c_int64(0), native.library("krylov")

    def work() -> None:
        kernels.arnoldi(
            *(ctypes.c_int64(size) for size in (groups, n, len(vectors))),
            pointers,
            *(ctypes.c_void_p(t.data_ptr()) for t in (image, column)),
            ctypes.c_int64(passes),
            ctypes.c_float(_noise(image)),
            ctypes.byref(counter),
        )

    native.on_all_threads(work, len(vectors) * image.numel())
    return image, column


def _noise(w: Tensor) -> float:
    return 10 * torch.finfo(w.dtype).eps


class _LeastSquares:
    """min ||beta e_1 - H y|| per group by Givens rotations, in float64 on the host: H is at most 31 x 30."""

    def __init__(self, beta: Array, dimensions: int) -> None:
        groups = beta.shape[0]
        self.r: Array = np.zeros((dimensions, dimensions, groups))  # upper triangular factor, [row, column, G]
        self.right: Array = np.zeros((dimensions + 1, groups))
        self.right[0] = beta
        self.rotations: list[tuple[Array, Array]] = []

    def append(self, column: Array) -> Array:
        """Adds a column [k + 1, G] of H; returns the residual norm [G] of the least-squares problem."""
        k = len(self.rotations)
        column = column.copy()
        for i, (cos, sin) in enumerate(self.rotations):
            upper, lower = column[i].copy(), column[i + 1].copy()
            column[i], column[i + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        radius = np.hypot(column[k], column[k + 1])
        safe = np.where(radius > 0, radius, 1.0)
        cos, sin = np.where(radius > 0, column[k] / safe, 1.0), column[k + 1] / safe
        self.rotations.append((cos, sin))
        self.r[:k, k], self.r[k, k] = column[:k], radius
        self.right[k + 1] = -sin * self.right[k]
        self.right[k] = cos * self.right[k]
        return np.abs(self.right[k + 1])

    def solution(self) -> Array:
        """Coefficients [k, G] by back substitution; an exhausted direction gets 0."""
        k = len(self.rotations)
        y: Array = np.zeros((k, self.right.shape[1]))
        for i in reversed(range(k)):
            rest = self.right[i] - np.einsum("jg,jg->g", self.r[i, i + 1 : k], y[i + 1 :])
            pivot = self.r[i, i]
            y[i] = np.where(pivot != 0, rest / np.where(pivot != 0, pivot, 1.0), 0.0)
        return y
