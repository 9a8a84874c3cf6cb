"""What is watched as a model trains or is evaluated: solves, firing rates, feedback norms, norms of gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ide_snn.block import FeedbackSNN
from ide_snn.distributed import Ranks
from ide_snn.dsr import DSRNode, record_firing_rates
from ide_snn.record import Rates
from ide_snn.solvers import Outcome, Solution

__all__ = [
    "BlockMonitor",
    "GradientNorms",
    "feedback_blocks",
    "feedback_diagnostics",
    "gradient_figures",
    "gradient_norm",
    "merged",
    "peak_of",
    "solver_figures",
]


def feedback_blocks(model: nn.Module) -> dict[str, FeedbackSNN]:
    """The feedback blocks of a model with the prefix of their figures: none for a single block."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, FeedbackSNN)}
    if len(blocks) == 1:
        return {"": next(iter(blocks.values()))}
    return {f"{name.replace('.', '_')}_": block for name, block in blocks.items()}


def feedback_diagnostics(model: nn.Module) -> dict[str, float]:
    """Feedback norm, alpha and the like of every block, by name."""
    return {
        f"feedback_{prefix}{name.removeprefix('feedback_')}": float(value)
        for prefix, block in feedback_blocks(model).items()
        for name, value in block.feedback_diagnostics().items()
    }


class BlockMonitor:
    """While entered, sums up what the blocks of `model` report; leaves all tensors on the device.

    Firing rates are summed only if asked for, since a block then has to count spikes; call `count(batch)` after
    each forward pass, so that they are weighted by the batch size. DSR nodes report firing rates too.
    """

    def __init__(self, model: nn.Module, *, firing_rates: bool = False) -> None:
        self._blocks = feedback_blocks(model)
        self._firing_rates = firing_rates
        self._has_dsr = any(isinstance(module, DSRNode) for module in model.modules())
        self._model = model
        self._stack = ExitStack()
        self._dsr_rates: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._last_rates: dict[str, Tensor] = {}
        self._rates: dict[str, Tensor] = {}
        self._samples = 0
        self.solves = 0
        self.failures = 0
        self.steps = 0
        self.max_steps = 0
        self.products = 0
        self.residual = 0.0
        self.max_residual = 0.0

    def __enter__(self) -> BlockMonitor:
        for prefix, block in self._blocks.items():
            self._handles.append(block.register_solve_hook(self._on_solve))
            if self._firing_rates:
                hook = functools.partial(self._on_simulation, prefix)
                self._handles.append(block.register_simulation_hook(hook))
        if self._firing_rates and self._has_dsr:
            self._dsr_rates = self._stack.enter_context(record_firing_rates(self._model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack.close()

    def _on_solve(self, solution: Solution) -> None:
        self.solves += 1
        self.failures += solution.outcome is not Outcome.converged
        self.steps += solution.stats.steps
        self.max_steps = max(self.max_steps, solution.stats.steps)
        self.products += solution.stats.products
        self.residual += solution.stats.max_residual
        self.max_residual = max(self.max_residual, solution.stats.max_residual)

    def _on_simulation(self, key: str, rates: Rates) -> None:
        self._last_rates[key] = rates.firing_rate.detach()

    def count(self, batch: int) -> None:
        """Add the firing rates of the last forward pass, of `batch` samples."""
        self._samples += batch
        if self._dsr_rates:
            self._last_rates["dsr_" if self._blocks else ""] = torch.stack(list(self._dsr_rates.values()))
        for key, rate in self._last_rates.items():
            total = self._rates.get(key)
            self._rates[key] = rate.double() * batch + (0.0 if total is None else total)

    def firing_rate(self, ranks: Ranks = Ranks()) -> dict[str, float]:
        """Mean spikes per neuron and step of each population, by name, over the samples of all ranks."""
        samples = sum(ranks.gather(self._samples))
        totals: dict[str, Tensor] = {}
        for own in ranks.gather({key: total.cpu() for key, total in self._rates.items()}):
            for key, total in own.items():
                totals[key] = totals[key] + total if key in totals else total
        return {
            f"{key}population_{index}": value
            for key, total in totals.items()
            for index, value in enumerate((total / samples).tolist(), start=1)
        }

    def state_dict(self) -> dict[str, int | float]:
        """The counts of the solves."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        for name in _COUNTERS:
            uncounted = math.nan if state["solves"] else 0  # earlier versions did not count products
            setattr(self, name, state.get(name, uncounted))


_COUNTERS = ("solves", "failures", "steps", "max_steps", "products", "residual", "max_residual")


def solver_figures(counts: Mapping[str, int | float]) -> dict[str, int | float]:
    """Figures of the solves that a monitor has counted; empty when there was none."""
    solves = counts["solves"]
    if not solves:
        return {}
    figures = {
        "solver_steps_mean": counts["steps"] / solves,
        "solver_steps_max": counts["max_steps"],
        "solver_products_mean": counts["products"] / solves,
        "solver_residual_mean": counts["residual"] / solves,
        "solver_residual_max": counts["max_residual"],
        "solver_failures": counts["failures"],
    }
    if math.isnan(figures["solver_products_mean"]):  # the epoch was begun by a version that did not count them
        del figures["solver_products_mean"]
    return figures


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """2-norm of all gradients as one vector."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads])


class GradientNorms:
    """Norms of the gradient of all parameters, of every optimiser step, kept on the device; alike on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.max_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, norm: Tensor) -> None:
        norm = norm.detach().to(self.norm)
        self.norm += norm
        self.max_norm = torch.maximum(self.max_norm, norm)
        self.steps += 1

    def state_dict(self) -> dict[str, int | float]:
        """The sum, the largest and their number; the only place that waits for the device."""
        return {"norm": float(self.norm), "max_norm": float(self.max_norm), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        self.norm.fill_(state["norm"])
        self.max_norm.fill_(state["max_norm"])
        self.steps = int(state["steps"])

    @staticmethod
    def uncounted() -> dict[str, int | float]:
        """The state of an epoch whose first steps were not counted: it has no figures."""
        return {"norm": math.nan, "max_norm": math.nan, "steps": 1}


def gradient_figures(counts: Mapping[str, int | float]) -> dict[str, float]:
    """Mean and largest norm of the gradients of an epoch; empty without any."""
    steps = counts["steps"]
    if not steps or math.isnan(counts["norm"]):
        return {}
    return {"gradient_norm_mean": counts["norm"] / steps, "gradient_norm_max": counts["max_norm"]}


def peak_of(counts: Mapping[str, int | float]) -> float:
    """How many times the mean of the others the largest norm of the gradients of an epoch is; 0 without others."""
    others = (counts["norm"] - counts["max_norm"]) / max(counts["steps"] - 1, 1)
    if math.isinf(counts["max_norm"]):
        return math.inf
    return counts["max_norm"] / others if others > 0 else 0.0


def merged(counts: Sequence[Mapping[str, int | float]]) -> dict[str, int | float]:
    """The counts of all ranks together: sums, but the largest of what is a maximum."""
    return {key: (max if key.startswith("max_") else sum)(own[key] for own in counts) for key in counts[0]}
