"""How close the rates are to the equilibrium, over the time steps.

    to_equilibrium[t] = mean over samples of ||a[t] - a*|| / ||a*||            a* = f(a*)
    residual[t]       = mean over samples of ||a[t] - f(a[t])|| / ||a*||

a is the last population's weighted rate; f and a* are those of the whole input (for an input with time: of the
weighted mean of all T frames). For IF neurons, constant input and one population both fall like 1/t; LIF neurons have a
floor proportional to 1 - lambda, and other inputs and chains follow no such law (Xiao et al., NeurIPS 2021, section 4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ide_snn.analysis.observe import Observation, Site, evaluation_mode
from ide_snn.solvers import Anderson, Solver

__all__ = ["Convergence", "ConvergenceCurve"]


@dataclass(frozen=True)
class ConvergenceCurve:
    """The two distances of one block over t = 1..T.

    Attributes:
        to_equilibrium, residual: means over the `samples` counted; empty if there is none.
        samples: with a solved equilibrium that is not zero.
        unsolved: samples left out because the solver did not reach its tolerance.
        silent: samples left out because their equilibrium is zero, where a relative distance means nothing.
        largest_solver_residual: ||f(a*) - a*|| / ||f(a*)||, the worst of the samples counted.
        one_over_t: whether theory promises a decay like 1/t.
    """

    to_equilibrium: list[float]
    residual: list[float]
    samples: int
    unsolved: int
    silent: int
    largest_solver_residual: float
    one_over_t: bool


@dataclass
class _Sums:
    distances: Tensor  # [2, T]
    one_over_t: bool
    samples: int = 0
    unsolved: int = 0
    silent: int = 0
    worst: float = 0.0


class Convergence:
    """Distances to the equilibrium of every block; a `Meter`.

    Args:
        solver: for a*; its tolerance must lie well below the distances of interest.
    """

    def __init__(self, solver: Solver = Anderson(tol=1e-5, max_steps=500)) -> None:
        self._solver = solver
        self._sums: dict[str, _Sums] = {}

    def add(self, observation: Observation, labels: Tensor) -> None:  # noqa: ARG002
        for site in observation.sites:
            with evaluation_mode(site.block), torch.no_grad():
                self._add_block(site)

    def result(self) -> dict[str, ConvergenceCurve]:
        """By prefix of the block."""
        curves = {}
        for prefix, sums in self._sums.items():
            means = (sums.distances / sums.samples).tolist() if sums.samples else ([], [])
            curves[prefix] = ConvergenceCurve(
                means[0], means[1], sums.samples, sums.unsolved, sums.silent, sums.worst, sums.one_over_t
            )
        return curves

    def as_dict(self) -> dict[str, Any]:
        return {prefix.rstrip("_") or "block": asdict(curve) for prefix, curve in self.result().items()}

    def _add_block(self, site: Site) -> None:
        block = site.block
        equilibrium, solution = block.equilibrium(site.x, self._solver)
        _, f = block.linearisation_point(site.x)
        size = _norms(equilibrium)
        solved = (solution.stats.residual <= self._solver.tol).to(size.device)
        counted = solved & (size > 0)
        sums = self._sums.setdefault(
            site.prefix, _Sums(torch.zeros(2, len(site.over_time), dtype=torch.float64), promises_one_over_t(site))
        )
        sums.samples += int(counted.sum())
        sums.unsolved += int((~solved).sum())
        sums.silent += int((solved & (size == 0)).sum())
        if not bool(counted.any()):
            return
        sums.worst = max(sums.worst, float(solution.stats.residual[counted.cpu()].max()))
        away = torch.stack([_norms(a - equilibrium) for a in site.over_time])
        residual = torch.stack([_norms(a - f(a, "running")) for a in site.over_time])
        relative = torch.stack([away, residual])[..., counted] / size[counted]
        sums.distances = sums.distances + relative.sum(-1).cpu()


def promises_one_over_t(site: Site) -> bool:
    """IF neurons, constant input, one population: the case in which the rates approach f's fixed point like 1/t."""
    block = site.block
    return block.neuron.leak == 1 and not block.input_has_time and len(block.layers) == 0


def _norms(a: Tensor) -> Tensor:
    """2-norm of every sample [B], in float64."""
    return a.flatten(1).double().norm(dim=1)
