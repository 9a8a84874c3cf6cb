"""A `torch.utils.data.DataLoader` as the training batches of `fit`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler


class TorchLoader:
    """The batches (x, y) of a `DataLoader`, whose order in an epoch is a function of seed and epoch alone.

    So that a resumed run sees the batches that it has not seen. What the data set itself draws (augmentation) is
    drawn anew, from torch's generator of each worker, which is seeded in the same way.

    Args:
        loader: of pairs (x, y); shuffled by `shuffle=True`, or by a sampler with `set_epoch` or `generator`.
        seed: of the order.

    Raises:
        ValueError: for a sampler whose order cannot be repeated.
    """

    def __init__(self, loader: DataLoader[Any], seed: int = 0) -> None:
        sampler = loader.sampler
        known = isinstance(sampler, (RandomSampler, SequentialSampler))
        if not known and not hasattr(sampler, "set_epoch") and not hasattr(sampler, "generator"):
            raise ValueError(
                f"the order of {type(sampler).__name__} cannot be repeated when a run is resumed: use shuffle=True, or "
                "a sampler with set_epoch(epoch) or an attribute generator"
            )
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of epoch `epoch`, counted from 0, without the first `start`."""
        order, workers = np.random.SeedSequence((self.seed, epoch)).generate_state(2, np.uint64)
        sampler: Any = self.loader.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "generator"):
            sampler.generator = torch.Generator().manual_seed(int(order >> 1))
        self.loader.generator = torch.Generator().manual_seed(int(workers >> 1))
        return itertools.islice(iter(self.loader), start, None)


def as_batches(train: Any, seed: int | None) -> Any:
    """`train` if it has epochs, a `DataLoader` as a `TorchLoader`.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(train, DataLoader):
        return TorchLoader(train, 0 if seed is None else seed)
    if not (hasattr(train, "epoch") and hasattr(train, "__len__")):
        raise TypeError(
            f"a {type(train).__name__} cannot be trained on: give a torch DataLoader, a DeviceLoader, or an object "
            "with __len__() and epoch(e, start=k), which yields the batches (x, y) of epoch e without the first k, "
            "always the same"
        )
    return train
