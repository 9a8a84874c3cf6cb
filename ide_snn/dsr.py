"""Spiking neurons trained by differentiation on spike representation (DSR): `DSRIFNode` and `DSRLIFNode`.

The value of a node is its simulated spike train; its gradient is that of the spike representation, a clamped
weighted mean of the input, so that nothing is propagated back through the time steps:

    U[t] = leak V[t-1] + gain x[t]              charge, V[0] = 0
    s[t] = 1 where U[t] >= alpha V_th           fire; equality fires
    V[t] = U[t] - V_th s[t]                     soft reset, by the full threshold
    y[t] = V_th / delta_t * s[t]                output

    o    = sum_t w_t y[t]                       spike representation, w_t = leak^(T-t) / sum_k leak^(T-k)
         ~ clamp(sum_t w_t x[t] / tau, 0, V_th / delta_t)

| node | leak              | gain     | tau, delta_t |
| ---- | ----------------- | -------- | ------------ |
| IF   | 1                 | 1        | 1, 1         |
| LIF  | exp(-delta_t/tau) | 1 - leak | as given     |

Time is in the unit of tau and delta_t; V, x and V_th share a unit; y is in that unit per time.
The gradient is the derivative of the clamp with every y[t] standing for o. With G = sum_t dL/dy[t]:

    dL/dx[t]  = w_t / tau * G      where 0 <= sum_t w_t x[t] / tau <= V_th / delta_t, else 0
    dL/dV_th  = sum G / delta_t    over the neurons above V_th / delta_t

What `compat="spikingjelly"` (measured on SpikingJelly 2.0.0) does differently, side by side with the default:

|                             | default: true derivative       | compat="spikingjelly"                        |
| --------------------------- | ------------------------------ | -------------------------------------------- |
| G                           | sum_t dL/dy[t]                 | T sum_t w_t dL/dy[t]                         |
| LIF: dL/dx[t]               | w_t / tau * G                  | G / (T tau): spread evenly over time         |
| LIF: dL/dV_th               | sum G / delta_t                | delta_t^2 times that: delta_t * sum G        |
| LIF: gradient at equality   | passes at 0 and V_th / delta_t | does not pass                                |
| stored V_th below its bound | passes (straight through)      | 0: the threshold never comes back            |

For IF the first four rows are the same thing. `v_threshold_grad_scaling` multiplies dL/dV_th in both.
With alpha = 0.5 the spike count of a constant current is rounded to the nearest, with alpha = 1 it is rounded down.

Source: Meng et al., "Training High-Performance Low-Latency Spiking Neural Networks by Differentiation on Spike
Representation", CVPR 2022 (arXiv 2205.00459): spike representation, and its reduction of the representation error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ide_snn.neurons import rate_weights, time_average
from ide_snn.once import differentiable_once

__all__ = ["DSRIFNode", "DSRLIFNode", "DSRNode", "record_firing_rates"]

Compat = Literal["none", "spikingjelly"]


@dataclass(frozen=True)
class Model:
    """The constants of a neuron model, see the module's table; `equality_passes` is the mask of its gradient."""

    leak: float
    gain: float
    tau: float
    delta_t: float
    equality_passes: bool


class DSRNode(nn.Module):
    """What both nodes share; use `DSRIFNode` or `DSRLIFNode`.

    The threshold in use is max(v_threshold, lower bound), computed in each forward: the stored parameter is changed
    by the optimiser only. It is an ordinary parameter without state around it, so DDP averages its gradient over the
    ranks as any other.

    Shapes: x [T, B, *] -> y [T, B, *], values in {0, V_th / delta_t}; T may differ from call to call.
    The backward pass keeps two masks [B, *], whatever T is. A neuron whose membrane ends NaN or infinite has NaN in its
    last step, since a NaN membrane never fires and would look like silence. Double backward raises.
    """

    def __init__(
        self,
        model: Model,
        *,
        v_threshold: float,
        alpha: float,
        v_threshold_training: bool,
        v_threshold_grad_scaling: float,
        v_threshold_lower_bound: float,
        compat: Compat,
    ) -> None:
        super().__init__()
        _require_positive(
            v_threshold=v_threshold,
            v_threshold_lower_bound=v_threshold_lower_bound,
            v_threshold_grad_scaling=v_threshold_grad_scaling,
        )
        if v_threshold < v_threshold_lower_bound:
            raise ValueError(
                f"v_threshold {v_threshold} lies below v_threshold_lower_bound {v_threshold_lower_bound}; "
                "raise the one or lower the other"
            )
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1] (the neuron fires at alpha * v_threshold), got {alpha}")
        if compat not in get_args(Compat):
            raise ValueError(f"compat must be one of {', '.join(get_args(Compat))}; got {compat!r}")
        self.model = model
        self.alpha = alpha
        self.grad_scaling = v_threshold_grad_scaling
        self.lower_bound = v_threshold_lower_bound
        self.compat = compat
        self.v_threshold: Tensor
        if v_threshold_training:
            self.v_threshold = nn.Parameter(torch.tensor(float(v_threshold)))
        else:
            self.register_buffer("v_threshold", torch.tensor(float(v_threshold)))

    def forward(self, x: Tensor) -> Tensor:
        """y [T, B, *] for the input current x [T, B, *]; see the module's equations.

        Raises:
            ValueError: x is not floating point [T, B, *] with T >= 1.
        """
        if x.dim() < 2 or not len(x) or not x.is_floating_point():
            raise ValueError(
                f"a DSR node takes a floating-point current [T, B, *] with T >= 1, got {x.dtype} {list(x.shape)}; "
                "repeat a constant current over time with x.expand(T, *x.shape)"
            )
        return _Simulate.apply(x, self.v_threshold, self)

    def representation(self, x: Tensor) -> Tensor:
        """clamp(sum_t w_t x[t] / tau, 0, V_th / delta_t) [B, *] for x [T, B, *], by plain autograd.

        The map whose derivative `forward` has by default (without `v_threshold_grad_scaling`).
        """
        drive = self.average(x) / self.model.tau
        return torch.minimum(drive.clamp_min(0), self.v_threshold.clamp_min(self.lower_bound) / self.model.delta_t)

    def average(self, y: Tensor) -> Tensor:
        """sum_t w_t y[t]: [B, *] for y [T, B, *]. Of a node's output it is the spike representation o."""
        return time_average(y, self.model.leak, y.dtype)

    def extra_repr(self) -> str:
        learned = "learned" if isinstance(self.v_threshold, nn.Parameter) else "fixed"
        text = f"v_threshold={self.v_threshold.item():.4g} ({learned}), alpha={self.alpha}"
        return text if self.compat == "none" else f"{text}, compat={self.compat}"


class DSRIFNode(DSRNode):
    """Integrate-and-fire node; equations, gradients and source in the module's docstring.

    Args:
        v_threshold: initial V_th > 0: the largest output, and what a reset subtracts.
        alpha: in (0, 1]; the neuron fires at alpha V_th.
        v_threshold_training: learn V_th (a scalar parameter); otherwise it is a buffer.
        v_threshold_grad_scaling: factor on dL/dV_th, as a learning rate of its own.
        v_threshold_lower_bound: the threshold in use is at least this.
        compat: "spikingjelly" for that library's gradients.

    Raises:
        ValueError: for values outside these ranges.
    """

    def __init__(
        self,
        *,
        v_threshold: float = 6.0,
        alpha: float = 0.5,
        v_threshold_training: bool = True,
        v_threshold_grad_scaling: float = 1.0,
        v_threshold_lower_bound: float = 0.01,
        compat: Compat = "none",
    ) -> None:
        super().__init__(
            Model(leak=1.0, gain=1.0, tau=1.0, delta_t=1.0, equality_passes=True),
            v_threshold=v_threshold,
            alpha=alpha,
            v_threshold_training=v_threshold_training,
            v_threshold_grad_scaling=v_threshold_grad_scaling,
            v_threshold_lower_bound=v_threshold_lower_bound,
            compat=compat,
        )


class DSRLIFNode(DSRNode):
    """Leaky integrate-and-fire node; equations, gradients and source in the module's docstring.

    T * delta_t should be of the order of tau or more: a constant x charges the membrane to
    (1 - exp(-T delta_t / tau)) x, and only x with this above alpha V_th are seen at all.

    Args:
        v_threshold, alpha, v_threshold_training, v_threshold_grad_scaling, v_threshold_lower_bound, compat: as for
            `DSRIFNode`; the largest output is V_th / delta_t.
        tau: membrane time constant > 0.
        delta_t: duration of a time step > 0, in the unit of tau.

    Raises:
        ValueError: for values outside these ranges.
    """

    def __init__(
        self,
        *,
        v_threshold: float = 1.0,
        tau: float = 2.0,
        delta_t: float = 0.05,
        alpha: float = 0.3,
        v_threshold_training: bool = True,
        v_threshold_grad_scaling: float = 1.0,
        v_threshold_lower_bound: float = 0.1,
        compat: Compat = "none",
    ) -> None:
        _require_positive(tau=tau, delta_t=delta_t)
        super().__init__(
            Model(
                leak=math.exp(-delta_t / tau),
                gain=-math.expm1(-delta_t / tau),
                tau=tau,
                delta_t=delta_t,
                equality_passes=compat != "spikingjelly",
            ),
            v_threshold=v_threshold,
            alpha=alpha,
            v_threshold_training=v_threshold_training,
            v_threshold_grad_scaling=v_threshold_grad_scaling,
            v_threshold_lower_bound=v_threshold_lower_bound,
            compat=compat,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.model.tau}, delta_t={self.model.delta_t}"


@contextmanager
def record_firing_rates(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While entered, the dict it yields has the mean spikes per neuron and step of each node's last forward.

    Keys are population_1, population_2, ... in the order of `network.modules()`; values are 0-dim tensors on the
    nodes' device, so that nothing waits for a GPU.
    """
    rates: dict[str, Tensor] = {}
    nodes = [module for module in network.modules() if isinstance(module, DSRNode)]

    def hook_of(name: str) -> Any:
        def hook(_node: nn.Module, _inputs: object, y: Tensor) -> None:
            y = y.detach()
            # NaN where the simulation broke down; it would count as a spike otherwise
            rates[name] = (y != 0).to(torch.float32).mean() + (y[-1] * 0).to(torch.float32).sum()

        return hook

    handles = [node.register_forward_hook(hook_of(f"population_{i}")) for i, node in enumerate(nodes, start=1)]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()


class _Simulate(torch.autograd.Function):
    """Value: the simulated spikes. Gradient: that of the spike representation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v_threshold: Tensor, node: DSRNode) -> Tensor:
        model = node.model
        # membranes in bfloat16 would lose the input they sum up
        dtype = torch.promote_types(x.dtype, torch.float32)
        threshold = v_threshold.clamp_min(node.lower_bound).to(dtype)
        height, fires_at = threshold / model.delta_t, node.alpha * threshold
        u = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
        y = x.new_empty(x.shape)
        for frame, out in zip(x.unbind(0), y.unbind(0), strict=True):
            if model.leak != 1:
                u.mul_(model.leak)
            u.add_(frame, alpha=model.gain)
            spikes = (u >= fires_at).to(dtype)
            u.addcmul_(spikes, threshold, value=-1)
            out.copy_(spikes * height)
        y[-1] += u * 0
        if any(ctx.needs_input_grad):
            drive = time_average(x, model.leak, dtype) / model.tau
            inside = (drive >= 0) & (drive <= height) if model.equality_passes else (drive > 0) & (drive < height)
            ctx.save_for_backward(inside, drive > height, v_threshold)
            ctx.node = node
        return y

    @staticmethod
    @differentiable_once("rate-coded layers")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inside, saturated, v_threshold = ctx.saved_tensors
        node: DSRNode = ctx.node
        model, time_steps = node.model, len(grad)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        as_peer = node.compat == "spikingjelly"
        total = time_average(grad, model.leak, dtype) * time_steps if as_peer else grad.sum(0, dtype=dtype)
        grad_x = grad_threshold = None
        if ctx.needs_input_grad[0]:
            weights = rate_weights(time_steps, 1.0 if as_peer else model.leak).to(grad.device, dtype)
            shape = (time_steps, *(1,) * total.dim())
            grad_x = (weights.view(shape) * (total * inside / model.tau)).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            slope = (model.delta_t if as_peer else 1 / model.delta_t) * node.grad_scaling
            grad_threshold = ((total * saturated).sum() * slope).to(v_threshold.dtype)
            if as_peer:
                grad_threshold = grad_threshold * (v_threshold >= node.lower_bound)
        return grad_x, grad_threshold, None


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {value}")
