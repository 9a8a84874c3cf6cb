"""Event-driven simulation and products on a CPU: work in proportion to the spikes, in float32.

A dense product K s adds weight times spike for every pair of neurons. Where few neurons fire it is cheaper to walk over
the spikes: each adds the row of weights between its channel and all output channels, once for every kernel tap, to the
positions it reaches,

    (K s)[p', :] = sum over spikes (c, p), taps k with p' = reach(p, k) of W[c, k, :]

The sums are those of the dense product in another order: float32 throughout, nothing is quantised, so membranes and
rates differ from those of torch's products by rounding alone. Neurons are updated while the sums are in the cache
(`csrc/events.c`); samples are independent, so a run of T steps needs memory for the state alone, whatever T is.
The same walk over values that are not zero applies f to rates and J^T to vectors that the slopes have thinned out.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ide_snn import native
from ide_snn.layers import Affine
from ide_snn.neurons import NeuronParams
from ide_snn.operators import Operator

LANES = 16  # of csrc/events.c
MAX_BLOCK = 64  # output channels whose sums fit the registers


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
        *((name, ctypes.c_void_p) for name in ("weight", "target", "bias", "gain")),
    ]


class _Population(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64), *((n, ctypes.c_void_p) for n in ("u", "spikes", "weighted", "count"))]


def best_path(maps: Sequence[object]) -> tuple[Literal["events", "fused"], str | None]:
    """(the fastest path for the recurrent connections `maps` on a CPU, None or why it cannot be taken).

    Fully connected populations have dense products: their weight does not fit the cache that the rows of a
    convolution's taps fit.
    """
    if not any(isinstance(affine, Affine) and affine.operator.kind == "linear" for affine in maps):
        return "events", why_not(maps)
    reasons = [_why_not(affine) for affine in maps] + [native.why_unavailable(name) for name in ("neurons", "krylov")]
    return "fused", next((reason for reason in reasons if reason), None)


def why_not(maps: Sequence[object]) -> str | None:
    """None where the event-driven kernels can take all of `maps`, else the reason."""
    reasons = (_why_not(affine) for affine in maps)
    return next((reason for reason in reasons if reason), None) or native.why_unavailable("events")


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


class EventConnection:
    """K (or K^T) with its weight packed for the kernels: [blocks, taps, input channels, block].

    Args:
        affine: the fixed connection, see `why_not`.
        adjoint: take K^T, without bias and gain.
    """

    def __init__(self, affine: Affine, *, adjoint: bool = False) -> None:
        operator = affine.operator
        self.reach = Reach.of(operator, affine.input_shape, adjoint=adjoint)
        rows = _rows(operator, affine.weight)  # [taps, in, out]
        if adjoint:
            rows = rows.transpose(1, 2)
        _, self.in_channels, self.out_channels = rows.shape
        shape = affine.input_shape if adjoint else operator.output_shape(affine.input_shape)
        self.out_shape = tuple(shape)
        self.blocks = -(-self.out_channels // MAX_BLOCK)
        self.block = -(-self.out_channels // self.blocks // LANES) * LANES
        padded = rows.new_zeros(self.blocks, self.reach.taps, self.in_channels, self.block)
        for b in range(self.blocks):
            part = rows[..., b * self.block : (b + 1) * self.block]
            padded[b, ..., : part.shape[-1]] = part
        self.weight = padded
        self.bias = None if adjoint or affine.bias is None else affine.bias.contiguous()
        self.gain = None if adjoint or affine.gain is None else channels_last(affine.gain)

    @property
    def accumulators(self) -> int:
        return self.reach.out_positions * self.block

    def as_struct(self) -> _Connection:
        reach = self.reach
        return _Connection(
            reach.in_positions,
            self.in_channels,
            reach.out_positions,
            self.out_channels,
            reach.taps,
            self.block,
            self.blocks,
            self.weight.data_ptr(),
            reach.target.ctypes.data,
            _pointer(self.bias),
            _pointer(self.gain),
        )

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """gain * (K (scale * x) + bias) for x [B, C, H, W] or [B, C] in float32, skipping zeros; channels-last."""
        x = channels_last(x)
        scale = None if scale is None else channels_last(scale)
        y = empty_channels_last((x.shape[0], *self.out_shape), x)
        struct, kernels = self.as_struct(), native.library("events")
        counter = ctypes.c_int64(0)
        size = self.reach.in_positions * self.in_channels

        def work() -> None:
            acc, channel, first = _scratch(self.accumulators, size, self.reach.in_positions)
            value = np.empty(size + 1, dtype=np.float32)
            kernels.product(
                ctypes.byref(struct),
                ctypes.c_int64(x.shape[0]),
                *(ctypes.c_void_p(_pointer(t)) for t in (x, scale, y)),
                ctypes.byref(counter),
                *(ctypes.c_void_p(a.ctypes.data) for a in (acc, channel, value, first)),
            )

        native.on_all_threads(work, x.numel() + y.numel())
        return y


def connect(affine: object) -> EventConnection:
    """The map for `advance`.

    Raises:
        ValueError: for one that the kernels cannot take.
    """
    reason = why_not([affine])
    if reason is not None or not isinstance(affine, Affine):
        raise ValueError(f"no event-driven simulation: {reason}")
    return EventConnection(affine)


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
    kernels = native.library("events")
    links = (_Connection * len(connections))(*(c.as_struct() for c in connections))
    populations = (_Population * len(states))(*(_population(s) for s in states))
    counter = ctypes.c_int64(0)
    accumulators = max(c.accumulators for c in connections)
    events = max(c.reach.in_positions * c.in_channels for c in connections)
    positions = max(c.reach.in_positions for c in connections)

    def work() -> None:
        scratch = _scratch(accumulators, events, positions)
        kernels.simulate(
            links,
            populations,
            *(ctypes.c_int64(n) for n in (len(states), drive.shape[0], steps)),
            ctypes.c_void_p(drive.data_ptr()),
            ctypes.c_float(neuron.v_threshold),
            ctypes.c_float(neuron.leak),
            ctypes.c_int64(positions + 1),
            ctypes.byref(counter),
            *(ctypes.c_void_p(a.ctypes.data) for a in scratch),
        )

    native.on_all_threads(work, steps * sum(s.u.numel() for s in states))


def _population(state: State) -> _Population:
    size = state.u[0].numel() if len(state.u) else 0
    count = None if state.count is state.weighted else state.count  # IF counts once
    return _Population(size, *(_pointer(t) for t in (state.u, state.spikes, state.weighted, count)))


def channels_last(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] or [B, C] with its channels last in memory; itself where they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def empty_channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _rows(operator: Operator, weight: Tensor) -> Tensor:
    """The weight as [taps, input channels, output channels]."""
    if operator.kind == "linear":
        return weight.t()[None]
    order = (2, 3, 1, 0) if operator.kind == "conv" else (2, 3, 0, 1)
    return weight.permute(order).flatten(0, 1)


def _scratch(accumulators: int, events: int, positions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory of one thread: accumulators, event channels, and bookkeeping of positions."""
    return (
        np.empty(accumulators, dtype=np.float32),
        np.empty(events + 8, dtype=np.int32),
        np.empty(4 * (positions + 1), dtype=np.int32),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
