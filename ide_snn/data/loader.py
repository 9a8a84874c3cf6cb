"""Batches from a data set that lies on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ide_snn.data.augment import Augmentation
from ide_snn.data.base import Normalization
from ide_snn.data.splits import EventSplit, Split
from ide_snn.distributed import Ranks, Share
from ide_snn.encoding import Encoder


class DeviceLoader:
    """Serves batches (inputs, labels [B]) of a split that stays on `device` as uint8.

    Inputs are normalised images [B, C, H, W] in `dtype`, or event frames [T, B, C, H, W], which are bool (counts:
    uint8) and become floating point in the network only.
    A batch costs one gather and one conversion there; there is no per-sample Python and no worker process.
    The order of an epoch is a pure function of (seed, epoch), the same on every device, so there is no state
    to save: a run that stopped after k batches of an epoch goes on with `epoch(epoch, start=k)`.

    With several processes `shared(ranks)` serves one process's share of every batch. The batches are those of a single
    process: order, augmentation and encoding of a sample do not depend on the number of processes.

    Args:
        split: what to serve; moved to `device` once (not copied when it is there already).
        batch_size: samples per batch, of all processes together; the last batch of an epoch may be smaller.
        normalization: usually `dataset.normalization`; None for events.
        augmentation: random changes of the images, drawn from (seed, epoch) as the order is; not for events.
        encoder: turns images into input over time [T, B, C, H, W]; draws from (seed, epoch, batch).
        time_steps: with an encoder T; for events, serve only the first frames, default: all.
        device: where the data lie and the batches appear.
        shuffle: a new random order in each epoch, otherwise the order of the split.
        seed: of the random orders.
        drop_last: leave out a last batch that is not full.
        dtype: floating-point type of the inputs.

    Raises:
        ValueError: the arguments leave no batch to serve, or do not fit the split.
    """

    def __init__(
        self,
        split: Split | EventSplit,
        *,
        batch_size: int,
        normalization: Normalization | None,
        augmentation: Augmentation = Augmentation(),
        encoder: Encoder | None = None,
        time_steps: int | None = None,
        device: str | torch.device = "cpu",
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if len(split) == 0:
            raise ValueError("the split is empty, so there is no batch to serve")
        if drop_last and batch_size > len(split):
            raise ValueError(
                f"drop_last leaves no batch: batch_size is {batch_size}, the split has {len(split)} samples"
            )
        _check_kind(split, normalization, augmentation, encoder, time_steps)
        self.split = split.to(device)
        self.labels = self.split.labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.augmentation = augmentation
        self.encoder = encoder
        self.time_steps = time_steps
        self.ranks = Ranks()
        self._constants = None if normalization is None else normalization.constants(self.labels.device, dtype)

    def shared(self, ranks: Ranks) -> DeviceLoader:
        """This loader for one of several processes: its share of every batch; the data are not copied."""
        other = copy.copy(self)
        other.ranks = ranks
        return other

    def shares(self, start: int = 0) -> Iterator[Share]:
        """Which samples of each batch of an epoch are served, without the first `start` batches."""
        for first in range(start * self.batch_size, self.samples, self.batch_size):
            yield self.ranks.share(min(self.batch_size, self.samples - first))

    @property
    def samples(self) -> int:
        """Samples served per epoch, by all processes together."""
        return len(self) * self.batch_size if self.drop_last else len(self.labels)

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch 0, for evaluation."""
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, without the first `start`.

        Raises:
            ValueError: `epoch` is negative or `start` is not in 0..len(self).
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must lie in 0..{len(self)}, the batches of an epoch; got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        device, skipped = self.labels.device, start * self.batch_size
        order = self._order(epoch)[skipped : self.samples].to(device)
        augment = self.augmentation if self.augmentation.changes else None
        choices = None if augment is None else augment.draw(self.samples, self.seed, epoch)[skipped:].to(device)
        for batch, share in enumerate(self.shares(start), start):
            first = batch * self.batch_size - skipped
            own = slice(first + share.first, first + share.end)
            # the encoder draws for the batch as a whole
            portion = own if self.encoder is None else slice(first, first + share.total)
            inputs = self._inputs(order[portion], None if choices is None else choices[portion])
            if self.encoder is not None:
                inputs = self._encode(inputs, epoch, batch)[:, share.first : share.end]
            yield inputs, self.labels.index_select(0, order[own])

    def _inputs(self, index: Tensor, choices: Tensor | None) -> Tensor:
        if isinstance(self.split, EventSplit):
            return self.split.batch(index, self.time_steps)
        images = self.split.images.index_select(0, index)
        if choices is not None:
            images = self.augmentation.apply(images, choices)
        assert self._constants is not None  # see _check_kind
        return self._constants.apply(images)

    def _encode(self, inputs: Tensor, epoch: int, batch: int) -> Tensor:
        assert self.encoder is not None
        assert self.time_steps is not None  # see _check_kind
        mixed = int(np.random.SeedSequence((self.seed, epoch, 2, batch)).generate_state(1, np.uint64)[0])
        generator = torch.Generator(inputs.device).manual_seed(mixed)
        return self.encoder.encode(inputs, self.time_steps, generator)

    def _order(self, epoch: int) -> Tensor:
        """Order of the samples in `epoch`: int64 [N] on the CPU."""
        if not self.shuffle:
            return torch.arange(len(self.labels))
        # hashed together: seed + epoch would give run 1 the orders of run 0, one epoch later
        mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(mixed))


def _check_kind(
    split: Split | EventSplit,
    normalization: Normalization | None,
    augmentation: Augmentation,
    encoder: Encoder | None,
    time_steps: int | None,
) -> None:
    """Images are normalised and may be augmented and encoded, events may be cut in time."""
    if isinstance(split, EventSplit):
        if normalization is not None or augmentation.changes or encoder is not None:
            raise ValueError("events are served as they are: no normalization, augmentation or encoder")
        if time_steps is not None and not 1 <= time_steps <= split.time_steps:
            raise ValueError(
                f"the recordings have {split.time_steps} frames, so time_steps must lie in 1..{split.time_steps}; "
                f"got {time_steps}"
            )
        return
    if normalization is None:
        raise ValueError("images need a normalization, usually dataset.normalization")
    if (time_steps is None) != (encoder is None):
        raise ValueError(f"images need time_steps with an encoder and have none without; got {time_steps}")
    channels, height, width = split.input_shape
    if augmentation.crop_padding >= min(height, width):
        raise ValueError(
            f"crop_padding={augmentation.crop_padding} leaves windows without any of the image, which has "
            f"{height} x {width} pixels: it must be less than {min(height, width)}"
        )
    if len(normalization.mean) != channels:
        raise ValueError(f"the images have {channels} channel(s), the normalization {len(normalization.mean)}")
