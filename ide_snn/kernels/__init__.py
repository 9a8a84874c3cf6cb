"""Fused kernels for the simulation and the solvers: Triton on CUDA devices, the same in torch operations everywhere.

Every function takes `backend="auto" | "triton" | "torch"`. "auto" is decided by the device alone: `available` says
how, `why_unavailable` why not by Triton. "triton" raises where it is not possible. Importing this package does not
import triton.
"""

from ide_snn.kernels.backend import Availability, Backend, available, in_layout_of, why_unavailable
from ide_snn.kernels.neuron import neuron_step_
from ide_snn.kernels.solver import apply_slope, masked_update_, residual

__all__ = [
    "Availability",
    "Backend",
    "apply_slope",
    "available",
    "in_layout_of",
    "masked_update_",
    "neuron_step_",
    "residual",
    "why_unavailable",
]
