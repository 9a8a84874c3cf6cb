"""Reader of the IDX format, in which MNIST and its relatives are published.

A file is: two zero bytes, one byte for the type (8 = uint8), one byte for the number of dimensions d, d
big-endian uint32 sizes, then the values with the last dimension fastest. Files may be gzip-compressed.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ide_snn.data.base import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8_MAGIC = 0x00000800
_CHUNK_BYTES = 1 << 20


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """Read the uint8 items of an IDX file, compressed or not (told by its content, not by its name).

    Memory grows with the data that are there, never with what the header promises.

    Args:
        path: the file.
        item_shape: shape of one item: (H, W) for images, () for labels.

    Returns:
        uint8 [N, *item_shape] with N >= 1.

    Raises:
        DataError: the file cannot be read, is damaged, or does not hold exactly such items.
    """
    try:
        with _open(path) as stream:
            count = _read_count(path, stream, item_shape)
            expected = count * math.prod(item_shape)
            # one byte more: shows trailing bytes, and makes gzip reach and verify its checksum
            data = _read_at_most(stream, expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); if it is damaged, get it again") from error
    if len(data) != expected:
        found = f"only {len(data)}" if len(data) < expected else "more"
        raise DataError(
            f"{path} is damaged: its header promises {expected} bytes of data "
            f"({_format_shape((count, *item_shape))}), found {found}; get the file again"
        )
    return torch.frombuffer(data, dtype=torch.uint8).reshape(count, *item_shape)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _read_count(path: Path, stream: BinaryIO | gzip.GzipFile, item_shape: tuple[int, ...]) -> int:
    """Read and check the header; return the number of items."""
    dimensions = 1 + len(item_shape)
    size = 4 * (1 + dimensions)
    header = stream.read(size)
    magic = _UINT8_MAGIC + dimensions
    # a file too short for the sizes is still told apart from one of another kind
    if len(header) >= 4 and header[:4] != struct.pack(">I", magic):
        raise DataError(
            f"{path} is not the IDX file that is needed: it starts with 0x{header[:4].hex()}, "
            f"expected 0x{magic:08x} (uint8, {dimensions} dimension(s))"
        )
    if len(header) < size:
        raise DataError(f"{path} ends within its header: expected {size} bytes, found {len(header)}")
    count, *found = struct.unpack(f">{dimensions}I", header[4:])
    if tuple(found) != item_shape:
        raise DataError(f"{path} holds items of {_format_shape(tuple(found))}, expected {_format_shape(item_shape)}")
    if count == 0:
        raise DataError(f"{path} holds no items: its header gives a count of 0")
    return count


def _read_at_most(stream: BinaryIO | gzip.GzipFile, limit: int) -> bytearray:
    data = bytearray()
    while len(data) < limit and (chunk := stream.read(min(_CHUNK_BYTES, limit - len(data)))):
        data += chunk
    return data


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
