"""What a data set is: uint8 images with labels, and the rule that turns them into network input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class DataError(ValueError):
    """A problem with a data file or with the choice of a data set."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: `images` uint8 [N, C, H, W] and `labels` int64 [N].

    Raises:
        DataError: a dtype or shape differs from that.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], got {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"labels must be int64 [N], got {_describe(self.labels)}")
        if len(self.images) != len(self.labels):
            raise DataError(f"there are {len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> "Split":
        """A copy of the images at `indices` (integers, in this order; repeats are allowed).

        Raises:
            DataError: `indices` are not integers.
            IndexError: an index is out of range.
        """
        index = torch.as_tensor(indices, device=self.labels.device)
        if index.numel() == 0:
            index = index.long()
        elif index.is_floating_point() or index.dtype == torch.bool:
            raise DataError(f"subset takes integer indices, got {index.dtype}; use mask.nonzero() for a mask")
        return Split(self.images[index.long()], self.labels[index.long()])


@dataclass(frozen=True)
class Normalization:
    """The map x -> (x / input_scale - mean) / std from stored to input values; `mean` and `std` per channel.

    Raises:
        DataError: a number is not finite, `input_scale` or a `std` is not positive, or the lengths differ.
    """

    input_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.input_scale) and self.input_scale > 0):
            raise DataError(f"input_scale must be positive and finite, got {self.input_scale}")
        if not self.mean or len(self.mean) != len(self.std):
            raise DataError(f"mean and std need one value per channel, got {self.mean} and {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise DataError(f"mean must be finite, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise DataError(f"std must be positive and finite, got {self.std}")

    def constants(self, device: torch.device, dtype: torch.dtype) -> "NormalizationConstants":
        """The same numbers as tensors: scale [], mean and std [C, 1, 1].

        Raises:
            ValueError: `dtype` is not a floating-point type.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"network input must have a floating-point dtype, got {dtype}")
        return NormalizationConstants(
            torch.tensor(self.input_scale, device=device, dtype=dtype),
            torch.tensor(self.mean, device=device, dtype=dtype)[:, None, None],
            torch.tensor(self.std, device=device, dtype=dtype)[:, None, None],
        )


class NormalizationConstants(NamedTuple):
    """`Normalization` on a device.

    Tensors on purpose: CUDA divides by a Python number through its reciprocal, which rounds differently.
    """

    scale: Tensor
    mean: Tensor
    std: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> normalised [B, C, H, W]; the result is the only memory it takes."""
        return images.to(self.scale.dtype).div_(self.scale).sub_(self.mean).div_(self.std)


def to_input(images: Tensor, normalization: Normalization, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input (images / input_scale - mean) / std, computed in `dtype` on the images' device.

    Args:
        images: uint8 [B, C, H, W], as stored in a `Split`; never changed.
        normalization: usually `dataset.normalization`.
        dtype: a floating-point type, of the result [B, C, H, W] and of the arithmetic.

    Raises:
        DataError: `images` are not uint8 [B, C, H, W] with the channels of `normalization`.
        ValueError: `dtype` is not a floating-point type.
    """
    channels = len(normalization.mean)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
        raise DataError(f"expected uint8 images [B, {channels}, H, W], got {_describe(images)}")
    return normalization.constants(images.device, dtype).apply(images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, whole in memory.

    Attributes:
        name: its name in `DATASETS`.
        train, test: the two parts; `validation` is taken from the training part, or None.
        num_classes: labels lie in [0, num_classes).
        class_names: one per class.
        input_scale: the stored value that means 1.0 (255 for 8-bit images, 16 for digits).
        mean, std: per channel, in units after the division by `input_scale`.

    Raises:
        DataError: the parts do not fit together.
    """

    name: str
    train: Split
    test: Split
    validation: Split | None
    num_classes: int
    class_names: tuple[str, ...]
    input_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise DataError(f"{self.name}: {len(self.class_names)} names for {self.num_classes} classes")
        channels = self.input_shape[0]
        if len(self.normalization.mean) != channels:
            raise DataError(
                f"{self.name}: mean and std need {channels} value(s), one per channel, got {self.mean} and {self.std}"
            )
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        for part, split in parts.items():
            if split is not None:
                self._check_split(part, split)

    def _check_split(self, part: str, split: Split) -> None:
        if len(split) == 0:
            raise DataError(f"{self.name}: the {part} split is empty")
        shape = tuple(split.images.shape[1:])
        if shape != self.input_shape:
            raise DataError(f"{self.name}: {part} images are {shape}, training images {self.input_shape}")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(f"{self.name}: {part} labels must lie in 0..{self.num_classes - 1}, found {low}..{high}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def normalization(self) -> Normalization:
        """What `to_input` and `DeviceLoader` need to turn the stored values into network input."""
        return Normalization(self.input_scale, self.mean, self.std)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
