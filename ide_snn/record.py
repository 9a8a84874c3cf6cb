"""What a simulation is told to keep, and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Path", "Rates", "Record", "together"]

Path = Literal["dense", "fused", "fused_half", "events", "events16"]


@dataclass(frozen=True)
class Record:
    """What to keep beside the last population's rate.

    Attributes:
        all_rates: the weighted rates of every population.
        spike_fraction: the mean spikes per time step of every neuron, unweighted.
        spikes, membranes: those of every time step [T, B, *]; their memory grows with T.
        mean_response: of the feedback, for the gradient of event-driven paths.
        on_step: called after every time step with what can be seen there (`ide_snn.Step`), for anything else.
        stop: called in the same way, but for the last step: which samples end there, bool [B'] for the B' samples that
            are still simulated. They are measured there, and later steps are of the others alone.
    """

    all_rates: bool = False
    spike_fraction: bool = False
    spikes: bool = False
    membranes: bool = False
    mean_response: bool = False
    on_step: Callable[[Any], None] | None = None
    stop: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.stop is not None and (self.spikes or self.membranes or self.mean_response):
            raise ValueError(
                "spikes, membranes and mean_response are of all samples in every step, which stop= ends for some"
            )


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
        membranes: membrane potentials of every population at the end of each step, that is after reset and leak,
            [T, B, *]; empty unless recorded.
        mean_response: K_fb a_n + b of the feedback before its gain, [B, *], for the weighted rates a_n: the mean of its
            responses to the single steps, with the weights of the simulation (on "events16" rounded). None unless
            recorded, which only event-driven paths do.
        time_steps: T.
        path: how it was computed, see `simulate`.
        steps: that each sample was simulated for, and that what was measured of it is of [B]; None: all T.
    """

    last: Tensor
    time_steps: int
    path: Path = "dense"
    all: tuple[Tensor, ...] = ()
    spike_fraction: tuple[Tensor, ...] = ()
    spikes: tuple[Tensor, ...] = ()
    membranes: tuple[Tensor, ...] = ()
    mean_response: Tensor | None = None
    steps: Tensor | None = None

    @property
    def firing_rate(self) -> Tensor:
        """Mean spikes per neuron and time step of each population [n], on the device.

        Raises:
            ValueError: if `spike_fraction` was not recorded.
        """
        if not self.spike_fraction:
            raise ValueError("firing rates were not recorded: simulate with Record(spike_fraction=True)")
        return torch.stack([fraction.mean() for fraction in self.spike_fraction])


def together(parts: Sequence[tuple[Tensor, Rates]], time_steps: int) -> Rates:
    """The rates of a batch of which every part (indices of its samples, rates) was simulated for at most T steps."""
    indices, rates = zip(*parts, strict=True)
    place = torch.cat(indices).argsort()
    columns = [torch.cat(own)[place] for own in zip(*(_measured(own) for own in rates), strict=True)]
    steps = torch.cat([torch.full_like(index, own.time_steps) for index, own in parts])[place]
    last, rest, count = columns[0], columns[1:], len(rates[0].all)
    recorded = {"last": last, "all": tuple(rest[:count]), "spike_fraction": tuple(rest[count:])}
    return replace(rates[0], **recorded, time_steps=time_steps, steps=steps)


def _measured(rates: Rates) -> tuple[Tensor, ...]:
    return rates.last, *rates.all, *rates.spike_fraction
