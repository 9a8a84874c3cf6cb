"""How the products of a forward and of its solve are computed.

| precision | on a CPU | on a GPU |
| --- | --- | --- |
| `float32` | torch's dense products: the reference | the same |
| `exact`   | event-driven (`ide_snn.event_driven`): float32 sums over the spikes | dense, fused neuron kernel |
| `fast`    | the same, and the simulation adds weights in 16-bit units, exactly | the same in float16; f, J in TF32 |

On a CPU `fast` also takes 16-bit whole numbers for fully connected layers (`ide_snn.integers`: the input stage,
gradients of weights, J^T of solves to a loose tolerance), and bfloat16 for the dense convolutions of f, of its gradient
and of such solves where the processor has it (`rounds_convolutions`).
float16 and TF32 round the factors of a product to 11 significant bits, in which spikes are exact, and add in float32;
float16 rounds the response, too, and ends at 65,504: a membrane beyond it becomes infinite, and its sample's rates NaN.
Only `fast` allows them, in a block's simulation and solve; for the gradients of the weights, which torch computes,
`round_products` sets TF32 for the whole process, as the command line does.
In `configs/precision` solvers stop at a residual of 1e-2 with `fast`, of 1e-3 with the others.
Where the machine lacks what a precision needs, the next best is taken and the log says which.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

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


@functools.cache
def multiplies_bfloat16() -> bool:
    """True where the processor has instructions for products of bfloat16: elsewhere float32's are faster."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def rounds_convolutions(precision: str, device: torch.device) -> bool:
    """True where dense convolutions of f, gradients and solves may take bfloat16 (by oneDNN: float32 sums)."""
    by_onednn = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    return precision == "fast" and device.type == "cpu" and by_onednn and multiplies_bfloat16()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Scope in which torch computes in the types it is given."""
    # entering torch's scope costs as much as a small product: only where there is something to leave
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def round_products(precision: str) -> None:
    """For the whole process: lets torch round float32 products on a GPU to TF32 with `fast`, and not with the others.

    Torch's own setting is TF32 for convolutions and float32 for matrices.

    Raises:
        ValueError: for an unknown precision.
    """
    require_precision(precision)
    # the older switches: after the newer ones torch refuses to read these
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "fast"


@contextmanager
def products_rounded(precision: str, device: torch.device) -> Iterator[None]:
    """Scope of `round_products` for products on `device`; on a CPU nothing is touched."""
    if device.type != "cuda":
        yield
        return
    require_precision(precision)
    switches = _switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, (ieee, tf32) in switches:
            setattr(owner, name, tf32 if precision == "fast" else ieee)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, tuple[object, object]]]:
    """(owner, attribute, (its value for float32 and exact, for fast)) of torch's settings."""
    matrices: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    sums: list[tuple[Any, str, tuple[object, object]]] = [(_HalfSums(), "reduced", (_HalfSums.off(),) * 2)]
    if hasattr(matrices, "allow_fp16_accumulation"):
        sums.append((matrices, "allow_fp16_accumulation", (False, False)))
    if hasattr(
        matrices, "fp32_precision"
    ):  # from torch 2.9 on; unlike the older ones they can always be read and put back
        return [*sums, *((owner, "fp32_precision", ("ieee", "tf32")) for owner in (matrices, cudnn.conv, cudnn.rnn))]
    return [*sums, *((owner, "allow_tf32", (False, True)) for owner in (matrices, cudnn))]


class _HalfSums:
    """Torch's setting whether sums of float16 products may be in float16; newer versions have two switches in it."""

    @property
    def reduced(self) -> bool | tuple[bool, bool]:
        matrices: Any = torch.backends.cuda.matmul
        one: bool = matrices.allow_fp16_reduced_precision_reduction
        return (one, matrices.allow_fp16_reduced_precision_reduction_split_k) if self._has_two() else one

    @reduced.setter
    def reduced(self, value: bool | tuple[bool, bool]) -> None:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = value

    @classmethod
    def off(cls) -> bool | tuple[bool, bool]:
        return (False, True) if cls._has_two() else False

    @staticmethod
    def _has_two() -> bool:
        return hasattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction_split_k")
