"""Linear solves by compiled kernels (`csrc/krylov.c`), float32 on a CPU.

Where A does not mix samples it may be given as `Factor`s, kernels that multiply a few samples at a time. Then GMRES is
one call: a thread takes a few samples, which stay in its cache, and each leaves when it is solved.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from ide_snn import memory, native
from ide_snn.native import Factor, lines, pointer
from ide_snn.solvers.runs import Array, Run, Terms


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
