"""MNIST and Fashion-MNIST from their IDX files.

Both are found in torchvision's layout, <data_dir>/MNIST/raw and <data_dir>/FashionMNIST/raw; Fashion-MNIST
also where Debian's package dataset-fashion-mnist puts it. A plain file is preferred to its .gz.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from ide_snn.data.base import Dataset, Normalization
from ide_snn.data.download import Remote
from ide_snn.data.idx import read_idx
from ide_snn.data.splits import Split
from ide_snn.files import DataError

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
    remote: Remote


_MNIST = _Source(
    name="mnist",
    title="MNIST",
    torchvision_name="MNIST",
    download_page="Yann LeCun's page 'The MNIST database of handwritten digits'",
    class_names=tuple(str(digit) for digit in range(NUM_CLASSES)),
    remote=Remote(
        title="MNIST",
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
    ),
)
_FASHION_MNIST = _Source(
    name="fashion_mnist",
    title="Fashion-MNIST",
    torchvision_name="FashionMNIST",
    download_page="Zalando Research's repository 'fashion-mnist' on GitHub (folder data/fashion)",
    class_names=FASHION_CLASSES,
    remote=Remote(
        title="Fashion-MNIST",
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
    ),
)


def load_mnist(data_dir: Path | None, *, download: bool = False) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits [1, 28, 28] from <data_dir>/MNIST/raw.

    With `download`, files that are missing are fetched.

    Raises:
        DataError: the files are missing, damaged or cannot be downloaded.
        ImportError: `download` without pooch.
    """
    return _load(_MNIST, data_dir, download, system_folder=None)


def load_fashion_mnist(data_dir: Path | None, *, download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing [1, 28, 28] from <data_dir>/FashionMNIST/raw.

    Where that folder holds none of the four files, Debian's package is used; the log says which it was.

    With `download`, files that are missing are fetched.

    Raises:
        DataError: the files are missing, damaged or cannot be downloaded.
        ImportError: `download` without pooch.
    """
    return _load(_FASHION_MNIST, data_dir, download, system_folder=DEBIAN_FASHION_MNIST)


def _load(source: _Source, data_dir: Path | None, download: bool, system_folder: Path | None) -> Dataset:
    if download and data_dir is not None:
        _download(source, data_dir.expanduser(), system_folder)
    folder = _find_folder(source, data_dir, system_folder)
    logger.info("%s: read from %s", source.title, folder)
    try:
        train, test = (_read_split(folder, *FILES[part]) for part in ("train", "test"))
    except DataError as error:
        raise DataError(f"{error} (remove it first). {_how_to_get(source)}") from error
    return Dataset(
        name=source.name,
        title=source.title,
        train=train,
        test=test,
        validation=None,
        num_classes=NUM_CLASSES,
        class_names=source.class_names,
        normalization=Normalization(255.0, (MEAN,), (STD,)),
    )


def _download(source: _Source, data_dir: Path, system_folder: Path | None) -> None:
    """Fetch the files that <data_dir> lacks, unless the data are complete in the system's folder."""
    folder = data_dir / source.torchvision_name / "raw"
    names = [name for pair in FILES.values() for name in pair]
    missing = [f"{name}.gz" for name in names if _find_file(folder, name) is None]
    if len(missing) == len(names) and system_folder is not None:
        missing = missing if any(_find_file(system_folder, name) is None for name in names) else []
    source.remote.fetch(missing, folder)


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
        "dataset.download=true fetches it into data_dir",
        f"or torchvision's datasets.{source.torchvision_name}(data_dir, download=True) writes this layout",
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
