"""Transposed products of fully connected layers by compiled kernels, float32 on a CPU (`csrc/dense.c`).

A fully connected population is solved a few samples at a time, whose vectors stay in the cache from one product to the
next; a library's product would take the whole batch, solved samples included. Where fewer than half of a vector's
numbers are not 0 (slopes are 0 for silent and saturated neurons) only those are multiplied. With `precision=fast`
factors may be rounded to 16-bit whole numbers (`ide_snn.integers`), which takes 0.6 of the time.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from torch import Tensor

from ide_snn import integers, native
from ide_snn.layers import Affine
from ide_snn.native import Factor, Stage, pointer
from ide_snn.products import product

# Samples that share each reading of the weight; their vectors fit the second-level cache.
TOGETHER = 32


class _Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "blocks")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "packed")),
        ("next", ctypes.c_int64),
    ]


class _Dense(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale")),
    ]


class _Turned(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "next")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "to")),
    ]


@dataclass(frozen=True)
class DenseMap:
    """The linear part of a fully connected layer without gain, W [out, in], and its adjoint; packed when first used.

    Args:
        affine: the layer.
        whole: the adjoint is in whole numbers: for at most `integers.MOST_INPUTS` outputs of the layer.
    """

    affine: Affine
    whole: bool = False

    @property
    def can_be_whole(self) -> bool:
        """True where `whole` is allowed and the machine has the kernels."""
        return len(self.affine.weight) <= integers.MOST_INPUTS and integers.why_unavailable() is None

    def linear(self, x: Tensor) -> Tensor:
        """W x."""
        return self.affine.linear(x)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """W^T (scale * y)."""
        assert y.shape[1:] == (len(self.affine.weight),)  # the kernel would read past it
        return product(self.adjoint_factor(scale), y)

    @functools.cached_property
    def packing(self) -> Stage:
        """The kernel that has packed W, for when the numbers of W have changed.

        `work.scale` may be the address of a float32 that W is multiplied by.
        """
        weight = self.affine.weight.contiguous()
        if self.whole:
            return integers.rows_packing(weight)
        columns = int(native.library("dense").columns())
        inputs, outputs = weight.shape
        blocks = 2 * -(-outputs // (2 * columns))  # kernels may read two at a time
        # [outputs of W^T / columns][inputs of W^T][columns], zero behind the last output
        packed = weight.new_empty(blocks, inputs, columns)
        work = _Pack(inputs, outputs, blocks, weight.data_ptr(), None, packed.data_ptr(), 0)
        stage = Stage("dense", "pack", work, packed.numel(), (weight, packed))
        stage.run()
        return stage

    def adjoint_factor(self, scale: Tensor | None) -> Factor:
        """y -> W^T (scale * y) of single samples, for solves."""
        if self.whole:
            return integers.rows_factor(self.packing, scale)
        inputs, outputs = self.affine.weight.shape
        packed, scale = self.packing.keep[-1], None if scale is None else scale.contiguous()
        work = _Dense(inputs, outputs, packed.data_ptr(), pointer(scale))
        each = 8 * (inputs + 1 + integers.SPARE)  # a number and its place, for every input
        return Factor("dense", "multiply", work, (packed, scale), outputs, TOGETHER, scratch_each=each)


def turned_product(x: Tensor, y: Tensor) -> Tensor:
    """(x * y)^T [N, B] for x and y [B, N]."""
    x, y = x.contiguous(), y.contiguous()
    assert x.shape == y.shape  # the kernel would read past one
    to = x.new_empty(x.shape[1], len(x))
    native.run("elementwise", "turned", _Turned(*x.shape, 0, x.data_ptr(), y.data_ptr(), to.data_ptr()), 3 * x.numel())
    return to
