"""Gradients that cannot be differentiated again, and say so.

torch's `once_differentiable` raises only where the cotangent has a graph. That of a sum has none: the derivative of its
gradient would silently be 0, or lack a part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def differentiable_once(what: str, remedy: str = "") -> Callable[[Backward], Backward]:
    """A decorator for the backward pass of a function, which then runs without a graph.

    With create_graph=True, derivatives of its gradients in the cotangents, or in any leaf that the function's inputs
    were computed from, raise RuntimeError.

    Args:
        what: was computed.
        remedy: for those who need second derivatives.
    """
    message = f"the gradient of {what} cannot be differentiated again (create_graph=True){remedy}"

    def decorated(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *cotangents: Tensor) -> Gradients:
            with torch.no_grad():
                gradients = backward(ctx, *cotangents)
            if not torch.is_grad_enabled():  # that is create_graph
                return gradients
            sources = *cotangents, *_leaves_of(ctx)
            return tuple(None if g is None else _Once.apply(g, message, *sources) for g in gradients)

        return once

    return decorated


def _leaves_of(node: Any) -> list[Tensor]:
    """The leaves that a backward pass through this node of a graph reaches."""
    leaves, seen, waiting = [], {node}, [node]
    while waiting:
        following = {edge[0] for edge in waiting.pop().next_functions if edge[0] is not None} - seen
        seen |= following
        waiting += following
        leaves += [leaf.variable for leaf in following if leaf.name() == "torch::autograd::AccumulateGrad"]
    return leaves


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, message: str, *_sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.clone()  # a view would refuse in-place changes, as optimizers and hooks make them

    @staticmethod
    def backward(ctx: Any, _cotangent: Tensor) -> Gradients:
        raise RuntimeError(ctx.message)
