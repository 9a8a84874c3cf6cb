"""The largest singular value of a linear map that is known by its products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@torch.no_grad()
def leading(
    times: Product, adjoint_times: Product, shape: tuple[int, ...], device: torch.device
) -> tuple[float, Tensor]:
    """(||K||_2, its right singular vector v of `shape`) for v -> K v and u -> K^T u, in float64 on `device`.

    By Lanczos on K^T K (scipy's ARPACK). The start is random, the same in every call: from singular vectors of an
    earlier K, which can be exact but not the leading ones, Lanczos would not move.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)

    def gram(x: NDArray[np.float64]) -> NDArray[np.float64]:
        moved = torch.from_numpy(x.copy()).to(device).view(shape)
        return adjoint_times(times(moved)).flatten().cpu().numpy()

    n = v.numel()
    if n > 1:  # ARPACK looks for fewer vectors than there are dimensions
        operator = LinearOperator((n, n), matvec=gram, dtype=np.float64)
        _, vectors = eigsh(operator, k=1, v0=v.flatten().cpu().numpy(), tol=1e-6)
        v = torch.from_numpy(vectors[:, 0].copy()).to(device).view(shape)
    return float(times(v).norm() / v.norm()), v
