"""The firing rate of a population and its slopes, in one pass over memory: float32 on a CPU, for event-driven paths.

    z = (gain response + drive) / V_th        rate = sigma(z)
    through = sigma'(z) / V_th                derivative of the rate in the drive
    slope = gain through                      derivative of the rate in the response

The numbers are those of the torch operations one after the other. Source: Xiao et al., NeurIPS 2021, section 4.2.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ide_snn import native
from ide_snn.event_driven import channels_last, empty_channels_last


class _Slopes(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("next", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("response", "gain", "drive", "slope", "through")),
        ("threshold", ctypes.c_double),
    ]


def fire_(response: Tensor, gain: Tensor | None, drive: Tensor | None, threshold: float) -> tuple[Tensor, ...]:
    """(rate, slope, through) for tensors [B, C, H, W] or [B, N]; without a gain the last two are one tensor.

    Args:
        response: channels-last; becomes the rate.
    """
    gain, drive = (None if t is None else channels_last(t) for t in (gain, drive))
    through = empty_channels_last(response.shape, response)
    slope = through if gain is None else empty_channels_last(response.shape, response)
    pointers = [None if t is None else t.data_ptr() for t in (response, gain, drive, slope, through)]
    work = _Slopes(response.numel(), 0, *pointers, threshold)
    native.run("elementwise", "slopes", work, response.numel())
    return response, slope, through


def fire(response: Tensor, gain: Tensor | None, drive: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """(rate, slope), the rate differentiable once in the response and the drive; the response may be overwritten."""
    rate, slope = _Fire.apply(channels_last(response), drive, gain, threshold)
    return rate, slope


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, response: Tensor, drive: Tensor | None, gain: Tensor | None, threshold: float
    ) -> tuple[Tensor, Tensor]:
        rate, slope, through = fire_(response, gain, drive, threshold)
        ctx.mark_dirty(response)
        ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(slope, through)
        return rate, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        slope, through = ctx.saved_tensors
        return (
            grad * slope if ctx.needs_input_grad[0] else None,
            grad * through if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
