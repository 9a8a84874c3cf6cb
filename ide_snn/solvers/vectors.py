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

from ide_snn import memory, native
from ide_snn.native import pointer

Array = NDArray[np.float64]
LINE = 64  # bytes that are read and written together


@dataclass(frozen=True)
class Factor:
    """A linear map of single samples as a kernel `Apply` of csrc/krylov.c.

    Attributes:
        library, kernel: csrc/`library`.c and the function in it.
        work, keep: what the function is given, and everything that it points to.
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
        *((name, ctypes.c_void_p) for name in ("b", "start", "y", "residual")),
        *((name, ctypes.c_void_p) for name in ("rhs", "norm", "length", "dimensions")),
        *((name, ctypes.c_double) for name in ("enough", "noise", "rounding")),
        ("memory", ctypes.c_void_p),
        ("room", ctypes.c_int64 * 4),
        ("padding", ctypes.c_int64 * 8),
        *((name, ctypes.c_int64) for name in ("next", "threads", "finished")),
        *((name, ctypes.c_double) for name in ("worst", "longest")),
        *((name, ctypes.c_int64) for name in ("most", "total")),
    ]


class Terms:
    """What follows from the tolerance of a GMRES solve and the rounding `eps` of its numbers.

    Attributes:
        enough: relative norm of a residual that needs no further dimension: a little below tol, for the residual that
            decides differs from the predicted by rounding.
        passes: of modified Gram-Schmidt, which loses orthogonality like eps / residual; one until that matters.
        noise: share of its length below which an orthogonalised vector is what cancelling has left of rounding.
    """

    def __init__(self, tol: float, eps: float) -> None:
        self.tol, self.eps = tol, eps
        self.is_loose = tol > eps**0.5
        self.enough = (0.99 if self.is_loose else 0.9) * tol
        self.passes = 1 if self.is_loose else 2
        self.noise = 10 * eps

    def trust(self, run: Run) -> bool:
        """True where the residual that a run computes is that of its y to rounding."""
        return self.is_loose and 100 * self.eps * run.longest <= self.tol


@dataclass(frozen=True)
class Run:
    """What a run of GMRES found; norms are relative to those of the right-hand side.

    Attributes:
        y, residual: [G, N]; the second may be empty, see `PreparedGmres`.
        norm: of the residual, with that of its rounding where factors are rounded, [G].
        worst, longest: largest norm of a residual, and of a y; NaN if one is.
        most, mean: products, of the group with the most, and per group.
        rounding: of the factors, see `gmres`.
    """

    y: Tensor
    residual: Tensor
    norm: Array
    worst: float
    longest: float
    most: int
    mean: float
    rounding: float = 0


def gmres(
    factors: tuple[Factor, ...],
    b: Tensor,
    terms: Terms,
    dimensions: int,
    start: Tensor | None = None,
    rhs: Array | None = None,
    *,
    rounding: float = 0,
) -> Run:
    """start + v with (1 - A) v = b by GMRES without restarts, each group in a space of its own.

    The same at any scale of b, bit for bit, as long as float32 has the numbers.

    Args:
        factors: of A, the one that is applied first at the front.
        b: [G, N].
        terms: when a group is solved, and how vectors are made orthogonal.
        dimensions: at most.
        start: [G, N]; None: 0.
        rhs: what norms are relative to, [G]; None: ||b||.
        rounding: of A v by the factors, in units of ||A v||; what it makes of the residuals is added to the norms.
    """
    prepared = PreparedGmres(factors, len(b), b.shape[1], terms, dimensions, rounding=rounding)
    prepared.take(b, start, rhs)
    prepared.stage.run()
    return prepared.result()


class PreparedGmres:
    """The kernel of `gmres` for right-hand sides [groups, n]: `take`, run `stage`, `result`.

    Args:
        own_memory: with scratch memory of its own, to be run at any time.
        rounding: as in `gmres`.
        keep_residual: write down the residuals; otherwise that of the result is empty, and only norms are known.
    """

    def __init__(
        self,
        factors: tuple[Factor, ...],
        groups: int,
        n: int,
        terms: Terms,
        dimensions: int,
        *,
        own_memory: bool = False,
        rounding: float = 0,
        keep_residual: bool = True,
    ) -> None:
        self._keeps_residual = keep_residual
        m, threads = dimensions, torch.get_num_threads()
        most = max([factor.together for factor in factors])
        turns = -(-groups // (most * threads))  # of every thread
        together = max(1, -(-groups // (max(turns, 1) * threads)))
        room = (ctypes.c_int64 * 4)(
            lines(4 * (m + 1) * together * n),
            lines(8 * together * (m * m + 4 * m + 1)),
            lines(4 * together * max([factor.size for factor in factors])) if len(factors) > 1 else 0,
            lines(max([factor.scratch + together * factor.scratch_each for factor in factors])),
        )
        size = threads * (room[0] + room[1] + 2 * room[2] + room[3])
        scratch = native.scratch(size, own=own_memory)
        links = (_Factor * len(factors))(
            *[_Factor(native.address(f.library, f.kernel), ctypes.addressof(f.work), f.size) for f in factors]
        )
        length, used = np.empty(groups), np.empty(groups, dtype=np.int64)  # the kernel's own
        work = _Solve(
            *(groups, n, together, m, terms.passes, ctypes.addressof(links), len(factors)),
            *((None,) * 6),
            *(length.ctypes.data, used.ctypes.data),
            *(terms.enough, terms.noise, rounding, scratch.data_ptr(), room),
        )
        self.stage = native.Stage("krylov", "gmres", work, 16 * groups * n, (factors, links, scratch, length, used))
        self._work = work

    def take(self, b: Tensor, start: Tensor | None = None, rhs: Array | None = None) -> None:
        """What `gmres` is given, for the next run."""
        work = self._work
        y, residual = memory.empty_like(b), memory.empty_like(b) if self._keeps_residual else b.new_empty(0)
        norm = b.new_empty(work.groups, dtype=torch.float64)
        work.b, work.y = b.data_ptr(), y.data_ptr()
        work.residual = residual.data_ptr() if self._keeps_residual else None
        work.start, work.rhs = pointer(start), (None if rhs is None else rhs.ctypes.data)
        work.norm = norm.data_ptr()
        self._now = y, residual, norm, (b, start, rhs)

    def result(self) -> Run:
        y, residual, norm, _ = self._now
        work = self._work
        mean = work.total / max(work.groups, 1)
        return Run(y, residual, norm.numpy(), work.worst, work.longest, int(work.most), mean, work.rounding)


def lines(size: int) -> int:
    """Bytes in whole lines."""
    return -(-size // LINE) * LINE


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "n")),
        *((name, ctypes.c_void_p) for name in ("b", "y", "image", "unit", "norm")),
        ("padding", ctypes.c_int64 * 8),
        ("next", ctypes.c_int64),
    ]


def rescaled(b: Tensor) -> tuple[Tensor, Tensor, Array]:
    """(b / unit [G, N], unit [G], ||b / unit|| [G]) of b [G, N]; the unit is a power of two near the largest |b|."""
    scaled, unit = memory.empty_like(b), b.new_empty(len(b))
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


def relative(absolute: Array, scale: Array) -> Array:
    """Norms of residuals [G] in units of their scale [G]."""
    # b = 0 has the solution v = 0 with residual 0 exactly. f(z) = 0 at some z, silent neurons, is nothing
    # infinite: there the residual is measured against z, which makes it 1
    if scale.size and scale.min() > 0 and scale.max() < np.inf:
        quotient: Array = absolute / scale
        return quotient
    known = scale > 0
    with np.errstate(invalid="ignore"):  # infinity in units of infinity is no number
        return np.where(known, absolute / np.where(known, scale, 1.0), np.where(absolute > 0, 1.0, absolute))


def largest(residual: Array) -> float:
    return float(residual.max()) if residual.size else 0.0
