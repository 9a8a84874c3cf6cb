"""Firing rates in one pass over memory: float32 on a CPU, for event-driven paths.

Of f, with its slopes:

    z = (gain response + drive) / V_th        rate = sigma(z)
    through = sigma'(z) / V_th                derivative of the rate in the drive
    slope = gain through                      derivative of the rate in the response

The numbers are those of the torch operations one after the other. Source: Xiao et al., NeurIPS 2021, section 4.2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ide_snn import memory
from ide_snn.event_driven import State, channels_last, empty_channels_last
from ide_snn.native import Stage, pointer
from ide_snn.once import differentiable_once


class _Rate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "size", "populations", "next")),
        *((name, ctypes.c_void_p) for name in ("membrane", "sizes", "weighted", "rate")),
        ("total", ctypes.c_double),
    ]


class _Slopes(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        ("next", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("response", "gain", "drive", "slope", "through")),
        ("threshold", ctypes.c_double),
    ]


def fire_(
    response: Tensor, gain: Tensor | None, drive: Tensor | None, v_threshold: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rate, slope, through) for tensors [B, C, H, W] or [B, N].

    Without a gain the last two are one tensor; with one, but without a drive, there is no `through`.

    Args:
        response: channels-last; becomes the rate.
    """
    gain, drive = (None if t is None else channels_last(t) for t in (gain, drive))
    slope = empty_channels_last(response.shape, response)
    through = slope if gain is None else None if drive is None else empty_channels_last(response.shape, response)
    fire_stage(response, gain, drive, slope, through, v_threshold).run()
    return response, slope, through


def fire_stage(
    response: Tensor,
    gain: Tensor | None,
    drive: Tensor | None,
    slope: Tensor,
    through: Tensor | None,
    v_threshold: float,
) -> Stage:
    """The kernel of `fire_`, for tensors that lie alike; beside a `through` the slope may be the gain."""
    tensors = (response, gain, drive, slope, through)
    work = _Slopes(response.numel(), 0, *map(pointer, tensors), v_threshold)
    return Stage("elementwise", "slopes", work, response.numel(), tensors)


def fire(response: Tensor, gain: Tensor | None, drive: Tensor | None, v_threshold: float) -> tuple[Tensor, Tensor]:
    """(rate, slope), the rate differentiable once in the response and the drive; the response may be overwritten."""
    rate, slope = _Fire.apply(channels_last(response), drive, gain, v_threshold)
    return rate, slope


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, response: Tensor, drive: Tensor | None, gain: Tensor | None, v_threshold: float
    ) -> tuple[Tensor, Tensor]:
        rate, slope, through = fire_(response, gain, drive, v_threshold)
        ctx.mark_dirty(response)
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)  # the slope's would be zeros
        ctx.save_for_backward(slope, through)
        return rate, slope

    @staticmethod
    @differentiable_once("firing rates")
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        slope, through = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        return (
            memory.multiply(grad, slope) if ctx.needs_input_grad[0] else None,
            memory.multiply(grad, through) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def weighted_rate(states: Sequence[State], total: float) -> Tensor:
    """`weighted` of the last population / total, NaN in samples where a membrane of any is NaN or infinite."""
    weighted = states[-1].weighted
    assert weighted is not None  # the rate that every simulation measures
    result = memory.empty_like(weighted)
    rate_stage(states, total, result).run()
    return result


def rate_stage(states: Sequence[State], total: float, result: Tensor) -> Stage:
    """The kernel of `weighted_rate`; the result may be the last population's `weighted`."""
    weighted = states[-1].weighted
    assert weighted is not None  # as above
    samples = max(len(weighted), 1)
    membranes = np.array([state.u.data_ptr() for state in states], dtype=np.uintp)
    sizes = np.array([state.u.numel() // samples for state in states], dtype=np.int64)
    work = _Rate(
        *(len(weighted), weighted.numel() // samples, len(states), 0),
        *(membranes.ctypes.data, sizes.ctypes.data, weighted.data_ptr(), result.data_ptr()),
        total,
    )
    elements = weighted.numel() + sum(state.u.numel() for state in states)
    return Stage("elementwise", "rate", work, elements, (*states, membranes, sizes, result))
