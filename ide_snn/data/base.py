"""What a data set is: images or event frames with labels, and the rule that turns images into network input."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ide_snn.data.splits import EventSplit, Split, describe
from ide_snn.files import DataError

__all__ = ["DataError", "Dataset", "EventSplit", "Normalization", "NormalizationConstants", "Split", "to_input"]


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
        raise DataError(f"expected uint8 images [B, {channels}, H, W], got {describe(images)}")
    return normalization.constants(images.device, dtype).apply(images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, whole in memory.

    Attributes:
        name: its name in `DATASETS`.
        title: what it is called in reports; says so where the data are a part of, or a stand-in for, a known set.
        train, test: the two parts; `validation` is taken from the training part, or None.
        num_classes: labels lie in [0, num_classes).
        class_names: one per class.
        normalization: turns stored images into network input; None for events, which are the input as they are.

    Raises:
        DataError: the parts do not fit together.
    """

    name: str
    title: str
    train: Split | EventSplit
    test: Split | EventSplit
    validation: Split | EventSplit | None
    num_classes: int
    class_names: tuple[str, ...]
    normalization: Normalization | None

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise DataError(f"{self.name}: {len(self.class_names)} names for {self.num_classes} classes")
        channels, normalization = self.input_shape[0], self.normalization
        if (normalization is None) != isinstance(self.train, EventSplit):
            raise DataError(f"{self.name}: images need a normalization, events have none")
        if normalization is not None and len(normalization.mean) != channels:
            raise DataError(
                f"{self.name}: mean and std need {channels} value(s), one per channel, "
                f"got {normalization.mean} and {normalization.std}"
            )
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        for part, split in parts.items():
            if split is not None:
                self._check_split(part, split)

    def _check_split(self, part: str, split: Split | EventSplit) -> None:
        if type(split) is not type(self.train):
            raise DataError(f"{self.name}: the {part} split is of another kind than the training split")
        if len(split) == 0:
            raise DataError(f"{self.name}: the {part} split is empty")
        if split.input_shape != self.input_shape:
            raise DataError(f"{self.name}: {part} images are {split.input_shape}, training images {self.input_shape}")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(f"{self.name}: {part} labels must lie in 0..{self.num_classes - 1}, found {low}..{high}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image or frame."""
        return self.train.input_shape
