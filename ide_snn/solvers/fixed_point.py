"""Damped fixed-point iteration; on a linear problem without damping it sums the Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ide_snn.solvers.base import Advance, Workspace, check_settings


@dataclass(frozen=True)
class FixedPoint:
    """y <- y + damping * r(y).

    Converges for damping = 1 when the spectral radius of A (of f's Jacobian) is below 1. An eigenvalue
    mu contributes the factor |1 - damping (1 - mu)|: for strongly negative mu, a smaller damping helps.

    Args:
        tol: relative residual to reach, per group.
        max_steps: iterations at most.
        damping: in (0, 1].
    """

    tol: float = 1e-3
    max_steps: int = 60
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    def begin(self, work: Workspace) -> _Iteration:  # noqa: ARG002
        return _Iteration(self.damping)


@dataclass
class _Iteration:
    damping: float

    def advance(self, y: Tensor, r: Tensor, budget: int) -> Advance:  # noqa: ARG002
        return Advance(y + self.damping * r)
