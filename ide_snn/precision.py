"""How the products of a forward and of its solve are computed.

| precision | on a CPU | on a GPU |
| --- | --- | --- |
| `float32` | torch's dense products: the reference | the same |
| `exact`   | event-driven (`ide_snn.event_driven`): float32 sums over the spikes | dense, fused neuron kernel |
| `fast`    | the same, and the simulation adds weights in 16-bit units, exactly | the same, products in TF32 |

TF32 rounds the factors of a product to 11 significant bits and adds in float32; spikes are exact in it. Only `fast`
allows it, in a block's simulation and solve; for the gradients of the weights, which torch computes, `round_products`
sets it for the whole process, as the command line does.
In `configs/precision` solvers stop at a residual of 1e-2 with `fast`, of 1e-3 with the others.
Where the machine lacks what a precision needs, the dense products are taken and the log says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Precision = Literal["float32", "exact", "fast"]
PRECISIONS = get_args(Precision)


def require_precision(value: str) -> None:
    """Raises ValueError unless `value` is one."""
    if value not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {value!r}")


def why_no_tf32(device: torch.device) -> str | None:
    """None where the GPU `device` multiplies in TF32, else the reason."""
    if torch.version.hip is not None:
        return "TF32 is for GPUs of NVIDIA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}, TF32 needs 8.0"


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Scope in which torch computes in the types it is given."""
    # entering torch's scope costs as much as a small product: only where there is something to leave
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def round_products(precision: str) -> None:
    """Lets torch round float32 products on a GPU to TF32 with `fast`, and not with the others.

    Torch's own setting is TF32 for convolutions and float32 for matrices.

    Raises:
        ValueError: for an unknown precision.
    """
    require_precision(precision)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "fast"


@contextmanager
def products_rounded(precision: str) -> Iterator[None]:
    """Scope of `round_products`."""
    convolutions, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, matrices.allow_tf32
    try:
        round_products(precision)
        yield
    finally:
        convolutions.allow_tf32, matrices.allow_tf32 = before
