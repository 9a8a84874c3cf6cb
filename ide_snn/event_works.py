"""What the kernels of `csrc/events.c` are given, as there; `ide_snn.event_driven` fills it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ide_snn import native


class Connection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_positions", "in_channels", "out_positions", "out_channels")),
        *((name, ctypes.c_int64) for name in ("together", "taps", "block", "blocks")),
        *((name, ctypes.c_void_p) for name in ("weight", "target", "bias", "gain", "levels", "unit")),
    ]


class Population(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("u", "spikes", "weighted", "count", "response")),
    ]


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("taps", "in_channels", "out_channels", "in_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("block", "blocks", "next")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "packed", "levels", "unit")),
        ("largest", ctypes.c_int64),
    ]


class Scratch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "size", "accumulators", "events", "positions")),
        ("memory", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, accumulators: int, events: int, positions: int, *, own: bool = False) -> tuple[Scratch, Tensor]:
        """Room for every thread: for so many sums, events and positions; and the memory, which the caller keeps.

        Args:
            own: memory that nobody else uses, instead of that of `native.scratch`.
        """
        scratch = cls.sizes(accumulators, events, positions)
        size = torch.get_num_threads() * scratch.size
        memory = native.scratch(size, own=own)
        scratch.memory = memory.data_ptr()
        return scratch, memory

    @classmethod
    def sizes(cls, accumulators: int, events: int, positions: int) -> Scratch:
        """The same without memory."""
        sizes = [-(-n // 16) * 16 for n in (accumulators, events + 8, positions + 1)]
        each = 4 * (sizes[0] + 2 * sizes[1] + 4 * sizes[2])  # all numbers have four bytes
        return cls(0, each, *sizes, None)


class Simulation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("connections", "populations")),
        *((name, ctypes.c_int64) for name in ("n", "batch", "steps", "group", "next", "from_rest")),
        ("drive", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("threshold", "leak", "share")),
        ("scratch", Scratch),
    ]


class FactorWork(ctypes.Structure):
    _fields_ = [("connection", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("scratch", Scratch)]


class Product(ctypes.Structure):
    _fields_ = [
        ("connection", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "next")),
        *((name, ctypes.c_void_p) for name in ("spikes", "x", "scale", "y")),
        ("scratch", Scratch),
    ]
