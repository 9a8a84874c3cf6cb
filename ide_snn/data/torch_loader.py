"""A `torch.utils.data.DataLoader` as the training batches of `fit`."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler


class TorchLoader:
    """The batches (x, y) of a `DataLoader`, whose order in an epoch is a function of seed and epoch alone.

    So that a resumed run sees the batches that it has not seen. What the data set itself draws (augmentation) is
    drawn anew: from torch's generator of each worker, which is seeded in the same way unless workers are persistent.
    While an epoch is read, generators of the loader and of its sampler are replaced. Its workers have process groups of
    their own, so that signals to that of the process that trains do not end them before it has saved.

    Args:
        loader: of pairs (x, y); shuffled by `shuffle=True`, or by a sampler, or batch sampler, with `set_epoch` or
            `generator`.
        seed: of the order; None: `fit` gives it that of its run.

    Raises:
        ValueError: for an order that cannot be repeated, and for no batches.
    """

    def __init__(self, loader: DataLoader[Any], seed: int | None = None) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                "the order of an IterableDataset cannot be repeated when a run is resumed: use a data set with "
                "__getitem__, or an object with __len__() and epoch(e, start=k) instead of the loader"
            )
        sampler = _order_of(loader)
        known = isinstance(sampler, (RandomSampler, SequentialSampler)) or type(sampler) in (list, tuple, range)
        if not known and not hasattr(sampler, "set_epoch") and not _has_generator(sampler):
            raise ValueError(
                f"the order of {type(sampler).__name__} cannot be repeated when a run is resumed: use shuffle=True, or "
                "a sampler with set_epoch(epoch) or an attribute generator (torch's, or None), from which it draws"
            )
        if loader.persistent_workers and not loader.in_order:
            raise ValueError("persistent workers keep in_order=False, the order of the fastest one: use in_order=True")
        if len(loader) == 0:
            raise ValueError("the loader has no batches: use a smaller batch_size, or drop_last=False")
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of epoch `epoch`, counted from 0, without the first `start`."""
        order, workers = np.random.SeedSequence((self.seed or 0, epoch)).generate_state(2, np.uint64)
        loader, sampler = self.loader, _order_of(self.loader)
        started = functools.partial(_start_worker, loader.worker_init_fn)
        replaced: list[tuple[Any, str, Any]] = [
            (loader, "generator", torch.Generator().manual_seed(int(workers >> 1))),
            (loader, "worker_init_fn", started),
            (loader, "in_order", True),  # otherwise it is that of the fastest workers
        ]
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        elif _has_generator(sampler):
            replaced.append((sampler, "generator", torch.Generator().manual_seed(int(order >> 1))))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        try:
            _assign(replaced)
            yield from itertools.islice(iter(loader), start, None)
        finally:
            _assign(before)


def _order_of(loader: DataLoader[Any]) -> Any:
    """What draws the order: a batch sampler of one's own, or the sampler."""
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def _has_generator(sampler: Any) -> bool:
    """True for one that may be replaced."""
    of_the_class = getattr(type(sampler), "generator", None)
    if isinstance(of_the_class, property) and of_the_class.fset is None:
        return False
    return isinstance(getattr(sampler, "generator", 0), (torch.Generator, type(None)))


def _assign(values: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in values:
        setattr(owner, name, value)


def _start_worker(given: Callable[[int], None] | None, worker: int) -> None:
    """In a new worker: signals to the group of the process that trains are that process's, which then saves."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if given is not None:
        given(worker)


def as_batches(train: Any) -> Any:
    """`train` if it has epochs, a `DataLoader` as a `TorchLoader`.

    Raises:
        TypeError: for anything else.
        ValueError: there are no batches, or their order cannot be repeated.
    """
    if isinstance(train, DataLoader):
        return TorchLoader(train)
    if not (hasattr(train, "epoch") and hasattr(train, "__len__")):
        raise TypeError(
            f"a {type(train).__name__} cannot be trained on: give a torch DataLoader, a DeviceLoader, or an object "
            "with __len__() and epoch(e, start=k), which yields the batches (x, y) of epoch e without the first k, "
            "always the same"
        )
    if len(train) == 0:
        raise ValueError("there are no training batches: use a smaller batch_size, or drop_last=False")
    return train
