"""One time step of a population of IF or LIF neurons, in place, in one pass over memory.

    I    = gain c + x                                      response of the connection, its dropout, constant drive
    u   <- u + I         s = 1 where u >= V_th             integrate and fire; equality fires
    u   <- lambda (u - V_th s)                             soft reset, then leak
    a   <- lambda a + s            k <- k + s              weighted and plain spike count

Every operation is rounded by itself, in the order written: the results are those of `ide_snn.neurons.step_` and the
accumulators of the simulation, bit for bit. Source: Xiao et al., NeurIPS 2021, sections 3.1 and 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ide_snn.kernels.backend import (
    Backend,
    as_bytes,
    load_kernels,
    require_distinct,
    require_same_layout,
    uses_triton,
)
from ide_snn.neurons import NeuronParams, step_

STATE_TYPES = (torch.float32, torch.float64)
MASK_TYPES = (torch.bool, torch.uint8)
SPIKE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, *MASK_TYPES)
COUNT_TYPES = (torch.float32, torch.float64, torch.int32)


def neuron_step_(
    current: Tensor,
    u: Tensor,
    spikes: Tensor,
    neuron: NeuronParams,
    *,
    gain: Tensor | None = None,
    gain_scale: float = 1.0,
    drive: Tensor | None = None,
    rate: Tensor | None = None,
    count: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """One step of all neurons; overwrites `u`, `spikes`, `rate` and `count`.

    All tensors have the shape of `u`, [B, C, H, W] or [B, N], and its order in memory (`in_layout_of` brings one into
    it); none may share memory with one that is written. They may have more than 2^31 elements.

    Args:
        current: c, floating point of any precision; rounded to u's type first. May be used as scratch memory where
            `gain` or `drive` is given.
        u: membrane potential, float32 (or float64), in the unit of V_th.
        spikes: receives 0 or 1 in its own type: floating point, int8, uint8 or bool.
        neuron: threshold and leak.
        gain: factor of the current: floating point, or a mask (bool, or uint8 of 0 and 1) of `gain_scale` and 0.
        gain_scale: of a mask, for instance 1 / (1 - p) of dropout; rounded to u's type.
        drive: x, in u's type.
        rate: a without its normaliser, in u's type. For IF a and k are the same: pass one of them.
        count: k, float32, float64 or int32.
        backend: see `ide_snn.kernels`.

    Raises:
        ValueError: for shapes, types, layouts, shared memory or a scale that make no sense.
        ImportError, RuntimeError: where backend="triton" is impossible; the message says what to do.
    """
    _check(current, u, spikes, gain, gain_scale, drive, rate, count)
    spikes = as_bytes(spikes)
    if not uses_triton(backend, u.device):
        _torch_step_(current, u, spikes, neuron, gain, gain_scale, drive, rate, count)
        return
    kernels, n = load_kernels(), u.numel()
    operands = (current, u, spikes, None if gain is None else as_bytes(gain), drive, rate, count)
    constants = {"V_THRESHOLD": neuron.v_threshold, "LEAK": neuron.leak, "GAIN_SCALE": gain_scale}
    kernels.launch(kernels.neuron_step, kernels.blocks(n), u, *operands, n, **constants)


def _torch_step_(
    current: Tensor,
    u: Tensor,
    spikes: Tensor,
    neuron: NeuronParams,
    gain: Tensor | None,
    gain_scale: float,
    drive: Tensor | None,
    rate: Tensor | None,
    count: Tensor | None,
) -> None:
    """The reference: the same in torch operations, without allocations where `current` has u's type."""
    current = current.to(u.dtype)
    if gain is not None:
        current.mul_(gain.to(u.dtype) if gain.is_floating_point() else gain)
        if gain_scale != 1:
            current.mul_(gain_scale)  # a mask's 0 or 1 times c is exact, so c is rounded once, as c (mask scale) is
    if drive is not None:
        current.add_(drive)
    step_(current, u, spikes, neuron)
    if rate is not None:
        if neuron.leak != 1:
            rate.mul_(neuron.leak)
        rate.add_(spikes)
    if count is not None:
        count.add_(spikes if count.is_floating_point() else spikes.to(count.dtype))


def _check(
    current: Tensor,
    u: Tensor,
    spikes: Tensor,
    gain: Tensor | None,
    gain_scale: float,
    drive: Tensor | None,
    rate: Tensor | None,
    count: Tensor | None,
) -> None:
    _require_type("u", u, STATE_TYPES)
    _require_type("spikes", spikes, SPIKE_TYPES)
    _require_type("drive", drive, (u.dtype,))
    _require_type("rate", rate, (u.dtype,))
    _require_type("count", count, COUNT_TYPES)
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, got {current.dtype}")
    is_mask = gain is not None and gain.dtype in MASK_TYPES
    if gain is not None and not (is_mask or gain.is_floating_point()):
        raise ValueError(f"gain must be floating point or a mask (bool, uint8), got {gain.dtype}")
    if not (math.isfinite(gain_scale) and gain_scale > 0):
        raise ValueError(f"gain_scale must be a positive finite number, got {gain_scale}")
    if gain_scale != 1 and not is_mask:
        raise ValueError(f"gain_scale={gain_scale} belongs to a gain that is a mask (bool, uint8)")
    require_same_layout("u", u, current=current, spikes=spikes, gain=gain, drive=drive, rate=rate, count=count)
    require_distinct(
        {"u": u, "spikes": spikes, "rate": rate, "count": count}, {"current": current, "gain": gain, "drive": drive}
    )


def _require_type(name: str, x: Tensor | None, types: tuple[torch.dtype, ...]) -> None:
    if x is not None and x.dtype not in types:
        raise ValueError(f"{name} must be {' or '.join(map(str, types))}, got {x.dtype}")
