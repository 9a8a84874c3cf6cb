"""The weight clip(alpha, -c, c) W / ||W||_2 with its derivative, and its matrix work by compiled kernels.

The kernels (`csrc/spectral.c`) are for float32 on a CPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ide_snn import native
from ide_snn.native import Stage
from ide_snn.once import differentiable_once


class _Phase(ctypes.Structure):
    _fields_ = [("next", ctypes.c_int64), ("done", ctypes.c_int64), ("padding", ctypes.c_int64 * 6)]


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("matrix", "u", "v", "kept_u", "kept_v", "g", "result", "sums", "alpha")),
        *((name, ctypes.c_double) for name in ("bound", "s", "scale", "p")),
        ("factor", ctypes.c_float),
        ("padding", ctypes.c_int64 * 8),
        ("phases", _Phase * 3),
    ]


def fits(matrix: Tensor, weight: Tensor) -> bool:
    """True where the kernels can take the matrix [rows, columns] of a weight: the same numbers in the same order."""
    is_view = weight.is_contiguous() and matrix.is_contiguous() and matrix.data_ptr() == weight.data_ptr()
    return is_view and native.is_plain(weight) and native.why_unavailable("spectral") is None


def state(weight: Tensor) -> tuple[int, int]:
    """Changes when the numbers of a weight do, as far as torch knows."""
    return weight.data_ptr(), weight._version


def step_(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """v = M^T u / ||M^T u||, then u = M v / s with s = ||M v|| = <u, M v>, both in place; returns s."""
    stage = step_stage(matrix, u, v)
    stage.run()
    return float(stage.work.s)


def pull(g: Tensor, matrix: Tensor, u: Tensor, v: Tensor, s: float, scale: float) -> tuple[Tensor, float]:
    """(scale (g - p u v^T), p) with p = <g, M> / s, for contiguous g [rows, columns]."""
    result = torch.empty_like(matrix)
    stage = pull_stage(g, matrix, u, v, result)
    stage.work.s, stage.work.scale = s, scale
    stage.run()
    return result, float(stage.work.p)


def step_stage(matrix: Tensor, u: Tensor, v: Tensor) -> Stage:
    """`step_`, whose result is `work.s`."""
    work, keep = _work(matrix, u, v)
    return Stage("spectral", "step", work, 2 * matrix.numel(), keep)


def weighing_stage(matrix: Tensor, norm: MatrixNorm, alpha: Tensor, u: Tensor, v: Tensor) -> tuple[Stage, int]:
    """(`step_` of the norm's u and v, the address of the float32 clip(alpha, -c, c) / s that it finds).

    Args:
        u, v: take what it makes of them, too.
    """
    norm.require_one_alpha()
    stage = step_stage(matrix, norm.u, norm.v)
    work = stage.work
    work.kept_u, work.kept_v, work.alpha, work.bound = u.data_ptr(), v.data_ptr(), alpha.data_ptr(), norm.bound
    factor = ctypes.addressof(work) + int(_Work.factor.offset)
    return replace(stage, keep=(*stage.keep, alpha, u, v)), factor


def pull_stage(g: Tensor, matrix: Tensor, u: Tensor, v: Tensor, result: Tensor) -> Stage:
    """`pull` for the `work.s` and `work.scale` that the caller sets, into `result`; p is `work.p`."""
    work, keep = _work(matrix, u, v)
    work.g, work.result = g.data_ptr(), result.data_ptr()
    return Stage("spectral", "pull", work, 3 * matrix.numel(), (*keep, g, result))


def _work(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[_Work, tuple[Any, ...]]:
    """The second is what the first points to."""
    if (*u.shape, *v.shape) != matrix.shape or not (native.is_plain(u) and native.is_plain(v)):
        raise ValueError(
            f"the constraint of a matrix {list(matrix.shape)} has vectors {list(u.shape)} of {u.dtype} and "
            f"{list(v.shape)} of {v.dtype}: one number per row and per column, contiguous, in float32, is needed"
        )
    sums = np.empty(sum(matrix.shape))
    pointers = (matrix.data_ptr(), u.data_ptr(), v.data_ptr(), *(None,) * 4, sums.ctypes.data, None)
    return _Work(*matrix.shape, *pointers), (matrix, u, v, sums)


class MatrixNorm(Protocol):
    """A norm <u, M(W) v> of a weight W by its matrix M, as `ide_snn.optimizations.SpectralMatrix`."""

    u: Tensor
    v: Tensor
    bound: float

    def matrix(self, weight: Tensor) -> Tensor:
        """M(W) [rows, columns]."""
        ...

    def times(self, weight: Tensor, v: Tensor) -> Tensor:
        """M(W) v."""
        ...

    def add_outer_(self, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """Adds u v^T to the matrix of a contiguous `weight`, in place."""
        ...

    def require_one_alpha(self) -> None:
        """Raises ValueError where alpha is not one number."""
        ...

    def take_step(self, weight: Tensor) -> tuple[Tensor | None, bool]:
        """(<u, M v>, True) once after a compiled update with this weight, else (None, False)."""
        ...


class OfUnitNorm(torch.autograd.Function):
    """clip(alpha, -c, c) W / <u, M(W) v> for the matrix M(W) of W, its derivative written out.

    With s = <u, M(W) v>, the cotangent G and p = <G, W> / s:  dL/dW = (clip(alpha) / s) (G - p u v^T)  and
    dL/dalpha = p where |alpha| <= c, else 0.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, norm: MatrixNorm) -> Tensor:
        u, v = norm.u.clone(), norm.v.clone()  # a later update must not change them
        s, ctx.native = norm.take_step(weight)
        s = torch.dot(u, norm.times(weight, v)) if s is None else s
        scale = alpha.clamp(-norm.bound, norm.bound) / s
        ctx.save_for_backward(weight, alpha, u, v, s, scale)
        ctx.norm = norm
        return weight * scale

    @staticmethod
    @differentiable_once("a weight of constraint spectral_matrix", ": those of spectral_operator can")
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, alpha, u, v, s, scale = ctx.saved_tensors
        if ctx.native and all(ctx.needs_input_grad[:2]):
            # hooks on saved tensors may give them another layout
            matrix, u, v = ctx.norm.matrix(weight).contiguous(), u.contiguous(), v.contiguous()
            result, p = pull(g.contiguous(), matrix, u, v, float(s), float(scale))
            inside = abs(alpha.item()) <= float(np.float32(ctx.norm.bound))
            return result.view(weight.shape), torch.full_like(alpha, p * inside), None  # NaN stays
        p = torch.dot(g.flatten(), weight.flatten()) / s
        to_weight = to_alpha = None
        if ctx.needs_input_grad[0]:
            to_weight = g.contiguous() * scale
            ctx.norm.add_outer_(to_weight, u * (-p * scale), v)
        if ctx.needs_input_grad[1]:
            to_alpha = p * (alpha.abs() <= ctx.norm.bound)
        return to_weight, to_alpha, None
