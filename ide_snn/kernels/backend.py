"""Which implementation of the kernels a device gets, and the layout that they ask of their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
INSTALL = "pip install -e '.[kernels]' (Linux)"
# Triton generates code for Volta and later.
OLDEST_CAPABILITY = (7, 0)


@dataclass(frozen=True)
class Availability:
    """What "auto" takes on a device, and why. As text it is one line for a log."""

    backend: Literal["triton", "torch"]
    reason: str

    def __str__(self) -> str:
        return f"neuron kernel: {self.backend} ({self.reason})"


def available(device: torch.device | str) -> Availability:
    """The implementation that `backend="auto"` takes for tensors on `device`."""
    device = torch.device(device)
    if device.type != "cuda":
        return Availability("torch", f"device {device.type}" if torch.cuda.is_available() else "no CUDA device")
    if not torch.cuda.is_available():
        return Availability("torch", "no CUDA device")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(device), OLDEST_CAPABILITY))
        return Availability("torch", f"compute capability {found}, triton needs {needed}")
    try:
        kernels = load_kernels()
    except ImportError as error:
        return Availability("torch", str(error))
    if kernels.INTERPRETED:
        return Availability("torch", "TRITON_INTERPRET is set, which is for tests")
    return Availability("triton", f"triton {kernels.TRITON_VERSION}, {torch.cuda.get_device_name(device)}")


def why_unavailable(device: torch.device | str = "cuda") -> str | None:
    """Why the Triton kernels cannot run on `device`; None where they can."""
    found = available(device)
    return None if found.backend == "triton" else found.reason


def load_kernels() -> ModuleType:
    """The module with the Triton kernels.

    Raises:
        ImportError: where triton cannot be imported; names the extra.
    """
    try:
        from ide_snn.kernels import triton_kernels
    except ImportError as error:
        raise ImportError(f"triton cannot be imported ({error}): {INSTALL}") from error
    return triton_kernels


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """True where the Triton kernels are to run.

    Raises:
        ValueError: for an unknown backend.
        ImportError: if "triton" is asked for and cannot be imported.
        RuntimeError: if "triton" is asked for and cannot run on `device`.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        # the test of the device first: this is asked in every time step
        return device.type == "cuda" and available(device).backend == "triton"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    if load_kernels().INTERPRETED or available(device).backend == "triton":
        return True
    raise RuntimeError(
        f"backend='triton' cannot run on {device} ({available(device).reason}): use a CUDA device, backend='auto' or "
        "'torch'; for tests on a CPU set TRITON_INTERPRET=1 before triton is imported"
    )


def in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """`x` itself where it lies in memory as `like` does, otherwise a copy that does; shapes must be equal."""
    if _same_layout(like, x):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def require_same_layout(like_name: str, like: Tensor, **operands: Tensor | None) -> None:
    """Checks that flat offset i means the same element in all tensors.

    Raises:
        ValueError: for another shape, device or memory order than that of `like`, or gaps in `like`.
    """
    if not _is_dense(like):
        raise ValueError(
            f"{like_name} with shape {list(like.shape)} and strides {list(like.stride())} has gaps or overlaps: make "
            "it contiguous or channels_last"
        )
    for name, x in operands.items():
        if x is None or (x.stride() == like.stride() and x.shape == like.shape and x.device == like.device):
            continue
        if x.shape != like.shape or x.device != like.device:
            raise ValueError(
                f"{name} has shape {list(x.shape)} on {x.device}, {like_name} {list(like.shape)} on {like.device}: "
                "the kernels do not broadcast"
            )
        if not _same_layout(like, x):
            raise ValueError(
                f"{name} has strides {list(x.stride())}, {like_name} {list(like.stride())} for shape "
                f"{list(like.shape)}: bring both into one memory format, for instance with in_layout_of({like_name}, "
                f"{name})"
            )


def require_distinct(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Raises ValueError where a tensor that a kernel writes starts at the same address as another operand."""
    seen: dict[int, str] = {}
    for name, x in (written | read).items():
        if x is None or x.numel() == 0:
            continue
        other = seen.get(x.data_ptr())
        if other is not None and other in written:
            raise ValueError(f"{name} and {other} are the same memory: give each its own tensor")
        seen.setdefault(x.data_ptr(), name)


def as_bytes(x: Tensor) -> Tensor:
    """A bool tensor as uint8 0 and 1, the same memory; any other unchanged."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _strides(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that are longer than 1; the others' strides mean nothing."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.stride() == b.stride() or a.numel() == 0 or _strides(a) == _strides(b))


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous() or x.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(_strides(x)):
        if stride != expected:
            return False
        expected *= size
    return True
