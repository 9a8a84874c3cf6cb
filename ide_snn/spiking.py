"""Spiking neurons for training through time: multi-step IF and LIF, and spikes kept as bits for the backward pass.

    u[t] = v[t-1] + I[t]                       charge
    s[t] = 1 where u[t] >= V_th                fire; equality fires
    v[t] = lambda (u[t] - V_th s[t])           soft reset, then leak           (`ide_snn.neurons`)
    v[t] = lambda u[t] (1 - s[t])              hard reset to 0, then leak

The derivative of s is a surrogate's g' (`ide_snn.surrogate`) at u - V_th, which is not divided by V_th. With the
gradients S of s[t] and G of v[t], the gradient of u[t], I[t] and v[t-1] is

    soft    lambda G           + (S - lambda V_th G) g'(u - V_th)
    hard    lambda G (1 - s)   + (S - lambda u G)    g'(u - V_th)

or, with `detach_reset`, without the second term in the bracket: the reset then counts as given. Both are used in the
field; here the default is the full gradient. All of it needs u alone: s follows from u.

Sources: Wu et al. (STBP), Frontiers in Neuroscience 12 (2018); Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine
36 (2019); the fused form with hard reset: Cheng et al. (LISNN), IJCAI 2020, section 3; checkpointing: Chen et al.,
arXiv 1604.06174.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ide_snn.neurons import NeuronParams
from ide_snn.once import differentiable_once
from ide_snn.operators import Operator
from ide_snn.precision import without_autocast
from ide_snn.surrogate import ATan, Surrogate

Reset = Literal["soft", "hard"]
Form = Literal["charge_fire_reset", "fused"]
_SURROGATE = ATan()


def require_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def require_steps(name: str, value: object) -> None:
    """Raises ValueError unless `value` is None or a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be None or a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class Firing:
    """What a neuron does in one step, and the adjoint of it (see the module).

    Raises:
        ValueError: for an unknown reset.
        TypeError: for a surrogate that is none.
    """

    neuron: NeuronParams = NeuronParams()
    surrogate: Surrogate = _SURROGATE
    reset: Reset = "soft"
    detach_reset: bool = False

    def __post_init__(self) -> None:
        require_choice("reset", self.reset, Reset)
        if not isinstance(self.surrogate, Surrogate):
            raise TypeError(f"surrogate must be one of ide_snn.surrogate, such as ATan(), got {self.surrogate!r}")

    def spikes(self, u: Tensor) -> Tensor:
        """s for the charged membrane u [B, *], in its dtype; g(u - V_th) for a surrogate in primitive mode.

        A NaN membrane does not fire; it stays NaN and so shows in the state.
        """
        if self.surrogate.spiking:
            return (u >= self.neuron.v_threshold).to(u.dtype)
        return self.surrogate.primitive(u - self.neuron.v_threshold)

    def after(self, u: Tensor, spikes: Tensor, out: Tensor | None = None) -> Tensor:
        """v for the charged membrane u and its spikes, with the rounding of `ide_snn.neurons.step`; u is kept."""
        if self.reset == "soft":
            v = torch.sub(u, spikes, alpha=self.neuron.v_threshold, out=out)
        else:
            v = torch.mul(u, 1 - spikes, out=out)  # a product and no choice: an infinite membrane becomes NaN, not 0
        return v if self.neuron.leak == 1 else v.mul_(self.neuron.leak)

    def step_(self, current: Tensor, u: Tensor, spikes: Tensor, neuron: NeuronParams) -> None:
        """`ide_snn.neurons.step_` with this reset; `neuron` must be the own one."""
        u.add_(current)
        torch.ge(u, neuron.v_threshold, out=spikes)
        self.after(u, spikes, out=u)

    def charge(self, u: Tensor, spikes: Tensor, current: Tensor, form: Form) -> Tensor:
        """The next charged membrane, from this one, its spikes and the next current."""
        if form == "charge_fire_reset":
            return self.after(u, spikes).add_(current)
        if self.reset == "soft":
            return torch.add(current, u.sub(spikes, alpha=self.neuron.v_threshold), alpha=self.neuron.leak)
        return torch.addcmul(current, u, 1 - spikes, value=self.neuron.leak)

    def adjoint(self, u: Tensor, grad_s: Tensor | None, grad_v: Tensor | None) -> Tensor:
        """Gradient of the charged membrane, from those of the spikes and of the state after the step (None is 0)."""
        slope = self.surrogate.derivative(u - self.neuron.v_threshold)
        if grad_v is None:
            return slope.zero_() if grad_s is None else grad_s * slope
        through = grad_v if self.neuron.leak == 1 else grad_v * self.neuron.leak
        if not self.detach_reset:
            lost = through * (self.neuron.v_threshold if self.reset == "soft" else u)
            grad_s = -lost if grad_s is None else grad_s - lost
        if self.reset == "hard":
            through = through * (1 - self.spikes(u))
        return through if grad_s is None else through + grad_s * slope


def multi_step(
    current: Tensor,
    u0: Tensor | None = None,
    params: NeuronParams = NeuronParams(),
    surrogate: Surrogate = _SURROGATE,
    *,
    reset: Reset = "soft",
    form: Form = "charge_fire_reset",
    detach_reset: bool = False,
    recompute: int | None = None,
) -> tuple[Tensor, Tensor]:
    """T steps of a population of IF or LIF neurons; state goes in and comes out, nothing is kept.

    Args:
        current: I [T, B, *], T >= 1, floating point.
        u0: state v before the first step [B, *]; None is rest (zeros).
        params: threshold and leak; leak 1 is IF.
        surrogate: for the derivative of the spikes; in primitive mode its primitive also replaces them.
        reset: see the module.
        form: "charge_fire_reset" rounds as the simulation of `FeedbackSNN` does. "fused" carries u instead of v,
            u <- lambda (u - V_th s) + I for soft and u <- lambda u (1 - s) + I for hard reset, in 3 instead of 4 and 5
            operations. Both are one model with one backward pass. The fused form need not round lambda times the
            membrane before it adds I: bit for bit they are equal where that product is exact (IF, or lambda a power
            of two), otherwise up to the last digits.
        detach_reset: take the reset as given in the backward pass.
        recompute: None keeps u of every step for the backward pass. k keeps it every k steps and a reference to
            `current`, from which the others are computed again, a segment at a time. That saves memory where
            `current` lies there anyway (a constant current expanded over T is one frame); a current that would not
            be kept otherwise is as large as the membranes it replaces.

    Returns:
        (spikes [T, B, *] in {0, 1}, final state v [B, *]), in the current's dtype but at least float32. Where the
        final state is not finite the neuron's spikes are NaN: a NaN membrane never fires, which would look like
        silence.

    Differentiable once in `current` and `u0`.

    Raises:
        ValueError: for shapes, choices or numbers that make no sense.
        TypeError: for a current that is not floating point.
    """
    firing = Firing(params, surrogate, reset, detach_reset)
    require_choice("form", form, Form)
    require_steps("recompute", recompute)
    if not current.is_floating_point():
        raise TypeError(f"current must be floating point, got {current.dtype}")
    if current.dim() < 2 or current.shape[0] < 1:
        raise ValueError(f"current must have shape [T, B, ...] with T >= 1, got {list(current.shape)}")
    dtype = torch.promote_types(current.dtype, torch.float32)
    if u0 is None:
        u0 = torch.zeros(current.shape[1:], dtype=dtype, device=current.device)
    if u0.shape != current.shape[1:] or u0.dtype != dtype:
        raise ValueError(
            f"u0 must have shape {list(current.shape[1:])} and dtype {dtype}, got {list(u0.shape)} and {u0.dtype}"
        )
    keeps = torch.is_grad_enabled() and (current.requires_grad or u0.requires_grad)
    spikes, last = _MultiStep.apply(current, u0, firing, form, recompute, keeps)
    return spikes, last


class _MultiStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, current: Tensor, u0: Tensor, firing: Firing, form: Form, recompute: int | None, keeps: bool
    ) -> tuple[Tensor, Tensor]:
        spikes = torch.empty(current.shape, dtype=u0.dtype, device=u0.device)
        u = u0 + current[0]
        kept = []  # u of every step, or of the first step of each segment
        for t, frame in enumerate(current):
            if t > 0:
                u = firing.charge(u, spikes[t - 1], frame.to(u0.dtype), form)
            spikes[t] = firing.spikes(u)
            if keeps and t % (recompute or 1) == 0:
                kept.append(u)
        last = firing.after(u, spikes[-1])
        ctx.firing, ctx.form, ctx.recompute, ctx.dtype = firing, form, recompute, current.dtype
        ctx.save_for_backward(*kept, *(() if recompute is None else (current,)))
        spikes += last * 0  # the spikes of a neuron that ended NaN or infinite become NaN
        return spikes, last

    @staticmethod
    @differentiable_once("spiking neurons")
    def backward(ctx: Any, grad_s: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        firing, length, steps = ctx.firing, ctx.recompute or 1, len(grad_s)
        kept = ctx.saved_tensors
        grad = torch.empty(grad_s.shape, dtype=ctx.dtype, device=grad_s.device)
        for start in reversed(range(0, steps, length)):
            membranes = [kept[start // length]]
            for t in range(start + 1, min(start + length, steps)):
                u, frame = membranes[-1], kept[-1][t].to(grad_v.dtype)
                membranes.append(firing.charge(u, firing.spikes(u), frame, ctx.form))
            for t, u in reversed(list(enumerate(membranes, start))):
                grad_v = firing.adjoint(u, grad_s[t], grad_v)
                grad[t] = grad_v
        return grad, grad_v, None, None, None, None


def pack_bits(spikes: Tensor) -> Tensor:
    """Spikes in {0, 1} of any shape and dtype as bits, 8 to a byte: uint8 [ceil(numel / 8)]."""
    flat = spikes.reshape(-1) if spikes.dtype == torch.bool else spikes.reshape(-1) != 0
    padding = -flat.numel() % 8
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    # Eight bytes are one integer with b_i at bit 8 i; times 2^56 + 2^49 + ... + 2^7 the top byte is the sum of b_i 2^i.
    words = flat.view(torch.int64)
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The spikes that `pack_bits` has packed, as 0 and 1 of `dtype` in `shape`."""
    # The reverse: every byte repeated eight times, of which byte i keeps bit i (the mask, as a signed number).
    words = (bits.to(torch.int64) * 0x0101010101010101) & (0x8040201008040201 - 2**64)
    return (words.view(torch.uint8)[: math.prod(shape)] != 0).view(shape).to(dtype)


def operator_gradients(
    operator: Operator, x: Tensor, y: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], *, rounded: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of K(W) x + b in x, W and b for the gradient y of its value; None where `needs` does not ask.

    One call of what torch's own backward calls, so that they are the same to the last bit, unless rounded.

    Args:
        x: [B, C, H, W] ([B, C] for linear); y has the shape of the operator's response.
        rounded: of convolutions that suit oneDNN the factors, which may be bfloat16, and the gradients of x and W are
            rounded to it (`precision.rounds_convolutions`); sums are float32.
    """
    if operator.kind == "linear":
        return (
            y.mm(weight) if needs[0] else None,
            y.t().mm(x) if needs[1] else None,
            y.sum(0) if needs[2] else None,
        )
    transposed = operator.kind == "conv_transposed"
    geometry = (operator.stride, operator.padding, operator.dilation, transposed, operator.output_padding)
    if rounded and operator.suits_onednn:
        half = (tensor.to(torch.bfloat16) for tensor in (y, x, weight))
        wanted = (needs[0], needs[1], False)
        both = torch.ops.aten.convolution_backward(*half, None, *geometry, operator.groups, wanted)
        to_x = both[0].to(x.dtype) if needs[0] else None
        # as parameters lie: autograd would copy another
        to_weight = both[1].to(torch.float32, memory_format=torch.contiguous_format) if needs[1] else None
        return to_x, to_weight, y.sum((0, 2, 3), dtype=torch.float32) if needs[2] else None
    sizes = [operator.out_channels] if needs[2] else None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        y, x, weight, sizes, *geometry, operator.groups, needs
    )
    return gradients


def apply_to_spikes(operator: Operator, spikes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """K(W) s + b for spikes s in {0, 1}, of which autograd keeps the bits only.

    Args:
        operator: `Operator.of(module)` for a linear, conv or transposed conv module.
        spikes: [B, C, H, W] ([B, C] for linear); fold time into the batch, `spikes.flatten(0, 1)`.
        weight, bias: of the module.

    Differentiable once.

    Raises:
        ValueError: for values other than 0 and 1 (a NaN too: it has no bit).
    """
    if not bool(((spikes == 0) | (spikes == 1)).all()):
        raise ValueError("only spikes, 0 or 1, fit into bits; use the module itself for other values or NaN")
    response: Tensor = _OnSpikes.apply(spikes, weight, bias, operator)
    return response


class _OnSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spikes: Tensor, weight: Tensor, bias: Tensor | None, operator: Operator) -> Tensor:
        ctx.operator, ctx.shape = operator, spikes.shape
        ctx.save_for_backward(pack_bits(spikes), weight)
        return operator.apply(spikes, weight, bias)

    @staticmethod
    @differentiable_once("responses to spikes")
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        bits, weight = ctx.saved_tensors
        spikes = unpack_bits(bits, ctx.shape, weight.dtype)
        with without_autocast(y.device.type):
            y = y.to(weight.dtype)
            return *operator_gradients(ctx.operator, spikes, y, weight, ctx.needs_input_grad[:3]), None
