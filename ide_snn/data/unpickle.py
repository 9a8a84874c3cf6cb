"""Reads the pickled dictionaries of CIFAR without executing what a pickle could name.

A pickle may call anything it can import. Here the few names that numpy arrays need stand for the plain classes
below, which only keep what the file says; every other name is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ide_snn.files import DataError

__all__ = ["PickledArray", "read_pickled_dict"]


class PickledArray:
    """What a file says of a numpy array: shape, dtype, order and bytes."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_uint8(self) -> NDArray[np.uint8]:
        """The array; raises ValueError where it is not one of uint8."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("it is incomplete")
        _, shape, dtype, fortran_order, content = self.state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", b"u1") or not isinstance(content, bytes):
            raise ValueError("its values are not uint8")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of which single bytes have none."""


def _reconstruct(kind: Any, *_: Any) -> PickledArray:
    if kind is not PickledArray:
        raise pickle.UnpicklingError("only numpy.ndarray can be reconstructed")
    return PickledArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> PickledArray:
    """How protocol 5 stores arrays."""
    if not isinstance(content, (bytes, bytearray, pickle.PickleBuffer)):  # of a number, bytes would make so many zeros
        raise pickle.UnpicklingError("the values of an array are not bytes")
    array = PickledArray()
    array.state = (1, shape, dtype, order == "F", bytes(content))
    return array


def _no_bytes() -> bytes:
    """How Python 3 stores b"" in protocol 2, as a call of bytes; with arguments that could ask for any memory."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes are stored as latin1, not as {encoding!r}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("__builtin__", "bytes"): _no_bytes,
    ("_codecs", "encode"): _encode,  # how Python 3 stores bytes in protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data, so it is refused")
        return _NAMES[module, name]


def read_pickled_dict(content: bytes, name: str) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3, its keys as str; arrays are `PickledArray`.

    Raises:
        DataError: naming `name`; the pickle is damaged, no dictionary, or asks for anything but arrays.
    """
    try:
        result = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # there is no end to what a damaged pickle can raise
        raise DataError(f"{name} is damaged or unsafe ({type(error).__name__}: {error}); get the file again") from error
    if not isinstance(result, dict):
        raise DataError(f"{name} holds no dictionary, but a {type(result).__name__}; get the file again")
    return {as_text(key): value for key, value in result.items()}


def as_text(value: Any) -> str:
    """str of a str or of the bytes that Python 2 wrote for it."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
