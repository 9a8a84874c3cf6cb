"""Everything at once: the analysis of one model on some batches, as plain containers and as traces to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ide_snn.analysis.convergence import Convergence
from ide_snn.analysis.cost import SynapticCost
from ide_snn.analysis.horizon import Horizon, check_thresholds
from ide_snn.analysis.observe import Observation, measure
from ide_snn.analysis.rates import FiringRates, Trace, telling_neurons, trace
from ide_snn.analysis.residuals import SolverTrace, solver_residuals
from ide_snn.analysis.spectrum import BlockSpectra

__all__ = ["DEFAULT_THRESHOLDS", "Analysis", "analyze_model"]

DEFAULT_THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Analysis:
    """What `analyze_model` found: the meters, and what was looked at in the first batch only."""

    samples: int
    time_steps: int
    thresholds: tuple[float, ...]
    rates: FiringRates
    cost: SynapticCost
    horizon: Horizon
    convergence: Convergence
    spectrum: BlockSpectra
    solvers: dict[str, list[SolverTrace]]
    traces: list[Trace]
    trace_neurons: dict[str, list[int]]

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only; what is NaN or infinite becomes None, which JSON can hold."""
        content = {
            "samples": self.samples,
            "time_steps": self.time_steps,
            "firing_rate": self.rates.as_dict(),
            "cost": self.cost.as_dict(),
            **self.horizon.as_dict(self.thresholds),
            "equilibrium": self.convergence.as_dict(),
            "spectrum": self.spectrum.as_dict(),
            "solvers": {
                prefix.rstrip("_") or "block": [each.as_dict() for each in traces]
                for prefix, traces in self.solvers.items()
            },
            "traces": [each.as_dict(self.trace_neurons[each.population]) for each in self.traces],
        }
        return _finite(content)


class _FirstBatch:
    """What is looked at in one batch only: traces and solvers; a `Meter`."""

    def __init__(self, samples: Sequence[int], neurons: Sequence[int] | None) -> None:
        self._samples = samples
        self._neurons = neurons
        self._seen = False
        self.traces: list[Trace] = []
        self.neurons: dict[str, list[int]] = {}
        self.solvers: dict[str, list[SolverTrace]] = {}

    def add(self, observation: Observation, labels: Tensor) -> None:
        if self._seen:
            return
        self._seen = True
        self.traces = [each for site in observation.sites for each in trace(site, self._samples)]
        for each in self.traces:
            chosen = telling_neurons(each.spikes) if self._neurons is None else list(self._neurons)
            each.require(chosen)
            self.neurons.setdefault(each.population, chosen)
        self.solvers = solver_residuals(observation, labels)


def analyze_model(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
    trace_samples: Sequence[int] = (0,),
    neurons: Sequence[int] | None = None,
    spectrum_samples: int = 8,
    progress: bool | None = False,
) -> Analysis:
    """All analyses of a classifier that contains one or several feedback blocks.

    Args:
        model: returns logits [B, C]; put into evaluation mode while it is looked at.
        batches: (inputs, labels); rates, cost, accuracy and distances are over all of them, traces, spectrum and
            solvers on the first.
        thresholds: of confidence, for early exit; in (0, 1].
        trace_samples: entries of the first batch whose spikes and membranes are kept.
        neurons: flat indices of the neurons whose membranes are kept, in every population; None: three of those that
            fire in the first of `trace_samples`.
        spectrum_samples: entries of the first batch whose Jacobian is looked at.
        progress: show a bar; None means only on a terminal.

    Raises:
        ValueError: for arguments out of range, or a model that is not such a classifier.
        UncountableError: for a module whose operations cannot be counted; the meters in `ide_snn.analysis` work
            one by one.
    """
    check_thresholds(thresholds)
    rates, cost, horizon, convergence = FiringRates(), SynapticCost(), Horizon(), Convergence()
    spectrum, first = BlockSpectra(spectrum_samples), _FirstBatch(trace_samples, neurons)
    # the horizon first, which refuses what are no labels
    measure(model, batches, horizon, first, rates, cost, convergence, spectrum, progress=progress)
    return Analysis(
        samples=len(horizon.labels),
        time_steps=len(horizon.logits),
        thresholds=tuple(thresholds),
        rates=rates,
        cost=cost,
        horizon=horizon,
        convergence=convergence,
        spectrum=spectrum,
        solvers=first.solvers,
        traces=first.traces,
        trace_neurons=first.neurons,
    )


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
