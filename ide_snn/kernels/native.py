"""The neuron step by a compiled kernel (`csrc/neurons.c`): float32 on a CPU, one pass over memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ide_snn import native
from ide_snn.neurons import NeuronParams


def why_not_native(u: Tensor) -> str | None:
    """None where `native_step_` can take a population with the membranes `u`, else the reason."""
    if u.device.type != "cpu" or u.dtype != torch.float32 or not u.is_contiguous():
        return "the compiled neuron step is for contiguous float32 on a CPU"
    return native.why_unavailable("neurons")


def native_step_(
    current: Tensor,
    u: Tensor,
    spikes: Tensor,
    neuron: NeuronParams,
    *,
    gain: Tensor | None,
    drive: Tensor | None,
    rate: Tensor | None,
    count: Tensor | None,
) -> None:
    """`neuron_step_`, bit for bit, for contiguous float32 tensors; checks nothing, for it is called in every step.

    Overwrites `current` where `gain` or `drive` is given.
    """
    operands = (current, gain, drive, u, spikes, rate, count)
    native.library("neurons").step(
        ctypes.c_int64(u.numel()),
        *(None if t is None else ctypes.c_void_p(t.data_ptr()) for t in operands),
        ctypes.c_float(neuron.v_threshold),
        ctypes.c_float(neuron.leak),
    )
