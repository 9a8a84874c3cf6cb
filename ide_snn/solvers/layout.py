"""Unknowns of any shape, seen as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Tensors seen as rows [G, N]: views, no copies, for contiguous and channels-last tensors alike."""

    shape: tuple[int, ...]
    channels_last: bool
    groups: int

    @classmethod
    def of(cls, x: Tensor, *, coupled: bool = False) -> Layout:
        """That of x [B, *]; a single row where the samples are `coupled`."""
        is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(x.shape), is_last, 1 if coupled else x.shape[0])

    def rows(self, x: Tensor) -> Tensor:
        """x as [G, N]."""
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        return x.reshape(self.groups, x.numel() // max(self.groups, 1))

    def unrows(self, x: Tensor) -> Tensor:
        """`rows`, undone."""
        if self.channels_last:
            batch, c, h, w = self.shape
            return x.view(batch, h, w, c).permute(0, 3, 1, 2)
        return x.view(self.shape)
