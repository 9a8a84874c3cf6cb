"""N-MNIST: MNIST's digits, moved in front of an event camera, as one event file per digit.

<data_dir>/NMNIST/Train/<digit>/<id>.bin and Test/<digit>/<id>.bin, as in the published archives. A part of the
recordings is a data set of its own; its title says how large it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ide_snn.data.base import Dataset
from ide_snn.data.cache import Cache
from ide_snn.data.splits import EventSplit, frame_bytes
from ide_snn.events import Binning, read_events
from ide_snn.files import DataError

logger = logging.getLogger(__name__)

SENSOR = (34, 34)  # height, width
NUM_CLASSES = 10
FOLDERS = {"train": "Train", "test": "Test"}
FULL_SIZES = {"train": 60_000, "test": 10_000}
HOW_TO_GET = (
    "To get it: the page of Garrick Orchard 'Neuromorphic-MNIST (N-MNIST)' links to the archives Train.zip and "
    "Test.zip (there is no stable address to download them from automatically); unpack both into <data_dir>/NMNIST"
)


def load_nmnist(
    data_dir: Path | None, *, time_steps: int, duration_ms: int = 300, frames: str = "binary", cache: str = "auto"
) -> Dataset:
    """N-MNIST as frames [T, 2, 34, 34]: 60,000 + 10,000 recordings, or the part of them that is there.

    Args:
        data_dir: the folder that holds NMNIST.
        time_steps, duration_ms, frames: see `Binning`.
        cache: see `Cache`.

    Raises:
        DataError: the files are missing or damaged, or an option is out of range.
    """
    binning = Binning(time_steps, duration_ms, frames)
    root = _find_root(data_dir)
    shape = (2, *SENSOR)
    files = {part: _list_files(root / folder) for part, folder in FOLDERS.items()}
    arrays = Cache(cache, data_dir).load(
        "nmnist",
        root,
        [path for paths in files.values() for path in paths],
        {"time_steps": time_steps, "duration_ms": duration_ms, "frames": frames},
        lambda: {part: _decode(part, paths, binning) for part, paths in files.items()},
    )
    parts = {
        part: EventSplit(torch.from_numpy(arrays[part]), _labels(paths), shape, frames == "binary")
        for part, paths in files.items()
    }
    sizes = {part: len(split) for part, split in parts.items()}
    title = "N-MNIST"
    if sizes != FULL_SIZES:
        title = f"N-MNIST (subset: {sizes['train']:,} + {sizes['test']:,} recordings)"
        logger.info("%s is not the whole of N-MNIST: it holds %d + %d recordings", root, *sizes.values())
    return Dataset(
        name="nmnist",
        title=title,
        train=parts["train"],
        test=parts["test"],
        validation=None,
        num_classes=NUM_CLASSES,
        class_names=tuple(str(digit) for digit in range(NUM_CLASSES)),
        normalization=None,
    )


def _find_root(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise DataError(f"N-MNIST was not found: no data_dir was given. {HOW_TO_GET}")
    root = data_dir.expanduser() / "NMNIST"
    missing = [str(root / folder) for folder in FOLDERS.values() if not (root / folder).is_dir()]
    if missing:
        raise DataError(f"N-MNIST was not found: there is no folder {' and no folder '.join(missing)}. {HOW_TO_GET}")
    return root


def _list_files(folder: Path) -> list[Path]:
    """The event files of all digits, in order."""
    paths = []
    for digit in range(NUM_CLASSES):
        own = sorted((folder / str(digit)).glob("*.bin"))
        if not own:
            raise DataError(f"{folder / str(digit)} is missing or holds no .bin file. {HOW_TO_GET}")
        paths += own
    return paths


def _labels(paths: Sequence[Path]) -> torch.Tensor:
    return torch.tensor([int(path.parent.name) for path in paths])


def _decode(part: str, paths: Sequence[Path], binning: Binning) -> NDArray[np.uint8]:
    """uint8 [N, T, P] as `EventSplit` keeps it."""
    binary = binning.frames == "binary"
    size = frame_bytes((2, *SENSOR), binary)
    result = np.empty((len(paths), binning.time_steps, size), dtype=np.uint8)
    for row, path in enumerate(tqdm(paths, f"reading N-MNIST {part}", disable=None, leave=False)):
        events = read_events(path, SENSOR)
        try:
            frames = binning.apply(events, SENSOR).reshape(binning.time_steps, -1)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        result[row] = np.packbits(frames, axis=1, bitorder="little") if binary else frames
    return result
