"""A run of GMRES without the host: a step of Arnoldi's method, the small least-squares problem, the combined vectors.

With an orthonormal basis q_0..q_m of the Krylov space, q_0 = b / beta, and the images of its vectors

    (1 - A) q_k = sum over i <= k + 1 of h_ik q_i
    y = sum of c_k q_k,  c = argmin ||beta e_1 - H c||          r = b - (1 - A) y = sum of t_i q_i,  t = beta e_1 - H c

Rows are groups of unknowns [G, N], as in `ide_snn.solvers.base`. Nothing here synchronises with the host: also how many
dimensions are taken is decided on the device. In torch operations it takes many small kernels, with Triton one each.
Source: Y. Saad & M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ide_snn.kernels.backend import Backend, load_kernels, uses_triton

ROW = {"BLOCK": 4096, "num_warps": 8}  # of programs that have a row: long enough to hide the latency of memory


def normalise_(w: Tensor) -> tuple[Tensor, Tensor]:
    """Turns w [G, N] into w / ||w||; returns it and ||w|| [G]. A zero row (the space is exhausted) stays zero."""
    length = w.norm(dim=1)
    return w.mul_(torch.where(length > 0, length.reciprocal(), 0.0)[:, None]), length


def orthogonalised(w: Tensor, basis: list[Tensor], passes: int, noise: float) -> tuple[Tensor, Tensor]:
    """(q [G, N], h [k + 2, G]) with w = h_0 q_0 + ... + h_k q_k + h_{k+1} q for the basis q_0..q_k; w is overwritten.

    By modified Gram-Schmidt. What `passes` leave of less than `noise` of ||w|| is rounding, and becomes 0.
    """
    column = torch.zeros(len(basis) + 1, w.shape[0], dtype=w.dtype, device=w.device)
    before = w.norm(dim=1)
    for _ in range(passes):
        for i, q in enumerate(basis):
            h = (q * w).sum(dim=1)
            w.addcmul_(q, h[:, None], value=-1)
            column[i] += h
    cancelled = w.norm(dim=1) <= noise * before
    vector, column[-1] = normalise_(w.masked_fill_(cancelled[:, None], 0))
    return vector, column


def arnoldi_step_(
    basis: Tensor, image: Tensor, columns: Tensor, k: int, *, passes: int, noise: float, backend: Backend = "auto"
) -> None:
    """Writes q_{k+1} and column k of H.

    Args:
        basis: q_0..q_m [m + 1, G, N], contiguous, float32 or float64; those behind k have yet to come.
        image: A q_k [G, N], contiguous.
        columns: H as [m, m + 1, G], contiguous, column k all 0.
        k: in 0..m - 1.
        passes, noise: see `orthogonalised`.

    Raises:
        ValueError: for shapes or layouts that make no sense.
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    m, groups, n = len(basis) - 1, *basis.shape[1:]
    if not 0 <= k < m or image.shape != (groups, n) or columns.shape != (m, m + 1, groups):
        raise ValueError(
            f"dimension {k}, basis {list(basis.shape)}, image {list(image.shape)}, columns {list(columns.shape)}: "
            "they must be in 0..m - 1, [m + 1, G, N], [G, N] and [m, m + 1, G]"
        )
    if not (basis.is_contiguous() and image.is_contiguous() and columns.is_contiguous()):
        raise ValueError("basis, image and columns must be contiguous")
    if uses_triton(backend, basis.device):
        kernels, plane = load_kernels(), groups * n
        operands = (basis, basis[k], image, basis[k + 1], columns[k], groups, plane)
        kernels.launch(kernels.arnoldi, groups, basis, *operands, N=n, K=k, NOISE=noise, PASSES=passes, **ROW)
        return
    w = basis[k] - image.to(basis.dtype)
    basis[k + 1], columns[k, : k + 2] = orthogonalised(w, list(basis[: k + 1]), passes, noise)


def least_squares(
    columns: Tensor, beta: Tensor, bound: Tensor, *, noise: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of y and r, of the first dimension j that is enough for all groups.

    Args:
        columns: H as [m, m + 1, G], contiguous.
        beta: ||b|| [G].
        bound: norm of a residual that is enough [G]. A group whose residual is not finite needs no more either.
        noise: a column that turns to less than that of its length is useless: its coefficient is 0.

    Returns:
        (c [m, G], t [m + 1, G], verdict [2]): 0 behind j; the verdict, int32, is j and 1 where more dimensions than m
        are needed. By Givens rotations in float64, whatever type H has.

    Raises:
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    m, groups = len(columns), columns.shape[2]
    solution, remainder = columns.new_empty(m, groups), columns.new_empty(m + 1, groups)
    verdict = torch.empty(2, dtype=torch.int32, device=columns.device)
    scratch = torch.empty(m * m + 3 * m, groups, dtype=torch.float64, device=columns.device)
    factor, turns, right = scratch.split((m * m, 2 * m, m))
    if uses_triton(backend, columns.device):
        kernels = load_kernels()
        operands = (columns, beta, bound, factor, turns, right, solution, remainder, verdict, groups)
        block = 1 << max(groups - 1, 1).bit_length()
        kernels.launch(kernels.least_squares, 1, columns, *operands, DIMENSIONS=m, NOISE=noise, BLOCK=block)
        return solution, remainder, verdict
    h, factor = columns.double(), factor.view(m, m, groups)
    last, taking = beta.double(), torch.ones((), dtype=torch.int32, device=columns.device)
    cosines, sines, used = turns[:m], turns[m:], torch.zeros_like(taking)
    for k in range(m):
        upper = h[k, 0]
        for i in range(k):
            factor[i, k] = cosines[i] * upper + sines[i] * h[k, i + 1]
            upper = cosines[i] * h[k, i + 1] - sines[i] * upper
        radius = torch.hypot(upper, h[k, k + 1])
        useless = radius <= noise * h[k, : k + 2].norm(dim=0)
        safe = torch.where(useless, 1.0, radius)
        cosines[k], sines[k] = torch.where(useless, 0.0, upper / safe), torch.where(useless, 1.0, h[k, k + 1] / safe)
        factor[k, k] = torch.where(useless, 0.0, radius)
        right[k] = torch.where(taking > 0, cosines[k] * last, 0.0)
        last = -sines[k] * last
        used = used + taking
        taking = taking * ((last.abs() > bound) & (last.abs() < torch.inf)).any()
    place = torch.arange(m + 1, device=columns.device)[:, None]
    c = torch.zeros(m, groups, dtype=torch.float64, device=columns.device)
    for i in reversed(range(m)):
        rest = right[i] - torch.where(place[i + 1 : m] < used, factor[i, i + 1 :] * c[i + 1 :], 0.0).sum(0)
        has_part = (factor[i, i] != 0) & (used > i)
        c[i] = torch.where(has_part, rest / torch.where(has_part, factor[i, i], 1.0), 0.0)
    t = torch.where(place[:m, None] < used, h * c[:, None], 0.0).sum(0).neg_()
    t[0] += beta
    solution.copy_(c)
    remainder.copy_(torch.where(place <= used, t, 0.0))
    return solution, remainder, torch.stack([used, taking])


def combine(
    basis: Tensor, solution: Tensor, remainder: Tensor, verdict: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [G, N], r [G, N], (||r||, ||y||) [2, G]) of what `least_squares` returns, from the basis [m + 1, G, N].

    Raises:
        ImportError, RuntimeError: where backend="triton" is impossible.
    """
    if uses_triton(backend, basis.device):
        kernels, (groups, n) = load_kernels(), basis.shape[1:]
        y, r, norms = basis.new_empty(groups, n), basis.new_empty(groups, n), basis.new_empty(2, groups)
        operands = (basis, solution, remainder, verdict, y, r, norms, groups, groups * n)
        kernels.launch(kernels.combine, groups, basis, *operands, N=n, DIMENSIONS=len(solution), **ROW)
        return y, r, norms
    y, r = (
        # a vector that is not taken may be anything
        torch.where(
            (torch.arange(len(t), device=t.device) < verdict[0] + more)[:, None, None],
            t[..., None] * basis[: len(t)],
            0.0,
        ).sum(0)
        for t, more in ((solution, 0), (remainder, 1))
    )
    return y, r, torch.stack([r.norm(dim=1), y.norm(dim=1)])
