"""What runs of GMRES are told and what they find, however they are computed; norms of residuals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Terms:
    """What follows from the tolerance of a GMRES solve and the rounding `eps` of its numbers.

    Attributes:
        enough: relative norm of a residual that needs no further dimension: a little below tol, for the residual that
            decides differs from the predicted by rounding.
        passes: of modified Gram-Schmidt, which loses orthogonality like eps / residual; one until that matters.
        noise: share of its length below which an orthogonalised vector is what cancelling has left of rounding.
    """

    def __init__(self, tol: float, eps: float) -> None:
        self.tol, self.eps = tol, eps
        self.is_loose = tol > eps**0.5
        self.enough = (0.99 if self.is_loose else 0.9) * tol
        self.passes = 1 if self.is_loose else 2
        self.noise = 10 * eps

    def trust(self, run: Run) -> bool:
        """True where the residual that a run computes is that of its y to rounding."""
        return self.is_loose and 100 * self.eps * run.longest <= self.tol


@dataclass(frozen=True)
class Run:
    """What a run of GMRES found; norms are relative to those of the right-hand side.

    Attributes:
        y, residual: [G, N]; the second may be empty, see `PreparedGmres`.
        norm: of the residual, with that of its rounding where factors are rounded, [G].
        worst, longest: largest norm of a residual, and of a y; NaN if one is.
        most, mean: products, of the group with the most, and per group.
        rounding: of the factors, see `gmres`.
    """

    y: Tensor
    residual: Tensor
    norm: Array
    worst: float
    longest: float
    most: int
    mean: float
    rounding: float = 0


def relative(absolute: Array, scale: Array) -> Array:
    """Norms of residuals [G] in units of their scale [G]."""
    # b = 0 has the solution v = 0 with residual 0 exactly. f(z) = 0 at some z, silent neurons, is nothing
    # infinite: there the residual is measured against z, which makes it 1
    if scale.size and scale.min() > 0 and scale.max() < np.inf:
        quotient: Array = absolute / scale
        return quotient
    known = scale > 0
    with np.errstate(invalid="ignore"):  # infinity in units of infinity is no number
        return np.where(known, absolute / np.where(known, scale, 1.0), np.where(absolute > 0, 1.0, absolute))


def largest(residual: Array) -> float:
    return float(residual.max()) if residual.size else 0.0
