"""The spiking neuron: its parameters, one time step, its firing rate, and the activation of its equilibrium.

Integrate-and-fire (IF) and leaky integrate-and-fire (LIF) with soft reset are one model with a leak lambda:

    u <- u + I                      integrate the input current I (same unit as the threshold)
    s  = 1 where u >= V_th          fire; equality fires
    u <- lambda * (u - V_th * s)    soft reset, then leak; lambda = 1 is IF

Source: Xiao et al., NeurIPS 2021, sections 3.1 and 4.1; time is counted in steps.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeuronParams:
    """What distinguishes one neuron model from another.

    Args:
        v_threshold: firing threshold V_th > 0, in the unit of the membrane potential.
        leak: lambda in (0, 1], the share of the membrane kept per time step; 1.0 is IF, below it LIF.

    Raises:
        ValueError: for values outside these ranges.
        TypeError: for what is no number.
    """

    v_threshold: float = 2.0
    leak: float = 1.0

    def __post_init__(self) -> None:
        for name in ("v_threshold", "leak"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not (math.isfinite(self.v_threshold) and self.v_threshold > 0):
            raise ValueError(f"v_threshold must be a positive finite number, got {self.v_threshold}")
        if not 0 < self.leak <= 1:
            raise ValueError(f"leak must lie in (0, 1] (1.0 is the IF neuron), got {self.leak}")

    def total_weight(self, time_steps: int) -> float:
        """sum_{t=1..T} lambda^(T-t), the normaliser of every weighted time average."""
        # summed term by term: the closed form (1 - lambda^T) / (1 - lambda) cancels for lambda close to 1
        return math.fsum(self.leak**k for k in range(time_steps))


def step(current: Tensor, u: Tensor, params: NeuronParams) -> tuple[Tensor, Tensor]:
    """One time step, as a pure function.

    Args:
        current: input current [B, *].
        u: membrane potential before the step [B, *]; not modified.

    Returns:
        (spikes, u): spikes in {0, 1} and the membrane potential after reset and leak, both [B, *].
    """
    u = u + current
    spikes = (u >= params.v_threshold).to(u.dtype)
    return spikes, params.leak * (u - params.v_threshold * spikes)


def step_(current: Tensor, u: Tensor, spikes: Tensor, params: NeuronParams) -> None:
    """`step` without allocations: overwrites `u` and `spikes`, with the same rounding."""
    u.add_(current)
    torch.ge(u, params.v_threshold, out=spikes)
    u.sub_(spikes, alpha=params.v_threshold)
    if params.leak != 1:
        u.mul_(params.leak)


def rate_weights(time_steps: int, leak: float, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights w_t = lambda^(T-t) / sum_k lambda^(T-k) of the firing rate a = sum_t w_t s[t]; shape [T]."""
    exponents = torch.arange(time_steps - 1, -1, -1, dtype=torch.float64, device="cpu")
    weights = torch.full((time_steps,), leak, dtype=torch.float64, device="cpu") ** exponents
    return (weights / weights.sum()).to(dtype)


def time_average(x: Tensor, leak: float, dtype: torch.dtype) -> Tensor:
    """sum_t w_t x[t] for x of shape [T, B, *] (any dtype, bool spikes too); differentiable; shape [B, *]."""
    weights = rate_weights(x.shape[0], leak).tolist()
    average = x[0].to(dtype) * weights[0]
    for weight, frame in zip(weights[1:], x[1:], strict=True):
        average = average + frame.to(dtype) * weight
    return average


def sigma(z: Tensor) -> Tensor:
    """sigma(z) = clamp(z, 0, 1), the equilibrium firing rate for the input z = current / V_th.

    Its derivative is 1 on the closed interval: the gradient passes at equality.
    """
    return z.clamp(0, 1)


def sigma_mask(z: Tensor) -> Tensor:
    """sigma'(z) as a bool tensor: True on [0, 1]."""
    return (z >= 0) & (z <= 1)


def require_finite(x: Tensor) -> None:
    """Raises ValueError where an input has NaN or infinity."""
    # one pass says it of nearly every input; the sum of finite numbers may overflow
    if not (math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x).all())):
        raise ValueError(
            f"input has {int((~torch.isfinite(x)).sum())} values that are NaN or infinite: check its normalisation"
        )
