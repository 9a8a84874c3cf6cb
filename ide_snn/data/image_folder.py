"""Images of one's own: train/<class>/* and test/<class>/* in a folder, a tar or a zip file."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ide_snn.data.archive import list_folder, locate, members
from ide_snn.data.base import Dataset, Normalization
from ide_snn.data.cache import Arrays, Cache
from ide_snn.data.image import fit_pixels, read_picture
from ide_snn.data.splits import Split
from ide_snn.files import DataError

logger = logging.getLogger(__name__)

PARTS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
LAYOUT = f"wanted in it: train/<class>/<image> and test/<class>/<image>, images being {', '.join(SUFFIXES)}"
Pictures = dict[tuple[str, str, str], NDArray[np.uint8]]


def load_image_folder(
    data_dir: Path | None,
    *,
    path: str,
    channels: int = 3,
    image_size: Sequence[int] | None = None,
    title: str | None = None,
    cache: str = "auto",
) -> Dataset:
    """All images of a folder or archive; the classes are its folders, in alphabetical order.

    Args:
        data_dir: what `path` is relative to.
        path: the folder or archive.
        channels: 1 converts to grey, 3 to RGB.
        image_size: (height, width) to resize to; None: all images must have one size.
        title: for reports; None: the name of the folder or archive.
        cache: see `Cache`.

    Raises:
        DataError: the folder or archive is missing, damaged or of another layout, or an image cannot be read.
        ImportError: Pillow is not installed.
    """
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise DataError(f"image_size must be [height, width], each at least 1; got {list(image_size)}")
    source = locate(path, data_dir, LAYOUT)
    size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
    arrays = Cache(cache, data_dir).load(
        "images",
        source,
        list_folder(source) if source.is_dir() else [source],
        {"channels": channels, "image_size": size},
        lambda: _decode(source, channels, size),
    )
    names = tuple(map(str, arrays["class_names"]))
    train, test = (Split(torch.from_numpy(arrays[part]), torch.from_numpy(arrays[f"{part}_labels"])) for part in PARTS)
    return Dataset(
        name="image_folder",
        title=source.name if title is None else title,
        train=train,
        test=test,
        validation=None,
        num_classes=len(names),
        class_names=names,
        normalization=Normalization(255.0, (0.5,) * channels, (0.5,) * channels),
    )


def _decode(source: Path, channels: int, size: tuple[int, int] | None) -> Arrays:
    pictures = _read_all(source, channels, size)
    classes = {part: sorted({name for own, name, _ in pictures if own == part}) for part in PARTS}
    for part in PARTS:
        if not classes[part]:
            raise DataError(f"{source} holds no image for {part}; {LAYOUT}")
    different = sorted(set(classes["train"]) ^ set(classes["test"]))
    if different:
        raise DataError(f"{source}: train and test must have the same classes; only one has {', '.join(different)}")
    arrays: dict[str, NDArray[Any]] = {"class_names": np.array(classes["train"])}
    for part in PARTS:
        keys = sorted(key for key in pictures if key[0] == part)
        arrays[part] = np.stack([pictures.pop(key) for key in keys])
        arrays[f"{part}_labels"] = np.array([classes["train"].index(name) for _, name, _ in keys], dtype=np.int64)
    return arrays


def _read_all(source: Path, channels: int, size: tuple[int, int] | None) -> Pictures:
    """(part, class, file) -> uint8 [C, H, W]; without a `size`, all have that of the first."""
    pictures: Pictures = {}
    others = 0
    for member in tqdm(members(source), f"reading {source.name}", unit=" files", disable=None, leave=False):
        if any(part.startswith(".") for part in member.parts):  # hidden files of some file managers
            continue
        suffix = PurePosixPath(member.parts[-1]).suffix.lower()
        if len(member.parts) != 3 or member.parts[0] not in PARTS or suffix not in SUFFIXES:
            others += 1
            continue
        name = f"{source}: {'/'.join(member.parts)}"
        picture = read_picture(io.BytesIO(member.content), name, channels)
        found = (picture.height, picture.width)
        wanted = size or found
        if size is None and pictures and found != (first := next(iter(pictures.values())).shape[1:]):
            raise DataError(
                f"{name} has {found[0]} x {found[1]} pixels, others have {first[0]} x {first[1]}: "
                f"set dataset.image_size=[{first[0]},{first[1]}] to resize them"
            )
        part, label, file = member.parts
        pictures[part, label, file] = fit_pixels(picture, *wanted)
    if others:
        logger.info("%s: passed over %d files that are no <part>/<class>/<image>", source, others)
    return pictures
