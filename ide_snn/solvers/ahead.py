"""Runs of GMRES whose dimensions are computed ahead of the host: on a GPU it waits once per run, not for each product.

As many dimensions are computed as the last runs took; how many of them are used is decided on the device, as the host
would have decided. So the numbers are those of the run that asks after every dimension, whatever was computed ahead. A
run that turns out to need more is made again with half as many more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn.kernels.krylov import arnoldi_step_, combine, least_squares, normalise_
from ide_snn.solvers.layout import Layout
from ide_snn.solvers.runs import Array, Run, Terms, largest, relative

PATIENCE = 32  # runs that take fewer dimensions before fewer are computed


class Foresight:
    """How many dimensions to compute ahead, from the runs so far. It has no influence on their numbers.

    Attributes:
        dimensions: of the next run.
    """

    def __init__(self) -> None:
        self.dimensions = 4
        self._fewer = self._most = 0

    def learn(self, used: int) -> None:
        """A run took `used` dimensions."""
        if used >= self.dimensions:
            self.dimensions, self._fewer, self._most = used, 0, 0
            return
        self._fewer, self._most = self._fewer + 1, max(self._most, used)
        if self._fewer == PATIENCE:
            self.dimensions, self._fewer, self._most = self._most, 0, 0


Attempt = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Ahead:
    """How a problem's runs are made ahead of the host.

    Attributes:
        foresight: shared by the problems that are alike, those of one block.
    """

    foresight: Foresight

    def attempt(
        self, matvec: Callable[[Tensor], Tensor], layout: Layout, b: Tensor, terms: Terms, dimensions: int
    ) -> Attempt:
        """(y, r, numbers [3 G + 2]) of a run from 0 with so many dimensions; no synchronisation with the host.

        Args:
            matvec: v -> A v on tensors of the problem's shape, without synchronisation either.
            layout: of these tensors as rows.
            b: [G, N], contiguous.

        The numbers, float64, are ||b||, ||r|| and ||y|| of the groups, the dimensions used, and 1 where it needs more.
        """
        basis, columns = b.new_empty(dimensions + 1, *b.shape), b.new_zeros(dimensions, dimensions + 1, len(b))
        basis[0], beta = normalise_(b.clone())
        for k in range(dimensions):
            image = layout.rows(matvec(layout.unrows(basis[k]))).contiguous()
            arnoldi_step_(basis, image, columns, k, passes=terms.passes, noise=terms.noise)
        bound = beta.double() * terms.enough
        solution, remainder, verdict = least_squares(columns, beta, bound, noise=terms.noise)
        y, r, norms = combine(basis, solution, remainder, verdict)
        return y, r, torch.cat([beta.double(), norms.double().flatten(), verdict.double()])

    def run(
        self, matvec: Callable[[Tensor], Tensor], layout: Layout, b: Tensor, terms: Terms, dimensions: int
    ) -> tuple[Run, Array]:
        """(a run from 0 of at most so many dimensions, ||b|| [G]); the host waits once, or more often where more were
        needed than foreseen."""
        foresight, ahead = self.foresight, min(self.foresight.dimensions, dimensions)
        while True:
            y, r, found = self.attempt(matvec, layout, b, terms, ahead)
            numbers = found.cpu().numpy()  # the only place where the host waits
            rhs, norm, length = numbers[:-2].reshape(3, -1)
            used, is_open = int(numbers[-2]), bool(numbers[-1])
            if not is_open or ahead == dimensions:
                break
            ahead = min(ahead + max(2, ahead // 2), dimensions)
        foresight.learn(used)
        norm, length = relative(norm, rhs), relative(length, rhs)
        return Run(y, r, norm, largest(norm), largest(length), used, used), rhs
