"""Connections as training through time needs them: one response per time step, and its adjoint.

A link is one connection during one forward. It has no memory: what the adjoint needs of a step (spikes, statistics of
the steps before) is handed to it again, so that the caller decides how that is kept.

| link        | connection                                    | backward                                            |
| ----------- | --------------------------------------------- | --------------------------------------------------- |
| `Folded`    | known operator, batch norm folded into W      | analytic, in s, W and b                             |
| `PerStep`   | known, batch norm with the step's statistics  | the step's response once more, by autograd          |
| `TimeBatch` | known, statistics of all steps so far         | the same                                            |
| `Own`       | a user's module                               | the same, with the buffers of the forward           |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ide_snn.layers import Affine, FixedConnection
from ide_snn.normalization import (
    BatchNorm,
    batch_count,
    batch_moments,
    batch_norm_scope,
    normalise_by_batch,
    update_running_statistics,
)
from ide_snn.spiking import operator_gradients

State = tuple[Tensor, ...]
Statistics = Literal["frozen", "per_step", "time_batch"]


class Link:
    """One connection during one forward.

    Attributes:
        tensors: what a gradient flows to, with its graph to the parameters.
        is_silent_at_zero: no input spikes means no output.
    """

    is_silent_at_zero = False

    def __init__(self, fixed: FixedConnection, tensors: Sequence[Tensor | None]) -> None:
        self.fixed = fixed
        self.tensors = tuple(t for t in tensors if t is not None)

    def start(self) -> State:
        """What the link carries from step to step, before the first."""
        return ()

    def first_response(self, t: int, s: Tensor, state: State) -> tuple[Tensor, State]:
        """The response of the forward pass (a new tensor); may update running statistics."""
        return self.respond(t, s, state, tuple(tensor.detach() for tensor in self.tensors))

    def respond(self, t: int, s: Tensor, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor, State]:
        """(response [B, *], next state) to the spikes s [B, *] of step t; differentiable, and nothing is updated."""
        raise NotImplementedError

    def finish(self, state: State, steps: int, batch: int) -> None:
        """Called once after the last of `steps` steps of a training forward, with the last state."""

    def pull(
        self,
        t: int,
        s: Tensor,
        state: State,
        tensors: Sequence[Tensor],
        grad: Tensor,
        grad_state: Sequence[Tensor | None],
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Gradients of (s, tensors, state) for those of the response and of the next state.

        Args:
            t, s, state, tensors: as in `respond`; without graph.
            needs: which of (s, *tensors) want one.
        """
        leaves = [x.detach().requires_grad_(need) for x, need in zip((s, *tensors), needs, strict=True)]
        carried = tuple(x.detach().requires_grad_() for x in state)
        with torch.enable_grad():
            response, following = self.respond(t, leaves[0], carried, leaves[1:])
        pairs = [(y, g) for y, g in zip((response, *following), (grad, *grad_state), strict=True) if g is not None]
        wanted = [leaf for leaf in (*leaves, *carried) if leaf.requires_grad]
        values, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(values, wanted, cotangents, allow_unused=True) if wanted else ())
        first, *rest = (next(found) if leaf.requires_grad else None for leaf in leaves)
        return first, tuple(rest), tuple(found)

    def _finish(self, y: Tensor) -> Tensor:
        pool = self.fixed.connection.pool
        y = F.avg_pool2d(y, pool) if pool > 1 else y
        return y if self.fixed.gain is None else y * self.fixed.gain


class Folded(Link):
    """A known operator with frozen statistics, folded into weight and bias once per forward.

    Args:
        moments: (mean, biased variance) per channel to normalise by, with their graph; None for running statistics.
    """

    def __init__(self, fixed: FixedConnection, moments: tuple[Tensor, Tensor] | None = None) -> None:
        operator, bn, weight, bias = fixed.operator, fixed.connection.bn, fixed.weight, fixed.bias
        assert operator is not None  # known connections have both
        assert weight is not None
        if bn is not None:
            assert bn.running_mean is not None  # connections create their batch norms with running statistics
            assert bn.running_var is not None
            # the buffer itself would change under the graph when this forward updates it
            mean, var = (bn.running_mean.clone(), bn.running_var) if moments is None else moments
            scale = bn.weight * torch.rsqrt(var + bn.eps)
            shift = bn.bias - mean * scale
            weight = weight * operator.per_output(scale)
            bias = shift if bias is None else bias * scale + shift
        super().__init__(fixed, (weight, bias))
        detached = None if bias is None else bias.detach()
        self.affine = Affine(operator, weight.detach(), detached, fixed.connection.pool, fixed.gain, fixed.input_shape)
        self.is_silent_at_zero = self.affine.is_silent_at_zero

    def respond(self, t: int, s: Tensor, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor, State]:  # noqa: ARG002
        return self.affine(s), state

    def pull(
        self,
        t: int,  # noqa: ARG002
        s: Tensor,
        state: State,  # noqa: ARG002
        tensors: Sequence[Tensor],
        grad: Tensor,
        grad_state: Sequence[Tensor | None],  # noqa: ARG002
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        operator, pool = self.affine.operator, self.affine.pool
        if self.affine.gain is not None:
            grad = grad * self.affine.gain
        if pool > 1:
            before = grad.new_empty(grad.shape[0], *operator.output_shape(self.affine.input_shape))
            grad = torch.ops.aten.avg_pool2d_backward(grad, before, [pool] * 2, [pool] * 2, [0, 0], False, True, None)
        wanted = (needs[0], needs[1], len(needs) > 2 and needs[2])
        found = operator_gradients(operator, s, grad, tensors[0], wanted)
        return found[0], found[1 : len(needs)], ()


class PerStep(Link):
    """A known operator whose batch norm takes the statistics of each step's batch.

    Running statistics are updated in every step, as by a batch norm that is called in every step.
    """

    def __init__(self, fixed: FixedConnection) -> None:
        bn = _batch_norm(fixed)
        super().__init__(fixed, (fixed.weight, bn.weight, bn.bias, fixed.bias))

    def first_response(self, t: int, s: Tensor, state: State) -> tuple[Tensor, State]:  # noqa: ARG002
        return self.fixed.respond(s, "batch", update_running=True), state

    def respond(self, t: int, s: Tensor, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor, State]:  # noqa: ARG002
        operator, bn = self.fixed.operator, _batch_norm(self.fixed)
        assert operator is not None  # a known connection
        weight, gamma, beta, *bias = tensors
        y = operator.apply(s, weight, bias[0] if bias else None)
        return self._finish(normalise_by_batch(bn, y, gamma, beta)), state


class TimeBatch(Link):
    """A known operator whose batch norm takes the statistics of all steps so far, of t * B samples in step t.

    The state is their mean and biased variance per channel, and the gradient flows through it. Running statistics are
    updated once, by those of all T * B samples.
    """

    def __init__(self, fixed: FixedConnection) -> None:
        bn = _batch_norm(fixed)
        super().__init__(fixed, (fixed.weight, bn.weight, bn.bias, fixed.bias))

    def start(self) -> State:
        return (torch.zeros_like(self.tensors[2]), torch.zeros_like(self.tensors[2]))

    def respond(self, t: int, s: Tensor, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor, State]:
        operator, bn = self.fixed.operator, _batch_norm(self.fixed)
        assert operator is not None  # a known connection
        weight, gamma, beta, *bias = tensors
        y = operator.apply(s, weight, bias[0] if bias else None).to(weight.dtype)
        now_mean, now_var, _ = batch_moments(bn, y)
        # two sets of samples joined (Chan, Golub & LeVeque 1979); the new one is 1 / (t + 1) of all
        share, (mean, var) = 1 / (t + 1), state
        step = now_mean - mean
        mean, var = mean + step * share, var + (now_var - var) * share + step**2 * (share * (1 - share))
        # batch_norm with given statistics would not differentiate them
        scale = gamma * torch.rsqrt(var + bn.eps)
        shape = (1, -1, *(1,) * (y.dim() - 2))
        return self._finish(y * scale.view(shape) + (beta - mean * scale).view(shape)), (mean, var)

    def finish(self, state: State, steps: int, batch: int) -> None:
        operator, bn, (mean, var) = self.fixed.operator, _batch_norm(self.fixed), state
        assert operator is not None  # a known connection
        values = steps * batch * math.prod(operator.output_shape(self.fixed.input_shape)[1:])
        update_running_statistics(bn, mean, var, batch_count(bn, mean.new_full((1,), values)))


class Own(Link):
    """A user's module with frozen statistics. Its response is computed once more for its gradient."""

    def __init__(self, fixed: FixedConnection) -> None:
        op = fixed.connection.op
        self._names = [name for name, _ in op.named_parameters()]
        super().__init__(fixed, [parameter for _, parameter in op.named_parameters()])
        # they change (running statistics with this forward, power iterations with the next one) before the backward
        self._buffers = {name: buffer.clone() for name, buffer in op.named_buffers()}

    def first_response(self, t: int, s: Tensor, state: State) -> tuple[Tensor, State]:  # noqa: ARG002
        return self.fixed.frozen(s), state

    def respond(self, t: int, s: Tensor, state: State, tensors: Sequence[Tensor]) -> tuple[Tensor, State]:  # noqa: ARG002
        op, values = self.fixed.connection.op, dict(zip(self._names, tensors, strict=True))
        with batch_norm_scope(op, "running", update_running=False):
            response = functional_call(op, {**values, **self._buffers}, (s,)).to(s.dtype)
        return self._finish(response), state


def make_link(fixed: FixedConnection, statistics: Statistics) -> Link:
    """The link of a connection of the chain.

    Raises:
        ValueError: for statistics of the spikes in a user's module that contains batch norm.
    """
    connection = fixed.connection
    if statistics == "frozen" or not connection.uses_batch_statistics:
        return Folded(fixed) if connection.is_known else Own(fixed)
    if not connection.is_known:
        raise ValueError(
            f"bn={statistics!r} needs the batch norm to be that of the connection, but {type(connection.op).__name__} "
            "brings its own: use Connection(op, batch_norm=True) on a known module, or bn='frozen'"
        )
    return PerStep(fixed) if statistics == "per_step" else TimeBatch(fixed)


def _batch_norm(fixed: FixedConnection) -> BatchNorm:
    bn = fixed.connection.bn
    assert bn is not None  # only connections with one have links that ask for it
    return bn
