"""MNIST and Fashion-MNIST from their IDX files.

Both are found in torchvision's layout, <data_dir>/MNIST/raw and <data_dir>/FashionMNIST/raw; Fashion-MNIST
also where Debian's package dataset-fashion-mnist puts it. A plain file is preferred to its .gz.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from ide_snn.data.base import DataError, Dataset, Split
from ide_snn.data.idx import read_idx

logger = logging.getLogger(__name__)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# of MNIST's training images; Xiao et al. (2021) use them for Fashion-MNIST too
MEAN = 0.1307
STD = 0.3081


@dataclass(frozen=True)
class _Source:
    """How one data set is called, where it may lie and how a user gets it."""

    name: str
    title: str
    torchvision_name: str
    download_page: str
    class_names: tuple[str, ...]


_MNIST = _Source(
    name="mnist",
    title="MNIST",
    torchvision_name="MNIST",
    download_page="Yann LeCun's page 'The MNIST database of handwritten digits'",
    class_names=tuple(str(digit) for digit in range(NUM_CLASSES)),
)
_FASHION_MNIST = _Source(
    name="fashion_mnist",
    title="Fashion-MNIST",
    torchvision_name="FashionMNIST",
    download_page="Zalando Research's repository 'fashion-mnist' on GitHub (folder data/fashion)",
    class_names=FASHION_CLASSES,
)


def load_mnist(data_dir: Path | None) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits [1, 28, 28] from <data_dir>/MNIST/raw.

    Raises:
        DataError: the files are missing or damaged.
    """
    return _load(_MNIST, data_dir, system_folder=None)


def load_fashion_mnist(data_dir: Path | None) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing [1, 28, 28] from <data_dir>/FashionMNIST/raw.

    Where that folder holds none of the four files, Debian's package is used; the log says which it was.

    Raises:
        DataError: the files are missing or damaged.
    """
    return _load(_FASHION_MNIST, data_dir, system_folder=DEBIAN_FASHION_MNIST)


def _load(source: _Source, data_dir: Path | None, system_folder: Path | None) -> Dataset:
    folder = _find_folder(source, data_dir, system_folder)
    logger.info("%s: read from %s", source.title, folder)
    return Dataset(
        name=source.name,
        train=_read_split(folder, *FILES["train"]),
        test=_read_split(folder, *FILES["test"]),
        validation=None,
        num_classes=NUM_CLASSES,
        class_names=source.class_names,
        input_scale=255.0,
        mean=(MEAN,),
        std=(STD,),
    )


def _find_folder(source: _Source, data_dir: Path | None, system_folder: Path | None) -> Path:
    """The first place that holds any of the four files: an incomplete one is an error, not passed over."""
    places = []
    if data_dir is not None:
        places.append(data_dir.expanduser() / source.torchvision_name / "raw")
    if system_folder is not None:
        places.append(system_folder)
    names = [name for pair in FILES.values() for name in pair]
    for folder in places:
        missing = [name for name in names if _find_file(folder, name) is None]
        if not missing:
            return folder
        if len(missing) < len(names):
            raise DataError(f"{folder} is incomplete: it lacks {_with_gz(missing)}. {_how_to_get(source)}")
    looked = [str(folder) for folder in places]
    if data_dir is None:
        looked.append(f"<data_dir>/{source.torchvision_name}/raw, but no data_dir was given")
    raise DataError(
        f"{source.title} was not found. Looked in: {'; '.join(looked)}. "
        f"Wanted there: {_with_gz(names)}. {_how_to_get(source)}"
    )


def _find_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _with_gz(names: list[str]) -> str:
    return ", ".join(f"{name}[.gz]" for name in names)


def _how_to_get(source: _Source) -> str:
    ways = [
        f"torchvision's datasets.{source.torchvision_name}(data_dir, download=True) writes this layout",
        f"or put the four files of {source.download_page} into <data_dir>/{source.torchvision_name}/raw",
    ]
    if source is _FASHION_MNIST:
        ways.append("or, on Debian and Ubuntu, install the package dataset-fashion-mnist")
    return f"To get it: {'; '.join(ways)}."


def _read_split(folder: Path, images_name: str, labels_name: str) -> Split:
    images_path, labels_path = _find_file(folder, images_name), _find_file(folder, labels_name)
    if images_path is None or labels_path is None:
        raise DataError(f"{folder} has lost {images_name} or {labels_name} while it was read")
    images, labels = read_idx(images_path, IMAGE_SHAPE), read_idx(labels_path, ())
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path} holds {len(labels)} labels, but {images_path} holds {len(images)} images; "
            "get both again from one source"
        )
    highest = int(labels.max())
    if highest >= NUM_CLASSES:
        raise DataError(f"{labels_path}: labels must lie in 0..{NUM_CLASSES - 1}, found {highest}")
    return Split(images[:, None], labels.long())
