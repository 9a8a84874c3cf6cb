"""Event-driven simulation and products on a CPU: work in proportion to the spikes, in float32.

A dense product K s adds weight times spike for every pair of neurons. Where few neurons fire it is cheaper to walk over
the spikes: each adds the row of weights between its channel and all output channels, once for every kernel tap, to the
positions it reaches,

    (K s)[p', :] = sum over spikes (c, p), taps k with p' = reach(p, k) of W[c, k, :]

The sums are those of the dense product in another order: float32 throughout, nothing is quantised, so membranes and
rates differ from those of torch's products by rounding alone. Neurons are updated while the sums are in the cache
(`csrc/events.c`); samples are independent, so a run of T steps needs memory for the state alone, whatever T is. Fully
connected populations have one position per sample; there the kernels take many samples together, as if they were
positions, so that a block of the weight stays in the cache for all of them.
The same walk over values that are not zero applies f to rates and J^T to vectors that the slopes have thinned out.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ide_snn import native
from ide_snn.layers import Affine
from ide_snn.neurons import NeuronParams
from ide_snn.operators import Operator

LANES, STRETCH = 16, 512  # of csrc/events.c
MAX_BLOCK = 64  # output channels whose sums fit the registers; LANES of a linear map, whose rows then fit the cache
TOGETHER = 64  # samples of a fully connected network
LEVEL_LANES, LEVEL_BLOCK = 32, 128  # of weights in whole units
LEVELS = 32767  # largest sum of them
MOST_INPUTS = 16384  # of an output, so that rounding each weight takes no more than a quarter of the levels
SPARSE = 0.5  # share of numbers that are not 0 up to which a walk over them is faster than a dense convolution


@dataclass(frozen=True)
class Reach:
    """Where the events at each input position go: target [taps, in_positions] is the output position or -1."""

    in_positions: int
    out_positions: int
    taps: int
    target: np.ndarray

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, operator: Operator, input_shape: tuple[int, ...], *, adjoint: bool = False) -> Reach:
        """Of K, or of K^T, on inputs of K of `input_shape` [C, H, W] or [C]."""
        out_shape = operator.output_shape(input_shape)
        source, tap, target = _pairs(operator, input_shape[1:], out_shape[1:])
        sizes = int(np.prod(input_shape[1:], dtype=int)), int(np.prod(out_shape[1:], dtype=int))
        if adjoint:
            source, target, sizes = target, source, sizes[::-1]
        taps = operator.kernel_size[0] * operator.kernel_size[1]
        table = np.full((taps, sizes[0]), -1, dtype=np.int32)
        table[tap, source] = target  # for each tap and source there is one target
        return cls(*sizes, taps, table)


def _pairs(
    operator: Operator, input_size: tuple[int, ...], output_size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (input position, tap, output position) that K connects."""
    if operator.kind == "linear":
        zero = np.zeros(1, dtype=int)
        return zero, zero, zero
    # a transposed convolution leads where the convolution comes from
    near, far = (output_size, input_size) if operator.kind == "conv" else (input_size, output_size)
    y, x, ky, kx = np.indices((*near, *operator.kernel_size)).reshape(4, -1)
    fy = y * operator.stride[0] - operator.padding[0] + ky * operator.dilation[0]
    fx = x * operator.stride[1] - operator.padding[1] + kx * operator.dilation[1]
    inside = (fy >= 0) & (fy < far[0]) & (fx >= 0) & (fx < far[1])
    here, there = (y * near[1] + x)[inside], (fy * far[1] + fx)[inside]
    tap = (ky * operator.kernel_size[1] + kx)[inside]
    return (there, tap, here) if operator.kind == "conv" else (here, tap, there)


class _Connection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_positions", "in_channels", "out_positions", "out_channels")),
        *((name, ctypes.c_int64) for name in ("taps", "block", "blocks")),
        *((name, ctypes.c_void_p) for name in ("weight", "target", "bias", "gain", "levels", "unit")),
    ]


class _Population(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64), *((n, ctypes.c_void_p) for n in ("u", "spikes", "weighted", "count"))]


class _Scratch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "size", "accumulators", "events", "positions")),
        ("memory", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, accumulators: int, events: int, positions: int) -> tuple[_Scratch, Tensor]:
        """Room for every thread: for so many sums, events and positions; and the memory, which the caller keeps."""
        sizes = [-(-n // 16) * 16 for n in (accumulators, events + 8, positions + 1)]
        each = 4 * (sizes[0] + 2 * sizes[1] + 4 * sizes[2])  # all numbers have four bytes
        memory = torch.empty(torch.get_num_threads() * each, dtype=torch.uint8)
        return cls(0, each, *sizes, memory.data_ptr()), memory


class _Simulation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("connections", "populations")),
        *((name, ctypes.c_int64) for name in ("n", "batch", "steps", "next")),
        ("drive", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("threshold", "leak")),
        ("scratch", _Scratch),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        ("connection", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "next")),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "y")),
        ("scratch", _Scratch),
    ]


def why_not(maps: Sequence[object]) -> str | None:
    """None where the event-driven kernels can take all of `maps`, else the reason."""
    reasons = (_why_not(affine) for affine in maps)
    unavailable = (native.why_unavailable(name) for name in ("events", "krylov"))
    return next((reason for reason in (*reasons, *unavailable) if reason), None)


def _why_not(affine: object) -> str | None:
    if not isinstance(affine, Affine):
        return "a connection is a module of your own"
    if affine.weight.device.type != "cpu":
        return f"the weights are on {affine.weight.device}"
    if affine.weight.dtype != torch.float32:
        return f"the weights are {affine.weight.dtype}"
    if affine.pool > 1:
        return "a connection has average pooling"
    if affine.operator.groups > 1:
        return "a connection has groups"
    return None


def why_not_in_levels(maps: Sequence[object]) -> str | None:
    """None where the weights of all of `maps`, that the kernels can take, can be in whole units, else the reason."""
    most = max((affine.weight.numel() // affine.operator.out_channels for affine in maps if isinstance(affine, Affine)))
    return None if most <= MOST_INPUTS else f"sums of {most} weights need more than 16 bits"


class EventConnection:
    """K (or K^T) with its weight packed for the kernels: [blocks, taps, input channels, block].

    Args:
        affine: the fixed connection, see `why_not`.
        adjoint: take K^T, without bias and gain.
        levels: round the weight to 16-bit multiples of a unit per output channel, of spikes alone (`advance`).
    """

    def __init__(self, affine: Affine, *, adjoint: bool = False, levels: bool = False) -> None:
        operator = affine.operator
        self.reach = Reach.of(operator, affine.input_shape, adjoint=adjoint)
        self.is_linear = operator.kind == "linear"
        self.in_channels, self.out_channels = operator.in_channels, operator.out_channels
        if adjoint:
            self.in_channels, self.out_channels = self.out_channels, self.in_channels
        shape = affine.input_shape if adjoint else operator.output_shape(affine.input_shape)
        self.out_shape = tuple(shape)
        lanes, most = (LEVEL_LANES, LEVEL_BLOCK) if levels else (LANES, MAX_BLOCK)
        self.blocks = -(-self.out_channels // (lanes if self.is_linear else most))
        self.block = -(-self.out_channels // self.blocks // lanes) * lanes
        self.at_once = min(self.blocks, STRETCH // self.block) * self.block  # channels summed before neurons are updated
        self.unit = None
        if levels:
            self.unit = affine.weight.new_ones(self.blocks * self.block)
            self.unit[: self.out_channels] = unit_of(operator, affine.weight)
        self.weight = self._packed(affine.weight, inputs_first=(operator.kind == "conv_transposed") != adjoint)
        self.bias = None if adjoint or affine.bias is None else affine.bias.contiguous()
        self.gain = None if adjoint or affine.gain is None else channels_last(affine.gain)

    def _packed(self, weight: Tensor, *, inputs_first: bool) -> Tensor:
        """`weight` [out, in, taps], or [in, out, taps] with `inputs_first`, as the kernels read it."""
        weight, taps = weight.contiguous(), self.reach.taps
        strides = (self.out_channels * taps, taps) if inputs_first else (taps, self.in_channels * taps)
        sizes = (taps, self.in_channels, self.out_channels, *strides, self.block, self.blocks)
        numbers = (_address(weight), *(ctypes.c_int64(size) for size in sizes))
        kernels, shape = native.library("events"), (self.blocks, taps, self.in_channels, self.block)
        if self.unit is None:
            packed = weight.new_empty(shape)
            kernels.pack(*numbers, _address(packed))
        else:
            packed, per_unit = weight.new_empty(shape, dtype=torch.int16), self.unit.reciprocal()
            kernels.pack_levels(*numbers, _address(per_unit), _address(packed))
        return packed

    def as_struct(self, reach: Reach, part: slice) -> _Connection:
        """For the samples `part` of the batch, with events that go where `reach` says."""
        return _Connection(
            reach.in_positions,
            self.in_channels,
            reach.out_positions,
            self.out_channels,
            reach.taps,
            self.block,
            self.blocks,
            self.weight.data_ptr() if self.unit is None else None,
            reach.target.ctypes.data,
            _pointer(self.bias),
            _pointer(None if self.gain is None else self.gain[part]),
            None if self.unit is None else self.weight.data_ptr(),
            _pointer(self.unit),
        )

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """gain * (K (scale * x) + bias) for x [B, C, H, W] or [B, C] in float32, skipping zeros; channels-last.

        Raises:
            ValueError: for a weight in levels, which is for spikes.
        """
        if self.unit is not None:
            raise ValueError("a weight in levels is for the spikes of `advance`; products need levels=False")
        x = channels_last(x)
        scale = None if scale is None else channels_last(scale)
        y = empty_channels_last((x.shape[0], *self.out_shape), x)
        for part, items, (reach,) in _parts(x.shape[0], [self]):
            struct = self.as_struct(reach, part)
            self._product(struct, reach, items, x[part], None if scale is None else scale[part], y[part])
        return y

    def _product(
        self, struct: _Connection, reach: Reach, items: int, x: Tensor, scale: Tensor | None, y: Tensor
    ) -> None:
        events = reach.in_positions * self.in_channels
        scratch, _memory = _Scratch.of(reach.out_positions * self.block, events, reach.in_positions)
        work = _Product(ctypes.addressof(struct), items, 0, *(_pointer(t) for t in (x, scale, y)), scratch)
        native.on_all_threads(native.library("events").product, work, reach.taps * (x.numel() + y.numel()))


def unit_of(operator: Operator, weight: Tensor) -> Tensor:
    """The unit of every output channel [out], so large that 16 bits hold the sum of any of its weights, each rounded.

    With P the sum of the channel's positive weights and N that of the others, n of them, the largest sum in units is at
    most max(P, -N) / unit + n / 2 <= 32767.
    """
    rows = weight.transpose(0, operator.output_dim_of_weight).flatten(1)
    reach = (rows.abs().sum(1) + rows.sum(1).abs()) / 2  # max(P, -N)
    unit = reach * (1.0001 / (LEVELS - rows.shape[1] / 2))  # float32 sums may be too small by their rounding
    return torch.where(unit == 0, 1.0, unit)


def connect(affine: object, *, levels: bool = False) -> EventConnection:
    """The map for `advance`.

    Args:
        levels: with the weight in 16-bit multiples of a unit per output channel.

    Raises:
        ValueError: for one that the kernels cannot take.
    """
    reason = why_not([affine])
    if reason is not None or not isinstance(affine, Affine):
        raise ValueError(f"no event-driven simulation: {reason}")
    return EventConnection(affine, levels=levels)


def is_sparse(x: Tensor) -> bool:
    """True where so much of x is 0 that a walk over the rest beats a dense product."""
    return int(torch.count_nonzero(x)) < SPARSE * x.numel()


def apply(operator: Operator, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`operator.apply`, differentiable once, by a walk over x where it is sparse."""
    if operator.kind == "linear" or not is_sparse(x):
        return operator.apply(x, weight, bias)
    y: Tensor = _Walk.apply(x, weight, bias, operator)
    return y


def respond(affine: Affine, x: Tensor) -> Tensor:
    """K x + b of a connection that `why_not` has no objection to, without its gain; channels-last, a new tensor."""
    operator = affine.operator
    if operator.kind == "linear" or not is_sparse(x):
        return channels_last(operator.apply(x, affine.weight, affine.bias))
    return EventConnection(replace(affine, gain=None))(x)


class _Walk(torch.autograd.Function):
    """K x + b by a walk; its backward pass by torch's dense convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operator: Operator) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operator = operator
        return EventConnection(Affine(operator, weight, bias, 1, None, tuple(x.shape[1:])))(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *ctx.operator.convolution_backward(grad, x, weight, ctx.needs_input_grad[:3]), None


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


class State(Protocol):
    """One population: channels-last tensors [B, *shape], float32 but for the spikes, which are uint8."""

    u: Tensor
    spikes: Tensor
    weighted: Tensor | None
    count: Tensor | None


def advance(
    connections: Sequence[EventConnection], states: Sequence[State], drive: Tensor, neuron: NeuronParams, steps: int
) -> None:
    """Advances `states` in place by `steps` time steps under the constant drive [B, *] of the first population.

    Args:
        connections: feedback, then those from population i to i + 1.
    """
    drive = channels_last(drive)
    for part, items, reaches in _parts(drive.shape[0], connections):
        both = list(zip(connections, reaches, strict=True))
        slices = [_Slice(state, part) for state in states]
        links = (_Connection * len(connections))(*(connection.as_struct(reach, part) for connection, reach in both))
        _advance(both, links, slices, drive[part], neuron, steps, items)


def _advance(
    both: Sequence[tuple[EventConnection, Reach]],
    links: ctypes.Array[_Connection],
    states: Sequence[_Slice],
    drive: Tensor,
    neuron: NeuronParams,
    steps: int,
    items: int,
) -> None:
    populations = (_Population * len(states))(*(state.as_struct(items) for state in states))
    accumulators = max(reach.out_positions * connection.at_once for connection, reach in both)
    events = max(reach.in_positions * connection.in_channels for connection, reach in both)
    scratch, _memory = _Scratch.of(accumulators, events, max(reach.in_positions for _, reach in both))
    work = _Simulation(
        ctypes.addressof(links),
        ctypes.addressof(populations),
        *(len(states), items, steps, 0),
        drive.data_ptr(),
        *(neuron.v_threshold, neuron.leak),
        scratch,
    )
    native.on_all_threads(native.library("events").simulate, work, steps * sum(state.u.numel() for state in states))


def _parts(batch: int, connections: Sequence[EventConnection]) -> Iterator[tuple[slice, int, tuple[Reach, ...]]]:
    """(samples, items that a thread takes one by one, where the events of an item go, per connection)."""
    if not all(connection.is_linear for connection in connections):
        yield slice(0, batch), batch, tuple(connection.reach for connection in connections)
        return
    whole = batch - batch % TOGETHER
    for first, end, size in ((0, whole, TOGETHER), (whole, batch, batch - whole)):
        if first < end:
            reach = Reach(size, size, 1, np.arange(size, dtype=np.int32)[None])
            yield slice(first, end), (end - first) // size, (reach,) * len(connections)


class _Slice:
    """Some samples of a population."""

    def __init__(self, state: State, part: slice) -> None:
        count = None if state.count is state.weighted else state.count  # IF counts once
        self.u = state.u[part]
        self.others = [None if t is None else t[part] for t in (state.spikes, state.weighted, count)]

    def as_struct(self, items: int) -> _Population:
        return _Population(self.u.numel() // max(items, 1), *(_pointer(t) for t in (self.u, *self.others)))


def channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] or [B, C] with its channels last in memory; itself where they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def empty_channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_pointer(tensor))
