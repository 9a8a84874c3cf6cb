"""Products with dense weights by a compiled kernel (`csrc/dense.c`), float32 on a CPU, for linear solves.

A fully connected population is solved a few samples at a time, whose vectors stay in the cache from one product to the
next; a library's product would take the whole batch, solved samples included.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from torch import Tensor

from ide_snn import native
from ide_snn.layers import Affine
from ide_snn.solvers.vectors import Factor

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


@dataclass(frozen=True)
class DenseMap:
    """The linear part of a fully connected layer without gain, W [out, in], and its adjoint; packed when first used."""

    affine: Affine

    def linear(self, x: Tensor) -> Tensor:
        """W x."""
        return self.affine.linear(x)

    def adjoint(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """W^T (scale * y)."""
        return self.affine.adjoint(y, scale)

    @functools.cached_property
    def _packed(self) -> Tensor:
        """W as blocks [outputs of W^T / columns][inputs of W^T][columns], zero behind the last output."""
        weight = self.affine.weight.contiguous()
        columns = int(native.library("dense").columns())
        inputs, outputs = weight.shape
        packed = weight.new_empty(-(-outputs // columns), inputs, columns)
        native.run("dense", "pack", _Pack(inputs, outputs, weight.data_ptr(), packed.data_ptr(), 0), packed.numel())
        return packed

    def adjoint_factor(self, scale: Tensor) -> Factor:
        """y -> W^T (scale * y) of single samples, for solves."""
        inputs, outputs = self.affine.weight.shape
        packed, scale = self._packed, scale.contiguous()
        work = _Dense(inputs, outputs, packed.data_ptr(), scale.data_ptr())
        keep = (packed, scale)
        return Factor("dense", "multiply", work, keep, outputs, TOGETHER, scratch_each=4 * inputs)
