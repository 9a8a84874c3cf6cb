"""Responses of convolutions that batch norm normalises, and the firing rates they cause, in few passes over memory.

On a CPU, for event-driven paths. With y = K x of a connection:

    response = gain (factor y + shift)         z = response / V_th,  rate = sigma(z),  slope = gain sigma'(z) / V_th

with factor and shift per channel. By running statistics they are those of the folded connection (or y is that of the
folded weight, and the factor 1). By the statistics of the batch, with h = (y - mean) s, s = 1 / sqrt(var + eps),

    factor = gamma s         shift = beta - mean factor

where the connection's bias changes nothing: its gradient is 0. With c the cotangent of the rate (of the response), and
e = slope c (gain c), which are computed again from y and not kept, and N values per channel,

    dL/dy = factor (e - sum(e) / N - h sum(h e) / N)         dL/dgamma = sum(h e)         dL/dbeta = sum(e)

y, rates and their cotangents are float32 or bfloat16, and lie channels-last; all else is float32, sums over the shares
of the batch are joined in float64. Source: Ioffe & Szegedy, ICML 2015, section 3.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ide_snn import memory, native
from ide_snn.event_driven import channels_last, empty_channels_last
from ide_snn.input_stage import why_not_batch_norm
from ide_snn.layers import FixedConnection
from ide_snn.native import is_plain, pointer
from ide_snn.normalization import BatchNorm, update_running_statistics
from ide_snn.once import differentiable_once
from ide_snn.torch_modules import returns_what_nobody_keeps

ROWS = 64  # of a share, as in csrc/conv_rates.c


class _Numbers(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("is_rounded", ctypes.c_int64)]


class _Response(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("factor", "shift", "gain")), ("threshold", ctypes.c_double)]


_SHAPE = [(name, ctypes.c_int64) for name in ("rows", "channels", "next")]


class _Moments(ctypes.Structure):
    _fields_ = [*_SHAPE, ("y", _Numbers), ("centre", ctypes.c_void_p), ("sums", ctypes.c_void_p)]


class _Rates(ctypes.Structure):
    _fields_ = [*_SHAPE, ("y", _Numbers), ("response", _Response), ("rate", _Numbers), ("slope", ctypes.c_void_p)]


class _Cotangents(ctypes.Structure):
    _fields_ = [
        *_SHAPE,
        *(("y", _Numbers), ("response", _Response), ("mean", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        *(("cotangent", _Numbers), ("sums", ctypes.c_void_p)),
        *(("share", ctypes.c_void_p), ("slant", ctypes.c_void_p), ("to_y", _Numbers)),
    ]


@dataclass(frozen=True)
class Response:
    """gain (factor y + shift) of a population.

    Attributes:
        y: [B, C, H, W] or [B, N], float32 or bfloat16, channels-last.
        factor, shift: per channel [C]; None is 1 and 0.
        gain: as y, float32; None is 1.
        v_threshold: V_th of its neurons; None where they are not asked: then its rate is the response itself.
    """

    y: Tensor
    factor: Tensor | None
    shift: Tensor | None
    gain: Tensor | None
    v_threshold: float | None

    def fire(self, *, rounded: bool = False, with_slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """(rate, slope), the rate in bfloat16 if `rounded`; without a graph."""
        rate = empty_channels_last(self.y.shape, self.y, torch.bfloat16 if rounded else torch.float32)
        slope = empty_channels_last(self.y.shape, self.y, torch.float32) if with_slope else None
        work = _Rates(*_rows(self.y), _numbers(self.y), self.as_struct(), _numbers(rate), pointer(slope))
        _run("rates", work, self.y)
        return rate, slope

    def as_struct(self) -> _Response:
        return _Response(*map(pointer, (self.factor, self.shift, self.gain)), self.v_threshold or 0.0)


def response(
    y: Tensor, factor: Tensor | None, shift: Tensor | None, gain: Tensor | None, v_threshold: float | None
) -> Response:
    """A `Response`, with what does not lie as the kernels read it copied."""
    assert gain is None or (gain.shape, gain.dtype) == (y.shape, torch.float32)  # the kernels would read past it
    factor, shift = (None if t is None else t.contiguous() for t in (factor, shift))
    return Response(channels_last(y), factor, shift, None if gain is None else channels_last(gain), v_threshold)


def suits(link: FixedConnection, samples: int) -> bool:
    """True where `respond` and `rates` can take the batch norm of a connection of an event-driven path."""
    bn = link.connection.bn
    if link.operator is None or link.connection.pool > 1 or len(link.output_shape) != 3:
        return False
    if bn is None or not (bn.training and returns_what_nobody_keeps(bn)):
        return False
    if link.gain is not None and link.gain.requires_grad:
        return False
    if why_not_batch_norm(bn, samples * math.prod(link.output_shape[1:]), nn.BatchNorm2d) is not None:
        return False
    return all(is_plain(cast(Tensor, t)) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))


def respond(link: FixedConnection, y: Tensor) -> Tensor:
    """gain BN(y + b) of y = K x [B, C, H, W], as `FixedConnection.respond` with the statistics of the batch.

    Moves the running statistics; differentiable once in y and the parameters.
    """
    return _fire(link, y, None, rounded=False, with_slope=False)[0]


def rates(
    link: FixedConnection, y: Tensor, v_threshold: float, *, rounded: bool, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(rate, slope) of the response, otherwise like `respond`.

    Args:
        rounded: the rate in bfloat16.
        with_slope: there is none otherwise.
    """
    return _fire(link, y, v_threshold, rounded=rounded, with_slope=with_slope)


def _fire(
    link: FixedConnection, y: Tensor, v_threshold: float | None, *, rounded: bool, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    bn = link.connection.bn
    assert bn is not None  # see `suits`
    rate, slope = _Fire.apply(y, bn.weight, bn.bias, link.bias, bn, link.gain, v_threshold, rounded, with_slope)
    return rate, slope


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        bias: Tensor | None,
        bn: BatchNorm,
        gain: Tensor | None,
        v_threshold: float | None,
        rounded: bool,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor | None]:
        y = channels_last(y)
        mean, var = _moments(y)
        count = mean.new_full((1,), y.numel() // y.shape[1])
        update_running_statistics(bn, mean if bias is None else mean + bias, var, count)
        mean, scale = mean.float(), torch.rsqrt(var + bn.eps).float()
        factor = gamma * scale
        behind = response(y, factor, beta - mean * factor, gain, v_threshold)
        rate, slope = behind.fire(rounded=rounded, with_slope=with_slope)
        if slope is not None:
            ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)  # the slope's would be zeros
        ctx.v_threshold, ctx.has_bias = v_threshold, bias is not None
        # gamma is saved for autograd to see that it is still that of the forward
        ctx.save_for_backward(y, factor, behind.shift, behind.gain, mean, scale, gamma)
        return rate, slope

    @staticmethod
    @differentiable_once("event-driven batch norm")
    def backward(ctx: Any, cotangent: Tensor | None, __: None) -> tuple[Tensor | None, ...]:
        if cotangent is None:
            return (None,) * 9
        y, factor, shift, gain, mean, scale, _ = ctx.saved_tensors
        behind = response(
            y, factor, shift, gain, ctx.v_threshold
        )  # hooks on saved tensors may give them another layout
        to_y, to_gamma, to_beta = _cotangents(behind, mean, scale, cotangent, needs_y=ctx.needs_input_grad[0])
        to_bias = 0 * to_beta if ctx.has_bias else None  # NaN stays NaN
        return to_y, to_gamma, to_beta, to_bias, None, None, None, None, None


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) [C] of y, in float64."""
    mean, _ = _joined(y, None)
    off, squares = _joined(y, mean.float())
    return mean.float().double() + off, (squares - off.square()).clamp_(min=0)  # NaN stays NaN


def _joined(y: Tensor, centre: Tensor | None) -> Tensor:
    """Means [2, C] in float64 of y - centre and of its squares."""
    sums = _room(y)
    _run("moments", _Moments(*_rows(y), _numbers(y), pointer(centre), sums.data_ptr()), y)
    return _mean(sums, y)


def _cotangents(
    of: Response, mean: Tensor, scale: Tensor, cotangent: Tensor, *, needs_y: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dL/dy in the type of y if it `needs_y`, dL/dgamma, dL/dbeta) for the cotangent of the rate."""
    y, cotangent, sums = of.y, channels_last(cotangent), _room(of.y)
    work = _Cotangents(*_rows(y), _numbers(y), of.as_struct(), *map(pointer, (mean, scale)), _numbers(cotangent))
    work.sums = sums.data_ptr()
    _run("sums", work, y)
    means = _mean(sums, y)
    to_beta, to_gamma = (means * (y.numel() // y.shape[1])).float()
    if not needs_y:
        return None, to_gamma, to_beta
    (share, slant), to_y = means.float(), memory.empty_like(y)
    work.next, work.share, work.slant, work.to_y = 0, share.data_ptr(), slant.data_ptr(), _numbers(to_y)
    _run("cotangents", work, y)
    return to_y, to_gamma, to_beta


def _rows(y: Tensor) -> tuple[int, int, int]:
    """(rows, channels, 0) of a work."""
    return y.numel() // y.shape[1], y.shape[1], 0


def _numbers(x: Tensor) -> _Numbers:
    assert x.dtype in (torch.float32, torch.bfloat16)  # the kernels would read past it
    return _Numbers(x.data_ptr(), x.dtype == torch.bfloat16)


def _room(y: Tensor) -> Tensor:
    """[shares, 2, C] for sums, read before the next kernel runs: tensors of their own would break up the heap."""
    rows, channels, _ = _rows(y)
    shape = (-(-rows // ROWS), 2, channels)
    return native.scratch(4 * math.prod(shape))[: 4 * math.prod(shape)].view(torch.float32).view(shape)


def _mean(sums: Tensor, y: Tensor) -> Tensor:
    return sums.sum(0, dtype=torch.float64) / (y.numel() // y.shape[1])


def _run(kernel: str, work: ctypes.Structure, y: Tensor) -> None:
    native.run("conv_rates", kernel, work, y.numel())
