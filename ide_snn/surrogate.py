"""Firing functions with a surrogate derivative, for training through time with autograd.

A neuron fires where x = u - V_th >= 0. The step has no useful derivative, so the backward pass takes the derivative g'
of a smooth "primitive" g instead (Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine 36, 2019). Each surrogate is
defined once, by g' and g, and has two modes:

    spiking=True     value 1 where x >= 0 (equality fires), else 0      gradient g'(x)
    spiking=False    value g(x)                                         gradient g'(x)

The second is an ordinary differentiable function, so a whole network can be checked by finite differences. The gradient
is differentiable again in both modes; in spiking mode that second derivative is g'', not that of the step. A NaN stays
a NaN in the value and in both functions: it never turns into a spike or into silence.

    fire = Sigmoid(alpha=4.0)      a module: nn.Sequential(nn.Linear(8, 8), fire); or sigmoid(x, alpha=4.0)
    s = fire(u - v_threshold)      any floating dtype and shape, for example [B, C, H, W]; s has the dtype of x

Adding one: its fields are its options, with their valid range; enter it in `SURROGATES` to choose it by name. The
primitive may be left out where none is wanted. Defaults are those of SpikingJelly 2.0.

    @dataclass(eq=False, repr=False)
    class Gaussian(Surrogate):
        width: float = option(1.0, above=0)

        def derivative(self, x: Tensor) -> Tensor:
            return torch.exp(-((x / self.width) ** 2) / 2)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

_P = ParamSpec("_P")


def option(default: float, **bound: float) -> Any:
    """A dataclass field whose value must be finite and, with `above=a` (`minimum=a`), greater than a (at least a)."""
    return field(default=default, metadata=bound)


def heaviside(x: Tensor) -> Tensor:
    """1 where x >= 0, 0 where x < 0, NaN where x is NaN, in the dtype of x; its derivative is 0 everywhere."""
    return x.clamp(0, 0).masked_fill(x >= 0, 1)  # the clamp keeps a NaN, a comparison alone would make it 0


def _by_sign(x: Tensor, negative: Callable[[Tensor], Tensor], positive: Callable[[Tensor], Tensor]) -> Tensor:
    # Each branch sees only its own half: the unused one would overflow, and autograd turns inf * 0 into NaN.
    return torch.where(x < 0, negative(x.clamp(max=0)), positive(x.clamp(min=0)))


class _Fire(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:
        value = heaviside(x) if surrogate.spiking else surrogate.primitive(x)
        # Autocast computes some functions of half-precision numbers in float32. Where nothing is to be converted,
        # `to` is not called: with it at the end, `torch.compile` of torch 2.11 makes the gradient 0.
        return value if value.dtype == x.dtype else value.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (grad * ctx.surrogate.derivative(x)).to(x.dtype), None


@dataclass(eq=False, repr=False)
class Surrogate(nn.Module):
    """Base of all surrogates: a module without parameters or state whose dataclass fields are its options.

    Args:
        spiking: the step as value, or the primitive (see the module).

    Immutable (`dataclasses.replace` makes a changed one); equal if class and options are equal. A ValueError for an
    option outside its range, or `spiking=False` where there is no primitive.
    """

    spiking: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__init__()
        if not isinstance(self.spiking, bool):
            raise ValueError(f"{type(self).__name__}: spiking must be True or False, got {self.spiking!r}")
        for f in dataclasses.fields(self)[1:]:
            value, above = getattr(self, f.name), f.metadata.get("above", -math.inf)
            minimum = f.metadata.get("minimum", above)
            kind = "an integer" if f.type == "int" else "a number"
            valid = isinstance(value, int if f.type == "int" else (int, float)) and not isinstance(value, bool)
            if not (valid and above < value < math.inf and value >= minimum):
                limits = ", ".join(f"{word} {limit}" for word, limit in f.metadata.items())
                raise ValueError(f"{type(self).__name__}: {f.name} must be {kind}, finite, {limits}; got {value!r}")
        if not self.spiking:
            self.primitive(torch.empty(0))  # raises where there is none

    def derivative(self, x: Tensor) -> Tensor:
        """g'(x), element by element."""
        raise NotImplementedError(f"{type(self).__name__} must define derivative(x)")

    def primitive(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """g(x), element by element; a ValueError if this surrogate has none."""
        raise ValueError(f"{type(self).__name__} has no primitive, only a derivative; use it with spiking=True")

    def forward(self, x: Tensor) -> Tensor:
        """The spikes (or g(x)) for x = u - V_th, same shape and dtype; a TypeError if x is not floating-point."""
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} needs a floating-point tensor (u - v_threshold), got {x.dtype}")
        return _Fire.apply(x, self)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in asdict(self).items() if (k, v) != ("spiking", True))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name in self.__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"{name} is fixed; dataclasses.replace(surrogate, {name}=...) copies")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surrogate) and type(self) is type(other) and asdict(self) == asdict(other)

    # By identity, as for any module (and for tensors): `nn.Module.modules` keeps a set of those seen, and the second of
    # two equal surrogates in one network must not be lost from it.
    __hash__ = nn.Module.__hash__


@dataclass(eq=False, repr=False)
class PiecewiseQuadratic(Surrogate):
    """Triangle of height alpha: g' = max(alpha - alpha^2 |x|, 0), g = 1/2 + alpha x - alpha^2 x |x| / 2 for
    |x| <= 1/alpha, else 0 or 1. Esser et al., PNAS 113 (2016); Bellec et al., NeurIPS 2018."""

    alpha: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.relu(self.alpha - self.alpha**2 * x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        z = (self.alpha * x).clamp(-1, 1)
        return 0.5 + z - 0.5 * z * z.abs()


@dataclass(eq=False, repr=False)
class PiecewiseExp(Surrogate):
    """g' = alpha/2 exp(-alpha |x|), g = exp(alpha x) / 2 for x < 0, 1 - exp(-alpha x) / 2 for x >= 0.
    Shrestha & Orchard (SLAYER), NeurIPS 2018."""

    alpha: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 * torch.exp(-self.alpha * x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        return _by_sign(x, lambda z: 0.5 * torch.exp(self.alpha * z), lambda z: 1 - 0.5 * torch.exp(-self.alpha * z))


@dataclass(eq=False, repr=False)
class Sigmoid(Surrogate):
    """g' = alpha g (1 - g), g = 1 / (1 + exp(-alpha x)). Wu et al. (STBP), Frontiers in Neuroscience 12 (2018)."""

    alpha: float = option(4.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        # g(x) g(-x): 1 - g would cancel for large x
        return self.alpha * torch.sigmoid(self.alpha * x) * torch.sigmoid(-self.alpha * x)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * x)


@dataclass(eq=False, repr=False)
class SoftSign(Surrogate):
    """g' = alpha / (2 (1 + alpha |x|)^2), g = (1 + alpha x / (1 + alpha |x|)) / 2: the fast sigmoid of Zenke & Ganguli,
    Neural Computation 30 (2018), scaled to [0, 1]."""

    alpha: float = option(2.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / (2 * (1 + self.alpha * x.abs()) ** 2)

    def primitive(self, x: Tensor) -> Tensor:
        return _by_sign(x, lambda z: 0.5 / (1 - self.alpha * z), lambda z: 1 - 0.5 / (1 + self.alpha * z))


@dataclass(eq=False, repr=False)
class SuperSpike(Surrogate):
    """g' = alpha / (1 + |x|)^2, no primitive. Zenke & Ganguli, Neural Computation 30 (2018): the derivative of the fast
    sigmoid, the steepness being that of x; alpha scales the height."""

    alpha: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / (1 + x.abs()) ** 2


@dataclass(eq=False, repr=False)
class ATan(Surrogate):
    """g' = alpha / (2 (1 + (pi alpha x / 2)^2)), g = 1/2 + arctan(pi alpha x / 2) / pi. Fang et al., ICCV 2021."""

    alpha: float = option(2.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / (2 * (1 + (math.pi / 2 * self.alpha * x) ** 2))

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 + torch.atan(math.pi / 2 * self.alpha * x) / math.pi


@dataclass(eq=False, repr=False)
class NonzeroSignLogAbs(Surrogate):
    """g' = alpha / (1 + alpha |x|), g = sign(x) ln(1 + alpha |x|): unbounded, with a heavy tail. Offered by the field's
    libraries; no paper introduces it."""

    alpha: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / (1 + self.alpha * x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        return _by_sign(x, lambda z: -torch.log1p(-self.alpha * z), lambda z: torch.log1p(self.alpha * z))


@dataclass(eq=False, repr=False)
class Erf(Surrogate):
    """Gaussian g' = alpha exp(-alpha^2 x^2) / sqrt(pi), g = (1 + erf(alpha x)) / 2. Wu et al. (STBP), Frontiers in
    Neuroscience 12 (2018)."""

    alpha: float = option(2.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / math.sqrt(math.pi) * torch.exp(-((self.alpha * x) ** 2))

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 * torch.erfc(-self.alpha * x)


@dataclass(eq=False, repr=False)
class PiecewiseLeakyReLU(Surrogate):
    """g' = 1 / (2 w) for |x| <= w, else c; g = 1/2 + x / (2 w) inside, with tails of slope c. The window of Wu et al.
    (STBP), Frontiers in Neuroscience 12 (2018), with a leak outside, so that no gradient vanishes."""

    w: float = option(1.0, above=0)
    c: float = option(0.01, minimum=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.c + (1 / (2 * self.w) - self.c) * heaviside(self.w - x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        inside = x.clamp(-self.w, self.w)
        return 0.5 + inside / (2 * self.w) + self.c * (x - inside)


@dataclass(eq=False, repr=False)
class SquarewaveFourierSeries(Surrogate):
    """Fourier series of a square wave with period T_period, over the odd harmonics h = 1, 3, ..., 2 n - 3:
    g' = 4 / T_period sum cos(2 pi h x / T_period), g = 1/2 + 2 / pi sum sin(2 pi h x / T_period) / h. n >= 2 counts one
    more than the terms, as the reference values do. Offered by the field's libraries; no paper introduces it."""

    n: int = option(2, minimum=2)
    T_period: float = option(8.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return 4 / self.T_period * torch.stack([torch.cos(w * x) for w in self._frequencies()]).sum(0)

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 + 4 / self.T_period * torch.stack([torch.sin(w * x) / w for w in self._frequencies()]).sum(0)

    def _frequencies(self) -> list[float]:
        return [2 * math.pi * h / self.T_period for h in range(1, 2 * self.n - 2, 2)]


@dataclass(eq=False, repr=False)
class S2NN(Surrogate):
    """x < 0: g = sigmoid(alpha x), g' = alpha g (1 - g); x >= 0: g = 1/2 + beta ln(1 + x), g' = beta / (1 + x).
    Suetake et al., Neural Networks 159 (2023), arXiv 2201.10879."""

    alpha: float = option(4.0, above=0)
    beta: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        a = self.alpha
        return _by_sign(x, lambda z: a * torch.sigmoid(a * z) * torch.sigmoid(-a * z), lambda z: self.beta / (1 + z))

    def primitive(self, x: Tensor) -> Tensor:
        return _by_sign(x, lambda z: torch.sigmoid(self.alpha * z), lambda z: 0.5 + self.beta * torch.log1p(z))


@dataclass(eq=False, repr=False)
class QPseudoSpike(Surrogate):
    """g' = r^-alpha, g = r^(1 - alpha) / 2 for x < 0, 1 - r^(1 - alpha) / 2 for x >= 0; r = 1 + 2 |x| / (alpha - 1),
    and alpha > 1 sets the weight of the tail. Herranz-Celotti & Rouat, arXiv 2202.00282 (2022)."""

    alpha: float = option(2.0, above=1)

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + 2 / (self.alpha - 1) * x.abs()) ** -self.alpha

    def primitive(self, x: Tensor) -> Tensor:
        scale, power = 2 / (self.alpha - 1), 1 - self.alpha
        return _by_sign(x, lambda z: 0.5 * (1 - scale * z) ** power, lambda z: 1 - 0.5 * (1 + scale * z) ** power)


@dataclass(eq=False, repr=False)
class LeakyKReLU(Surrogate):
    """g' = leak for x < 0, k for x >= 0; g = leak x or k x: a leaky ReLU (Maas, Hannun & Ng, ICML workshop 2013) with
    a free slope k."""

    leak: float = option(0.0, minimum=0)
    k: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.leak + (self.k - self.leak) * heaviside(x)

    def primitive(self, x: Tensor) -> Tensor:
        return _by_sign(x, lambda z: self.leak * z, lambda z: self.k * z)


@dataclass(eq=False, repr=False)
class FakeNumericalGradient(Surrogate):
    """g' = min(1 / |x|, alpha), no primitive: the slope sign(x) / x of a chord of the sign function from 0 to x, at
    most alpha. Offered by the field's libraries; no paper introduces it."""

    alpha: float = option(0.3, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / x.abs().clamp(min=1 / self.alpha)


@dataclass(eq=False, repr=False)
class LogTailedReLU(Surrogate):
    """g' = alpha for x <= 0, 1 for 0 < x <= 1, 1 / x above; g = alpha x, x, 1 + ln x. Cai et al. (HWGQ), CVPR 2017."""

    alpha: float = option(0.0, minimum=0)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x <= 0, self.alpha, 1 / x.clamp(min=1))

    def primitive(self, x: Tensor) -> Tensor:
        return torch.where(x <= 0, self.alpha * x, x.clamp(max=1) + torch.log(x.clamp(min=1)))


@dataclass(eq=False, repr=False)
class Rect(Surrogate):
    """Window g' = alpha for |x| <= 1 / (2 alpha), else 0; g = clamp(1/2 + alpha x, 0, 1). Wu et al. (STBP),
    Frontiers in Neuroscience 12 (2018)."""

    alpha: float = option(1.0, above=0)

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha * heaviside(0.5 / self.alpha - x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        return (0.5 + self.alpha * x).clamp(0, 1)


def _function(surrogate: Callable[_P, Surrogate]) -> Callable[Concatenate[Tensor, _P], Tensor]:
    """The function f(x, *options) of a surrogate."""

    def fire(x: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        return surrogate(*args, **kwargs)(x)

    fire.__doc__ = surrogate.__doc__
    return fire


SURROGATES: dict[str, type[Surrogate]] = {
    "piecewise_quadratic": PiecewiseQuadratic,
    "piecewise_exp": PiecewiseExp,
    "sigmoid": Sigmoid,
    "soft_sign": SoftSign,
    "super_spike": SuperSpike,
    "atan": ATan,
    "nonzero_sign_log_abs": NonzeroSignLogAbs,
    "erf": Erf,
    "piecewise_leaky_relu": PiecewiseLeakyReLU,
    "squarewave_fourier_series": SquarewaveFourierSeries,
    "s2nn": S2NN,
    "q_pseudo_spike": QPseudoSpike,
    "leaky_k_relu": LeakyKReLU,
    "fake_numerical_gradient": FakeNumericalGradient,
    "log_tailed_relu": LogTailedReLU,
    "rect": Rect,
}

piecewise_quadratic, piecewise_exp = _function(PiecewiseQuadratic), _function(PiecewiseExp)
sigmoid, soft_sign, super_spike = _function(Sigmoid), _function(SoftSign), _function(SuperSpike)
atan, erf, nonzero_sign_log_abs = _function(ATan), _function(Erf), _function(NonzeroSignLogAbs)
piecewise_leaky_relu, leaky_k_relu = _function(PiecewiseLeakyReLU), _function(LeakyKReLU)
squarewave_fourier_series = _function(SquarewaveFourierSeries)
s2nn, q_pseudo_spike, rect = _function(S2NN), _function(QPseudoSpike), _function(Rect)
fake_numerical_gradient, log_tailed_relu = _function(FakeNumericalGradient), _function(LogTailedReLU)
