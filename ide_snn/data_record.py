"""What a checkpoint says of the data it was trained on, and whether other data are the same or can be judged by it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ide_snn.checkpoint import Checkpoint, CheckpointError, alike
from ide_snn.data import Dataset, Normalization
from ide_snn.data.splits import EventSplit

__all__ = ["as_in_training", "data_differences", "data_section", "normalization_of"]

log = logging.getLogger(__name__)


def data_section(dataset: Dataset) -> dict[str, Any]:
    """What predictions, evaluations and resumed runs need to know about the data; plain containers.

    `digest` is of all images (frames) and labels of the parts that are used, in their order.
    """
    section: dict[str, Any] = {"name": dataset.name, "title": dataset.title, "class_names": list(dataset.class_names)}
    section |= {"train_samples": len(dataset.train), "test_samples": len(dataset.test), "digest": _digest(dataset)}
    normalization = dataset.normalization
    if normalization is None:
        return section
    numbers = {"input_scale": normalization.input_scale, "mean": normalization.mean, "std": normalization.std}
    return {**section, **{key: list(v) if isinstance(v, tuple) else v for key, v in numbers.items()}}


def _digest(dataset: Dataset) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in (dataset.train, dataset.test, dataset.validation):
        if part is not None:
            content = part.frames if isinstance(part, EventSplit) else part.images
            for tensor in (content, part.labels):
                found.update(str(tuple(tensor.shape)).encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def data_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What both say about their data and is not the same, as 'key: old -> new'; numbers up to rounding."""
    rounding = 1e-6  # of means of images, on another machine
    both = (key for key in old if key in new)
    return [f"{key}: {old[key]} -> {new[key]}" for key in both if not alike(old[key], new[key], rounding)]


def normalization_of(section: Mapping[str, Any]) -> Normalization:
    return Normalization(section["input_scale"], tuple(section["mean"]), tuple(section["std"]))


def as_in_training(dataset: Dataset, checkpoint: Checkpoint, *, tell: bool = True) -> Dataset:
    """The data with the normalisation of those that the checkpoint was trained on.

    Args:
        tell: log what is different and no error.

    Raises:
        CheckpointError: they have other classes, or in another order: the labels mean something else.
    """
    saved = checkpoint.data
    names, now = saved.get("class_names"), list(dataset.class_names)
    if names is not None and names != now:
        if names != [str(label) for label in range(len(now))]:
            raise CheckpointError(
                f"{checkpoint.path} was trained on the classes {', '.join(names)}, but the data have {', '.join(now)}: "
                "set data_dir to data with the same classes"
            )
        if tell:  # imported checkpoints number the classes where nobody knew their names
            log.warning("the checkpoint's classes have numbers for names: taken to be, in order, %s", ", ".join(now))
    title = saved.get("title", dataset.title)
    if tell and title != dataset.title:
        log.warning("trained on %s, now on %s", title, dataset.title)
    elif tell and saved.get("digest", now_digest := _digest(dataset)) != now_digest:
        log.warning("%s has other images or labels than when this was trained", title)
    if dataset.normalization is None or "mean" not in saved:
        return dataset
    return replace(dataset, normalization=normalization_of(saved))
