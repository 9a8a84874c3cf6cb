"""Batch norm by the statistics of the batch or by the running ones, folded into an affine map, over several processes.

Inside `synchronised(model, ranks)` the batch is that of all ranks: statistics are exact for shares of any size,
running statistics are the same everywhere, and the gradient is that of the whole batch. torch's `SyncBatchNorm` does
this on GPUs only, and not for the statistics that a feedback network takes apart from a batch norm's forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ide_snn.distributed import Ranks
from ide_snn.once import differentiable_once

__all__ = [
    "BatchNorm",
    "Statistics",
    "batch_count",
    "batch_moments",
    "batch_norm_for",
    "batch_norm_scope",
    "batch_norms",
    "fold",
    "frozen_statistics",
    "normalise",
    "normalise_by_batch",
    "synchronised",
    "update_running_statistics",
]

Statistics = Literal["batch", "running"]
BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norm_for(op: nn.Module) -> BatchNorm:
    if isinstance(op, nn.Linear):
        return nn.BatchNorm1d(op.out_features)
    return nn.BatchNorm2d(op.out_channels)  # type: ignore[arg-type]


def normalise(bn: BatchNorm, y: Tensor, statistics: Statistics, *, update_running: bool) -> Tensor:
    """BN(y) for y [B, C, *], by the statistics asked for where `bn` is in training mode, else by the running ones."""
    if not bn.training or (statistics == "batch" and update_running):
        return bn(y)
    if statistics == "batch":
        return normalise_by_batch(bn, y, bn.weight, bn.bias)
    mean, var = _copy(bn.running_mean), _copy(bn.running_var)
    return F.batch_norm(y, mean, var, bn.weight, bn.bias, False, 0.0, bn.eps)


def normalise_by_batch(bn: BatchNorm, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """BN(y) for y [B, C, *] by the batch's statistics, with this weight and bias; nothing is updated."""
    if _ranks(bn) is None:
        return F.batch_norm(y, None, None, weight, bias, True, 0.0, bn.eps)
    mean, var, _ = batch_moments(bn, y)
    return _normalise_by(y, mean, var, weight, bias, bn.eps)


def require_features(bn: BatchNorm, features: int) -> None:
    """Raises ValueError unless all that `bn` has is of so many features."""
    held = {**bn._parameters, **bn._buffers}  # without torch's search for attributes
    for kind in ("weight", "bias", "running_mean", "running_var"):
        tensor = held.get(kind)
        if tensor is not None and tensor.shape != (features,):
            raise ValueError(
                f"batch norm's {kind} has the shape {list(tensor.shape)}, its connection has {features} outputs"
            )


def batch_moments(bn: BatchNorm, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, count) per channel of y [B, C, *]; of all ranks where `bn` is synchronised.

    Differentiable in y. The count of values per channel has the shape [1].
    """
    ranks = _ranks(bn)
    if ranks is None:
        var, mean = torch.var_mean(y, _all_but_channels(y), correction=0)
        return mean, var, var.new_full((1,), y.numel() // y.shape[1])
    moments: tuple[Tensor, Tensor, Tensor] = _Moments.apply(y, ranks)
    return moments


def batch_count(bn: BatchNorm, own: Tensor) -> Tensor:
    """The count [1] of values per channel of the whole batch, from that of this process."""
    ranks = _ranks(bn)
    return own if ranks is None else ranks.sum_(own.clone())


@torch.no_grad()
def update_running_statistics(bn: BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """As a training forward of `bn` does for `count` values per channel of biased variance `var`."""
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1 / float(bn.num_batches_tracked) if momentum is None else momentum
    assert momentum is not None  # a cumulative average counts its batches
    bn.running_mean.lerp_(mean.to(bn.running_mean), momentum)
    unbiased = var * (count / (count - 1).clamp(min=1))
    bn.running_var.lerp_(unbiased.to(bn.running_var), momentum)


def fold(bn: BatchNorm, moments: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel with BN(y) = scale * y + shift."""
    mean, var = (bn.running_mean, bn.running_var) if moments is None else moments
    assert mean is not None  # connections create their batch norms with running statistics
    assert var is not None
    scale = bn.weight.detach() * torch.rsqrt(var + bn.eps)
    return scale, bn.bias.detach() - mean * scale


@contextmanager
def batch_norm_scope(module: nn.Module, statistics: Statistics, *, update_running: bool) -> Iterator[None]:
    """Runs a user's module with the statistics asked for; modes and buffers are restored exactly.

    Everything but batch norm is in evaluation mode, so that constraints inside advance only in `prepare`.
    """
    modes = [(m, m.training) for m in module.modules()]
    norms = [m for m, training in modes if isinstance(m, BatchNorm) and training]
    tracking = [(m, m.track_running_stats, m.running_mean, m.running_var) for m in norms]
    try:
        for m, _ in modes:
            m.training = False
        for norm in norms:
            norm.training = statistics == "batch"
            if statistics == "running":
                norm.running_mean, norm.running_var = _copy(norm.running_mean), _copy(norm.running_var)
            elif not update_running:
                norm.running_mean = norm.running_var = None
                norm.track_running_stats = False
        yield
    finally:
        for m, training in modes:
            m.training = training
        for norm, tracks, mean, var in tracking:
            norm.track_running_stats, norm.running_mean, norm.running_var = tracks, mean, var


def frozen_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Scope in which batch norms in `module` use, and do not touch, their running statistics."""
    return batch_norm_scope(module, "running", update_running=False)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The batch norms of a model, but for torch's SyncBatchNorm, which look after themselves."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]


@contextmanager
def synchronised(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While entered, batch norms of `model` in training mode normalise by the batch of all ranks.

    All ranks have to run the same forwards and backwards, each with its share of the batch. The modules stay what they
    are (no other class, no other keys in the state dict); only their forward is another one for that time.
    """
    norms = [] if ranks.is_alone else batch_norms(model)
    try:
        for norm in norms:
            norm.__dict__["ranks"] = ranks
            norm.__dict__["forward"] = functools.partial(_synchronised_forward, norm)
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"], norm.__dict__["ranks"]


def _ranks(bn: BatchNorm) -> Ranks | None:
    """The ranks whose batch is normalised together; None for this process alone."""
    ranks: Ranks | None = bn.__dict__.get("ranks")
    return ranks


def _synchronised_forward(bn: BatchNorm, y: Tensor) -> Tensor:
    if not bn.training:
        normalised: Tensor = type(bn).forward(bn, y)
        return normalised
    bn._check_input_dim(y)
    mean, var, count = batch_moments(bn, y)
    update_running_statistics(bn, mean, var, count)
    return _normalise_by(y, mean, var, bn.weight, bn.bias, bn.eps)


def _normalise_by(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(y - mean) / sqrt(var + eps) * weight + bias, differentiable in all of them, which F.batch_norm is not."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (y.dim() - 2))
    return (y * scale.view(shape) + shift.view(shape)).to(y.dtype)


class _Moments(torch.autograd.Function):
    """(mean, biased variance, count) of y [B, C, *] over the samples of all ranks, per channel.

    Ranks exchange the moments of their own samples, which are joined (Chan, Golub & LeVeque 1979): sums of squares
    would lose digits. Backward: with G_mean and G_var the sums over the ranks of dL/dmean and dL/dvar, N the count,

        dL/dy = (G_mean + 2 (y - mean) G_var) / N
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype, ctx.ranks = y.dtype, ranks
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        var, mean = torch.var_mean(y, _all_but_channels(y), correction=0)
        channels = y.shape[1]
        every = ranks.all_gather(torch.cat([mean, var, mean.new_full((1,), y.numel() // channels)]))
        means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
        ctx.save_for_backward(y, mean, count)
        ctx.mark_non_differentiable(count)
        return mean, var, count

    @staticmethod
    @differentiable_once("moments over processes")
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor, None]:
        y, mean, count = ctx.saved_tensors
        grad_mean, grad_var = ctx.ranks.sum_(torch.stack([grad_mean, grad_var]))
        shape = (1, -1, *(1,) * (y.dim() - 2))
        centred = (y - mean.view(shape)).mul_((2 * grad_var / count).view(shape))
        return centred.add_((grad_mean / count).view(shape)).to(ctx.dtype), None


def _all_but_channels(y: Tensor) -> list[int]:
    return [d for d in range(y.dim()) if d != 1]


def _copy(statistic: Tensor | None) -> Tensor | None:
    """Graphs built with running statistics outlive their update in the same forward: they get their own copy."""
    return None if statistic is None else statistic.clone()
