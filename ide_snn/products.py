"""Linear maps of single samples, as kernels have them (`Factor`), applied to whole batches."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ide_snn import native
from ide_snn.native import Factor, Stage, lines


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("apply", "factor")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "batch", "together")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "memory")),
        ("room", ctypes.c_int64),
        ("padding", ctypes.c_int64 * 8),
        *((name, ctypes.c_int64) for name in ("next", "threads")),
    ]


def product_stage(factor: Factor, batch: int, inputs: int, *, own_memory: bool = False) -> Stage:
    """The kernel of y = the map of x, contiguous x [batch, inputs] and y [batch, outputs]; set their addresses.

    Args:
        own_memory: with scratch memory of its own, to be run at any time.
    """
    threads = torch.get_num_threads()
    together = max(1, min(factor.together, -(-batch // threads)))
    room = lines(factor.scratch + together * factor.scratch_each)
    memory = native.scratch(threads * room, own=own_memory)
    work = _Product(
        *(native.address(factor.library, factor.kernel), ctypes.addressof(factor.work)),
        *(inputs, factor.size, batch, together, None, None, memory.data_ptr(), room),
    )
    return Stage("product", "product", work, batch * (inputs + factor.size), (factor, memory))


def product(factor: Factor, x: Tensor) -> Tensor:
    """The map of x [B, inputs], float32 on a CPU; [B, outputs]."""
    x = x.contiguous()
    y = x.new_empty(len(x), factor.size)
    stage = product_stage(factor, *x.shape)
    stage.work.x, stage.work.y = x.data_ptr(), y.data_ptr()
    stage.run()
    return y
