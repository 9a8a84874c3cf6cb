"""Broyden's good method with limited memory.

C. G. Broyden, Math. Comp. 19 (1965), with the inverse kept as a sum of rank-one terms (Sherman-Morrison).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn.solvers.base import Advance, Workspace, check_settings, require_count


@dataclass(frozen=True)
class Broyden:
    """y <- y - H r, H the current estimate of the residual's inverse Jacobian, one H per group.

    H starts at -1, which makes the first step the plain fixed-point step: the residual f(y) - y has the
    Jacobian J - 1. Each update makes H map the last change of r to the last change of y.

    Args:
        tol: relative residual to reach, per group.
        max_steps: iterations at most.
        memory: rank of H + 1; when it is full, H starts anew.
    """

    tol: float = 1e-3
    max_steps: int = 30
    memory: int = 30

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("memory", self.memory)

    def begin(self, work: Workspace) -> _QuasiNewton:  # noqa: ARG002
        return _QuasiNewton(self.memory)


class _QuasiNewton:
    """H = -1 + sum_i left_i right_i^T."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.previous: tuple[Tensor, Tensor] | None = None

    def advance(self, y: Tensor, r: Tensor, budget: int) -> Advance:  # noqa: ARG002
        if self.previous is not None:
            self._update(y - self.previous[0], r - self.previous[1])
        self.previous = (y, r)
        return Advance(y - self._apply(r, self.left, self.right))

    @staticmethod
    def _apply(x: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """H x, or H^T x with left and right exchanged."""
        result = -x
        for a, b in zip(left, right, strict=True):
            result.addcmul_(a, (b * x).sum(dim=1, keepdim=True))
        return result

    def _update(self, dy: Tensor, dr: Tensor) -> None:
        if len(self.left) == self.memory:
            self.left.clear()
            self.right.clear()
        correction = dy - self._apply(dr, self.left, self.right)
        row = self._apply(dy, self.right, self.left)  # dy^T H
        curvature = (row * dr).sum(dim=1, keepdim=True)
        # A group that no longer moves has no curvature: it keeps its H.
        negligible = curvature.abs() <= torch.finfo(dy.dtype).eps * row.norm(dim=1, keepdim=True) * dr.norm(
            dim=1, keepdim=True
        )
        self.left.append(correction * torch.where(negligible, 0.0, curvature.reciprocal()))
        self.right.append(row)
