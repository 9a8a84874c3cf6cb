"""Linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU.

Where A does not mix samples it may be given as `Factor`s, kernels that multiply a few samples at a time. Then GMRES is
one call: a thread takes a few samples, which stay in its cache, and each leaves when it is solved.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn import native

Array = NDArray[np.float64]
LINE = 64  # bytes that are read and written together


@dataclass(frozen=True)
class Factor:
    """A linear map of single samples as a kernel `Apply` of csrc/krylov.c.

    Attributes:
        library, kernel: csrc/`library`.c and the function in it.
        work: what the function is given; `tensors` and anything else that it points to is kept here.
        size: numbers per sample of the result.
        together: samples that are best multiplied at a time.
        scratch, scratch_each: bytes that a thread needs, and those for every sample that is multiplied at a time.
    """

    library: str
    kernel: str
    work: ctypes.Structure
    keep: tuple[Any, ...]
    size: int
    together: int = 1
    scratch: int = 0
    scratch_each: int = 0


class _Factor(ctypes.Structure):
    _fields_ = [("apply", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("size", ctypes.c_int64)]


class _Solve(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "n", "together", "m", "passes")),
        ("factors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("b", "start", "y", "residual", "enough", "norm", "length", "dimensions")
        ),
        ("noise", ctypes.c_double),
        ("memory", ctypes.c_void_p),
        ("room", ctypes.c_int64 * 4),
        ("padding", ctypes.c_int64 * 8),
        ("next", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Solved:
    """y [G, N] with its residual [G, N] and the norms of both [G]; the products [G] that each group took.

    The residual is written where it is not below what was enough, and 0 elsewhere.
    """

    y: Tensor
    residual: Tensor
    norm: Array
    length: Array
    products: NDArray[np.int64]


def gmres(
    factors: tuple[Factor, ...],
    b: Tensor,
    start: Tensor | None,
    enough: Array,
    *,
    dimensions: int,
    passes: int,
    noise: float,
) -> Solved:
    """start + v with (1 - A) v = b by GMRES without restarts, each group in a space of its own.

    Args:
        factors: of A, the one that is applied first at the front.
        b: [G, N].
        start: [G, N], or None for 0.
        enough: norm [G] of a residual that needs no further dimension.
        dimensions: at most.
        passes: of modified Gram-Schmidt.
        noise: share of its length below which an orthogonalised vector is noise.
    """
    (groups, n), m = b.shape, dimensions
    together = max(1, min(max(factor.together for factor in factors), -(-groups // torch.get_num_threads())))
    room = [
        4 * (m + 1) * together * n,
        8 * together * (m * m + 3 * m + 1),
        4 * together * max((factor.size for factor in factors[:-1]), default=0),
        max(factor.scratch + together * factor.scratch_each for factor in factors),
    ]
    room = [-(-size // LINE) * LINE for size in room]
    memory = torch.empty(torch.get_num_threads() * (sum(room) + room[2]), dtype=torch.uint8)
    links = (_Factor * len(factors))(
        *(_Factor(native.address(f.library, f.kernel), ctypes.addressof(f.work), f.size) for f in factors)
    )
    y, residual = torch.empty_like(b), torch.empty_like(b)
    norm, length, products = np.empty(groups), np.empty(groups), np.empty(groups, dtype=np.int64)
    work = _Solve(
        *(groups, n, together, m, passes),
        ctypes.addressof(links),
        len(factors),
        *(b.data_ptr(), None if start is None else start.data_ptr(), y.data_ptr(), residual.data_ptr()),
        *(array.ctypes.data for array in (enough, norm, length, products)),
        noise,
        memory.data_ptr(),
        (ctypes.c_int64 * 4)(*room),
    )
    native.run("krylov", "gmres", work, 16 * b.numel())
    solved = norm <= enough
    if not solved.all():
        residual[torch.from_numpy(solved)] = 0
    return Solved(y, residual, norm, length, products)


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "n")),
        *((name, ctypes.c_void_p) for name in ("b", "y", "image", "unit", "norm")),
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


def _once(name: str, rows: Tensor, **tensors: Tensor) -> Array:
    """Calls a kernel for the groups of `rows` [G, N]; returns the norms [G] that it finds."""
    norm = np.empty(len(rows))
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    native.run(
        "krylov", name, _Work(groups=rows.shape[0], n=rows.shape[1], norm=norm.ctypes.data, **pointers), rows.numel()
    )
    return norm
