"""Transposed products of fully connected layers by a compiled kernel (`csrc/dense.c`), float32 on a CPU.

A fully connected population is solved a few samples at a time, whose vectors stay in the cache from one product to the
next; a library's product would take the whole batch, solved samples included.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn import native
from ide_snn.layers import Affine
from ide_snn.solvers.vectors import Factor, lines

# Samples that share each reading of the weight; their vectors fit the second-level cache.
TOGETHER = 24


class _Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "packed")),
        ("next", ctypes.c_int64),
    ]


class _Dense(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        ("factor", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "together")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "memory")),
        *((name, ctypes.c_int64) for name in ("room", "next", "threads")),
    ]


@dataclass(frozen=True)
class DenseMap:
    """The linear part of a fully connected layer without gain, W [out, in], and its adjoint; packed when first used."""

    affine: Affine

    def linear(self, x: Tensor) -> Tensor:
        """W x."""
        return self.affine.linear(x)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """W^T (scale * y)."""
        y, factor = y.contiguous(), self.adjoint_factor(scale)
        x, threads = y.new_empty(len(y), factor.size), torch.get_num_threads()
        together = max(1, min(TOGETHER, -(-len(y) // threads)))
        room = lines(together * factor.scratch_each)
        memory = native.scratch(threads * room)
        pointers = (y.data_ptr(), x.data_ptr(), memory.data_ptr())
        work = _Product(ctypes.addressof(factor.work), len(y), together, *pointers, room, 0, 0)
        native.run("dense", "product", work, self.affine.weight.numel())
        return x

    @functools.cached_property
    def _packed(self) -> Tensor:
        """W as blocks [outputs of W^T / columns][inputs of W^T][columns], zero behind the last output."""
        weight = self.affine.weight.contiguous()
        columns = int(native.library("dense").columns())
        inputs, outputs = weight.shape
        packed = weight.new_empty(-(-outputs // columns), inputs, columns)
        native.run("dense", "pack", _Pack(inputs, outputs, weight.data_ptr(), packed.data_ptr(), 0), packed.numel())
        return packed

    def adjoint_factor(self, scale: Tensor | None) -> Factor:
        """y -> W^T (scale * y) of single samples, for solves."""
        inputs, outputs = self.affine.weight.shape
        packed, scale = self._packed, None if scale is None else scale.contiguous()
        work = _Dense(inputs, outputs, packed.data_ptr(), None if scale is None else scale.data_ptr())
        keep = (packed, scale)
        return Factor("dense", "multiply", work, keep, outputs, TOGETHER, scratch_each=4 * inputs)
