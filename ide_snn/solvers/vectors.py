"""The vector work of linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU, one pass over memory."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn import native

Array = NDArray[np.float64]
# Products are for all groups or for one, two, three quarters: pieces of any size would scatter over the heap.
PARTS = 4


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "n", "count", "k", "m", "passes")),
        *((name, ctypes.c_void_p) for name in ("b", "y", "image", "basis", "rows", "open", "dimensions")),
        *((name, ctypes.c_void_p) for name in ("state", "unit", "norm", "length")),
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
    """The Krylov space of r under (1 - A), and the least-squares problem in it; as `gmres.Krylov`.

    Groups that are not kept keep the space that they have; the vectors of the others, the open ones, are [open, N].
    """

    def __init__(self, r: Tensor, dimensions: int, passes: int, noise: float) -> None:
        groups, newest = len(r), torch.empty_like(r)
        self.vectors = [newest]
        self.open: Tensor | None = None
        self._state = np.empty(groups * (dimensions**2 + 3 * dimensions + 1))
        self._addresses = np.zeros((2, dimensions + 1), dtype=np.uintp)  # of the vectors, and of the rows of each
        self._addresses[0, 0] = newest.data_ptr()
        self._rows: list[NDArray[np.int64] | None] = [None]
        self._dimensions = np.zeros(groups, dtype=np.int64)
        self._norm = np.empty(groups)
        self._work = _Work(
            groups=groups,
            n=r.shape[1],
            m=dimensions,
            passes=passes,
            noise=noise,
            b=r.data_ptr(),
            y=newest.data_ptr(),
            basis=self._addresses[0].ctypes.data,
            rows=self._addresses[1].ctypes.data,
            dimensions=self._dimensions.ctypes.data,
            state=self._state.ctypes.data,
            norm=self._norm.ctypes.data,
        )
        _call("start", self._work, 1)

    @property
    def newest(self) -> Tensor:
        newest = self.vectors[-1]
        if self.open is None or len(newest) == len(self.open):
            return newest
        rows = self._rows[-1]
        return newest.index_select(0, self.open if rows is None else torch.from_numpy(rows)[self.open])

    @property
    def size(self) -> int:
        return len(self.vectors) - 1

    def extend(self, image: Tensor) -> Array:
        k = self._work.k = len(self.vectors)
        self._work.image = self._addresses[0, k] = image.data_ptr()
        self.vectors.append(image)
        rows = None
        if self.open is not None:
            rows = np.zeros(len(self._norm), dtype=np.int64)
            rows[self.open.numpy()] = np.arange(len(self.open))
            self._addresses[1, k] = rows.ctypes.data
        self._rows.append(rows)
        _call("extend", self._work, 2 * k)
        return self._norm

    def keep(self, is_open: NDArray[np.bool_]) -> None:
        now = np.arange(len(self._norm)) if self.open is None else self.open.numpy()
        part = -(-len(self._norm) // PARTS)
        size = -(-np.count_nonzero(is_open) // part) * part
        if size < len(now):  # the open ones first, filled up with others that are still here
            self.open = torch.from_numpy(np.sort(now[np.argsort(~is_open[now], kind="stable")[:size]]))
            self._work.open, self._work.count = self.open.data_ptr(), size

    def finish(self, y: Tensor | None) -> tuple[Tensor, Tensor, Array, Array]:
        length, shape = np.empty(len(self._norm)), self.vectors[0].shape
        result = self.vectors[0].new_empty(shape)
        residual = self.vectors[-1] if self.open is None else self.vectors[0].new_empty(shape)
        self._work.b, self._work.open = None if y is None else y.data_ptr(), None
        self._work.y, self._work.image, self._work.length = result.data_ptr(), residual.data_ptr(), length.ctypes.data
        _call("finish", self._work, 2 * self.size)
        return result, residual, self._norm, length


def _once(name: str, rows: Tensor, **tensors: Tensor) -> Array:
    """Calls a kernel for the groups of `rows` [G, N]; returns the norms [G] that it finds."""
    norm = np.empty(len(rows))
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    _call(name, _Work(groups=rows.shape[0], n=rows.shape[1], norm=norm.ctypes.data, **pointers), 1)
    return norm


def _call(name: str, work: _Work, passes_over_memory: int) -> None:
    work.next = 0
    native.run("krylov", name, work, passes_over_memory * work.groups * work.n)
