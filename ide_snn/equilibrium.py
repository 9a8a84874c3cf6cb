"""The equilibrium map f of a feedback SNN and products with its Jacobian.

    a_1 = sigma((W_fb a_n + Xbar) / V_th)       a_i = sigma(layer_i(a_{i-1}) / V_th),  i = 2..n
    composed: a_n = f(a_n)

    J w = D_n K_n ... D_2 K_2 D_1 K_fb w / V_th^n         D_i = sigma' (0 or 1 per neuron), K linear parts
    J^T v = K_fb^T D_1 K_2^T D_2 ... K_n^T D_n v / V_th^n

Source: Xiao et al., NeurIPS 2021, sections 4.1 to 4.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ide_snn import conv_rates, convolutions, integers
from ide_snn.convolutions import SPARSE_BESIDE_BFLOAT16, RoundedMap, is_sparse
from ide_snn.dense import DenseMap
from ide_snn.event_driven import EventMap, channels_last
from ide_snn.firing import fire, fire_
from ide_snn.layers import FixedConnection
from ide_snn.native import Factor
from ide_snn.neurons import NeuronParams, sigma, sigma_mask
from ide_snn.normalization import Statistics
from ide_snn.operators import Operator
from ide_snn.precision import Precision, rounds_convolutions
from ide_snn.record import Path
from ide_snn.simulation import EVENT_PATHS
from ide_snn.solvers import LinearProblem, Rough
from ide_snn.solvers.ahead import Ahead
from ide_snn.torch_modules import returns_what_nobody_keeps

Products = Literal["auto", "analytic", "autograd"]
BFLOAT16_NOISE = 2e-3  # error of J^T v with factors and results in bfloat16, in units of ||v||


class Known(NamedTuple):
    """A response factor y + shift without its gain, per channel, of y [B, *]; None is 1 and 0."""

    y: Tensor
    factor: Tensor | None = None
    shift: Tensor | None = None


class LinearMap(Protocol):
    """The linear part of a connection and its adjoint, such as `Affine`."""

    def linear(self, x: Tensor) -> Tensor: ...

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor: ...


class Linearisation(Protocol):
    """J at one point; both products act on tensors of the shape of a_n [B, *] and carry no graph."""

    def matvec(self, w: Tensor) -> Tensor:
        """J w."""
        ...

    def rmatvec(self, v: Tensor) -> Tensor:
        """J^T v."""
        ...


@dataclass(frozen=True)
class EquilibriumMap:
    """a -> f(a) for the connections and the drive of one forward.

    Attributes:
        feedback, layers: the recurrent connections, fixed for this forward.
        drive: Xbar [B, *], with its graph to the input stage.
        neuron: threshold and leak (f depends on the threshold only).
        path: how the simulation was computed; with events the analytic products of J with convolutions skip the zeros
            of the slopes, and solves use compiled vector work.
        precision: of float32 products on a GPU, and of gradients, see `ide_snn.precision`.
        ahead: J -> how a solve runs ahead of the host, on a GPU.
    """

    feedback: FixedConnection
    layers: Sequence[FixedConnection]
    drive: Tensor
    neuron: NeuronParams
    path: Path = "dense"
    precision: Precision = "float32"
    ahead: Callable[[Linearisation], Ahead] | None = None

    @property
    def chain(self) -> tuple[FixedConnection, ...]:
        return (self.feedback, *self.layers)

    @property
    def is_known(self) -> bool:
        """True where every connection has an analytic adjoint."""
        return all(link.operator is not None for link in self.chain)

    @property
    def couples_samples(self) -> bool:
        """True where f with batch statistics makes a sample's rates depend on the others'."""
        return any(link.connection.uses_batch_statistics for link in self.chain)

    @property
    def takes_integers(self) -> bool:
        """True where fully connected connections may be in 16-bit whole numbers, as `DenseMap(..., whole=True)`."""
        return self.path in EVENT_PATHS and integers.allowed(self.precision)

    @property
    def rounds_convolutions(self) -> bool:
        """True where convolutions of event-driven paths may be rounded, as `convolutions.apply(..., rounded=True)`."""
        return rounds_convolutions(self.precision, self.drive.device)

    def __call__(self, a: Tensor, statistics: Statistics, *, update_running: bool = False) -> Tensor:
        """f(a), differentiable in a, the drive and the connections' parameters; [B, *]."""
        return sigma(self.activations(a, statistics, update_running=update_running)[-1])

    def activations(self, a: Tensor, statistics: Statistics, *, update_running: bool = False) -> list[Tensor]:
        """z_1..z_n, the arguments of sigma in f(a), with their graph; z_i has the shape of population i."""
        z = [self.feedback.respond(a, statistics, update_running=update_running) + self.drive]
        for layer in self.layers:
            z[-1] = z[-1] / self.neuron.v_threshold
            z.append(layer.respond(sigma(z[-1]), statistics, update_running=update_running))
        z[-1] = z[-1] / self.neuron.v_threshold
        return z

    def rates_and_slopes(
        self, a: Tensor, response: Tensor | None = None, *, also_frozen: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Known]]:
        """(f(a), the slopes of `linearise_with`, responses for `frozen_rates`) for event-driven paths.

        Uses batch statistics and updates the running ones, as a training forward does; f(a) is differentiable once.
        Up to the first batch norm f with running statistics has the same products.

        Args:
            a: point [B, *].
            response: K_fb a + b of the feedback with running statistics, where it is known.
            also_frozen: find these responses, and no slopes, which are those of `frozen_rates` then.
        """
        slopes: list[Tensor] = []
        frozen: list[Known] = []
        for number in range(len(self.chain)):
            shared = also_frozen and all(before.connection.bn is None for before in self.chain[:number])
            a, slope, known = self._fire(
                number, a, None if number else response, with_slope=not also_frozen, shared=shared
            )
            slopes += [] if slope is None else [slope]
            frozen += [] if known is None else [known]
        return a, slopes, frozen

    def _fire(
        self, number: int, a: Tensor, response: Tensor | None, *, with_slope: bool, shared: bool
    ) -> tuple[Tensor, Tensor | None, Known | None]:
        """(rate, slope, response with running statistics if `shared`) of one connection of `rates_and_slopes`."""
        link, v_threshold, rounded = self.chain[number], self.neuron.v_threshold, self.rounds_convolutions
        known = None
        if number and conv_rates.suits(link, len(a)):
            y = link.product(a, functools.partial(convolutions.apply, rounded=rounded, as_computed=True))
            is_rounded = self._takes_bfloat16(number + 1)
            rate, slope = conv_rates.rates(link, y, v_threshold, rounded=is_rounded, with_slope=with_slope)
            if shared:
                known = Known(y.detach(), link.folded[0], link.plain.bias)
            return rate, slope, known
        linear, products = replace(link, gain=None), _Products(rounded)
        products.known = response if link.connection.bn is None else None
        behind = linear.respond(a, "batch", update_running=True, apply=products)
        if shared:
            known = Known(link.frozen_response(products.value.detach()) if response is None else response)
        if link.connection.bn is not None and not returns_what_nobody_keeps(link.connection.bn):
            behind = behind.clone()
        rate, slope = fire(behind, link.gain, None if number else self.drive, v_threshold)
        return rate, slope if with_slope else None, known

    def _takes_bfloat16(self, number: int) -> bool:
        """True where the input of a connection of this number may be rounded."""
        operator = self.chain[number].operator if number < len(self.chain) else None
        return operator is not None and operator.suits_onednn and self.rounds_convolutions

    @torch.no_grad()
    def frozen_rates(self, a: Tensor, known: Sequence[Known] = ()) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(what each connection is given in f(a), the slopes of `linearise_with`, sigma'(z_1) / V_th).

        For event-driven paths, with running statistics, without a graph.

        Args:
            a: point [B, *].
            known: responses of the first connections, where they are known; that of the feedback, whose factor and
                shift are None, is overwritten.
        """
        v_threshold, rounded = self.neuron.v_threshold, self.rounds_convolutions
        affine, product = self.feedback.plain, functools.partial(convolutions.apply, rounded=rounded)
        y = known[0].y if known else product(affine.operator, a, affine.weight, affine.bias)
        inputs = [a]
        a, slope, through = fire_(channels_last(y), self.feedback.gain, self.drive, v_threshold)
        slopes = [slope]
        assert through is not None  # there is a drive
        for number, link in enumerate(self.layers, 1):
            affine = link.plain
            if number < len(known):
                y, factor, shift = known[number]
            else:
                y, factor, shift = convolutions.linear(affine, a, rounded=rounded), None, affine.bias
            inputs.append(a)
            behind = conv_rates.response(y, factor, shift, link.gain, v_threshold)
            a, slopes_of_a = behind.fire(rounded=self._takes_bfloat16(number + 1))
            assert slopes_of_a is not None  # asked for
            slopes.append(slopes_of_a)
        return inputs, slopes, through

    def linearise(
        self, a: Tensor, statistics: Statistics, products: Products = "auto", *, response: Tensor | None = None
    ) -> Linearisation:
        """J at a.

        Args:
            a: point [B, *].
            statistics: what the chain's batch norms normalise by.
            products: "analytic" (known connections and running statistics only), "autograd" (anything), or
                "auto", which takes the analytic ones where it can.
            response: K_fb a + b of the feedback with running statistics, where it is known; overwritten.

        Raises:
            ValueError: if analytic products are asked for where there are none.
        """
        couples = statistics == "batch" and self.couples_samples
        analytic = not couples and self.is_known
        if products == "analytic" and not analytic:
            raise ValueError(
                "analytic products need known connections (linear, conv, transposed conv) and running statistics; "
                "use products='auto' or 'autograd'"
            )
        if analytic and products != "autograd":
            if self.path in EVENT_PATHS:
                return self.linearise_with(self.frozen_rates(a, () if response is None else (Known(response),))[1])
            return self.linearise_by(self._frozen_activations(a))
        with torch.enable_grad():
            point = a.detach().requires_grad_()
            return AutogradLinearisation(point, self(point, statistics))

    def linearise_by(self, activations: Sequence[Tensor]) -> AnalyticLinearisation:
        """J with running statistics for activations z_1..z_n that are already known.

        Each slope sigma'(z_i) / V_th takes in the dropout gain of the connection before it.
        """
        slopes = []
        for link, z in zip(self.chain, activations, strict=True):
            slope = sigma_mask(z.detach()).to(torch.promote_types(z.dtype, torch.float32)).div_(self.neuron.v_threshold)
            slopes.append(slope if link.gain is None else slope.mul_(link.gain))
        return self.linearise_with(slopes)

    def linearise_with(self, slopes: Sequence[Tensor]) -> AnalyticLinearisation:
        """J with running statistics and these slopes of the connections, gain_i sigma'(z_i) / V_th."""
        maps: list[LinearMap] = []
        for link in self.chain:
            plain = link.plain  # callers have seen that all connections are known
            if self.path in EVENT_PATHS:
                # that of fully connected populations skips zeros where they are most of a vector
                maps.append(DenseMap(plain) if plain.operator.kind == "linear" else EventMap(plain))
            else:
                maps.append(plain)
        return AnalyticLinearisation(tuple(maps), tuple(slopes))

    def adjoint_problem(self, jacobian: Linearisation, g: Tensor, *, coupled: bool = False) -> LinearProblem:
        """v = g + J^T v, with the kernels that the path allows.

        Args:
            jacobian: of this map.
            g: right-hand side, of the shape of a_n [B, *].
            coupled: J mixes the samples of the batch.
        """
        native = self.path in EVENT_PATHS
        factors = rough = None
        if native and not coupled and isinstance(jacobian, AnalyticLinearisation):
            factors = jacobian.transposed_factors()
            rounded = jacobian.in_whole_numbers() if self.takes_integers else None
            if rounded is None and self.rounds_convolutions:
                rounded = jacobian.in_bfloat16()
            rough = None if rounded is None else rounded.as_rough()
        g = g if factors is None else channels_last(g)  # the order in memory that the kernels read
        ahead = None if self.ahead is None or coupled else self.ahead(jacobian)
        return LinearProblem(
            jacobian.rmatvec, g, coupled=coupled, native=native, factors=factors, rough=rough, ahead=ahead
        )

    @torch.no_grad()
    def _frozen_activations(self, a: Tensor) -> list[Tensor]:
        z = [(self.feedback.frozen(a) + self.drive) / self.neuron.v_threshold]
        for layer in self.layers:
            z.append(layer.frozen(sigma(z[-1])) / self.neuron.v_threshold)
        return z


class _Products:
    """`convolutions.apply` with what it has computed, or is to take as known."""

    known: Tensor | None
    value: Tensor

    def __init__(self, rounded: bool) -> None:
        self._rounded = rounded

    def __call__(self, operator: Operator, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.value = convolutions.apply(operator, x, weight, bias, rounded=self._rounded, known=self.known)
        return self.value


@dataclass(frozen=True)
class AnalyticLinearisation:
    """Products by the connections' own adjoints; `slopes` are gain_i sigma'(z_i) / V_th."""

    maps: tuple[LinearMap, ...]
    slopes: tuple[Tensor, ...]

    def transposed_factors(self) -> Callable[[], tuple[Factor, ...]] | None:
        """What makes J^T as kernels, once; None where a map has no such kernel."""
        maps = [link for link in self.maps if isinstance(link, (EventMap, DenseMap))]
        if len(maps) < len(self.maps):
            return None

        @functools.cache
        def factors() -> tuple[Factor, ...]:
            pairs = zip(reversed(maps), reversed(self.slopes), strict=True)
            return tuple(link.adjoint_factor(slope) for link, slope in pairs)

        return factors

    def in_whole_numbers(self) -> AnalyticLinearisation | None:
        """With J^T of fully connected maps in 16-bit whole numbers; None where there are others."""
        if not all(isinstance(link, DenseMap) and link.can_be_whole for link in self.maps):
            return None
        return replace(self, maps=tuple(replace(cast(DenseMap, link), whole=True) for link in self.maps))

    def in_bfloat16(self) -> AnalyticLinearisation | None:
        """With products in bfloat16; None where that is not faster than walks over what all the slopes leave."""
        if not all(map(_suits_bfloat16, self.maps, self.slopes)):
            return None
        return replace(self, maps=tuple(RoundedMap(cast(EventMap, link).affine) for link in self.maps))

    def as_rough(self) -> Rough:
        """J^T of rounded maps, as solves have it."""
        linear = [link for link in self.maps if isinstance(link, DenseMap)]
        noise = sum(integers.noise(len(link.affine.weight)) for link in linear) if linear else BFLOAT16_NOISE
        return Rough(self.rmatvec, noise, self.transposed_factors())

    def matvec(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            for link, slope in zip(self.maps, self.slopes, strict=True):
                w = link.linear(w) * slope
        return w

    def rmatvec(self, v: Tensor) -> Tensor:
        dtype = v.dtype
        with torch.no_grad():
            for link, slope in zip(reversed(self.maps), reversed(self.slopes), strict=True):
                v = link.adjoint(v, slope)
        return v.to(dtype)  # of rounded maps it is bfloat16


def _suits_bfloat16(link: LinearMap, slope: Tensor) -> bool:
    if not isinstance(link, EventMap) or not link.affine.operator.suits_onednn:
        return False
    return not is_sparse(slope, SPARSE_BESIDE_BFLOAT16)


@dataclass(frozen=True)
class AutogradLinearisation:
    """Products through the graph of f at `point`, which is built once and kept."""

    point: Tensor
    value: Tensor

    def rmatvec(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.value, self.point, v, retain_graph=True)[0]

    def matvec(self, w: Tensor) -> Tensor:
        # J w is the derivative of v -> <J^T v, w>, which is linear in v
        with torch.enable_grad():
            v = torch.zeros_like(self.value, requires_grad=True)
            (product,) = torch.autograd.grad(self.value, self.point, v, create_graph=True)
            return torch.autograd.grad(product, v, w)[0]


def dense_jacobian(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix [N, N] of a linear map on tensors of the shape of `like`, column by column; small N only."""
    basis = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.stack([product(e.view_as(like)).flatten() for e in basis], dim=1)
