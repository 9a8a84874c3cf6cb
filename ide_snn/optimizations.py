"""Constraints on the feedback weight, as torch parametrizations.

    W_fb = clip(alpha, -c, c) W / ||W||           alpha learnable, stored unclipped, clipped in use

With ||.|| a bound of the operator norm and c = gamma V_th (gamma = 0.5 in the paper, so c = 1 for V_th = 2),
||W_fb|| <= gamma V_th and the equilibrium map of a network with one population is a contraction (up to the lag of
the estimate, see below); with a norm that does not bound the operator, nothing is promised.
Source: Xiao et al., NeurIPS 2021, section 4.4 and appendix; which norm is meant is a choice here:

| name                        | ||W||                                                      | bounds the operator |
| --------------------------- | ---------------------------------------------------------- | ------------------- |
| `spectral_matrix`           | 2-norm of W as the matrix (output channels, the rest)      | linear only         |
| `spectral_matrix_first_dim` | the same with the first dimension; differs if transposed   | linear only         |
| `spectral_operator`         | 2-norm of the convolution at its real spatial size         | yes                 |
| `frobenius`                 | root of the sum of squares                                 | linear only         |
| `weight_norm`               | 2-norm of each output channel, with an alpha for each      | no                  |
| `none`                      | no constraint                                              | no                  |

2-norms are estimated by power iteration, one step per training forward and none in evaluation. The estimate
approaches from below, so it starts converged; `excess` measures what training has moved it away.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ide_snn import spectral
from ide_snn.dropout import VariationalDropout as VariationalDropout
from ide_snn.operators import Operator
from ide_snn.precision import without_autocast
from ide_snn.singular import leading

log = logging.getLogger(__name__)


class NormConstraint(nn.Module):
    """W -> clip(alpha, -c, c) W / ||W||; subclasses say which norm.

    Reading the weight changes nothing. `update` advances the norm's estimate; a constrained module that is
    called by itself does so once per training forward, `FeedbackSNN` once per training forward of the block.

    Args:
        operator: geometry of the constrained module.
        weight: its initial weight; alpha starts at ||weight||, so nothing changes unless ||weight|| > c.
        bound: c > 0.

    Raises:
        ValueError: for a bound that is not positive, or a weight that is zero or not finite.
    """

    alpha: nn.Parameter

    def __init__(self, operator: Operator, weight: Tensor, bound: float) -> None:
        super().__init__()
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"the bound c on the norm must be positive and finite, got {bound}")
        if operator.kind == "conv_transposed" and operator.groups != 1:
            raise ValueError("constraints do not support grouped transposed convolutions: use groups=1")
        self.operator = operator
        self.bound = bound
        _check_weight(weight)

    def _start(self, weight: Tensor) -> None:
        self.alpha = nn.Parameter(self.norm(weight.detach()).detach().clone())

    def norm(self, weight: Tensor) -> Tensor:
        """The norm (or its current estimate), differentiable in `weight`; broadcasts against it."""
        raise NotImplementedError

    def exact_norm(self, weight: Tensor) -> Tensor:
        """The norm without estimation error, for reports and tests; not differentiable."""
        return self.norm(weight.detach())

    def require_input(self, operator: Operator, shape: tuple[int, ...]) -> None:
        """Raises ValueError where the norm is of another operator (what the module is now) or inputs [C, H, W]."""

    def update(self, weight: Tensor, *, native: bool = False) -> None:
        """Improves the estimate by one step; norms in closed form have nothing to improve.

        Args:
            native: by compiled kernels, where there are any for this norm and this weight.
        """

    def excess(self, weight: Tensor) -> float:
        """max(true norm / estimate) - 1: by how much ||W_fb|| <= c may be exceeded at present."""
        return float((self.exact_norm(weight) / self.norm(weight.detach())).max()) - 1

    def forward(self, weight: Tensor) -> Tensor:
        return (self.alpha.clamp(-self.bound, self.bound) / self.norm(weight)) * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the constrained weight sets W; its length has no effect, alpha keeps the norm."""
        _check_weight(weight)
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class PowerIteration(NormConstraint):
    """A norm sigma = <u, K v> of a linear map K, by power iteration on its singular vectors u and v.

    Norms stay out of autocast: a bound rounded to 8 bits is none.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        operator: Operator,
        weight: Tensor,
        bound: float,
        *,
        input_size: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(operator, weight, bound)
        self.input_size = input_size
        weight = weight.detach()
        device = "cpu" if generator is None else generator.device  # whatever torch's default device is
        start = torch.randn(self._shape_of_v(weight), generator=generator, dtype=torch.float64, device=device)
        self.register_buffer("v", start.to(weight) / start.norm().to(weight))
        self.register_buffer("u", self.times(weight, self.v))
        self.converge(weight)
        self._start(weight)
        name, norm, excess = type(self).__name__, float(self.norm(weight)), self.excess(weight)
        log.debug("%s: norm %.6g, true/estimated - 1 = %.1e", name, norm, excess)

    def _shape_of_v(self, weight: Tensor) -> tuple[int, ...]:
        raise NotImplementedError

    def times(self, weight: Tensor, v: Tensor) -> Tensor:
        """K v."""
        raise NotImplementedError

    def adjoint_times(self, weight: Tensor, u: Tensor) -> Tensor:
        """K^T u."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, weight: Tensor, *, native: bool = False) -> None:  # noqa: ARG002
        with without_autocast(weight.device.type):
            self.v.copy_(_unit(self.adjoint_times(weight, self.u)))
            self.u.copy_(_unit(self.times(weight, self.v)))

    @torch.no_grad()
    def converge(self, weight: Tensor) -> None:
        """Sets u and v to the leading singular vectors.

        By Lanczos: power iteration creeps where singular values cluster, as those of convolutions do, and
        stopped at a relative change of 1e-6 it was seen to be 0.4 % too low.
        """
        self.v.copy_(self._leading(weight)[1])
        with without_autocast(weight.device.type):
            self.u.copy_(_unit(self.times(weight, self.v)))
        self.update(weight)

    def _leading(self, weight: Tensor) -> tuple[float, Tensor]:
        """||K||_2 and its right singular vector, in float64, from a start of its own."""
        weight = weight.detach().double()
        with without_autocast(weight.device.type):
            return leading(
                lambda v: self.times(weight, v), lambda u: self.adjoint_times(weight, u), self.v.shape, weight.device
            )

    def right_inverse(self, weight: Tensor) -> Tensor:
        super().right_inverse(weight)
        self.converge(weight.detach())
        return weight

    def norm(self, weight: Tensor) -> Tensor:
        with without_autocast(weight.device.type):
            # clones: a later update must not change what autograd has saved of this forward
            return (self.u.clone() * self.times(weight, self.v.clone())).sum()


class SpectralMatrix(PowerIteration):
    """||W||_2 of W reshaped to (output channels, rest), the paper's norm."""

    _step: tuple[tuple[int, int], Tensor] | None = None  # `spectral.state` of the last compiled update, and its s

    @torch.no_grad()
    def update(self, weight: Tensor, *, native: bool = False) -> None:
        matrix = self.matrix(weight)
        if native and spectral.fits(matrix, weight):
            self._step = spectral.state(weight), weight.new_tensor(spectral.step_(matrix, self.u, self.v))
        else:
            self._step = None
            super().update(weight)

    def take_step(self, weight: Tensor) -> tuple[Tensor | None, bool]:
        """(<u, M v>, True) once after a compiled update with this weight, else (None, False)."""
        step, self._step = self._step, None
        if step is None or step[0] != spectral.state(weight) or not spectral.fits(self.matrix(weight), weight):
            return None, False
        return step[1], True

    def forward(self, weight: Tensor) -> Tensor:
        self.require_one_alpha()
        with without_autocast(weight.device.type):
            product: Tensor = spectral.OfUnitNorm.apply(weight, self.alpha, self)
        return product

    def require_one_alpha(self) -> None:
        """Raises ValueError where alpha, which a user may have put there, is not one number."""
        if self.alpha.numel() != 1:
            raise ValueError(f"alpha of a spectral constraint is one number, got {list(self.alpha.shape)}")

    def add_outer_(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """Adds u v^T to the matrix of a contiguous `weight`, in place."""
        if self.operator.output_dim_of_weight == 0:
            self.matrix(weight).addr_(u, v)  # a view
        else:
            rows = weight.transpose(0, self.operator.output_dim_of_weight)
            rows.add_(torch.outer(u, v).view(rows.shape))

    def matrix(self, weight: Tensor) -> Tensor:
        if self.operator.kind == "linear":
            return weight
        return weight.transpose(0, self.operator.output_dim_of_weight).flatten(1)

    def _shape_of_v(self, weight: Tensor) -> tuple[int, ...]:
        return (self.matrix(weight).shape[1],)

    def times(self, weight: Tensor, v: Tensor) -> Tensor:
        return torch.mv(self.matrix(weight), v)

    def adjoint_times(self, weight: Tensor, u: Tensor) -> Tensor:
        return torch.mv(self.matrix(weight).t(), u)

    def exact_norm(self, weight: Tensor) -> Tensor:
        matrix = self.matrix(weight.detach()).double()
        # the Gram matrix of the short side: an eigenvalue problem of a few hundred instead of a full SVD
        gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
        return torch.linalg.eigvalsh(gram)[-1].sqrt()


class SpectralMatrixFirstDim(SpectralMatrix):
    """||W||_2 of W reshaped to (first dimension, rest): for weights made by the original code only."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def add_outer_(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        self.matrix(weight).addr_(u, v)


class SpectralOperator(PowerIteration):
    """The true operator norm of the (transposed) convolution on inputs of [C, *input_size]."""

    def _shape_of_v(self, weight: Tensor) -> tuple[int, ...]:  # noqa: ARG002
        if self.operator.kind == "linear":
            return (1, self.operator.in_channels)
        if self.input_size is None or len(self.input_size) != 2:
            raise ValueError("constraint spectral_operator needs input_size=(height, width) of the convolution's input")
        return (1, self.operator.in_channels, *self.input_size)

    def require_input(self, operator: Operator, shape: tuple[int, ...]) -> None:
        if operator != self.operator:
            raise ValueError(
                f"constraint spectral_operator was made for {self.operator} and bounds nothing for {operator}: "
                "remove_constraint, then constrain the module anew"
            )
        if self.v.shape[1:] != shape:
            raise ValueError(
                f"constraint spectral_operator was made for inputs {list(self.v.shape[1:])} and bounds nothing for "
                f"{list(shape)}: give input_size={tuple(shape[1:])}"
            )

    def times(self, weight: Tensor, v: Tensor) -> Tensor:
        return self.operator.apply(v, weight)

    def adjoint_times(self, weight: Tensor, u: Tensor) -> Tensor:
        return self.operator.adjoint(u, weight, tuple(self.v.shape[1:]))

    def exact_norm(self, weight: Tensor) -> Tensor:
        exact, _ = self._leading(weight)
        return torch.tensor(exact, dtype=torch.float64, device=weight.device)


class Frobenius(NormConstraint):
    """||W||_F, an upper bound of the matrix 2-norm in closed form."""

    def __init__(self, operator: Operator, weight: Tensor, bound: float) -> None:
        super().__init__(operator, weight, bound)
        self._start(weight)

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm()


class WeightNorm(NormConstraint):
    """Each output channel has its own length: alpha has one entry per channel (Salimans & Kingma, 2016).

    Every |alpha| <= c leaves ||W_fb||_2 up to c sqrt(output channels): this one does not bound the operator.
    """

    def __init__(self, operator: Operator, weight: Tensor, bound: float) -> None:
        super().__init__(operator, weight, bound)
        if bool((self.norm(weight.detach()) == 0).any()):
            raise ValueError("weight_norm: an output channel has only zero weights; initialise it first")
        self._start(weight)

    def norm(self, weight: Tensor) -> Tensor:
        channel = self.operator.output_dim_of_weight
        others = [d for d in range(weight.dim()) if d != channel]
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


CONSTRAINTS: dict[str, type[NormConstraint] | None] = {
    "spectral_matrix": SpectralMatrix,
    "spectral_operator": SpectralOperator,
    "frobenius": Frobenius,
    "weight_norm": WeightNorm,
    "none": None,
    "spectral_matrix_first_dim": SpectralMatrixFirstDim,
}


def constrain(
    module: nn.Module,
    name: str,
    *,
    bound: float = 1.0,
    input_size: tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Constrains `module.weight` in place and returns the module.

    Args:
        module: `nn.Linear`, `nn.Conv2d` or `nn.ConvTranspose2d`, with its initial weight.
        name: a key of `CONSTRAINTS`.
        bound: c; the norm in use exceeds it by as much as the estimate of ||W|| lags behind, see `excess`.
        input_size: (height, width) of the module's input; `spectral_operator` on convolutions needs it. Inputs of
            another size are refused.
        generator: for the start of the power iteration.

    Raises:
        ValueError: unknown name, or a bound, weight or size the constraint cannot work with.
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"unknown constraint {name!r}; valid are {', '.join(CONSTRAINTS)}")
    if get_constraint(module) is not None:
        raise ValueError("the module's weight is already constrained; remove that constraint first")
    kind = CONSTRAINTS[name]
    if kind is None:
        return module
    operator, weight = Operator.of(module), module.weight
    assert isinstance(weight, Tensor)  # narrows the type of nn.Module's attribute
    if issubclass(kind, PowerIteration):
        constraint: NormConstraint = kind(operator, weight, bound, input_size=input_size, generator=generator)
    else:
        constraint = kind(operator, weight, bound)
    parametrize.register_parametrization(module, "weight", constraint)
    module.register_forward_pre_hook(advance_before_training_forward)
    return module


def advance_before_training_forward(module: nn.Module, _inputs: object) -> None:
    """The forward pre-hook of constrained modules: called by themselves, they advance their estimate."""
    if module.training:
        update_constraints(module, recurse=False)


def get_constraint(module: nn.Module) -> NormConstraint | None:
    """The constraint on `module.weight`, or None."""
    # what parametrize.is_parametrized asks, without torch's search for an attribute that most modules do not have
    parametrizations = module._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict) or "weight" not in parametrizations:
        return None
    return next((p for p in parametrizations["weight"].children() if isinstance(p, NormConstraint)), None)


def raw_weight(module: nn.Module) -> Tensor:
    """The W that a constrained module's optimizer sees; `module.weight` is alpha W / ||W||."""
    if get_constraint(module) is None:
        return module.weight  # type: ignore[return-value]
    return module.parametrizations["weight"].original  # type: ignore[index,union-attr]


def update_constraints(module: nn.Module, *, recurse: bool = True, native: bool = False) -> None:
    """One step of every norm estimate in `module`; each training forward needs exactly one."""
    for host in module.modules() if recurse else (module,):
        constraint = get_constraint(host)
        if constraint is not None:
            constraint.update(raw_weight(host), native=native)


def remove_constraint(module: nn.Module) -> nn.Module:
    """Leaves a plain parameter with the constrained value.

    Raises:
        ValueError: if there is none.
    """
    if get_constraint(module) is None:
        raise ValueError(f"{type(module).__name__} has no constrained weight")
    hooks = module._forward_pre_hooks  # torch has no public way to look one up
    for key in [k for k, hook in hooks.items() if hook is advance_before_training_forward]:
        del hooks[key]
    kind = type(module)  # torch takes the weight from this class of its making, which copies of the module share
    module.__class__ = type(kind.__name__, kind.__bases__, {**vars(kind)})
    return parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _check_weight(weight: Tensor) -> None:
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("cannot constrain a weight that contains NaN or infinity")
    if not bool(weight.any()):
        raise ValueError("cannot constrain a zero weight: its norm is 0; initialise it first")


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x)
