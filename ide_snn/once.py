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
            # nothing that is kept may keep the graph of a cotangent, which leads back here
            plain = (c.detach() if c is not None and c.requires_grad else c for c in cotangents)
            with torch.no_grad():
                gradients = backward(ctx, *plain)
            if not torch.is_grad_enabled():  # that is create_graph
                return gradients
            link = _Link.apply(message, *cotangents, *_leaves_of(ctx))
            return tuple(None if g is None else _Once.apply(g, link) for g in gradients)

        return once

    return decorated


def _leaves_of(node: Any) -> list[Tensor]:
    """The leaves that a backward pass through this node of a graph reaches."""
    leaves, seen, waiting = [], {node}, [node]
    while waiting:
        following = {edge[0] for edge in waiting.pop().next_functions if edge[0] is not None} - seen
        seen |= following
        waiting += following
        # nodes of users' functions may have any attributes, so only their types are asked
        leaves += [leaf.variable for leaf in following if type(leaf).__name__ == "AccumulateGrad"]
    return leaves


class _Once(torch.autograd.Function):
    """The gradient, which depends on the link, too."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, _link: Tensor) -> Tensor:
        return gradient.clone()  # a view would refuse in-place changes, as optimizers and hooks make them

    @staticmethod
    def backward(_ctx: Any, _cotangent: Tensor) -> Gradients:
        return None, torch.zeros((), device="cpu")


class _Link(torch.autograd.Function):
    """A number that cannot be differentiated in its sources."""

    @staticmethod
    def forward(ctx: Any, message: str, *_sources: Tensor) -> Tensor:
        ctx.message = message
        return torch.zeros((), device="cpu")  # whatever torch's default device is

    @staticmethod
    def backward(ctx: Any, _cotangent: Tensor) -> Gradients:
        raise RuntimeError(ctx.message)
