"""The element-wise parts of a linear solve v = b + J^T v, each in one pass over memory.

Rows are groups of unknowns [G, N], as in `ide_snn.solvers.base`: one per sample, or a single one. Nothing here
synchronises with the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ide_snn.kernels.backend import (
    Backend,
    as_bytes,
    load_kernels,
    require_distinct,
    require_same_layout,
    uses_triton,
)


def apply_slope(
    v: Tensor, mask: Tensor, scale: float, out: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """D v for a slope that is `scale` or 0: out = v (mask scale).

    The slope of a population is gain sigma'(z) / V_th; one byte per neuron holds it where the gain is a dropout mask.
    The product is rounded to v's type or float32, whichever is wider, then to the type of `out`, so that the next
    product can be given bfloat16 without another pass.

    Args:
        v: [B, *], floating point.
        mask: bool, or uint8 of 0 and 1; shape and memory order of v.
        scale: positive, for instance 1 / ((1 - p) V_th).
        out: receives the result, floating point; may be `v` itself; by default a new tensor like v.

    Raises:
        ValueError: for shapes, types, layouts or a scale that make no sense.
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    if out is None:
        out = torch.empty_like(v)
    if mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"mask must be bool or uint8, got {mask.dtype}")
    if not (v.is_floating_point() and out.is_floating_point()):
        raise ValueError(f"v and out must be floating point, got {v.dtype} and {out.dtype}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive finite number, got {scale}")
    require_same_layout("v", v, mask=mask, out=out)
    if uses_triton(backend, v.device):
        kernels, n = load_kernels(), v.numel()
        kernels.launch(kernels.apply_slope, kernels.blocks(n), v, v, as_bytes(mask), out, n, SCALE=scale)
        return out
    work = torch.promote_types(v.dtype, torch.float32)
    product = out if out.dtype == work else torch.empty_like(v, dtype=work)
    torch.mul(v, mask, out=product).mul_(scale)  # times 0 or 1 is exact: one rounding
    return product if product is out else out.copy_(product)


def residual(
    b: Tensor, image: Tensor, y: Tensor, out: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """r = (b + image) - y and ||r|| of every row.

    Args:
        b, y: [G, N], contiguous, one type (float32, float64).
        image: J^T y [G, N], floating point of any precision; rounded to y's type first.
        out: receives r; may be `image` where that has y's type; by default a new tensor.

    Returns:
        (r [G, N], ||r|| [G]), both in y's type. r is the same bit for bit on every backend; the norms are sums, whose
        order differs.

    Raises:
        ValueError: for shapes, types or layouts that make no sense.
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    _require_rows("y", y)
    if out is None:
        out = torch.empty_like(y)
    if b.dtype != y.dtype or out.dtype != y.dtype:
        raise ValueError(f"b, y and out must have one type, got {b.dtype}, {y.dtype} and {out.dtype}")
    if not image.is_floating_point():
        raise ValueError(f"image must be floating point, got {image.dtype}")
    require_same_layout("y", y, b=b, image=image, out=out)
    require_distinct({"out": out}, {"b": b, "y": y})
    if not uses_triton(backend, y.device):
        torch.add(b, image.to(y.dtype), out=out).sub_(y)
        return out, out.norm(dim=1)
    kernels = load_kernels()
    groups, n = y.shape
    blocks = kernels.blocks(n)
    squares = torch.zeros(groups, blocks, dtype=y.dtype, device=y.device)
    kernels.launch(kernels.residual, groups * blocks, y, b, image, y, out, squares, n, blocks)
    return out, squares.double().sum(1).sqrt().to(y.dtype)


def masked_update_(y: Tensor, r: Tensor, active: Tensor, step: float = 1.0, *, backend: Backend = "auto") -> Tensor:
    """y <- y + step r in the active rows; the others are neither read nor written.

    Args:
        y: [G, N], contiguous, float32 or float64; overwritten and returned.
        r: like y.
        active: [G], bool or uint8.
        step: finite.

    Raises:
        ValueError: for shapes, types or layouts that make no sense.
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    _require_rows("y", y)
    if r.dtype != y.dtype:
        raise ValueError(f"y and r must have one type, got {y.dtype} and {r.dtype}")
    if active.shape != y.shape[:1] or active.dtype not in (torch.bool, torch.uint8) or active.device != y.device:
        raise ValueError(
            f"active must be bool or uint8 [{y.shape[0]}] on {y.device}, got {active.dtype} {list(active.shape)} on "
            f"{active.device}"
        )
    if not math.isfinite(step):
        raise ValueError(f"step must be finite, got {step}")
    require_same_layout("y", y, r=r)
    require_distinct({"y": y}, {"r": r, "active": active})
    if not uses_triton(backend, y.device):
        # not torch.add(alpha=...), which may round once where the two operations round twice
        return torch.where(active.bool()[:, None], y + (r if step == 1 else r * step), y, out=y)
    kernels = load_kernels()
    groups, n = y.shape
    blocks = kernels.blocks(n)
    active = as_bytes(active.contiguous())
    kernels.launch(kernels.masked_update, groups * blocks, y, y, r, active, n, blocks, STEP=step)
    return y


def _require_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be contiguous rows [G, N] in float32 or float64, got {x.dtype} {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
