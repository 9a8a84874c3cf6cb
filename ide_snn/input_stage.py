"""The input stage of a fully connected population by kernels: its product in whole numbers, what follows in one.

    y = x W^T                                   `ide_snn.integers`
    drive = gain BN(y + b)                      one kernel (`csrc/features.c`), by the statistics of the batch
    dL/dy, dL/dgamma, dL/dbeta, dL/db           one more, from e = dL/ddrive:

with h = (y - mean) s, s = 1 / sqrt(var + eps) and means over the samples

    dL/dy = gamma s (gain e - mean(gain e) - h mean(h gain e))
    dL/dgamma = sum h gain e        dL/dbeta = sum gain e        dL/db = sum dL/dy, which is 0 but for rounding

and dL/dW = (dL/dy)^T x. Without batch norm drive = gain (y + b). Tensors are [B, N], float32 on a CPU; running
statistics are those of torch's batch norm.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ide_snn import integers, native
from ide_snn.layers import FixedConnection
from ide_snn.native import Stage, is_plain, pointer
from ide_snn.normalization import BatchNorm
from ide_snn.once import differentiable_once
from ide_snn.torch_modules import returns_what_nobody_keeps

OTHER_NORM = "the input stage's batch norm is not as Connection makes it"


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "features", "next")),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "gain", "gamma", "beta", "mean", "scale")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var", "batches")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        ("drive", ctypes.c_void_p),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "features", "next")),
        *((name, ctypes.c_void_p) for name in ("v", "slope", "through", "x", "gain", "gamma", "mean", "scale")),
        *((name, ctypes.c_void_p) for name in ("to_response", "to_x", "turned", "to_gamma", "to_beta")),
        *((name, ctypes.c_void_p) for name in ("to_bias", "to_feedback_bias")),
    ]


class Behind(NamedTuple):
    """What is done to y [B, N]: tensors [N] but for the gain [B, N]; `mean` and `scale` s are results."""

    y: Tensor
    bias: Tensor | None
    gain: Tensor | None
    bn: nn.BatchNorm1d | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    scale: Tensor


def forward_stage(of: Behind, drive: Tensor) -> Stage:
    """The kernel of drive = gain BN(y + b), which moves the running statistics."""
    bn = of.bn
    running = (None,) * 3 if bn is None else (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    settings = (0.0, 0.0) if bn is None else (bn.eps, cast(float, bn.momentum))
    tensors = (of.y, of.bias, of.gain, of.gamma, of.beta, of.mean, of.scale, *running)
    work = _Forward(*of.y.shape, 0, *map(pointer, tensors), *settings, drive.data_ptr())
    return Stage("features", "forward", work, of.y.numel(), (*tensors, drive))


def backward_stage(
    of: Behind,
    to_y: Tensor,
    turned: Tensor,
    slope: Tensor | None = None,
    through: Tensor | None = None,
    to_response: Tensor | None = None,
) -> Stage:
    """The kernel from v [B, N] to dL/dy, also `turned` [N, B]; `work` takes the addresses of v and vectors [N].

    Args:
        through: e = through v; None: e = v.
        slope: for the feedback's cotangent slope v, to `to_response` [N, B]; None: without.
    """
    tensors = (None, slope, through, of.y, of.gain, of.gamma, of.mean, of.scale)
    results = (to_response, to_y, turned)
    work = _Backward(*of.y.shape, 0, *map(pointer, (*tensors, *results)))
    return Stage("features", "backward", work, 4 * of.y.numel(), (*tensors, *results))


def set_results(
    back: Stage,
    v: Tensor,
    to_gamma: Tensor | None,
    to_beta: Tensor | None,
    to_bias: Tensor | None,
    to_feedback_bias: Tensor | None = None,
) -> None:
    """Tells a `backward_stage` where v is, and where the cotangents [N] are to be written."""
    work = back.work
    work.v, work.to_gamma, work.to_beta = v.data_ptr(), pointer(to_gamma), pointer(to_beta)
    work.to_bias, work.to_feedback_bias = pointer(to_bias), pointer(to_feedback_bias)


def why_not_batch_norm(bn: nn.Module | None, samples: int, kind: type[BatchNorm] = nn.BatchNorm1d) -> str | None:
    """None where kernels can take a batch norm of this kind for so many values per channel, else the reason."""
    if bn is None:
        return None
    if type(bn) is not kind or not (bn.affine and bn.track_running_stats) or bn.momentum is None:
        return OTHER_NORM
    if bn.eps <= 0:  # which torch refuses
        return OTHER_NORM
    batches = bn.num_batches_tracked
    if not all(t is not None and t.shape == (bn.num_features,) for t in _tensors(bn)):
        return OTHER_NORM
    if batches is not None and batches.dtype != torch.int64:
        return OTHER_NORM
    if "forward" in bn.__dict__:
        return "batch norm has another forward, as over several processes"
    return None if samples > 1 else "batch norm of one sample"


def suits(first: FixedConnection, samples: int) -> bool:
    """True where `respond` can take the input stage, whose product suits `ide_snn.integers`."""
    connection, bn = first.connection, first.connection.bn
    if connection.pool > 1 or native.why_unavailable("features") is not None:
        return False
    if bn is not None and not (bn.training and returns_what_nobody_keeps(bn)):
        return False
    if first.gain is not None and first.gain.requires_grad:
        return False
    if why_not_batch_norm(bn, samples) is not None:
        return False
    of_norm = () if bn is None else _tensors(bn)
    return all(t is None or is_plain(t) for t in (first.weight, first.bias, first.gain, *of_norm))


def _tensors(bn: BatchNorm) -> tuple[Tensor | None, ...]:
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def respond(first: FixedConnection, x: Tensor) -> Tensor:
    """The drive [B, N] of x [B, inputs] by the statistics of the batch, differentiable once."""
    bn = cast("nn.BatchNorm1d | None", first.connection.bn)
    gamma, beta = (None, None) if bn is None else (bn.weight, bn.bias)
    drive: Tensor = _InputStage.apply(x, first.weight, first.bias, gamma, beta, first.gain, bn)
    return drive


class _InputStage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        gain: Tensor | None,
        bn: nn.BatchNorm1d | None,
    ) -> Tensor:
        y = integers.multiply(x, weight, by_outputs=True)
        mean, scale = y.new_empty(2, y.shape[1]).unbind()
        drive = torch.empty_like(y)
        forward_stage(Behind(y, bias, gain, bn, gamma, beta, mean, scale), drive).run()
        ctx.save_for_backward(x, weight, bias, gamma, gain, y, mean, scale)
        return drive

    @staticmethod
    @differentiable_once("an event-driven input stage")
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        # kernels have their addresses, and hooks on saved tensors may give them another layout
        saved: list[Any] = [None if t is None else t.contiguous() for t in ctx.saved_tensors]
        x, weight, bias, gamma, gain, y, mean, scale = saved
        to_y, turned, e = torch.empty_like(y), y.new_empty(y.shape[1], len(y)), e.contiguous()
        to_bias, to_gamma, to_beta = (None if t is None else torch.empty_like(t) for t in (bias, gamma, gamma))
        back = backward_stage(Behind(y, bias, gain, None, gamma, None, mean, scale), to_y, turned)
        set_results(back, e, to_gamma, to_beta, to_bias)
        back.run()
        to_x = to_y.mm(weight) if ctx.needs_input_grad[0] else None
        to_weight = integers.product_of_samples(turned, x) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, to_bias, to_gamma, to_beta, None, None
