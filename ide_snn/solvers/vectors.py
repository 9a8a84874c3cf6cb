"""The vector work of linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU, one pass over memory."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn import native

Array = NDArray[np.float64]


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "n", "k", "m", "passes")),
        *((name, ctypes.c_void_p) for name in ("b", "y", "image", "basis", "state", "unit", "norm")),
        ("noise", ctypes.c_double),
        ("padding", ctypes.c_int64 * 8),
        ("next", ctypes.c_int64),
    ]


def rescaled(b: Tensor) -> tuple[Tensor, Tensor, Array]:
    """(b / unit [G, N], unit [G], ||b / unit|| [G]) of b [G, N]; the unit is a power of two near the largest |b|."""
    scaled, unit = torch.empty_like(b), torch.empty(len(b))
    return scaled, unit, _once("rescale", b, b=b, y=scaled, unit=unit)


def residual_(b: Tensor, y: Tensor, image: Tensor) -> tuple[Tensor, Array]:
    """(r = b + A y - y, ||r|| per group [G]) from `image` = A y, which r overwrites; all [G, N]."""
    return image, _once("residual", image, b=b, y=y, image=image)


class NativeKrylov:
    """The Krylov space of r under (1 - A), and the least-squares problem in it; as `gmres.Krylov`."""

    def __init__(self, r: Tensor, dimensions: int, passes: int, noise: float) -> None:
        newest = torch.empty_like(r)
        self.vectors = [newest]
        self._state = np.empty(len(r) * (dimensions**2 + 3 * dimensions + 1))
        self._basis = np.array([newest.data_ptr()] + [0] * dimensions, dtype=np.uintp)
        self._norm = np.empty(len(r), dtype=np.float32)
        self._work = _Work(
            groups=r.shape[0],
            n=r.shape[1],
            m=dimensions,
            passes=passes,
            noise=noise,
            b=r.data_ptr(),
            y=newest.data_ptr(),
            basis=self._basis.ctypes.data,
            state=self._state.ctypes.data,
            norm=self._norm.ctypes.data,
        )
        _call("start", self._work, 1)

    @property
    def newest(self) -> Tensor:
        return self.vectors[-1]

    @property
    def size(self) -> int:
        return len(self.vectors) - 1

    def extend(self, image: Tensor) -> Array:
        k = self._work.k = len(self.vectors)
        self._work.image = self._basis[k] = image.data_ptr()
        self.vectors.append(image)
        _call("extend", self._work, 2 * k)
        return self._norm.astype(np.float64)

    def finish(self, y: Tensor | None) -> tuple[Tensor, Tensor, Array, Array]:
        result, length = torch.empty_like(self.newest), np.empty(len(self.newest), dtype=np.float32)
        self._work.b = None if y is None else y.data_ptr()
        self._work.y, self._work.unit = result.data_ptr(), length.ctypes.data
        _call("finish", self._work, 2 * self.size)
        return result, self.newest, self._norm.astype(np.float64), length.astype(np.float64)


def _once(name: str, rows: Tensor, **tensors: Tensor) -> Array:
    """Calls a kernel for the groups of `rows` [G, N]; returns the norms [G] that it finds."""
    norm = np.empty(len(rows), dtype=np.float32)
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    _call(name, _Work(groups=rows.shape[0], n=rows.shape[1], norm=norm.ctypes.data, **pointers), 1)
    return norm.astype(np.float64)


def _call(name: str, work: _Work, passes_over_memory: int) -> None:
    work.next = 0
    native.run("krylov", name, work, passes_over_memory * work.groups * work.n)
