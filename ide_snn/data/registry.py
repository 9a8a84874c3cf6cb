"""From a name and a few choices to a data set."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ide_snn.data.base import Dataset, Normalization
from ide_snn.data.cifar import load_cifar10, load_cifar100
from ide_snn.data.digits import load_digits
from ide_snn.data.image_folder import load_image_folder
from ide_snn.data.mnist import load_fashion_mnist, load_mnist
from ide_snn.data.nmnist import load_nmnist
from ide_snn.data.npz import load_npz, load_npz_events
from ide_snn.data.splits import EventSplit, Split
from ide_snn.files import DataError

# each takes the data_dir, then its own options by name
DATASETS: Mapping[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion_mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "nmnist": load_nmnist,
    "image_folder": load_image_folder,
    "npz": load_npz,
    "npz_events": load_npz_events,
}


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation_size: int = 0,
    split_seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
    **options: Any,
) -> Dataset:
    """Load a data set into memory.

    The validation split and the limits keep the proportions of the classes. They depend on the data and
    `split_seed` only, a smaller limit takes a part of what a larger one takes, and the samples keep their order.

    Args:
        name: one of `DATASETS`.
        data_dir: the folder that holds MNIST/raw, FashionMNIST/raw, NMNIST, ...; not needed for digits.
        mean, std: replace the data set's own normalisation; one value per channel, after the division by its
            input_scale; not for events.
        validation_size: number of training samples to set apart; 0 gives `validation=None`, unless the data have a
            validation part of their own.
        split_seed: selects which samples the validation split and the limits take.
        train_limit, test_limit: use this many samples only; `train_limit` counts what validation leaves.
        options: what only this data set takes, see its function in `DATASETS`.

    Raises:
        DataError: no such name or option, missing or damaged files, or a size, mean or std that does not fit.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(str(name).lower(), DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}{hint}")
    load = DATASETS[name]
    _check_options(name, load, options)
    dataset = load(None if data_dir is None else Path(data_dir).expanduser(), **options)
    normalization = _replaced(dataset, mean, std)
    train, validation = dataset.train, dataset.validation
    if validation_size != 0:
        if validation is not None:
            raise DataError(f"validation_size must be 0: {dataset.title} has a validation part of its own")
        _check_size("validation_size", validation_size, 0, len(train) - 1)
        train, validation = _take_part(train, validation_size, split_seed)
    if train_limit is not None:
        _check_size("train_limit", train_limit, 1, len(train))
        _, train = _take_part(train, train_limit, split_seed)
    test = dataset.test
    if test_limit is not None:
        _check_size("test_limit", test_limit, 1, len(test))
        _, test = _take_part(test, test_limit, split_seed)
    return replace(dataset, train=train, test=test, validation=validation, normalization=normalization)


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of all N items in which every prefix has nearly the proportions of the whole.

    Item r = 0, 1, ... of the c items of a class, in random order, stands at (r + 1/2) / c; all items are
    sorted by that.

    Args:
        labels: int64 [N].
        seed: of the random order; a pure function of `labels` and `seed`.

    Returns:
        int64 [N], a permutation.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero().squeeze(1)
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return order[position.argsort(stable=True)]


def _check_options(name: str, load: Callable[..., Dataset], options: Mapping[str, object]) -> None:
    taken = [option for option in inspect.signature(load).parameters.values() if option.kind is option.KEYWORD_ONLY]
    names = [option.name for option in taken]
    for option in options:
        if option not in names:
            raise DataError(f"{name} has no option {option!r}; its own are: {', '.join(names) or 'none'}")
    missing = [option.name for option in taken if option.default is option.empty and option.name not in options]
    if missing:
        raise DataError(f"{name} needs {', '.join(missing)}")


def _replaced(dataset: Dataset, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalization | None:
    """The data set's normalisation with another mean or std."""
    own = dataset.normalization
    if mean is None and std is None:
        return own
    if own is None:
        raise DataError(f"{dataset.name} holds events, which are not normalised: it takes no mean and std")
    new_mean = own.mean if mean is None else _per_channel("mean", mean)
    return Normalization(own.input_scale, new_mean, own.std if std is None else _per_channel("std", std))


def _take_part(split: Split | EventSplit, size: int, seed: int) -> tuple[Split | EventSplit, Split | EventSplit]:
    """(what is left, a stratified part of `size` samples), each in the order of `split`."""
    order = stratified_order(split.labels, seed)
    return split.subset(order[size:].sort().values), split.subset(order[:size].sort().values)


def _check_size(name: str, size: int, low: int, high: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise DataError(f"{name} counts samples, so it must be an integer; got {size!r}")
    if not low <= size <= high:
        raise DataError(f"{name} must lie in {low}..{high} here, got {size}")


def _per_channel(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be a list with one number per channel, got {values!r}") from error
