"""Event-driven simulation and products on a CPU: work in proportion to the spikes, in float32.

A dense product K s adds weight times spike for every pair of neurons. Where few neurons fire it is cheaper to walk over
the spikes: each adds the row of weights between its channel and all output channels, once for every kernel tap, to the
positions it reaches,

    (K s)[p', :] = sum over spikes (c, p), taps k with p' = reach(p, k) of W[c, k, :]

The sums are those of the dense product in another order, in float32, so membranes and rates differ from those of
torch's products by rounding alone. Or the weights are rounded to 16-bit multiples of a unit per output channel
("levels"), whose sums are exact and cost half. Neurons are updated while the sums are in the cache (`csrc/events.c`);
samples are independent, so a run of T steps needs memory for the state alone, whatever T is. Where a weight does not
fit the cache, the kernels walk over the events of a few samples together, as if their positions were one sample's, so
that it is read once for all of them; fully connected populations, of one position, over those of many.

The same walk over values that are not zero applies f to rates and J^T to vectors that the slopes have thinned out;
`ide_snn.convolutions` has what else may be taken.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ide_snn import event_works as works
from ide_snn import memory, native
from ide_snn.layers import Affine
from ide_snn.native import Factor, Stage, pointer
from ide_snn.neurons import NeuronParams
from ide_snn.reach import Reach

LANES, STRETCH = 16, 512  # of csrc/events.c
MAX_BLOCK = 64  # output channels whose sums fit the registers; LANES of a linear map, whose rows then fit the cache
TOGETHER = 64  # samples of a fully connected population whose events are walked over at a time
FEW = 8  # the same of convolutions
CACHED = 8 << 20  # bytes of weights that stay in the last-level cache beside what else there is
LEVEL_LANES, LEVEL_BLOCK = 32, 128  # of weights in whole units
LEVELS = 32767  # largest sum of them
MOST_INPUTS = 4096  # of an output: rounding then moves a weight by some 1.6 % of their root mean square


KERNELS = ("events", "krylov", "elementwise", "conv_rates", "dense", "product")


def why_not(maps: Sequence[object]) -> str | None:
    """None where the event-driven kernels can take all of `maps`, else the reason."""
    reasons = (_why_not(affine) for affine in maps)
    unavailable = (native.why_unavailable(name) for name in KERNELS)
    return next((reason for reason in (*reasons, *unavailable) if reason), None)


def _why_not(affine: object) -> str | None:
    if not isinstance(affine, Affine):
        return "a connection is a module of your own"
    if affine.weight.device.type != "cpu":
        return f"the weights are on {affine.weight.device}"
    if affine.weight.dtype != torch.float32:
        return f"the weights are {affine.weight.dtype}"
    if affine.bias is not None and (affine.bias.dtype, affine.bias.device.type) != (torch.float32, "cpu"):
        return f"a bias is {affine.bias.dtype} on {affine.bias.device}"
    if affine.pool > 1:
        return "a connection has average pooling"
    if affine.operator.groups > 1:
        return "a connection has groups"
    return None


def why_not_in_levels(affines: Sequence[Affine]) -> str | None:
    """None where all weights, which the kernels can take, can be in whole units, else which cannot."""
    numbers = {affine.weight.numel() // affine.operator.out_channels for affine in affines}
    wide = " and ".join(str(number) for number in sorted(numbers) if number > MOST_INPUTS)
    return f"sums of {wide} weights need more than 16 bits and are in float32" if wide else None


class EventConnection:
    """K (or K^T) with its weight packed for the kernels: [blocks, taps, input channels, block].

    Args:
        affine: the fixed connection, see `why_not`.
        adjoint: take K^T, without bias and gain.
        levels: round the weight to 16-bit multiples of a unit per output channel, which multiply spikes only.
    """

    def __init__(self, affine: Affine, *, adjoint: bool = False, levels: bool = False) -> None:
        operator = affine.operator
        self.reach = Reach.of(operator, affine.input_shape, adjoint=adjoint)
        self.is_linear = operator.kind == "linear"
        self.in_channels, self.out_channels = operator.in_channels, operator.out_channels
        if adjoint:
            self.in_channels, self.out_channels = self.out_channels, self.in_channels
        self.out_shape = tuple(affine.input_shape if adjoint else operator.output_shape(affine.input_shape))
        lanes, most = (LEVEL_LANES, LEVEL_BLOCK) if levels else (LANES, MAX_BLOCK)
        self.blocks = -(-self.out_channels // (lanes if self.is_linear else most))
        self.block = -(-self.out_channels // self.blocks // lanes) * lanes
        # channels that are summed before their neurons are updated
        self.at_once = min(self.blocks, STRETCH // self.block) * self.block
        # The unit of an output channel is so large that 16 bits hold the sum of any of its weights, each rounded.
        self.unit = affine.weight.new_empty(self.blocks * self.block) if levels else None
        dtype, taps = torch.int16 if levels else affine.weight.dtype, self.reach.taps
        shape = (self.blocks, taps, self.in_channels, self.block)
        self.weight = memory.empty(shape, dtype, affine.weight.device)
        # the kernel that has packed the weight, for when its numbers have changed
        self.packing = self._packing(affine.weight, inputs_first=(operator.kind == "conv_transposed") != adjoint)
        self.packing.run()
        self._targets: dict[int, np.ndarray] = {}  # by samples together; the kernels have their addresses
        self.bias = None if adjoint or affine.bias is None else affine.bias.contiguous()
        self.gain = None if adjoint or affine.gain is None else channels_last(affine.gain)

    def _packing(self, weight: Tensor, *, inputs_first: bool) -> Stage:
        """The kernel that packs `weight` [out, in, taps], or [in, out, taps] with `inputs_first`."""
        weight, taps = weight.contiguous(), self.reach.taps
        strides = (self.out_channels * taps, taps) if inputs_first else (taps, self.in_channels * taps)
        targets = (self.weight, None, None) if self.unit is None else (None, self.weight, self.unit)
        work = works.Pack(
            *(taps, self.in_channels, self.out_channels, *strides, self.block, self.blocks, 0),
            *map(pointer, (weight, None, *targets)),
            LEVELS,
        )
        return Stage("events", "pack", work, self.weight.numel(), (weight, self.weight, self.unit))

    def as_struct(self, together: int) -> works.Connection:
        """For walks over the events of so many samples at a time."""
        reach = self.reach
        if together not in self._targets:
            self._targets[together] = reach.targets(together)
        return works.Connection(
            *(reach.in_positions, self.in_channels, reach.out_positions, self.out_channels),
            *(together, reach.taps, self.block, self.blocks),
            self.weight.data_ptr() if self.unit is None else None,
            self._targets[together].ctypes.data,
            pointer(self.bias),
            pointer(self.gain),
            None if self.unit is None else self.weight.data_ptr(),
            pointer(self.unit),
        )

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """gain * (K (scale * x) + bias) in float32 for x [B, C, H, W] or [B, C], skipping zeros; channels-last.

        Args:
            x: float32, or spikes as uint8 (0 or 1).
            scale: like x; with float32 only.

        Raises:
            ValueError: for numbers where the weight is in levels, which are for spikes.
        """
        is_spikes = x.dtype == torch.uint8
        if not is_spikes and self.unit is not None:
            raise ValueError("a weight in levels multiplies spikes (uint8); for numbers use levels=False")
        x = channels_last(x)
        scale = None if scale is None else channels_last(scale)
        y = empty_channels_last((x.shape[0], *self.out_shape), x, torch.float32)
        struct = self.as_struct(*_together([self], len(x)))
        scratch, _keep = works.Scratch.of(*_room(struct, self.block))
        tensors = (x, None) if is_spikes else (None, x)
        pointers = map(pointer, (*tensors, scale, y))
        work = works.Product(ctypes.addressof(struct), len(x), 0, *pointers, scratch)
        native.run("events", "product", work, self.reach.taps * (x.numel() + y.numel()))
        return y


def connect(affine: object, *, levels: bool = False) -> EventConnection:
    """The map for `advance`.

    Args:
        levels: with the weight in 16-bit multiples of a unit per output channel, where its sums have room in 16 bits.

    Raises:
        ValueError: for one that the kernels cannot take.
    """
    reason = why_not([affine])
    if reason is not None or not isinstance(affine, Affine):
        raise ValueError(f"no event-driven simulation: {reason}")
    return EventConnection(affine, levels=levels and why_not_in_levels([affine]) is None)


@dataclass(frozen=True)
class EventMap:
    """The linear part of a connection without gain, and its adjoint, skipping zeros; packed when first used."""

    affine: Affine

    @functools.cached_property
    def _forward(self) -> EventConnection:
        return EventConnection(replace(self.affine, bias=None))

    @functools.cached_property
    def _backward(self) -> EventConnection:
        return EventConnection(self.affine, adjoint=True)

    def linear(self, x: Tensor) -> Tensor:
        """K x."""
        return self._forward(x)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """K^T (scale * y)."""
        return self._backward(y, scale)

    def adjoint_factor(self, scale: Tensor) -> Factor:
        """y -> K^T (scale * y) of single samples, for solves."""
        connection, scale = self._backward, channels_last(scale)
        struct = connection.as_struct(1)
        scratch = works.Scratch.sizes(*_room(struct, connection.block))
        work = works.FactorWork(ctypes.addressof(struct), scale.data_ptr(), scratch)
        size, keep = struct.out_positions * connection.out_channels, (connection, struct, scale)
        return Factor("events", "multiply", work, keep, size, scratch=scratch.size)


class State(Protocol):
    """One population: channels-last tensors [B, *shape], float32 but for the spikes, which are uint8."""

    u: Tensor
    spikes: Tensor
    weighted: Tensor | None
    count: Tensor | None
    response: Tensor | None


def advance(
    connections: Sequence[EventConnection],
    states: Sequence[State],
    drive: Tensor,
    neuron: NeuronParams,
    steps: int,
    *,
    from_rest: bool = False,
    share: float = 0,
) -> None:
    """Advances `states` in place by `steps` time steps under the constant drive [B, *] of the first population.

    Args:
        connections: feedback, then those from population i to i + 1.
        from_rest: whatever the states hold, start from 0.
        share: of a step in the first state's `response`, which takes up K s[1..T] + bias of the feedback, weighted as
            the rates are; 0 where further steps are to follow. Other states have no response.
    """
    simulation_stage(connections, states, drive, neuron, steps, from_rest=from_rest, share=share).run()


def simulation_stage(
    connections: Sequence[EventConnection],
    states: Sequence[State],
    drive: Tensor,
    neuron: NeuronParams,
    steps: int,
    *,
    from_rest: bool = False,
    share: float = 0,
    own_memory: bool = False,
) -> Stage:
    """The kernel of `advance`.

    Args:
        own_memory: with scratch memory of its own, to be run at any time.
    """
    drive, batch = channels_last(drive), len(drive)
    together = _together(connections, batch)
    structs = [c.as_struct(n) for c, n in zip(connections, together, strict=True)]
    links = (works.Connection * len(structs))(*structs)
    tensors = [_tensors(state) for state in states]
    populations = (works.Population * len(states))(
        *(works.Population(own[0].numel() // max(batch, 1), *map(pointer, own)) for own in tensors)
    )
    rooms = [_room(struct, c.at_once) for struct, c in zip(structs, connections, strict=True)]
    scratch, keep = works.Scratch.of(*map(max, zip(*rooms, strict=True)), own=own_memory)
    work = works.Simulation(
        ctypes.addressof(links),
        ctypes.addressof(populations),
        *(len(states), batch, steps, max(together), 0, from_rest),
        drive.data_ptr(),
        *(neuron.v_threshold, neuron.leak, share),
        scratch,
    )
    elements = steps * sum(state.u.numel() for state in states)
    return Stage("events", "simulate", work, elements, (links, populations, tensors, connections, drive, keep))


def _together(connections: Sequence[EventConnection], batch: int) -> list[int]:
    """Samples whose events each of the connections, used in turn, walks over at a time: threads get equal shares."""
    is_large = sum(c.weight.numel() * c.weight.element_size() for c in connections) > CACHED
    threads = torch.get_num_threads()

    def evenly(most: int) -> int:
        turns = max(1, -(-batch // (most * threads)))  # of every thread
        return -(-batch // (turns * threads))

    return [evenly(TOGETHER if c.is_linear else FEW if is_large else 1) for c in connections]


def _room(struct: works.Connection, at_once: int) -> tuple[int, int, int]:
    """Sums, events and positions that a thread has at a time, with so many channels' sums."""
    outputs, inputs = struct.together * struct.out_positions, struct.together * struct.in_positions
    return outputs * at_once, inputs * struct.in_channels, inputs


def _tensors(state: State) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `works.Population` takes them."""
    count = None if state.count is state.weighted else state.count  # IF counts once
    return state.u, state.spikes, state.weighted, count, state.response


def channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] or [B, C] with its channels last in memory; itself where they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def empty_channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return memory.empty(shape, dtype or like.dtype, like.device, layout)
