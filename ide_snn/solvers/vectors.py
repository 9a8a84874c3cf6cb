"""The vector work of linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU, one pass over memory."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn import native


def rescaled(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b / unit [G, N], unit [G], ||b / unit|| [G]) of b [G, N]; the unit is a power of two near the largest |b|."""
    scaled, unit, norm = torch.empty_like(b), torch.empty(len(b)), torch.empty(len(b))
    _run("rescale", b, 1, *(_pointer(t) for t in (b, scaled, unit, norm)))
    return scaled, unit, norm


def residual_(b: Tensor, y: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """(r = b + A y - y, ||r|| per group [G]) from `image` = A y, which r overwrites; all [G, N]."""
    norm = torch.empty(len(image))
    _run("residual", image, 1, *(_pointer(t) for t in (b, y, image, norm)))
    return image, norm


class NativeKrylov:
    """The Krylov space of r under (1 - A), and the least-squares problem in it; as `gmres.Krylov`. Overwrites r."""

    def __init__(self, r: Tensor, dimensions: int, passes: int, noise: float) -> None:
        self.vectors = [r]
        self._dimensions, self._passes, self._noise = dimensions, passes, noise
        self._state = np.empty(len(r) * (dimensions**2 + 3 * dimensions + 1))
        _run("start", r, 1, _pointer(r), _pointer(self._state), ctypes.c_int64(dimensions))

    @property
    def newest(self) -> Tensor:
        return self.vectors[-1]

    @property
    def size(self) -> int:
        return len(self.vectors) - 1

    def extend(self, image: Tensor) -> NDArray[np.float64]:
        predicted = np.empty(len(image), dtype=np.float32)
        _run(
            "extend",
            image,
            len(self.vectors),
            *self._basis(len(self.vectors)),
            _pointer(image),
            _pointer(self._state),
            ctypes.c_int64(self._dimensions),
            ctypes.c_int64(self._passes),
            ctypes.c_float(self._noise),
            _pointer(predicted),
        )
        self.vectors.append(image)
        return predicted.astype(np.float64)

    def finish(self, y: Tensor | None) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
        y = torch.zeros_like(self.newest) if y is None else y.clone()
        norm = np.empty(len(y), dtype=np.float32)
        _run(
            "finish",
            y,
            2 * self.size,
            *self._basis(self.size),
            _pointer(y),
            _pointer(self._state),
            ctypes.c_int64(self._dimensions),
            _pointer(norm),
        )
        return y, self.newest, norm.astype(np.float64)

    def _basis(self, size: int) -> tuple[ctypes.c_int64, ctypes.Array[ctypes.c_void_p]]:
        """`size`, and the addresses of all vectors."""
        pointers = (ctypes.c_void_p * len(self.vectors))(*(q.data_ptr() for q in self.vectors))
        return ctypes.c_int64(size), pointers


def _run(name: str, rows: Tensor, passes: int, *arguments: object) -> None:
    """Calls a kernel for the groups of `rows` [G, N], over which it goes `passes` times."""
    kernel = getattr(native.library("krylov"), name)
    counter = ctypes.c_int64(0)
    groups, n = (ctypes.c_int64(size) for size in rows.shape)
    native.on_all_threads(lambda: kernel(groups, n, *arguments, ctypes.byref(counter)), passes * rows.numel())


def _pointer(array: Tensor | NDArray[np.float32] | NDArray[np.float64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data)
