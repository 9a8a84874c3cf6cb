"""How the products of a forward and of its solve are computed.

| precision | on a CPU | on a GPU |
| --- | --- | --- |
| `float32` | torch's dense products: the reference | the same |
| `exact`   | event-driven (`ide_snn.event_driven`): float32 sums over the spikes | dense, fused neuron kernel |
| `fast`    | the same, and the simulation adds weights in 16-bit units, exactly | the same |

In `configs/precision` solvers stop at a residual of 1e-2 with `fast`, of 1e-3 with the others.
Where the machine lacks what a precision needs, the dense products are taken and the log says why.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Precision = Literal["float32", "exact", "fast"]


def require_precision(value: str) -> None:
    """Raises ValueError unless `value` is one."""
    if value not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {value!r}")


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Scope in which torch computes in the types it is given."""
    # entering torch's scope costs as much as a small product: only where there is something to leave
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
