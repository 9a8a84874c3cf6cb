"""How strongly the equilibrium map contracts: the ends of J's spectrum, and the norm of the feedback.

    |mu|_max   largest |eigenvalue| of J: below 1 the plain (Neumann) iteration of the backward solve converges
    ||J||_2    below 1 f contracts locally
    ||W_fb||   of the weight as the matrix (output channels, rest), the paper's norm, and of the operator at its real
               map size; with one population ||J||_2 <= ||W_fb||_operator / V_th

J is taken at the simulated rates with running statistics, one sample at a time (J is block diagonal over samples).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, eigsh
from torch import Tensor

from ide_snn.analysis.observe import Observation, Site, evaluation_mode
from ide_snn.block import FeedbackSNN
from ide_snn.equilibrium import dense_jacobian
from ide_snn.layers import Affine, FixedConnection
from ide_snn.optimizations import SpectralMatrix, get_constraint

__all__ = [
    "BlockSpectra",
    "FeedbackNorms",
    "Spectrum",
    "block_spectrum",
    "feedback_norms",
    "largest_eigenvalue",
    "largest_singular_value",
]

Product = Callable[[Tensor], Tensor]
Array = NDArray[np.float64]
DENSE_BELOW = 64  # ARPACK needs room for its Krylov space
TOLERANCE = 1e-5  # of the eigenvalues, relative; float32 products carry no more


@dataclass(frozen=True)
class FeedbackNorms:
    """Of W_fb as it is used (constraint, batch norm and pooling included), both exact up to 1e-5.

    Attributes:
        matrix: 2-norm of the weight as a matrix; None for an own module or a grouped transposed convolution.
        operator: 2-norm of the connection's linear part at its real map size.
        constraint: class of its constraint, or None.
    """

    matrix: float | None
    operator: float
    constraint: str | None


@dataclass(frozen=True)
class Spectrum:
    """One value per sample.

    Attributes:
        eigenvalue: largest |eigenvalue| of J; NaN where ARPACK did not find it.
        norm: ||J||_2.
        feedback: norms of W_fb.
        norm_bound: ||W_fb||_operator / V_th, which ||J||_2 cannot exceed; None for several populations.
    """

    eigenvalue: list[float]
    norm: list[float]
    feedback: FeedbackNorms
    norm_bound: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def block_spectrum(site: Site, samples: int = 8) -> Spectrum:
    """Spectrum ends of J for the first `samples` entries of the block's batch."""
    block = site.block
    eigenvalues, norms = [], []
    with evaluation_mode(block), torch.no_grad():
        for i in range(min(samples, site.batch)):
            rates, f = block.linearisation_point(site.inputs_of(slice(i, i + 1)))
            jacobian = f.linearise(rates, "running")
            eigenvalues.append(largest_eigenvalue(jacobian.matvec, rates))
            norms.append(largest_singular_value(jacobian.matvec, jacobian.rmatvec, rates))
        feedback = feedback_norms(block, site.inputs_of(slice(0, 1)))
    bound = None if len(block.layers) else feedback.operator / block.neuron.v_threshold
    return Spectrum(eigenvalues, norms, feedback, bound)


def feedback_norms(block: FeedbackSNN, x: Tensor) -> FeedbackNorms:
    """Matrix and operator norm of W_fb; x is an input of the block, of which only the shape matters."""
    with evaluation_mode(block), torch.no_grad():
        _, f = block.linearisation_point(x)
        link = f.feedback
        constraint = get_constraint(link.connection.op)
        return FeedbackNorms(
            _matrix_norm(link), _operator_norm(link), None if constraint is None else type(constraint).__name__
        )


def largest_eigenvalue(product: Product, like: Tensor) -> float:
    """Largest |eigenvalue| of a real linear map on tensors of the shape of `like`; NaN if ARPACK does not find it."""
    n = like.numel()
    if n < DENSE_BELOW:
        return float(torch.linalg.eigvals(dense_jacobian(product, like).double()).abs().max())
    start = _start(n)
    if not _apply(product, like)(start).any():
        return 0.0  # no neuron's rate reacts; ARPACK cannot start from there
    operator = LinearOperator((n, n), matvec=_apply(product, like), dtype=np.float64)
    try:
        values = eigs(operator, k=1, v0=start, ncv=min(n, 40), tol=TOLERANCE, return_eigenvectors=False)
    except ArpackNoConvergence:
        return math.nan
    return float(np.abs(values).max())


def largest_singular_value(product: Product, adjoint: Product, like: Tensor) -> float:
    """2-norm of a real linear map from tensors of the shape of `like`, by Lanczos on K^T K."""
    n = like.numel()
    gram = _apply(lambda v: adjoint(product(v)), like)
    start = _start(n)
    if n == 1 or not gram(start).any():
        return math.sqrt(max(float(gram(np.ones(1))[0]), 0.0)) if n == 1 else 0.0
    operator = LinearOperator((n, n), matvec=gram, dtype=np.float64)
    (value,) = eigsh(operator, k=1, v0=start, ncv=min(n, 40), tol=TOLERANCE, return_eigenvectors=False)
    return math.sqrt(max(float(value), 0.0))


class BlockSpectra:
    """`block_spectrum` of every block for the first samples it sees; a `Meter`."""

    def __init__(self, samples: int = 8) -> None:
        self._samples = samples
        self.result: dict[str, Spectrum] = {}

    def add(self, observation: Observation, labels: Tensor) -> None:  # noqa: ARG002
        for site in observation.sites:
            if site.prefix not in self.result:
                self.result[site.prefix] = block_spectrum(site, self._samples)

    def as_dict(self) -> dict[str, Any]:
        return {prefix.rstrip("_") or "block": spectrum.as_dict() for prefix, spectrum in self.result.items()}


def _matrix_norm(link: FixedConnection) -> float | None:
    affine = link.frozen
    if not isinstance(affine, Affine) or (affine.operator.kind == "conv_transposed" and affine.operator.groups > 1):
        return None
    if not bool(affine.weight.any()):
        return 0.0
    return float(SpectralMatrix(affine.operator, affine.weight, bound=1.0).exact_norm(affine.weight))


def _operator_norm(link: FixedConnection) -> float:
    affine = link.frozen
    zero = next(iter([*link.connection.parameters(), torch.zeros(())])).new_zeros(1, *link.input_shape)
    if isinstance(affine, Affine):
        return largest_singular_value(affine.linear, affine.adjoint, zero)
    offset = affine(zero)

    def adjoint(y: Tensor) -> Tensor:
        with torch.enable_grad():
            point = zero.clone().requires_grad_()
            return torch.autograd.grad(affine(point), point, y)[0]

    return largest_singular_value(lambda x: affine(x) - offset, adjoint, zero)


def _apply(product: Product, like: Tensor) -> Callable[[Array], Array]:
    """The map on numpy vectors, as ARPACK wants it."""

    def apply(vector: Array) -> Array:
        w = torch.from_numpy(np.array(vector, dtype=np.float64)).to(like).view(like.shape)
        return product(w).flatten().double().cpu().numpy()

    return apply


def _start(n: int) -> Array:
    return np.random.default_rng(0).standard_normal(n)
