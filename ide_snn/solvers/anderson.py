"""Anderson acceleration (type II) with windowed memory.

D. G. Anderson, J. ACM 12 (1965); the difference form of Walker & Ni, SIAM J. Numer. Anal. 49 (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn.solvers.base import Advance, Workspace, check_settings, require_count


@dataclass(frozen=True)
class Anderson:
    """y <- y + beta r - (dY + beta dR) gamma with gamma = argmin ||r - dR gamma||, one gamma per group.

    dY, dR hold the last `memory` differences of iterates and residuals.

    Args:
        tol: relative residual to reach, per group.
        max_steps: iterations at most.
        memory: differences kept.
        mixing: beta in (0, 1].
    """

    tol: float = 1e-3
    max_steps: int = 30
    memory: int = 5
    mixing: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        require_count("memory", self.memory)
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing must lie in (0, 1], got {self.mixing}")

    def begin(self, work: Workspace) -> _Acceleration:  # noqa: ARG002
        return _Acceleration(self)


class _Acceleration:
    def __init__(self, settings: Anderson) -> None:
        self.settings = settings
        self.previous: tuple[Tensor, Tensor] | None = None
        self.dy: list[Tensor] = []
        self.dr: list[Tensor] = []
        self.gram: Tensor | None = None  # [G, k, k] inner products of dr

    def advance(self, y: Tensor, r: Tensor, budget: int) -> Advance:  # noqa: ARG002
        if self.previous is not None:
            self._remember(y - self.previous[0], r - self.previous[1])
        self.previous = (y, r)
        beta = self.settings.mixing
        proposal = y + beta * r
        for gamma, dy, dr in zip(self._coefficients(r), self.dy, self.dr, strict=True):
            proposal.sub_(gamma * dy).sub_(gamma * dr, alpha=beta)
        return Advance(proposal)

    def _remember(self, dy: Tensor, dr: Tensor) -> None:
        if len(self.dr) == self.settings.memory:
            del self.dy[0], self.dr[0]
            self.gram = self.gram[:, 1:, 1:] if self.gram is not None else None
        self.dy.append(dy)
        self.dr.append(dr)
        row = torch.stack([(dr * other).sum(dim=1) for other in self.dr], dim=1)  # [G, k]
        if self.gram is None:
            self.gram = row[:, :, None]
            return
        above = torch.cat([self.gram, row[:, :-1, None]], dim=2)
        self.gram = torch.cat([above, row[:, None, :]], dim=1)

    def _coefficients(self, r: Tensor) -> list[Tensor]:
        """gamma of each difference, [G, 1] each, from the normal equations scaled to unit diagonal."""
        if self.gram is None:
            return []
        right = torch.stack([(dr * r).sum(dim=1) for dr in self.dr], dim=1)
        gram, right = self.gram.double(), right.double()
        scale = gram.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
        gram = gram * scale[:, :, None] * scale[:, None, :]
        # Differences can be parallel, or zero in a group that has converged: a ridge at the rounding error of
        # the inner products keeps the system solvable and changes nothing otherwise.
        ridge = 10 * torch.finfo(r.dtype).eps
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        # solve_ex: a NaN must come out as a NaN, for the loop to see it, not as an exception of the factorisation
        gamma = torch.linalg.solve_ex(gram, right * scale).result * scale
        return list(gamma.to(r.dtype).unsqueeze(2).unbind(dim=1))
