"""Random crops and flips of a whole batch at once, on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ide_snn.data.base import DataError


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images; the default is nothing.

    Args:
        crop_padding: pad by this many pixels of value 0 on each side and cut out a random window of the old size.
        flip: mirror left and right with probability 1/2.

    Raises:
        DataError: `crop_padding` is not a whole number of at least 0.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop_padding, bool) or not isinstance(self.crop_padding, int) or self.crop_padding < 0:
            raise DataError(f"crop_padding counts pixels, a whole number of at least 0; got {self.crop_padding!r}")

    @property
    def changes(self) -> bool:
        """False where images stay as they are."""
        return self.flip or self.crop_padding > 0

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Row offset, column offset and flip for each of `count` images of an epoch, int64 [count, 3] on the CPU.

        A pure function of its arguments: the k-th image served in an epoch gets the k-th row on every device, and
        in a run that was resumed.
        """
        mixed = int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(mixed)
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat([offsets, flips], dim=1)

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """The changed images [B, C, H, W], of the dtype they had; `choices` [B, 3] are rows of `draw`."""
        height, width = images.shape[-2:]
        rows = choices[:, :1] + torch.arange(height, device=images.device)
        across = torch.arange(width, device=images.device)
        columns = choices[:, 1:2] + torch.where(choices[:, 2:] == 1, across.flip(0), across)
        if self.crop_padding:
            images = torch.nn.functional.pad(images, (self.crop_padding,) * 4)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        # advanced indices around a slice put the channel last
        return images[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
