"""Connections between populations, and the same connections with everything fixed for one forward.

A connection is an affine map (linear | conv | transposed conv | a user's own module), then optionally batch
norm, average pooling and variational dropout. During one forward its weight, statistics and dropout gain are
fixed and shared by all time steps, by the equilibrium map f and by its Jacobian:

    Connection --prepare--> FixedConnection --affine--> Affine
     parameters              weight computed once,       detached, batch norm folded into the weight;
                             gain drawn once             y -> K y + b and the adjoint K^T
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ide_snn import memory
from ide_snn.affinity import Probe
from ide_snn.dropout import VariationalDropout
from ide_snn.normalization import (
    BatchNorm,
    Statistics,
    batch_moments,
    batch_norm_for,
    batch_norm_scope,
    fold,
    normalise,
    require_features,
)
from ide_snn.operators import KNOWN_MODULES, Operator
from ide_snn.optimizations import constrain, get_constraint, raw_weight, update_constraints
from ide_snn.torch_modules import returns_what_nobody_keeps, runs_as_torch_wrote_it

Apply = Callable[[Operator, Tensor, Tensor, Tensor | None], Tensor]


class Connection(nn.Module):
    """An affine map between populations.

    Args:
        op: `nn.Linear`, `nn.Conv2d`, `nn.ConvTranspose2d` (solved with analytic adjoints), or any module that is
            affine once its batch norms use fixed statistics (solved with autograd products).
        batch_norm: normalise the output channels (known modules only; a user's module brings its own).
        pool: kernel size and stride of average pooling; 1 is none.
        dropout: probability of variational dropout of the output.
        constraint: constraint on `op.weight`, see `ide_snn.optimizations`.
        bound: its c, without effect for "none". The derivative of the feedback is at most c / V_th long where the norm
            bounds the operator: the paper's c is 0.5 V_th.
        input_size: (height, width) of the input; `spectral_operator` needs it, and is for inputs of this size.
        generator: for the start of the constraint's power iteration.

    Raises:
        ValueError: for an option the module cannot have, or dropout inside a user's module.
    """

    def __init__(
        self,
        op: nn.Module,
        *,
        batch_norm: bool = False,
        pool: int = 1,
        dropout: float = 0.0,
        constraint: str = "none",
        bound: float = 1.0,
        input_size: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        known = isinstance(op, KNOWN_MODULES)
        if not known and (batch_norm or constraint != "none"):
            names = ", ".join(m.__name__ for m in KNOWN_MODULES)
            raise ValueError(
                f"batch_norm and constraint are for {names}; inside your {type(op).__name__} use torch's batch norm "
                "and ide_snn.optimizations.constrain on its linear parts"
            )
        if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in op.modules()):
            raise ValueError(
                f"{type(op).__name__} contains torch dropout, whose mask would change in every time step; "
                "use Connection(..., dropout=p)"
            )
        if any(isinstance(m, VariationalDropout) and m.drops for m in op.modules()):
            raise ValueError(
                f"{type(op).__name__} contains variational dropout, which does nothing inside a connection, where one "
                "mask is drawn for all time steps: use Connection(..., dropout=p) outside, and no module around it"
            )
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        if known:
            Operator.of(op)  # raises for what it has no geometry of
        self.op = op
        self.pool = pool
        self.bn = batch_norm_for(op) if batch_norm else None
        self.dropout = VariationalDropout(dropout)
        if constraint != "none":
            constrain(op, constraint, bound=bound, input_size=input_size, generator=generator)
        self._probed: dict[tuple[int, ...], Probe] = {}  # what own modules were found to be, by input shape

    @property
    def operator(self) -> Operator | None:
        """Geometry of a known module; None for any other, also one with a forward of its own or hooks."""
        return Operator.of(self.op) if runs_as_torch_wrote_it(self.op) else None

    @property
    def is_known(self) -> bool:
        """True where adjoints are analytic."""
        return self.operator is not None

    @property
    def uses_batch_statistics(self) -> bool:
        """True where a training forward of f normalises by statistics of the batch."""
        if isinstance(self.op, KNOWN_MODULES):  # then there is at most its own
            return self.bn is not None and self.bn.training
        return any(isinstance(m, BatchNorm) and m.training for m in self.modules())

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the response, without the batch, to an input of `shape` [C, H, W] or [C]."""
        return self._output_shape(self.operator, shape)

    def _output_shape(self, operator: Operator | None, shape: tuple[int, ...]) -> tuple[int, ...]:
        if operator is not None:
            output, constraint = operator.output_shape(shape), get_constraint(self.op)
            if constraint is not None:
                constraint.require_input(operator, shape)
            return _pooled(output, self.pool)
        probe = self._probed.get(shape)
        if probe is None or not probe.is_of(self.op):
            probe = self._probed[shape] = Probe.of(self.op, shape)
        return _pooled(probe.response, self.pool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probed": {}}  # a copy is looked at anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_probed": {}})

    def forward(self, x: Tensor) -> Tensor:
        """The connection by itself, gain * pool(BN(K x + b)), as an ordinary module; x [B, C, H, W] or [B, C].

        A `FeedbackSNN` does not call this: hooks on it see nothing of a simulation.
        """
        return self.prepare(tuple(x.shape[1:]), x).respond(x, "batch", update_running=True)

    def prepare(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        generator: torch.Generator | None = None,
        *,
        native: bool = False,
    ) -> FixedConnection:
        """Fixes this connection for one forward: advances its constraints, computes its weight, draws its gain.

        Args:
            shape: of the input, without the batch.
            like: a tensor [B, *] of the state's dtype and device; only B, dtype and device are read.
            generator: for the dropout gain.
            native: prepare for compiled kernels: gains of convolutions are channels-last; on a CPU gains are drawn by
                one, and constraints advance by one.
        """
        operator = self.operator
        if self.training:
            update_constraints(self.op, recurse=operator is None, native=native)
            if operator is None:
                _advance_parametrizations(self.op)
        output = self._output_shape(operator, shape)
        layout = torch.channels_last if native and len(output) == 3 else torch.contiguous_format
        template = memory.empty((len(like), *output), like.dtype, like.device, layout)
        gain = self.dropout.draw(template, generator, native=native)
        if gain is not None and ((gain.shape, gain.dtype) != (template.shape, template.dtype) or gain.is_neg()):
            gain = template.copy_(gain)  # of a dropout of one's own; kernels read every number
        if operator is None:
            return FixedConnection(self, None, None, None, gain, shape, output)
        weight, bias = cast(Tensor, self.op.weight), cast("Tensor | None", self.op.bias)
        self.require_sizes(operator, weight, bias)
        return FixedConnection(self, operator, weight, bias, gain, shape, output)

    def require_sizes(self, operator: Operator, weight: Tensor, bias: Tensor | None) -> None:
        """Raises ValueError unless weight, bias and batch norm, which a user may have put there, suit the operator."""
        operator.require_sizes(weight, bias)
        if self.bn is not None:
            require_features(self.bn, operator.out_channels)

    def feedback_diagnostics(self) -> dict[str, float]:
        """Norm in use, largest |alpha| stored, and the excess of the true norm over its estimate, for logs."""
        constraint = get_constraint(self.op)
        if constraint is None:
            return {}
        raw = raw_weight(self.op).detach()
        with torch.no_grad():
            ratio = constraint.exact_norm(raw) / constraint.norm(raw)
            used = constraint.alpha.clamp(-constraint.bound, constraint.bound) * ratio
        return {
            "feedback_norm": float(used.abs().max()),
            "alpha": float(constraint.alpha.detach().abs().max()),
            "norm_excess": float(ratio.max()) - 1,
        }

    def extra_repr(self) -> str:
        return f"pool={self.pool}" if self.pool > 1 else ""


@dataclass(frozen=True)
class FixedConnection:
    """A connection during one forward. `weight` and `bias` carry the graph to the parameters; None for own modules."""

    connection: Connection
    operator: Operator | None
    weight: Tensor | None
    bias: Tensor | None
    gain: Tensor | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def respond(
        self, x: Tensor, statistics: Statistics, *, update_running: bool = False, apply: Apply = Operator.apply
    ) -> Tensor:
        """gain * pool(BN(K x + b)), differentiable in x and in the parameters.

        Args:
            x: [B, *input_shape].
            statistics: what batch norms in training mode normalise by; others always use running ones.
            update_running: update the running statistics, which a training forward does exactly once.
            apply: how a known operator computes K x + b.
        """
        owner = self.connection
        if self.operator is None:
            with batch_norm_scope(owner.op, statistics, update_running=update_running):
                y = owner.op(x).to(x.dtype)  # it may compute in another type
        else:
            assert self.weight is not None  # known connections have one
            y = apply(self.operator, x, self.weight, self.bias)
        if owner.bn is not None:
            y = normalise(owner.bn, y, statistics, update_running=update_running)
        if owner.pool > 1:
            y = F.avg_pool2d(y, owner.pool)
        if self.gain is None:
            return y
        in_place = owner.bn is not None and returns_what_nobody_keeps(owner.bn)
        return y.mul_(self.gain) if in_place and y.dtype == self.gain.dtype else y * self.gain

    def product(self, x: Tensor, apply: Apply = Operator.apply) -> Tensor:
        """K x of a known connection, without its bias; arguments as of `respond`."""
        assert self.operator is not None  # of a known connection
        assert self.weight is not None
        return apply(self.operator, x, self.weight, None)

    @cached_property
    def frozen(self) -> Affine | OpaqueAffine:
        """The detached affine map with the running statistics at its first use in this forward."""
        return self.affine()

    @cached_property
    def plain(self) -> Affine:
        """`frozen` of a known connection without its gain."""
        assert isinstance(self.frozen, Affine)  # of a known connection
        return replace(self.frozen, gain=None)

    @cached_property
    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) per channel of batch norm in `frozen`."""
        assert self.connection.bn is not None  # asked of connections that have one
        return fold(self.connection.bn, None)

    @torch.no_grad()
    def frozen_response(self, y: Tensor) -> Tensor:
        """K x + b behind the batch norm of `frozen` from y = K x + b [B, *] in front of it; a new tensor."""
        if self.connection.bn is None:
            return y.clone()
        scale, shift = (vector.view(-1, *(1,) * (y.dim() - 2)) for vector in self.folded)
        return torch.addcmul(shift, y, scale)

    def affine(self, moments: tuple[Tensor, Tensor] | None = None) -> Affine | OpaqueAffine:
        """The detached affine map with frozen statistics.

        Args:
            moments: (mean, biased variance) per channel to normalise by, instead of the running ones.
        """
        owner = self.connection
        if self.operator is None:
            return OpaqueAffine(self)
        assert self.weight is not None  # known connections have one
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        if owner.bn is not None:
            with torch.no_grad():
                scale, shift = self.folded if moments is None else fold(owner.bn, moments)
            weight = weight * self.operator.per_output(scale)
            bias = shift if bias is None else bias * scale + shift
        return Affine(self.operator, weight, bias, owner.pool, self.gain, self.input_shape)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and biased variance per channel of K x + b, where this connection's batch norm uses the batch's."""
        bn = self.connection.bn
        if bn is None or not bn.training or self.weight is None or self.operator is None:
            return None
        with torch.no_grad():
            y = self.operator.apply(x, self.weight, self.bias)
            mean, var, _ = batch_moments(bn, y)
        return mean, var


@dataclass(frozen=True)
class Affine:
    """x -> gain * pool(K x + b) and its adjoint, for one of the known operators; carries no graph."""

    operator: Operator
    weight: Tensor
    bias: Tensor | None
    pool: int
    gain: Tensor | None
    input_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self._finish(self.operator.apply(x, self.weight, self.bias))

    def linear(self, x: Tensor) -> Tensor:
        """The linear part, gain * pool(K x)."""
        return self._finish(self.operator.apply(x, self.weight))

    def _finish(self, y: Tensor) -> Tensor:
        if self.pool > 1:
            y = F.avg_pool2d(y, self.pool)
        return y if self.gain is None else y.mul_(self.gain)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """K^T pool^T (gain * scale * y); y is not modified."""
        if scale is not None:
            y = y * scale
        if self.gain is not None:
            y = y * self.gain
        if self.pool > 1:
            y = _unpool(y, self.pool, self.operator.output_shape(self.input_shape))
        return self.operator.adjoint(y, self.weight, self.input_shape)

    @cached_property
    def rounded_weight(self) -> Tensor:
        """The weight of a convolution in bfloat16, channels-last: as products have it, in which it needs no copy."""
        return self.weight.to(torch.bfloat16, memory_format=torch.channels_last)

    @property
    def is_silent_at_zero(self) -> bool:
        """True where no input spikes means no output, so that the product can be skipped."""
        return self.bias is None


@dataclass(frozen=True)
class OpaqueAffine:
    """A user's affine module with frozen statistics; no adjoint of its own."""

    fixed: FixedConnection

    def __call__(self, x: Tensor) -> Tensor:
        return self.fixed.respond(x, "running")

    @property
    def gain(self) -> Tensor | None:
        return self.fixed.gain

    @property
    def is_silent_at_zero(self) -> bool:
        return False


def as_connection(module: object) -> Connection:
    """A Connection itself; any other module wrapped into one.

    Raises:
        ValueError: for what is no module.
    """
    if isinstance(module, Connection):
        return module
    if not isinstance(module, nn.Module):
        raise ValueError(f"a connection must be a module, got {type(module).__name__}")
    return Connection(module)


def cached_weights() -> AbstractContextManager[None]:
    """Scope in which parametrized weights of users' modules are computed once; for use without gradients."""
    return parametrize.cached()


@torch.no_grad()
def _advance_parametrizations(op: nn.Module) -> None:
    """Reads the parametrized tensors of a user's module once in training mode, as a forward of its own would.

    Parametrizations that advance when they are read (torch's spectral_norm) do so once per training forward; during
    the forward itself the module is in evaluation mode.
    """
    for module in op.modules():
        if parametrize.is_parametrized(module) and get_constraint(module) is None:
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, name)


def _pooled(shape: tuple[int, ...], pool: int) -> tuple[int, ...]:
    if pool == 1:
        return shape
    if len(shape) != 3 or min(shape[1:]) < pool:
        raise ValueError(f"cannot pool {list(shape)} by {pool}: pooling needs [C, H, W] with H, W >= {pool}")
    return (shape[0], shape[1] // pool, shape[2] // pool)


def _unpool(y: Tensor, pool: int, shape: tuple[int, ...]) -> Tensor:
    """Adjoint of average pooling; rows and columns that pooling drops get zero."""
    spread = F.interpolate(y, scale_factor=pool, mode="nearest") / pool**2
    return F.pad(spread, (0, shape[2] - spread.shape[3], 0, shape[1] - spread.shape[2]))
