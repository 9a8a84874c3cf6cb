"""The implicit gradient of a known chain without batch norm, written out: no graph is built for it.

With the cotangent g of the rates a, one application of f at a, z_i = (gain_i (K_i a_{i-1} + b_i) [+ Xbar]) / V_th with
a_0 = a and a_i = sigma(z_i), gives all that the gradient needs:

    slope_i = gain_i sigma'(z_i) / V_th                     of the products with J
    (I - J^T) v = g                                         the solve
    d_n = slope_n v,   d_{i-1} = slope_{i-1} K_i^T d_i      of the responses K_i a_{i-1} + b_i
    dL/dK_i = d_i a_{i-1}^T,   dL/db_i = sum over samples and positions of d_i
    dL/dXbar = sigma'(z_1) / V_th times what reaches population 1

Source: Xiao et al., NeurIPS 2021, section 4.3. `ide_snn.implicit` does the same for any f by autograd's chain rule.
Event-driven paths only (float32 on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ide_snn import convolutions, event_driven, memory
from ide_snn.dense import DenseMap, turned_product
from ide_snn.equilibrium import AnalyticLinearisation, EquilibriumMap, Known
from ide_snn.layers import Affine
from ide_snn.once import differentiable_once
from ide_snn.operators import Operator
from ide_snn.simulation import EVENT_PATHS
from ide_snn.spiking import operator_gradients

UNROLLED = ": gradient=Unrolled() can, with precision='float32' and another constraint than spectral_matrix"
Solve = Callable[[AnalyticLinearisation, Tensor], Tensor]


def has_written_out_gradient(f: EquilibriumMap) -> bool:
    """True where `attach_written_out` can take f."""
    return f.path in EVENT_PATHS and all(link.connection.bn is None for link in f.chain)


def attach_written_out(rates: Tensor, f: EquilibriumMap, solve: Solve, response: Tensor | None = None) -> Tensor:
    """A tensor with the value of `rates` and the gradient of f's fixed point in the drive and the chain's parameters.

    Args:
        rates: [B, *]; carry no graph.
        f: see `has_written_out_gradient`.
        solve: (J, g) -> v with (I - J^T) v = g.
        response: K_1 rates + b_1 where it is known; overwritten.
    """
    if not torch.is_grad_enabled():
        return rates
    parameters = [tensor for link in f.chain for tensor in (link.weight, link.bias)]
    value: Tensor = _Chain.apply(f, solve, rates, response, f.drive, *parameters)
    return value


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: EquilibriumMap,
        solve: Solve,
        rates: Tensor,
        response: Tensor | None,
        _drive: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            return memory.clone(rates)
        inputs, slopes, first = f.frozen_rates(rates, () if response is None else (Known(response),))
        ctx.f, ctx.solve = f, solve
        # parameters are saved for autograd to see that they are still those of the forward
        ctx.save_for_backward(first, *inputs, *slopes, *parameters)
        return memory.clone(rates)  # a view would refuse in-place operations behind the block

    @staticmethod
    @differentiable_once("an equilibrium", UNROLLED)
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        f, needed, n = ctx.f, ctx.needs_input_grad[5:], len(ctx.f.chain)
        first, *saved = ctx.saved_tensors
        inputs, slopes = saved[:n], saved[n : 2 * n]
        jacobian = f.linearise_with(slopes)
        v = ctx.solve(jacobian, event_driven.channels_last(cotangent))
        gradients: list[Tensor | None] = [None] * len(needed)
        for number in reversed(range(len(f.chain))):
            affine, x, slope = f.chain[number].frozen, inputs[number], slopes[number]
            wanted = (False, needed[2 * number], needed[2 * number + 1])
            if affine.operator.kind == "linear":
                turned = turned_product(v, slope)
                # by a product that skips zeros: most slopes are 0
                to_weight = of_rates(x, whole=f.takes_integers).adjoint(turned) if wanted[1] else None
                to_bias = turned.sum(1) if wanted[2] else None
            else:
                rounded = f.rounds_convolutions and affine.operator.suits_onednn
                d = convolutions.scaled(v, slope) if rounded else memory.multiply(v, slope)
                _, to_weight, to_bias = operator_gradients(
                    affine.operator, x, d, affine.weight, wanted, rounded=rounded
                )
            gradients[2 * number : 2 * number + 2] = to_weight, to_bias
            if number:
                v = jacobian.maps[number].adjoint(v, slope)
        to_drive = memory.multiply(v, first) if ctx.needs_input_grad[4] else None
        return None, None, None, None, to_drive, *gradients


def of_rates(x: Tensor, *, whole: bool) -> DenseMap:
    """The map whose adjoint is d^T -> d^T x [N, M], for d [B, N] and x [B, M].

    Args:
        whole: in whole numbers, where the batch is not too large for them.
    """
    samples, inputs = x.shape
    plain = DenseMap(Affine(Operator("linear", inputs, samples), x, None, 1, None, (inputs,)))
    return replace(plain, whole=whole and plain.can_be_whole)
