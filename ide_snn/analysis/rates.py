"""Where a network spikes: firing rates per population, spike rasters and membrane traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ide_snn.analysis.observe import Observation, Site, evaluation_mode
from ide_snn.record import Record

__all__ = ["FiringRates", "PopulationRate", "Trace", "telling_neurons", "trace"]


@dataclass(frozen=True)
class PopulationRate:
    """Means over neurons and samples.

    Attributes:
        plain: spikes per neuron and time step.
        weighted: sum_t lambda^(T-t) s[t] / sum_t lambda^(T-t); the same as `plain` for IF neurons.
        silent: share of (neuron, sample) pairs without a single spike.
        neurons: in the population.
    """

    plain: float
    weighted: float
    silent: float
    neurons: int


class FiringRates:
    """Firing rate of every population; a `Meter`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._neurons: dict[str, int] = {}
        self._samples: dict[str, int] = {}

    def add(self, observation: Observation, labels: Tensor) -> None:  # noqa: ARG002
        for site in observation.sites:
            for i, (plain, weighted) in enumerate(zip(site.rates.spike_fraction, site.rates.all, strict=True)):
                name = site.population(i)
                sums = torch.stack([plain.double().sum(), weighted.double().sum(), (plain == 0).double().sum()])
                self._sums[name] = self._sums.get(name, 0) + sums
                self._neurons[name] = plain[0].numel()
                self._samples[name] = self._samples.get(name, 0) + site.batch

    def result(self) -> dict[str, PopulationRate]:
        """By population."""
        rates = {}
        for name, sums in self._sums.items():
            plain, weighted, silent = (sums / (self._samples[name] * self._neurons[name])).tolist()
            rates[name] = PopulationRate(plain, weighted, silent, self._neurons[name])
        return rates

    def as_dict(self) -> dict[str, Any]:
        return {name: asdict(rate) for name, rate in self.result().items()}


@dataclass(frozen=True)
class Trace:
    """One population of one sample: all spikes, and the membrane potentials just before the reset.

    Attributes:
        population: its name.
        sample: index in the batch.
        spikes: bool [T, neurons], neurons flattened in the order [C, H, W].
        membranes: u + I before the reset [T, neurons], in units of the input current: a spike where it reaches V_th.
        v_threshold: V_th.
    """

    population: str
    sample: int
    spikes: Tensor
    membranes: Tensor
    v_threshold: float

    @property
    def neurons(self) -> int:
        return self.spikes.shape[1]

    def require(self, neurons: Sequence[int]) -> None:
        """Raises ValueError for an index that the population has not."""
        wrong = [index for index in neurons if not 0 <= index < self.neurons]
        if wrong:
            raise ValueError(
                f"neurons: there is no neuron {wrong[0]} in {self.population}, which has {self.neurons} "
                f"(0..{self.neurons - 1})"
            )

    def as_dict(self, neurons: Sequence[int]) -> dict[str, Any]:
        """Spike times t = 1..T and membranes of the chosen neurons."""
        self.require(neurons)
        return {
            "population": self.population,
            "sample": self.sample,
            "neurons": list(neurons),
            "spike_times": [(self.spikes[:, i].nonzero().flatten() + 1).tolist() for i in neurons],
            "membrane_before_reset": [[round(float(u), 6) for u in self.membranes[:, i]] for i in neurons],
        }


def trace(site: Site, samples: Sequence[int]) -> list[Trace]:
    """Spikes and membranes of every population for the chosen entries of the block's batch.

    They are simulated again, by themselves; needs memory for T * neurons * samples spikes and potentials.

    Raises:
        ValueError: for a sample that the batch has not.
    """
    wrong = [index for index in samples if not 0 <= index < site.batch]
    if wrong:
        raise ValueError(f"there is no sample {wrong[0]}: the batch has {site.batch} (0..{site.batch - 1})")
    chosen, neuron = torch.tensor(list(samples), device=site.x.device), site.block.neuron
    with evaluation_mode(site.block):
        rates = site.block.simulate(site.inputs_of(chosen), Record(spikes=True, membranes=True))
    traces = []
    for j, sample in enumerate(samples):
        for i, (spikes, after) in enumerate(zip(rates.spikes, rates.membranes, strict=True)):
            s, u = spikes[:, j].flatten(1).cpu(), after[:, j].flatten(1).cpu()
            before = u / neuron.leak + neuron.v_threshold * s.to(u.dtype)
            traces.append(Trace(site.population(i), sample, s, before, neuron.v_threshold))
    return traces


def telling_neurons(spikes: Tensor, count: int = 3) -> list[int]:
    """Neurons worth a look, from a spike train [T, neurons]: a busy, a middling and a quiet one.

    Of those that fire, but not in every step, if there are enough of them; otherwise of all.
    """
    totals = spikes.sum(0)
    order = torch.argsort(totals, descending=True, stable=True)
    lively = order[(totals[order] > 0) & (totals[order] < len(spikes))]
    if len(lively) < count:
        lively = order
    places = [math.floor((i + 0.5) * len(lively) / count) for i in range(min(count, len(lively)))]
    return [int(lively[place]) for place in places]
