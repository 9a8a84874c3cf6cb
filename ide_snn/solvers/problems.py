"""What solvers solve: v = b + A v, linear, or z = f(z)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ide_snn.native import Factor
from ide_snn.solvers.ahead import Ahead


@dataclass(frozen=True)
class Rough:
    """A with rounding, which is faster: `matvec` v -> A v + e with ||e|| <= noise ||v|| or so per sample.

    factors: the same as kernels, where the problem has those of A; the noise is in units of ||A v|| then.
    """

    matvec: Callable[[Tensor], Tensor]
    noise: float
    factors: Callable[[], tuple[Factor, ...]] | None = None


@dataclass(frozen=True)
class LinearProblem:
    """v = rhs + A v with `matvec` v -> A v on tensors of rhs's shape [B, *].

    coupled: True where A mixes samples of the batch; then there is one group.
    native: the solver may use compiled kernels (float32 on a CPU), and overwrite what `matvec` returns.
    factors: returns A as a tuple of per-sample kernels in order of application; with `native`, where A does not mix
        samples. They read `rhs` in its order in memory. Called only if the solve needs exact products.
    rough: A with rounding, for solvers that may begin with it; the verdict is on A.
    ahead: how runs of GMRES are made without waiting for the host after every product, where A does not mix samples and
        `matvec` does not wait.
    """

    matvec: Callable[[Tensor], Tensor]
    rhs: Tensor
    _: KW_ONLY
    coupled: bool = False
    native: bool = False
    factors: Callable[[], tuple[Factor, ...]] | None = None
    rough: Rough | None = None
    ahead: Ahead | None = None

    @property
    def start(self) -> Tensor:
        return self.rhs

    def image(self, y: Tensor) -> Tensor:
        """b + A y, the fixed-point map of the problem."""
        return self.rhs + self.matvec(y)


@dataclass(frozen=True)
class FixedPointProblem:
    """z = f(z) on tensors of the shape of `start` [B, *]."""

    f: Callable[[Tensor], Tensor]
    start: Tensor
    _: KW_ONLY
    coupled: bool = False

    def image(self, y: Tensor) -> Tensor:
        return self.f(y)


Problem = LinearProblem | FixedPointProblem
