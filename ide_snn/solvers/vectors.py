"""The vector work of linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU, one pass over memory."""

from __future__ import annotations

import ctypes
from typing import Any

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
    return scaled, unit, _run("rescale", b, 1, b=b, y=scaled, unit=unit)


def residual_(b: Tensor, y: Tensor, image: Tensor) -> tuple[Tensor, Array]:
    """(r = b + A y - y, ||r|| per group [G]) from `image` = A y, which r overwrites; all [G, N]."""
    return image, _run("residual", image, 1, b=b, y=y, image=image)


class NativeKrylov:
    """The Krylov space of r under (1 - A), and the least-squares problem in it; as `gmres.Krylov`. Overwrites r."""

    def __init__(self, r: Tensor, dimensions: int, passes: int, noise: float) -> None:
        self.vectors = [r]
        self._state = np.empty(len(r) * (dimensions**2 + 3 * dimensions + 1))
        self._settings = {"m": dimensions, "passes": passes, "noise": noise}
        _run("start", r, 1, y=r, state=self._state, m=dimensions)

    @property
    def newest(self) -> Tensor:
        return self.vectors[-1]

    @property
    def size(self) -> int:
        return len(self.vectors) - 1

    def extend(self, image: Tensor) -> Array:
        predicted = self._run("extend", k=len(self.vectors), image=image)
        self.vectors.append(image)
        return predicted

    def finish(self, y: Tensor | None) -> tuple[Tensor, Tensor, Array]:
        y = torch.zeros_like(self.newest) if y is None else y.clone()
        norm = self._run("finish", k=self.size, y=y)
        return y, self.newest, norm

    def _run(self, name: str, *, k: int, **arrays: Tensor) -> Array:
        basis = np.array([q.data_ptr() for q in self.vectors], dtype=np.uintp)
        return _run(name, self.newest, 2 * k, k=k, basis=basis, state=self._state, **self._settings, **arrays)


def _run(name: str, rows: Tensor, passes_over_memory: int, **fields: Any) -> Array:
    """Calls a kernel for the groups of `rows` [G, N]; returns the norms [G] that it finds."""
    norm = np.empty(len(rows), dtype=np.float32)
    values = {key: _address(value) for key, value in {**fields, "norm": norm}.items()}
    work = _Work(groups=rows.shape[0], n=rows.shape[1], **values)
    native.on_all_threads(getattr(native.library("krylov"), name), work, passes_over_memory * rows.numel())
    return norm.astype(np.float64)


def _address(value: object) -> object:
    """The address of an array; a number as it is."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value.ctypes.data if isinstance(value, np.ndarray) else value
