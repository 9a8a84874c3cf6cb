"""Backpropagation through time (BPTT) with surrogate gradients for feedback networks.

The value is that of the simulation, bit for bit: `ide_snn.simulation` runs, and a recorder keeps what the backward pass
needs. The gradient is that of the T steps, s[t] having a surrogate's derivative (`ide_snn.spiking`), written by hand:

    S_n[t] = K_fb^T U_1[t+1] + w_t dL/da_n       S_i[t] = K_{i+1}^T U_{i+1}[t]
    U_i[t] = adjoint of fire, reset and leak at the charged membrane u_i[t], for S_i[t] and U_i[t+1]
    dL/dW_i += U_i[t] s_{i-1}[t]^T               dL/dX[t] = U_1[t]

U is the gradient of the charged membrane, w_t the weight of step t in the rate. Kept per time step are, for each
population, the spikes as bits (1/32 of float32) and u; with `recompute=k` u of every k-th step only, the others being
charged again from the kept spikes, so that no rounding can make a different spike train of them. Between steps nothing
else is kept, for no kind of connection.

Source: Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine 36 (2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ide_snn.equilibrium import EquilibriumMap
from ide_snn.layers import FixedConnection
from ide_snn.links import Folded, Link, Own, State, Statistics, make_link
from ide_snn.neurons import NeuronParams
from ide_snn.normalization import batch_moments
from ide_snn.once import differentiable_once
from ide_snn.precision import without_autocast
from ide_snn.record import Rates, Record
from ide_snn.simulation import simulate
from ide_snn.spiking import Firing, Reset, pack_bits, require_choice, require_steps, unpack_bits
from ide_snn.surrogate import ATan, Surrogate

Output = Literal["rate", "spikes"]


@dataclass(frozen=True)
class Bptt:
    """Differentiate the T simulated steps with a surrogate derivative of the spikes; memory grows with T.

    Args:
        surrogate: one of `ide_snn.surrogate`; its derivative is taken at u - V_th.
        bn: what the chain's batch norms normalise by while training; in evaluation always running statistics.
            "per_step" was the most accurate of the three (results/bptt_bn.md) and is the default.
            "frozen": running statistics, folded into the weights, as the simulation of implicit differentiation has it
            (the value is the same, bit for bit). They are updated by one application of f at the rates.
            "per_step": the statistics of each step's batch; every step updates the running ones.
            "time_batch": the statistics of all T * B samples. With feedback those of later steps depend on the
            normalised earlier ones, so step t takes those of the steps so far (t * B samples; the gradient flows
            through them); the running ones are updated once, by all.
            The input stage is the same in all three: a constant input has its batch's statistics, an input that
            varies in time those of its weighted time average.
        output: "rate" (the block returns a_n [B, *]) or "spikes" (s_n [T, B, *], for a loss per step).
        reset: "soft", the neuron of implicit differentiation, or "hard" (to 0).
        detach_reset: take the reset as given in the backward pass.
        truncate: k cuts the gradient of the state (membranes, spikes fed back, statistics) every k steps.
        recompute: k keeps membranes every k steps only, for one more simulation in the backward pass.
        pack: keep spikes as bits; False keeps them as numbers, for comparison.

    Raises:
        ValueError: for an unknown choice, a k that is no step count, or a surrogate in primitive mode.
        TypeError: for a surrogate that is none.
    """

    surrogate: Surrogate = field(default_factory=ATan)
    bn: Statistics = "per_step"
    output: Output = "rate"
    reset: Reset = "soft"
    detach_reset: bool = False
    truncate: int | None = None
    recompute: int | None = None
    pack: bool = True

    def __post_init__(self) -> None:
        require_choice("bn", self.bn, Statistics)
        require_choice("output", self.output, Output)
        require_steps("truncate", self.truncate)
        require_steps("recompute", self.recompute)
        self.firing(NeuronParams())
        if not self.surrogate.spiking:
            raise ValueError(
                f"{self.surrogate} is in primitive mode, but the simulation fires spikes: use spiking=True"
            )

    def firing(self, neuron: NeuronParams) -> Firing:
        """The neuron with this reset and surrogate."""
        return Firing(neuron, self.surrogate, self.reset, self.detach_reset)


@dataclass(frozen=True)
class Frames:
    """An input x [T, B, *] that varies in time, its weighted average [B, *] and the input stage."""

    x: Tensor
    mean: Tensor
    stage: FixedConnection

    def link(self) -> Folded | Own:
        """The input stage of one step; while training with the batch statistics of the mean input's response."""
        connection, statistics = self.stage.connection, None
        operator, bn = connection.operator, connection.bn
        if operator is None:
            return Own(self.stage)
        if bn is not None and bn.training:
            assert self.stage.weight is not None  # known connections have one
            y = operator.apply(self.mean, self.stage.weight, self.stage.bias)
            mean, var, _ = batch_moments(bn, y)
            statistics = mean, var
        return Folded(self.stage, statistics)


def through_time(
    bptt: Bptt,
    f: EquilibriumMap,
    frames: Frames | None,
    shapes: Sequence[tuple[int, ...]],
    time_steps: int,
    record: Record = Record(),
) -> tuple[Rates, Tensor]:
    """Simulates, and attaches the gradient through time. Where none is wanted nothing is kept.

    Args:
        f: connections and constant drive of this forward.
        frames: for an input that varies in time, which then replaces the drive.
        shapes: of the n populations, without the batch.
        record: for the rates that are returned.

    Returns:
        (what the simulation measured, value of the block as `bptt.output` says).
    """
    stage = None if frames is None else frames.link()
    source = f.drive if frames is None else frames.x
    chain = tuple(make_link(fixed, bptt.bn) for fixed in f.chain)
    sizes = tuple((f.drive.shape[0], *shape) for shape in shapes)
    dtype = torch.promote_types(f.drive.dtype, torch.float32)
    run = _Unrolled(bptt, bptt.firing(f.neuron), stage, chain, sizes, time_steps, dtype)
    tensors = (source, *(tensor for link in run.links for tensor in link.tensors))
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    tape = _Tape(run.firing, len(sizes), run.segment, bptt.pack) if wants else None
    if bptt.output == "spikes":
        record = dataclasses.replace(record, spikes=True)
    rates = run.simulate(source.detach(), record, tape)
    value = rates.last
    if bptt.output == "spikes":
        value = rates.spikes[-1].to(value.dtype) + value * 0  # a sample whose rates are NaN has NaN spikes
    if bptt.bn == "frozen" and f.couples_samples:
        with torch.no_grad():
            f.activations(rates.last, "batch", update_running=True)
    if tape is not None:
        value = _ThroughTime.apply(value, run, tape, *tensors)
    return rates, value


class _Step:
    """A link as a map of the simulation: here steps are counted and the link's state is carried."""

    def __init__(self, link: Link, first: int) -> None:
        self.link, self.t, self.state = link, first, link.start()
        self.is_silent_at_zero = link.is_silent_at_zero
        self.states = [self.state] * first  # before each step

    def __call__(self, s: Tensor) -> Tensor:
        self.states.append(self.state)
        response, self.state = self.link.first_response(self.t, s, self.state)
        self.t += 1
        return response


class _Tape:
    """What the backward pass needs of every step: spikes, and the charged membranes of each segment's first step."""

    def __init__(self, firing: Firing, populations: int, segment: int, pack: bool) -> None:
        self.firing, self.populations, self.segment, self.pack = firing, populations, segment, pack
        self.spikes: list[Tensor] = []
        self.membranes: list[Tensor] = []
        self.states: list[list[State]] = []

    def advance(self, current: Tensor, u: Tensor, spikes: Tensor, neuron: NeuronParams) -> None:
        """A step of the next population, in place of `ide_snn.neurons.step_`."""
        if len(self.spikes) // self.populations % self.segment == 0:
            charged = u + current
            self.membranes.append(charged)
        else:
            charged = u.add_(current)
        torch.ge(charged, neuron.v_threshold, out=spikes)
        self.firing.after(charged, spikes, out=u)
        self.spikes.append(pack_bits(spikes) if self.pack else spikes.clone())


@dataclass(frozen=True)
class _Memory:
    """What was kept, as the backward pass finds it again. `tensors` and `states` are per link."""

    source: Tensor | None
    tensors: list[tuple[Tensor, ...]]
    spikes: Sequence[Tensor]
    membranes: Sequence[Tensor]
    states: list[list[State]]


@dataclass(frozen=True)
class _Unrolled:
    """The connections and neurons of one forward, and the sweep back through its steps.

    Attributes:
        stage: the input stage, for an input that varies in time.
        chain: feedback, then the connections from population i to i + 1.
        shapes: of the populations with the batch.
        dtype: of the membranes.
    """

    bptt: Bptt
    firing: Firing
    stage: Link | None
    chain: tuple[Link, ...]
    shapes: tuple[tuple[int, ...], ...]
    time_steps: int
    dtype: torch.dtype

    @property
    def links(self) -> tuple[Link, ...]:
        """The chain, then the input stage if it is one of them."""
        return self.chain if self.stage is None else (*self.chain, self.stage)

    @property
    def segment(self) -> int:
        return self.bptt.recompute or 1

    def drive(self, source: Tensor, t: int) -> Tensor:
        """X[t], of the source as it is or through the input stage; without graph."""
        if self.stage is None:
            return source
        return self.stage.first_response(t, source[t].to(self.dtype), ())[0]

    def simulate(self, source: Tensor, record: Record, tape: _Tape | None) -> Rates:
        feedback, *layers = (_Step(link, int(i == 0 and link.is_silent_at_zero)) for i, link in enumerate(self.chain))
        drive = source if self.stage is None else lambda t: self.drive(source, t)
        shapes, steps = [shape[1:] for shape in self.shapes], self.time_steps
        advance = self.firing.step_ if tape is None else tape.advance
        rates = simulate(drive, layers, feedback, shapes, self.firing.neuron, steps, record, advance)
        if tape is not None:
            tape.states = [step.states for step in (feedback, *layers)]
        with torch.no_grad():
            for step in (feedback, *layers):
                step.link.finish(step.state, steps, self.shapes[0][0])
        return rates

    def spikes(self, memory: _Memory, t: int, i: int) -> Tensor:
        """s_i[t] [B, *]; zero before the first step."""
        if t < 0:
            return torch.zeros(self.shapes[i], dtype=self.dtype, device=memory.spikes[0].device)
        kept = memory.spikes[t * len(self.shapes) + i]
        return unpack_bits(kept, self.shapes[i], self.dtype) if self.bptt.pack else kept

    @torch.no_grad()
    def charged(self, memory: _Memory, start: int) -> list[list[Tensor]]:
        """u_i[t] for the steps of the segment from `start`; the first was kept, the others are charged again."""
        n, index = len(self.shapes), start // self.segment
        membranes = [list(memory.membranes[index * n : (index + 1) * n])]
        for t in range(start + 1, min(start + self.segment, self.time_steps)):
            assert memory.source is not None  # kept where steps are recomputed
            currents = []
            for j, link in enumerate(self.chain):
                s = self.spikes(memory, t, j - 1) if j else self.spikes(memory, t - 1, n - 1)
                response, _ = link.respond(t, s, memory.states[j][t], memory.tensors[j])
                currents.append(response if j else response.to(self.dtype) + self.drive(memory.source, t))
            last = membranes[-1]
            after = [self.firing.after(u, self.spikes(memory, t - 1, i)) for i, u in enumerate(last)]
            membranes.append([v.add_(current) for v, current in zip(after, currents, strict=True)])
        return membranes


class _Sweep:
    """The way back through the steps: the gradients that are carried, and the sums of those that are wanted."""

    def __init__(self, run: _Unrolled, memory: _Memory, needs: Sequence[bool]) -> None:
        self.run, self.memory = run, memory
        flags = iter(needs[1:])
        self.needs_source = needs[0]
        self.needs = [tuple(next(flags) for _ in tensors) for tensors in memory.tensors]
        self.sums: list[list[Tensor | None]] = [[None] * len(tensors) for tensors in memory.tensors]
        self.source: list[Tensor] = []  # of each step from the last to the first, or their sum
        self.grad_v: list[Tensor | None] = [None] * len(run.shapes)
        self.grad_fed: Tensor | None = None  # of the spikes that were fed back to the step after
        self.grad_states: list[tuple[Tensor | None, ...]] = [(None,) * len(link.start()) for link in run.links]

    def step(self, t: int, charged: Sequence[Tensor], grad_last: Tensor) -> None:
        """One step back; `grad_last` is the gradient of s_n[t] from the loss directly."""
        run, n = self.run, len(self.run.shapes)
        cut = t == 0 or (run.bptt.truncate is not None and t % run.bptt.truncate == 0)
        grad_s: Tensor | None = grad_last if self.grad_fed is None else self.grad_fed + grad_last
        for i in reversed(range(n)):
            grad_u = run.firing.adjoint(charged[i], grad_s, self.grad_v[i])
            self.grad_v[i] = None if cut else grad_u
            if i > 0:
                grad_s = self._pull(i, t, run.spikes(self.memory, t, i - 1), grad_u, True)
        self.grad_fed = None
        if t > 0 or not run.chain[0].is_silent_at_zero:
            self.grad_fed = self._pull(0, t, run.spikes(self.memory, t - 1, n - 1), grad_u, not cut)
        if cut:
            self.grad_states = [(None,) * len(state) for state in self.grad_states]
        self._pull_source(t, grad_u)

    def _pull_source(self, t: int, grad_u: Tensor) -> None:
        if self.run.stage is not None:
            assert self.memory.source is not None  # kept for the input stage's weight
            frame = self.memory.source[t].to(self.run.dtype)
            grad_frame = self._pull(len(self.run.chain), t, frame, grad_u, self.needs_source)
            if grad_frame is not None:
                self.source.append(grad_frame)
        elif self.needs_source:
            self.source = [self.source[0] + grad_u if self.source else grad_u]

    def _pull(self, j: int, t: int, s: Tensor, grad: Tensor, needs_input: bool) -> Tensor | None:
        """Through link j: adds to the sums of its tensors, carries its state, returns the gradient of its input."""
        memory, needs = self.memory, (needs_input, *self.needs[j])
        if not any(needs):
            return None
        grad_s, found, self.grad_states[j] = self.run.links[j].pull(
            t, s, memory.states[j][t], memory.tensors[j], grad, self.grad_states[j], needs
        )
        for k, gradient in enumerate(found):
            if gradient is not None:
                before = self.sums[j][k]
                self.sums[j][k] = gradient if before is None else before + gradient
        return grad_s

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the source and of every link's tensors."""
        source: Tensor | None = None
        if self.source:
            source = self.source[0] if self.run.stage is None else torch.stack(self.source[::-1])
        return source, *(gradient for sums in self.sums for gradient in sums)


class _ThroughTime(torch.autograd.Function):
    """Forward: the value. Backward: the sweep."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, run: _Unrolled, tape: _Tape, source: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.has_source = run, run.stage is not None or run.segment > 1
        ctx.counts = len(tensors), len(tape.spikes), len(tape.membranes)
        states = [x for link in tape.states for state in link for x in state]
        ctx.save_for_backward(*tensors, *tape.spikes, *tape.membranes, *states, *((source,) if ctx.has_source else ()))
        device = value.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return value.clone()

    @staticmethod
    @differentiable_once("backpropagation through time")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: _Unrolled = ctx.run
        memory = _restore(ctx)
        sweep = _Sweep(run, memory, ctx.needs_input_grad[3:])
        device, dtype, enabled = ctx.autocast
        leak = run.firing.neuron.leak
        share = grad / run.firing.neuron.total_weight(run.time_steps)
        for start in reversed(range(0, run.time_steps, run.segment)):
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                segment = run.charged(memory, start)
            with without_autocast(device):
                for t, charged in reversed(list(enumerate(segment, start))):
                    sweep.step(t, charged, share if run.bptt.output == "rate" else grad[t])
                    share = share if leak == 1 else share * leak
        return None, None, None, *sweep.gradients()


def _restore(ctx: Any) -> _Memory:
    run, saved = ctx.run, iter(ctx.saved_tensors)
    tensors, spikes, membranes = ([next(saved) for _ in range(count)] for count in ctx.counts)
    values = iter(tensors)
    states = []
    for link in run.links:
        width = len(link.start()) if link is not run.stage else 0
        states.append([tuple(next(saved) for _ in range(width)) for _ in range(run.time_steps)])
    source = next(saved) if ctx.has_source else None
    return _Memory(source, [tuple(next(values) for _ in link.tensors) for link in run.links], spikes, membranes, states)
