"""Simulation of the spiking dynamics for T time steps; no gradient, memory independent of T.

    u_1 <- u_1 + X[t] + W_fb s_n[t-1]         u_i <- u_i + layer_i(s_{i-1}[t])   i = 2..n, in the same step
    s_i  = 1 where u_i >= V_th                u_i <- lambda (u_i - V_th s_i)
    a_i  = sum_t lambda^(T-t) s_i[t] / sum_t lambda^(T-t)

All membranes and spikes are zero at t = 0. Source: Xiao et al., NeurIPS 2021, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn.layers import Affine, OpaqueAffine, cached_weights
from ide_snn.neurons import NeuronParams, step_

Map = Affine | OpaqueAffine


@dataclass(frozen=True)
class Record:
    """What to keep beside the last population's rate. `spikes` needs memory proportional to T."""

    all_rates: bool = False
    spike_fraction: bool = False
    spikes: bool = False


@dataclass(frozen=True)
class Rates:
    """What a simulation measured.

    Attributes:
        last: weighted firing rate a_n of the last population [B, *]; NaN for a sample in which any membrane ended
            NaN or infinite.
        all: weighted rates of every population, first to last; empty unless recorded.
        spike_fraction: spikes per time step of every neuron of every population [B, *] (unweighted mean);
            empty unless recorded.
        spikes: spike trains of every population, bool [T, B, *]; empty unless recorded.
        time_steps: T.
    """

    last: Tensor
    time_steps: int
    all: tuple[Tensor, ...] = ()
    spike_fraction: tuple[Tensor, ...] = ()
    spikes: tuple[Tensor, ...] = ()

    @property
    def firing_rate(self) -> Tensor:
        """Mean spikes per neuron and time step of each population [n], on the device.

        Raises:
            ValueError: if `spike_fraction` was not recorded.
        """
        if not self.spike_fraction:
            raise ValueError("firing rates were not recorded: simulate with Record(spike_fraction=True)")
        return torch.stack([fraction.mean() for fraction in self.spike_fraction])


class _Population:
    """State of one population: membrane, current spikes, and the accumulators that were asked for."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, neuron: NeuronParams, *, rate: bool, count: bool):
        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.neuron = neuron
        self.u, self.spikes = zeros(), zeros()
        # For IF both accumulators are the spike count: one is enough.
        self.weighted = zeros() if rate or (count and neuron.leak == 1) else None
        self.count = zeros() if count and neuron.leak != 1 else self.weighted

    def advance(self, current: Tensor) -> Tensor:
        step_(current, self.u, self.spikes, self.neuron)
        if self.weighted is not None:
            if self.neuron.leak != 1:
                self.weighted.mul_(self.neuron.leak)
            self.weighted.add_(self.spikes)
        if self.count is not None and self.count is not self.weighted:
            self.count.add_(self.spikes)
        return self.spikes


def simulate(
    drive: Tensor | Callable[[int], Tensor],
    layers: Sequence[Map],
    feedback: Map,
    shapes: Sequence[tuple[int, ...]],
    neuron: NeuronParams,
    time_steps: int,
    record: Record = Record(),
) -> Rates:
    """Runs the populations for `time_steps` steps from rest.

    Args:
        drive: X, [B, *shapes[0]]; or a function t -> X[t] for t = 0..T-1 for an input that varies in time.
        layers: n - 1 maps from population i to i + 1.
        feedback: map from the last population to the first.
        shapes: of the n populations, without the batch.
        neuron: threshold and leak.
        time_steps: T.
        record: what to keep.

    Nothing passed in is modified.
    """
    with torch.no_grad(), cached_weights():
        x = drive(0) if callable(drive) else drive
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        last = len(shapes) - 1
        populations = [
            _Population(
                (x.shape[0], *shape),
                like,
                neuron,
                rate=i == last or record.all_rates,
                count=record.spike_fraction,
            )
            for i, shape in enumerate(shapes)
        ]
        trains: list[list[Tensor]] = [[] for _ in populations]
        for t in range(time_steps):
            if t > 0 and callable(drive):
                x = drive(t)
            first = populations[0]
            if t > 0 or not feedback.is_silent_at_zero:
                current = feedback(populations[-1].spikes)
                current = current.add_(x) if current.dtype == like.dtype else current.to(like.dtype).add_(x)
            else:
                current = x
            spikes = first.advance(current)
            for layer, population in zip(layers, populations[1:], strict=True):
                spikes = population.advance(layer(spikes))
            if record.spikes:
                for train, population in zip(trains, populations, strict=True):
                    train.append(population.spikes.bool())
    return _measure(populations, trains, neuron, time_steps, record)


def _measure(
    populations: list[_Population],
    trains: list[list[Tensor]],
    neuron: NeuronParams,
    time_steps: int,
    record: Record,
) -> Rates:
    total = neuron.total_weight(time_steps)

    def share(accumulator: Tensor | None, whole: float) -> Tensor:
        assert accumulator is not None  # allocated for what is recorded
        return accumulator / whole

    # A membrane that is NaN never fires, which would look like silence: the whole sample's rates become NaN instead.
    poison = torch.stack([(p.u * 0).flatten(1).sum(1) for p in populations]).sum(0)
    last = share(populations[-1].weighted, total)
    return Rates(
        last=last + poison.view(-1, *(1,) * (last.dim() - 1)),
        time_steps=time_steps,
        all=tuple(share(p.weighted, total) for p in populations) if record.all_rates else (),
        spike_fraction=(tuple(share(p.count, time_steps) for p in populations) if record.spike_fraction else ()),
        spikes=tuple(torch.stack(train) for train in trains) if record.spikes else (),
    )
