"""Convolutions of numbers of which some are 0: by a walk over the others, or dense.

The rates in f, and vectors that the slopes have thinned out in J^T, are neither as sparse as spikes nor dense. Up to
some share of numbers that are not 0 a walk over them (`ide_snn.event_driven`) is the faster; beyond it a dense product
is, which may be of factors rounded to bfloat16, with float32 sums (`precision.rounds_convolutions`). J^T in float32
always walks. Float32 on a CPU.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ide_snn import memory, native
from ide_snn.event_driven import EventConnection
from ide_snn.layers import Affine
from ide_snn.once import differentiable_once
from ide_snn.operators import Operator
from ide_snn.spiking import operator_gradients

SPARSE = 0.5  # share of numbers that are not 0 up to which a walk over them is faster than a dense convolution,
SPARSE_BESIDE_BFLOAT16 = 0.3  # and than one of bfloat16
LOOKED_AT = 1 << 15  # numbers of which the share is taken


def is_sparse(x: Tensor, share: float = SPARSE) -> bool:
    """True where so much of x [B, *] is 0 that a walk over the rest beats a dense product, by numbers all over x."""
    lies = x.permute(0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x
    rows = lies.reshape(-1, lies.shape[-1])
    step = max(1, rows.numel() // LOOKED_AT)
    while math.gcd(step, len(rows)) > 1:  # a common divisor would look at the same places of every sample
        step += 1
    some = rows[::step]
    return int(torch.count_nonzero(some)) < share * some.numel()


def apply(
    operator: Operator,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rounded: bool = False,
    as_computed: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """`operator.apply`, differentiable once, by a walk over x where it is sparse.

    Args:
        x: float32, or bfloat16 if rounded.
        rounded: factors, response and gradients of dense convolutions that suit oneDNN are rounded to bfloat16.
        as_computed: such a response without bias is left in bfloat16; otherwise it is float32.
        known: the value, which of convolutions is not computed again.
    """
    if operator.kind == "linear":
        return operator.apply(x, weight, bias)
    y: Tensor = _Convolution.apply(x, weight, bias, operator, rounded, as_computed, known)
    return y


@torch.no_grad()
def linear(affine: Affine, x: Tensor, *, rounded: bool = False) -> Tensor:
    """K x of `affine`, as `apply` computes it with `as_computed`."""
    if affine.operator.kind == "linear":
        return affine.operator.apply(x, affine.weight)
    rounded = rounded and affine.operator.suits_onednn
    return _product(affine, x, None, rounded, walks=_walks(x, rounded))


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
        as_computed: bool,
        known: Tensor | None,
    ) -> Tensor:
        rounded, affine = rounded and operator.suits_onednn, Affine(operator, weight, None, 1, None, tuple(x.shape[1:]))
        walks = known is not None or _walks(x, rounded)
        factors = x, weight
        if rounded and (not walks or any(ctx.needs_input_grad)):
            factors = x.to(torch.bfloat16), affine.rounded_weight
        ctx.save_for_backward(*factors)
        ctx.operator, ctx.rounded = operator, rounded
        if known is not None:
            return memory.clone(known)  # callers overwrite it
        y = _product(affine, x if walks else factors[0], bias, rounded, walks=walks)
        return y if as_computed and bias is None else y.to(torch.float32)

    @staticmethod
    @differentiable_once("event-driven convolutions")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        gradients = operator_gradients(ctx.operator, x, grad, weight, needs, rounded=ctx.rounded)
        return *gradients, None, None, None, None


def _walks(x: Tensor, rounded: bool) -> bool:
    return is_sparse(x, SPARSE_BESIDE_BFLOAT16 if rounded else SPARSE)


def _product(affine: Affine, x: Tensor, bias: Tensor | None, rounded: bool, *, walks: bool) -> Tensor:
    """K x + b of a convolution, in bfloat16 where it is dense, rounded and without bias."""
    if walks:
        return EventConnection(replace(affine, bias=bias, gain=None))(x.to(torch.float32))
    if not rounded:
        return affine.operator.apply(x, affine.weight, bias)
    y = affine.operator.apply(x.to(torch.bfloat16), affine.rounded_weight)
    return y if bias is None else y.to(torch.float32).add_(bias.view(-1, 1, 1))


@dataclass(frozen=True)
class RoundedMap:
    """The linear part of a convolution without gain, and its adjoint, with factors and results in bfloat16."""

    affine: Affine

    def linear(self, x: Tensor) -> Tensor:
        """K x."""
        return self.affine.operator.apply(x.to(torch.bfloat16), self.affine.rounded_weight).to(x.dtype)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """K^T (scale * y) in bfloat16, which may be the y of another."""
        return self.affine.operator.adjoint(scaled(y, scale), self.affine.rounded_weight, self.affine.input_shape)


class _Rounded(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "next")),
        *(("x", ctypes.c_void_p), ("is_rounded", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("scale", "to")),
    ]


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """scale * x, rounded to bfloat16, of x in float32 or bfloat16; by one pass over memory where both lie alike."""
    if scale is None:
        return x.to(torch.bfloat16)
    last = torch.channels_last
    if not (x.is_contiguous(memory_format=last) and scale.is_contiguous(memory_format=last)):
        return (x * scale).to(torch.bfloat16)
    assert scale.dtype == torch.float32  # the kernel would read past it
    assert scale.shape == x.shape
    to = memory.empty(x.shape, torch.bfloat16, x.device, last)
    work = _Rounded(x.numel(), 0, x.data_ptr(), x.dtype == torch.bfloat16, scale.data_ptr(), to.data_ptr())
    native.run("elementwise", "rounded", work, x.numel())
    return to
