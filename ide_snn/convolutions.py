"""Convolutions of numbers of which some are 0: by a walk over the others, or dense.

The rates in f, and vectors that the slopes have thinned out in J^T, are neither as sparse as spikes nor dense. Up to
some share of numbers that are not 0 a walk over them (`ide_snn.event_driven`) is the faster; beyond it a dense product
is, which may be of factors rounded to bfloat16, with float32 sums (`precision.rounds_convolutions`). J^T in float32
always walks. Float32 on a CPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ide_snn.event_driven import EventConnection
from ide_snn.layers import Affine
from ide_snn.operators import Operator
from ide_snn.spiking import operator_gradients

SPARSE = 0.5  # share of numbers that are not 0 up to which a walk over them is faster than a dense convolution,
SPARSE_BESIDE_BFLOAT16 = 0.3  # and than one of bfloat16


def is_sparse(x: Tensor, share: float = SPARSE) -> bool:
    """True where so much of x [B, *] is 0 that a walk over the rest beats a dense product, by the first samples."""
    some = x[: -(-len(x) // 16)]
    return int(torch.count_nonzero(some)) < share * some.numel()


def apply(
    operator: Operator,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rounded: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """`operator.apply`, differentiable once, by a walk over x where it is sparse.

    Args:
        rounded: factors, response and gradients of dense convolutions that suit oneDNN are rounded to bfloat16.
        known: the value, which of convolutions is not computed again.
    """
    if operator.kind == "linear":
        return operator.apply(x, weight, bias)
    y: Tensor = _Convolution.apply(x, weight, bias, operator, rounded, known)
    return y


class _Convolution(torch.autograd.Function):
    """K x + b, where x is sparse by a walk; its backward pass by torch's dense convolutions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operator: Operator,
        rounded: bool,
        known: Tensor | None,
    ) -> Tensor:
        rounded = rounded and operator.suits_onednn
        is_dense = known is None and not is_sparse(x, SPARSE_BESIDE_BFLOAT16 if rounded else SPARSE)
        factors = x, weight
        if rounded and (is_dense or any(ctx.needs_input_grad)):
            factors = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(*factors)
        ctx.operator, ctx.rounded = operator, rounded
        if known is not None:
            return known.clone()  # callers overwrite it
        if not is_dense:
            return EventConnection(Affine(operator, weight, bias, 1, None, tuple(x.shape[1:])))(x)
        if not rounded:
            return operator.apply(x, weight, bias)
        y = operator.apply(*factors).to(torch.float32)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        return *operator_gradients(ctx.operator, x, grad, weight, needs, rounded=ctx.rounded), None, None, None


@dataclass(frozen=True)
class RoundedMap:
    """The linear part of a convolution without gain, and its adjoint, with factors and results in bfloat16."""

    affine: Affine

    @functools.cached_property
    def _weight(self) -> Tensor:
        return self.affine.weight.to(torch.bfloat16, memory_format=torch.channels_last)

    def linear(self, x: Tensor) -> Tensor:
        """K x."""
        return self.affine.operator.apply(x.to(torch.bfloat16), self._weight).to(x.dtype)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """K^T (scale * y)."""
        scaled = (y if scale is None else y * scale).to(torch.bfloat16)
        return self.affine.operator.adjoint(scaled, self._weight, self.affine.input_shape).to(y.dtype)
