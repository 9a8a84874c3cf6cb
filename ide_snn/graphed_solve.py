"""The linear solve on a GPU: GMRES ahead of the host (`ide_snn.solvers.ahead`), with `compile=true` as CUDA graphs.

A graph has the products of J^T and all that GMRES does for a number of dimensions. Right-hand side, slopes and weights
are copied into its own tensors before every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ide_snn.equilibrium import AnalyticLinearisation, Linearisation
from ide_snn.graphed_simulation import Blanks
from ide_snn.graphs import Graphs
from ide_snn.layers import Affine
from ide_snn.precision import Precision
from ide_snn.solvers.ahead import Ahead, Attempt, Foresight
from ide_snn.solvers.layout import Layout
from ide_snn.solvers.runs import Terms


class GraphedSolves:
    """What the solves of one block have in common. A copy or a pickle starts anew."""

    def __init__(self) -> None:
        self.foresight, self.graphs = Foresight(), Graphs("the linear solve", most=8)  # numbers of dimensions, too

    def ahead(self, jacobian: Linearisation, precision: Precision, *, captured: bool) -> Ahead:
        """For (I - J^T) v = g; with `captured` as graphs, where J has analytic products."""
        if captured and isinstance(jacobian, AnalyticLinearisation):
            maps = tuple(link for link in jacobian.maps if isinstance(link, Affine))
            if len(maps) == len(jacobian.maps):
                return _Captured(self.foresight, self.graphs, maps, jacobian.slopes, precision)
        return Ahead(self.foresight)

    def __reduce__(self) -> tuple[type[GraphedSolves], tuple[()]]:
        return GraphedSolves, ()


@dataclass(frozen=True)
class _Captured(Ahead):
    graphs: Graphs
    maps: tuple[Affine, ...]
    slopes: tuple[Tensor, ...]
    precision: Precision  # decides on the rounding of products at the time of the capture

    def attempt(
        self,
        matvec: Callable[[Tensor], Tensor],  # noqa: ARG002
        layout: Layout,
        b: Tensor,
        terms: Terms,
        dimensions: int,
    ) -> Attempt:
        blanks, tensors = Blanks.of(self.maps)
        count, plain = len(self.slopes), Ahead(self.foresight)

        def run(b: Tensor, *given: Tensor) -> Attempt:
            jacobian = AnalyticLinearisation(tuple(blanks.filled(given[count:])), given[:count])
            return plain.attempt(jacobian.rmatvec, layout, b, terms, dimensions)

        purpose = (blanks, layout, terms.tol, dimensions, self.precision)
        y, r, numbers = self.graphs(purpose, run, b, *self.slopes, *tensors)
        return y, r, numbers
