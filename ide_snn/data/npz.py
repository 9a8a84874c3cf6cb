"""Arrays of one's own in one .npz file: images, or the frames of event recordings.

    numpy.savez("mine.npz", train_images=..., train_labels=..., test_images=..., test_labels=...)

Files of MedMNIST and Keras are of this form. Nothing in the file is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn.data.archive import DAMAGE, locate
from ide_snn.data.base import Dataset, Normalization
from ide_snn.data.splits import EventSplit, Split
from ide_snn.files import DataError

Array = NDArray[Any]
S = TypeVar("S", Split, EventSplit)

# the images or recordings of a part and their labels are called so, as by MedMNIST, or so, as by Keras
NAMINGS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
LAYOUT = (
    "wanted in it: train_images, train_labels, test_images, test_labels (or x_train, y_train, x_test, y_test); "
    "val_images with val_labels and class_names may be there too"
)


def load_npz(data_dir: Path | None, *, path: str, channels: int = 1, title: str | None = None) -> Dataset:
    """Images uint8 [N, H, W], [N, C, H, W] or [N, H, W, C].

    Args:
        data_dir: what `path` is relative to.
        path: the file.
        channels: C, by which the last two forms are told apart; where both fit, channels come first.
        title: for reports; None: the name of the file.

    Raises:
        DataError: the file is missing or damaged, lacks an array, or one has another type or shape.
    """
    normalization = Normalization(255.0, (0.5,) * channels, (0.5,) * channels)
    return _load(
        "npz",
        locate(path, data_dir, LAYOUT),
        title,
        lambda images, labels: Split(_images(images, channels), labels),
        normalization,
    )


def load_npz_events(data_dir: Path | None, *, path: str, time_steps: int, title: str | None = None) -> Dataset:
    """Recordings of events as frames: bool [N, T, C, H, W], spike or none, or uint8 with numbers of events.

    Args:
        data_dir, path, title: as `load_npz`.
        time_steps: the first so many frames are used.

    Raises:
        DataError: as `load_npz`, or the recordings are shorter.
    """
    return _load(
        "npz_events",
        locate(path, data_dir, LAYOUT),
        title,
        lambda frames, labels: _recordings(frames, labels, time_steps),
        None,
    )


def _load(
    name: str,
    source: Path,
    title: str | None,
    split: Callable[[Array, Tensor], S],
    normalization: Normalization | None,
) -> Dataset:
    try:
        with open(source, "rb") as raw:  # numpy leaves damaged files open
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"it holds one array only; {LAYOUT}")
            parts = _parts(file, split)
            class_names = _class_names(file, parts)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    except (*DAMAGE, ValueError, MemoryError) as error:
        raise DataError(f"{source} cannot be read, is damaged or no file of arrays ({error})") from error
    return Dataset(
        name=name,
        title=source.name if title is None else title,
        train=parts["train"],
        test=parts["test"],
        validation=parts.get("val"),
        num_classes=len(class_names),
        class_names=class_names,
        normalization=normalization,
    )


def _parts(file: Any, split: Callable[[Array, Tensor], S]) -> dict[str, S]:
    parts = {}
    for part in ("train", "test", "val"):
        names = _names_of(part, file.files)
        if names is not None:
            try:
                values, labels = (_array(file, name) for name in names)
                parts[part] = split(values, _labels(labels))
            except DataError as error:
                raise DataError(f"{' and '.join(names)}: {error}") from error
    return parts


def _array(file: Any, name: str) -> Array:
    array = file[name]
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no array
        raise DataError(f"{name} is no array")
    return array


def _class_names(file: Any, parts: Mapping[str, Split | EventSplit]) -> tuple[str, ...]:
    """Those of the file, or the numbers of the classes."""
    if "class_names" not in file.files:
        highest = max(int(part.labels.max()) for part in parts.values())
        samples = sum(len(part) for part in parts.values())
        if highest >= samples:
            raise DataError(
                f"labels reach {highest}, but there are {samples} samples in all: number the classes from 0, and leave "
                "samples out that have no label"
            )
        return tuple(map(str, range(highest + 1)))
    names = _array(file, "class_names")
    if names.ndim != 1 or not len(names) or names.dtype.kind not in "US" or len(set(names.tolist())) < len(names):
        raise DataError(f"class_names must be different texts [classes], got {_describe(names)}")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names.tolist())


def _names_of(part: str, known: list[str]) -> tuple[str, str] | None:
    """What the two arrays of a part are called, None for a validation part that is not there."""
    for naming in NAMINGS:
        values, labels = (name.format(part) for name in naming)
        if values in known and labels in known:
            return values, labels
        if values in known or labels in known:
            raise DataError(f"of {values} and {labels} one is missing; {LAYOUT}")
    if part == "val":
        return None
    raise DataError(f"it has no {part} part; {LAYOUT}; found: {', '.join(known) or 'nothing'}")


def _labels(labels: Array) -> Tensor:
    """int64 [N] from integers [N] or [N, 1]."""
    if labels.dtype.kind not in "iu" or labels.ndim == 0 or labels.size != len(labels):
        raise DataError(f"labels must be integers [N], one class of each, got {_describe(labels)}")
    if not len(labels):
        raise DataError("there are no samples")
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _images(images: Array, channels: int) -> Tensor:
    """uint8 [N, C, H, W]."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] != channels and images.shape[3] == channels:
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(
            f"images must be uint8 [N, H, W], [N, C, H, W] or [N, H, W, C], with values 0 to 255, "
            f"got {_describe(images)}"
        )
    if images.shape[1] != channels:
        raise DataError(
            f"images {_describe(images)} have no dimension of {channels} channel(s), second or last: set "
            "dataset.input_shape=[channels,height,width], and as many values of dataset.mean and dataset.std"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _recordings(frames: Array, labels: Tensor, time_steps: int) -> EventSplit:
    if frames.dtype not in (np.bool_, np.uint8) or frames.ndim != 5:
        raise DataError(f"frames must be [N, T, C, H, W], bool or uint8 (numbers of events), got {_describe(frames)}")
    if time_steps < 1:
        raise DataError(f"time_steps must be at least 1, got {time_steps}")
    if frames.shape[1] < time_steps:
        raise DataError(
            f"recordings have {frames.shape[1]} frames, fewer than time_steps={time_steps}: "
            f"set time_steps={frames.shape[1]}, or store more frames"
        )
    binary = frames.dtype == np.bool_
    channels, height, width = frames.shape[2:]
    flat = frames[:, :time_steps].reshape(len(frames), time_steps, channels * height * width)
    stored = np.packbits(flat, axis=2, bitorder="little") if binary else np.ascontiguousarray(flat)
    return EventSplit(torch.from_numpy(stored), labels, (channels, height, width), bool(binary))


def _describe(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
