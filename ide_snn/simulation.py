"""Simulation of the spiking dynamics for T time steps; no gradient, memory independent of T.

    u_1 <- u_1 + X[t] + W_fb s_n[t-1]         u_i <- u_i + layer_i(s_{i-1}[t])   i = 2..n, in the same step
    s_i  = 1 where u_i >= V_th                u_i <- lambda (u_i - V_th s_i)
    a_i  = sum_t lambda^(T-t) s_i[t] / sum_t lambda^(T-t)

All membranes and spikes are zero at t = 0. Source: Xiao et al., NeurIPS 2021, sections 4.1 and 4.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ide_snn import event_driven
from ide_snn.firing import weighted_rate
from ide_snn.kernels import in_layout_of, neuron_step_
from ide_snn.layers import Affine, OpaqueAffine, cached_weights
from ide_snn.neurons import NeuronParams, step_
from ide_snn.record import Path, Rates, Record, together

Advance = Callable[[Tensor, Tensor, Tensor, NeuronParams], None]
EVENT_PATHS = ("events", "events16")
FUSED_PATHS = ("fused", "fused_half")
CHANNELS_LAST_PATHS = (*EVENT_PATHS, "fused_half")  # the layout of tensor cores, too
SPIKE_TYPES = {"events": torch.uint8, "events16": torch.uint8, "fused_half": torch.float16}  # elsewhere the membrane's


class Map(Protocol):
    """A connection in the simulation, such as `Affine`: spikes -> a new tensor with the response."""

    @property
    def is_silent_at_zero(self) -> bool:
        """True where no input spikes means no output."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


class _Population:
    """State of one population: membrane, current spikes, and the accumulators that were asked for."""

    def __init__(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        leak: float,
        path: Path,
        *,
        rate: bool,
        count: bool,
        response: bool,
    ) -> None:
        def state(dtype: torch.dtype = like.dtype) -> Tensor:
            if path in EVENT_PATHS:  # whose kernel starts from 0
                return event_driven.empty_channels_last(shape, like, dtype)
            if path in CHANNELS_LAST_PATHS:
                return event_driven.empty_channels_last(shape, like, dtype).zero_()
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self.path = path
        self.u, self.spikes = state(), state(SPIKE_TYPES.get(path, like.dtype))
        # For IF both accumulators are the spike count: one is enough.
        self.weighted = state() if rate or (count and leak == 1) else None
        self.count = state() if count and leak != 1 else self.weighted
        self.response = state() if response else None

    def part(self, samples: Tensor) -> _Population:
        """A copy with the state of these samples (indices) only."""

        def own(state: Tensor) -> Tensor:
            found = state[samples]
            return event_driven.channels_last(found) if self.path in CHANNELS_LAST_PATHS else found

        part = copy.copy(self)
        part.u, part.spikes = own(self.u), own(self.spikes)
        part.weighted = None if self.weighted is None else own(self.weighted)
        part.count = part.weighted if self.count is self.weighted else own(self.count)  # type: ignore[arg-type]
        return part


class Step:
    """The populations at the end of time step t = 1..T.

    The tensors are the simulation's own and change with the next step: clone what is to be kept.
    """

    def __init__(self, t: int, populations: Sequence[_Population], neuron: NeuronParams) -> None:
        self.t = t
        self._populations, self._neuron = populations, neuron

    @property
    def spikes(self) -> tuple[Tensor, ...]:
        """Spikes of this step, 0 or 1, of every population [B, *]."""
        return tuple(population.spikes.to(population.u.dtype) for population in self._populations)

    @property
    def membranes(self) -> tuple[Tensor, ...]:
        """Membrane potentials after reset and leak, of every population [B, *]."""
        return tuple(population.u for population in self._populations)

    def last_rate(self) -> Tensor:
        """Weighted rate a_n[t] [B, *], a new tensor: bit for bit what a simulation of t steps measures as `last`."""
        return _last_rate(self._populations, self._neuron, self.t)


def simulate(
    drive: Tensor | Callable[[int], Tensor],
    layers: Sequence[Map],
    feedback: Map,
    shapes: Sequence[tuple[int, ...]],
    neuron: NeuronParams,
    time_steps: int,
    record: Record = Record(),
    advance: Advance = step_,
    path: Path = "dense",
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
        advance: one step of one population, (current, u, spikes, neuron) -> None, overwriting u and spikes; called
            for the populations in their order, step by step. Of the dense path.
        path: "dense" takes the maps' own products and torch operations. "fused" has the same products and one kernel
            for the neurons and their accumulators (`ide_snn.kernels`), with the same rounding; `advance` is not used.
            "fused_half" is that with spikes, weights and responses in float16, whose 11 significant bits are those of
            TF32, and channels-last memory; membranes and rates stay as they are.
            "events" walks over the spikes (`ide_snn.event_driven`, float32 on a CPU, where `why_not` is None); the
            sums are the same in another order. "events16" does so with weights in 16-bit multiples of a unit per output
            channel, whose sums are exact.

    Nothing passed in is modified.

    Raises:
        ValueError: with `record.stop`, for maps with a gain, that is with dropout, whose masks are of single samples.
    """
    has_gain = any(isinstance(m, (Affine, OpaqueAffine)) and m.gain is not None for m in (feedback, *layers))
    if record.stop is not None and has_gain:
        raise ValueError("stop= is for simulations without dropout: call eval() first")
    has_own = callable(drive) or not all(isinstance(link, Affine) for link in (feedback, *layers))
    with torch.no_grad(), cached_weights() if has_own else nullcontext():  # it is one for all threads of the process
        x = drive(0) if callable(drive) else drive
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        last = len(shapes) - 1
        populations = [
            _Population(
                (x.shape[0], *shape),
                like,
                neuron.leak,
                path,
                rate=i == last or record.all_rates,
                count=record.spike_fraction,
                response=i == 0 and record.mean_response and path in EVENT_PATHS,
            )
            for i, shape in enumerate(shapes)
        ]
        engine: _Dense | _Events
        if path in EVENT_PATHS:
            engine = _Events((feedback, *layers), populations, neuron, levels=path == "events16")
        else:
            engine = _Dense((feedback, *layers), populations, neuron, None if path in FUSED_PATHS else advance)
        watcher = _Watcher(populations, neuron, record)
        ended = _Ended(x.shape[0], x.device)
        # all steps at once where nobody looks in between
        stride = 1 if callable(drive) or watcher.looks else time_steps
        for t in range(0, time_steps, stride):
            if t > 0 and callable(drive):
                x = drive(t) if not ended.parts else drive(t)[ended.going_on]
            engine.run(x, t, stride, 1 / neuron.total_weight(time_steps) if t + stride == time_steps else 0)
            watcher.look(t + stride)
            if record.stop is not None and t + stride < time_steps:
                stopped = record.stop(Step(t + stride, populations, neuron))
                going_on = ended.take(stopped, populations, watcher, neuron, t + stride, record, path)
                if going_on is not None:
                    x = x[going_on]
                    if not len(x):
                        return together(ended.parts, time_steps)
    rates = _measure(populations, watcher, neuron, time_steps, record, path)
    return rates if record.stop is None else together([*ended.parts, (ended.going_on, rates)], time_steps)


class _Ended:
    """The samples that a simulation has ended for, and what was measured of them."""

    def __init__(self, samples: int, device: torch.device) -> None:
        self.parts: list[tuple[Tensor, Rates]] = []
        self.going_on = torch.arange(samples, device=device)

    def take(self, stopped: Tensor, populations: Sequence[_Population], *measured: Any) -> Tensor | None:
        """Takes samples out of the populations; returns those that go on among what they were, None for all.

        Args:
            stopped: which of the samples that were going on, bool.
            measured: what else `_measure` takes.
        """
        if not bool(stopped.any()):
            return None
        out, going_on = stopped.nonzero().flatten(), (~stopped).nonzero().flatten()
        self.parts.append((self.going_on[out], _measure([p.part(out) for p in populations], *measured)))
        for population in populations:
            vars(population).update(vars(population.part(going_on)))
        self.going_on = self.going_on[going_on]
        return going_on


class _Dense:
    """Steps by the maps' own products. `maps` are feedback, then those from population i to i + 1.

    Without `advance` the neurons are those of the fused kernel.
    """

    def __init__(
        self, maps: Sequence[Map], populations: Sequence[_Population], neuron: NeuronParams, advance: Advance | None
    ) -> None:
        self.maps, self.populations, self.neuron, self.advance = maps, populations, neuron, advance
        if populations[0].path == "fused_half":  # once: otherwise every product would convert its weight
            self.maps = [_in_half(link) if isinstance(link, Affine) else link for link in maps]

    def run(self, x: Tensor, start: int, steps: int, _share: float) -> None:
        feedback, *layers = self.maps
        first, *others = self.populations
        x = in_layout_of(first.u, x) if self.advance is None else x
        for t in range(start, start + steps):
            if t > 0 or not feedback.is_silent_at_zero:
                spikes = self._step(first, feedback, self.populations[-1].spikes, x)
            else:
                spikes = self._update(first, x)
            for layer, population in zip(layers, others, strict=True):
                spikes = self._step(population, layer, spikes)

    def _step(self, population: _Population, link: Map, spikes: Tensor, drive: Tensor | None = None) -> Tensor:
        """One step of a population, driven by its predecessor's spikes."""
        dtype = population.u.dtype
        if self.advance is None and isinstance(link, Affine):
            current = replace(link, gain=None)(spikes)
            return self._update(population, current, link.gain, drive)
        current = link(spikes if isinstance(link, Affine) else spikes.to(dtype))
        if drive is not None:
            is_own = isinstance(link, Affine) or current.dtype != dtype  # nobody keeps it, as a hook of a module may
            current = current.to(dtype).add_(drive) if is_own else current + drive
        return self._update(population, current)

    def _update(
        self, population: _Population, current: Tensor, gain: Tensor | None = None, drive: Tensor | None = None
    ) -> Tensor:
        """Integrates gain * current + drive; returns the spikes."""
        if self.advance is None:
            u, weighted, spikes = population.u, population.weighted, population.spikes
            count = None if population.count is weighted else population.count
            gain, drive = (None if x is None else in_layout_of(u, x) for x in (gain, drive))
            current = in_layout_of(u, current)
            neuron_step_(current, u, spikes, self.neuron, gain=gain, drive=drive, rate=weighted, count=count)
            return spikes
        self.advance(current, population.u, population.spikes, self.neuron)
        if population.weighted is not None:
            if self.neuron.leak != 1:
                population.weighted.mul_(self.neuron.leak)
            population.weighted.add_(population.spikes)
        if population.count is not None and population.count is not population.weighted:
            population.count.add_(population.spikes)
        return population.spikes


def _in_half(link: Affine) -> Affine:
    """With weight and bias in float16, channels-last; the gain, of the neuron kernel, stays."""
    bias = None if link.bias is None else link.bias.half()
    return replace(link, weight=event_driven.channels_last(link.weight.half()), bias=bias)


class _Events:
    """Steps by walking over the spikes."""

    def __init__(
        self, maps: Sequence[Map], populations: Sequence[_Population], neuron: NeuronParams, *, levels: bool
    ) -> None:
        self.connections = [event_driven.connect(affine, levels=levels) for affine in maps]
        self.populations, self.neuron = populations, neuron

    def run(self, x: Tensor, start: int, steps: int, share: float) -> None:
        """`share` of a step in the mean response, in the last call; else 0."""
        from_rest = start == 0
        event_driven.advance(
            self.connections, self.populations, x, self.neuron, steps, from_rest=from_rest, share=share
        )


class _Watcher:
    """Keeps what `record` asks for of single time steps."""

    def __init__(self, populations: Sequence[_Population], neuron: NeuronParams, record: Record) -> None:
        self.populations, self.neuron, self.record = populations, neuron, record
        self.trains: list[list[Tensor]] = [[] for _ in populations]
        self.traces: list[list[Tensor]] = [[] for _ in populations]
        self.looks = record.spikes or record.membranes or bool(record.on_step or record.stop)

    def look(self, t: int) -> None:
        """After time step t = 1..T."""
        if self.record.spikes:
            for train, population in zip(self.trains, self.populations, strict=True):
                train.append(population.spikes.bool())
        if self.record.membranes:
            for trace, population in zip(self.traces, self.populations, strict=True):
                trace.append(population.u.clone())
        if self.record.on_step is not None:
            self.record.on_step(Step(t, self.populations, self.neuron))


def _measure(
    populations: list[_Population],
    watcher: _Watcher,
    neuron: NeuronParams,
    time_steps: int,
    record: Record,
    path: Path,
) -> Rates:
    total = neuron.total_weight(time_steps)

    def share(accumulator: Tensor | None, whole: float) -> Tensor:
        assert accumulator is not None  # allocated for what is recorded
        return accumulator / whole

    return Rates(
        last=_last_rate(populations, neuron, time_steps),
        time_steps=time_steps,
        path=path,
        all=tuple(share(p.weighted, total) for p in populations) if record.all_rates else (),
        spike_fraction=(tuple(share(p.count, time_steps) for p in populations) if record.spike_fraction else ()),
        spikes=tuple(torch.stack(train) for train in watcher.trains) if record.spikes else (),
        membranes=tuple(torch.stack(trace) for trace in watcher.traces) if record.membranes else (),
        mean_response=populations[0].response,
    )


def _last_rate(populations: Sequence[_Population], neuron: NeuronParams, time_steps: int) -> Tensor:
    """The last population's weighted rate after `time_steps` steps."""
    if populations[-1].path in EVENT_PATHS:
        return weighted_rate(populations, neuron.total_weight(time_steps))
    # A membrane that is NaN never fires, which would look like silence: the whole sample's rates become NaN instead.
    poison = torch.stack([(p.u * 0).sum(list(range(1, p.u.dim()))) for p in populations]).sum(0)
    last = populations[-1]
    assert last.weighted is not None  # the rate that every simulation measures
    rate = last.weighted / neuron.total_weight(time_steps)
    return rate.add_(poison.view(-1, *(1,) * (rate.dim() - 1)))
