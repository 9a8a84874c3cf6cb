"""One part of a data set in memory: images, or the frames of event recordings, with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn.files import DataError

__all__ = ["EventSplit", "Split", "describe"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] and their `labels` int64 [N].

    Raises:
        DataError: a dtype or shape differs from that.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], got {describe(self.images)}")
        _check_labels("images", self.images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: str | torch.device) -> Split:
        """The same data on `device`; not copied when they are there already."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """A copy of the images at `indices` (integers, in this order; repeats are allowed).

        Raises:
            DataError: `indices` are not integers.
            IndexError: an index is out of range.
        """
        index = _as_index(indices, self.labels.device)
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class EventSplit:
    """Frames of N recordings, T each, and their `labels` int64 [N].

    Binary frames are kept eight pixels to a byte: all of N-MNIST takes 0.6 GB, not 4.9.

    Args:
        frames: uint8 [N, T, P]. The C H W pixels of a frame in that order, one per byte (counts; P = C H W), or
            eight per byte, the first in the lowest bit (binary; P = ceil(C H W / 8)).
        labels: of the recordings.
        input_shape: (C, H, W) of one frame.
        binary: which of the two forms `frames` has.

    Raises:
        DataError: a dtype or shape differs from that.
    """

    frames: Tensor
    labels: Tensor
    input_shape: tuple[int, int, int]
    binary: bool = True

    def __post_init__(self) -> None:
        size = frame_bytes(self.input_shape, self.binary)
        if self.frames.dtype != torch.uint8 or self.frames.ndim != 3 or self.frames.shape[2] != size:
            raise DataError(f"frames must be uint8 [N, T, {size}], got {describe(self.frames)}")
        _check_labels("recordings", self.frames, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def time_steps(self) -> int:
        """T, the frames of each recording."""
        return self.frames.shape[1]

    def to(self, device: str | torch.device) -> EventSplit:
        """The same data on `device`; not copied when they are there already."""
        return EventSplit(self.frames.to(device), self.labels.to(device), self.input_shape, self.binary)

    def subset(self, indices: Tensor | Sequence[int]) -> EventSplit:
        """A copy of the recordings at `indices`; as `Split.subset`."""
        index = _as_index(indices, self.labels.device)
        return EventSplit(self.frames[index], self.labels[index], self.input_shape, self.binary)

    def batch(self, index: Tensor, time_steps: int | None = None) -> Tensor:
        """The first `time_steps` frames (default: all) of the recordings at `index` [B], unpacked on the device.

        Returns:
            [T, B, C, H, W]: bool for binary frames, uint8 for counts.
        """
        frames = self.frames[:, :time_steps].index_select(0, index).transpose(0, 1)
        shape = (*frames.shape[:2], *self.input_shape)
        if not self.binary:
            return frames.reshape(shape)
        bits = torch.arange(8, dtype=torch.uint8, device=frames.device)
        pixels = (frames.unsqueeze(-1) >> bits & 1).flatten(-2)[..., : math.prod(self.input_shape)]
        return pixels.bool().reshape(shape)


def frame_bytes(input_shape: tuple[int, int, int], binary: bool) -> int:
    """P, the bytes of one stored frame."""
    pixels = math.prod(input_shape)
    return -(-pixels // 8) if binary else pixels


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_labels(what: str, values: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(f"labels must be int64 [N], got {describe(labels)}")
    if len(values) != len(labels):
        raise DataError(f"there are {len(values)} {what} but {len(labels)} labels")


def _as_index(indices: Tensor | Sequence[int], device: torch.device) -> Tensor:
    index = torch.as_tensor(indices, device=device)
    if index.numel() == 0:
        return index.long()
    if index.is_floating_point() or index.dtype == torch.bool:
        raise DataError(f"subset takes integer indices, got {index.dtype}; use mask.nonzero() for a mask")
    return index.long()
