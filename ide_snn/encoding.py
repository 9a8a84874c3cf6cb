"""Encoders: real-valued inputs [B, C, H, W] as input over time [T, B, C, H, W].

An encoder is a frozen dataclass with a method `encode(x, time_steps, generator=None)`. Spikes are bool, counts uint8
and signed spikes int8 tensors, all on the device of x; cast them where they meet weights (0 and 1 are exact in every
dtype). [B, C, H, W] stands for any shape with the batch first. Stochastic encoders draw from `generator` (on the device
of x; the global one without it), so the same seed gives the same spikes; the others ignore it. Only `Direct` passes a
gradient back to x.

    spikes = Bernoulli().encode(x, time_steps=10, generator=torch.Generator().manual_seed(0))

Values outside an encoder's range are an error, not clipped: a network normally wants them rescaled, and clipping would
hide that. Inputs normalised by mean and standard deviation are outside [0, 1]: encode first, or use `Direct`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Generator, Tensor

__all__ = ["ENCODERS", "Bernoulli", "Delta", "Direct", "Encoder", "Latency", "Poisson", "Population"]


class Encoder(Protocol):
    """What all encoders have in common."""

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:
        """Input over time [T, B, C, H, W] for x [B, C, H, W].

        Raises:
            TypeError: if x is not floating-point.
            ValueError: if `time_steps` is not a positive integer, or x is outside the encoder's range.
        """


@dataclass(frozen=True)
class Direct:
    """Constant current: the real values themselves at every step, as one expanded view (no copy; do not write to it).

    Any range. The first layer then does the encoding (Rueckauer et al., Frontiers in Neuroscience 11, 2017).
    """

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:  # noqa: ARG002
        _check(self, x, time_steps)
        return x.expand(time_steps, *x.shape)


@dataclass(frozen=True)
class Bernoulli:
    """Rate coding: at every step a spike with probability rate * x, independently; bool [T, B, C, H, W].

    The field calls this "Poisson encoding", since for small probabilities it approaches a Poisson process of that
    intensity seen through short time bins. Its counts are binomial, with variance T p (1 - p) instead of T p, and an
    input of 1 fires at every step (rate 1), without noise. `Poisson` draws true Poisson counts.

    Args:
        rate: firing probability per step of the input 1, in (0, 1]. Inputs lie in [0, 1].
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.rate <= 1, f"Bernoulli: rate is a probability in (0, 1], got {self.rate}")

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:
        _check(self, x, time_steps, 0, 1)
        probability = (self.rate * _at_least_float32(x.detach())).expand(time_steps, *x.shape)
        return torch.empty(probability.shape, dtype=torch.bool, device=x.device).bernoulli_(
            probability, generator=generator
        )


@dataclass(frozen=True)
class Poisson:
    """True Poisson counts: at every step the number of spikes ~ Poisson(rate * x); uint8 [T, B, C, H, W].

    Mean and variance are both rate * x per step (a Poisson process in bins of one step), so a count may exceed 1.

    Args:
        rate: expected spikes per step of the input 1, in (0, 100], so that uint8 holds them. Inputs lie in [0, 1].
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.rate <= 100, f"Poisson: rate (spikes per step) must lie in (0, 100], got {self.rate}")

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:
        _check(self, x, time_steps, 0, 1)
        mean = self.rate * _at_least_float32(x.detach())
        counts = torch.empty((time_steps, *x.shape), dtype=torch.uint8, device=x.device)
        for frame in counts:  # step by step: the float counts of all steps would take four times the memory
            frame.copy_(torch.poisson(mean, generator=generator))
        return counts


@dataclass(frozen=True)
class Latency:
    """Time to first spike: each value fires at most once, the larger the earlier; bool [T, B, C, H, W].

    1 fires at step 0 and 0 at the last step, T - 1; the time is rounded to a step:

        linear        t = (T - 1) (1 - x)                                    tau=None
        logarithmic   t = -tau ln(x + (1 - x) exp(-(T - 1) / tau))           tau in steps

    The logarithmic one is the time at which a threshold exp(-t / tau) has fallen to x (Park et al., T2FSNN, DAC 2020),
    with a floor that makes 0 fire last. Small tau spreads the dark values over time; for large tau the code is linear.

    Args:
        tau: time constant of the logarithmic code, in steps; None is linear.
        off_below: values below it never fire; at 0.0 every value fires once. Inputs lie in [0, 1].
    """

    tau: float | None = None
    off_below: float = 0.0

    def __post_init__(self) -> None:
        valid = self.tau is None or (self.tau > 0 and math.isfinite(self.tau))
        _require(valid, f"Latency: tau must be positive and finite (in steps), or None for linear, got {self.tau}")
        _require(0 <= self.off_below <= 1, f"Latency: off_below must lie in [0, 1], got {self.off_below}")

    def times(self, x: Tensor, time_steps: int) -> Tensor:
        """The step in 0 .. T - 1 of each value's spike, int64 [B, C, H, W], disregarding `off_below`."""
        _check(self, x, time_steps, 0, 1)
        x, last = _at_least_float32(x.detach()), time_steps - 1
        if self.tau is None:
            return (last * (1 - x)).round().long()
        floor = math.exp(-last / self.tau)
        # exp(-last / tau) may underflow: then 0 has no finite time
        return (-self.tau * torch.log(x + (1 - x) * floor)).round().clamp(0, last).long()

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:  # noqa: ARG002
        times = self.times(x, time_steps).masked_fill(x < self.off_below, time_steps)
        steps = torch.arange(time_steps, device=x.device)
        return times == steps.view(-1, *[1] * x.dim())


OffSpikes = Literal["none", "negative", "channel"]


@dataclass(frozen=True)
class Delta:
    """Changes of a sequence x [T, B, C, H, W]: an on spike where it rose by the threshold or more, an off spike where
    it fell by as much. `time_steps` must be the sequence's length. Any finite range.

    A static image has no changes, so it is refused rather than encoded as silence. The first frame has no predecessor
    and gives no spikes; put a frame of zeros before it to encode it as a change from darkness.

    Args:
        threshold: smallest change that fires, > 0, in the unit of x; equality fires.
        off_spikes: what a fall gives: `none` (nothing; bool [T, B, C, H, W]), `negative` (-1; int8 [T, B, C, H, W]) or
            `channel` (a spike in channels of its own, behind the on spikes; bool [T, B, 2 C, H, W]. Event files are the
            other way round: their channel 0 is the fall).
        accumulate: False compares with the frame before; True with the value at the pixel's last spike, so that slow
            changes add up until they fire, as in an event camera (Lichtsteiner et al., IEEE JSSC 43, 2008).
    """

    threshold: float = 0.1
    off_spikes: OffSpikes = "none"
    accumulate: bool = False

    def __post_init__(self) -> None:
        valid = self.threshold > 0 and math.isfinite(self.threshold)
        _require(valid, f"Delta: threshold must be positive and finite, got {self.threshold}")
        _require(
            self.off_spikes in get_args(OffSpikes),
            f"Delta: off_spikes is one of {get_args(OffSpikes)}, got {self.off_spikes!r}",
        )

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:  # noqa: ARG002
        _check(self, x, time_steps, -math.inf, math.inf)
        if x.dim() < 3 or x.shape[0] != time_steps:
            raise ValueError(
                f"Delta encodes the changes of a sequence [T, B, C, ...] with T = time_steps = {time_steps}, got shape "
                f"{tuple(x.shape)}. A static image has none: use bernoulli, poisson, latency or direct for it"
            )
        change = self._changes(x.detach())
        on, off = change >= self.threshold, change <= -self.threshold
        if self.off_spikes == "negative":
            return on.to(torch.int8) - off.to(torch.int8)
        return on if self.off_spikes == "none" else torch.cat([on, off], dim=2)

    def _changes(self, x: Tensor) -> Tensor:
        if not self.accumulate:
            return torch.cat([torch.zeros_like(x[:1]), x.diff(dim=0)])
        changes, reference = torch.zeros_like(x), x[0]
        for change, frame in zip(changes, x, strict=True):
            change.copy_(frame - reference)
            reference = torch.where(change.abs() >= self.threshold, frame, reference)
        return changes


@dataclass(frozen=True)
class Population:
    """Each value as the spike times of m neurons with overlapping Gaussian receptive fields; bool [T, B, C * m, H, W].

    Neuron i = 1 .. m (channel c * m + i - 1) responds to its channel's value by

        r_i = exp(-(x - mu_i)^2 / (2 s^2)),  mu_i = low + (i - 3/2) d,  s = d / beta,  d = (high - low) / (m - 2)

    and fires once at step round((T - 1) (1 - r_i)), the best fitting neuron first, unless r_i < cutoff (Bohte, La
    Poutre & Kok, IEEE Transactions on Neural Networks 13, 2002). `responses` gives the r_i for other codes, such as
    `Bernoulli().encode(Population().responses(x), T)`.

    Args:
        neurons: m >= 3 per value.
        low, high: range of the inputs.
        beta: > 0; the larger, the narrower the fields. The paper uses 1 to 2.
        cutoff: responses below it stay silent, in [0, 1].
    """

    neurons: int = 8
    low: float = 0.0
    high: float = 1.0
    beta: float = 1.5
    cutoff: float = 0.1

    def __post_init__(self) -> None:
        valid = isinstance(self.neurons, int) and self.neurons >= 3
        _require(valid, f"Population: neurons must be an integer >= 3 (per value), got {self.neurons!r}")
        _require(math.isfinite(self.high - self.low) and self.low < self.high, "Population: needs finite low < high")
        _require(self.beta > 0 and math.isfinite(self.beta), f"Population: beta must be positive, got {self.beta}")
        _require(0 <= self.cutoff <= 1, f"Population: cutoff must lie in [0, 1], got {self.cutoff}")

    def responses(self, x: Tensor) -> Tensor:
        """r in [0, 1], [B, C * m, H, W], for x [B, C, H, W]."""
        _check(self, x, 1, self.low, self.high)
        if x.dim() < 2:
            raise ValueError(f"Population widens the channels of x [B, C, ...], got shape {tuple(x.shape)}")
        x, spacing = _at_least_float32(x.detach()), (self.high - self.low) / (self.neurons - 2)
        centres = self.low + spacing * (torch.arange(self.neurons, dtype=x.dtype, device=x.device) - 0.5)
        distance = x.unsqueeze(2) - centres.view(-1, *[1] * (x.dim() - 2))
        return torch.exp(-((distance * self.beta / spacing) ** 2) / 2).flatten(1, 2)

    def encode(self, x: Tensor, time_steps: int, generator: Generator | None = None) -> Tensor:  # noqa: ARG002
        return Latency(off_below=self.cutoff).encode(self.responses(x), time_steps)


ENCODERS: dict[str, type[Encoder]] = {
    "direct": Direct,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "latency": Latency,
    "delta": Delta,
    "population": Population,
}


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)


def _at_least_float32(x: Tensor) -> Tensor:
    # 8 bits of bfloat16 are too few for probabilities and times
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(encoder: Encoder, x: Tensor, time_steps: int, low: float | None = None, high: float = 1) -> None:
    """Dtype, number of steps and, unless `low` is None, range; the range costs one synchronisation on a GPU."""
    name = type(encoder).__name__
    if isinstance(time_steps, bool) or not isinstance(time_steps, int) or time_steps < 1:
        raise ValueError(f"{name}: time_steps must be a positive integer, got {time_steps!r}")
    if not x.is_floating_point():
        raise TypeError(f"{name} needs a floating-point tensor, got {x.dtype}; for 8-bit images encode x.float() / 255")
    if low is None or x.numel() == 0:
        return
    smallest, largest = (value.item() for value in torch.aminmax(x.detach()))  # NaN if there is one
    if not (low <= smallest <= largest <= high and math.isfinite(largest - smallest)):
        remedy = "(x - low) / (high - low) with the data's low and high rescales, x / 255 for 8-bit images"
        raise ValueError(f"{name} needs finite values in [{low}, {high}], got {smallest} to {largest}; {remedy}")
