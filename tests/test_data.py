"""Data sets: their content, their choices, and the way from stored values to network input."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DATASETS, DataError, Dataset, Normalization, Split, load_dataset, to_input
from ide_snn.data.registry import stratified_order

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def counts(split: Split) -> list[int]:
    return split.labels.bincount(minlength=10).tolist()


def same(first: Split, second: Split) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


# digits


def test_digits_have_the_known_content(digits: Dataset) -> None:
    assert digits.name == "digits"
    assert digits.input_shape == (1, 8, 8)
    assert (len(digits.train), len(digits.test), digits.validation) == (1437, 360, None)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert int(digits.train.images.max()) == 16
    total = np.array(counts(digits.train)) + counts(digits.test)
    assert total.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert counts(digits.test) == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.class_names == tuple("0123456789")
    assert digits.num_classes == 10


def test_digits_keep_images_and_labels_together(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = [image.astype(np.uint8).tobytes() for image in bundled.images]
    known = dict(zip(images, bundled.target, strict=True))
    for split in (digits.train, digits.test):
        for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True):
            assert known[image.tobytes()] == label


def test_digits_constants_are_those_of_the_training_part(digits: Dataset) -> None:
    values = digits.train.images.double() / digits.normalization.input_scale
    assert digits.normalization.mean == (round(values.mean().item(), 4),)
    assert digits.normalization.std == (round(values.std(correction=0).item(), 4),)


def test_digits_split_does_not_depend_on_a_seed_or_a_folder(digits: Dataset) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    other = load_dataset("digits", split_seed=5, data_dir="no/such/folder")
    assert same(other.train, digits.train)
    assert same(other.test, digits.test)


def test_importing_the_package_does_not_import_scikit_learn_or_pillow() -> None:
    code = "import sys, ide_snn.data; sys.exit(bool({'sklearn', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# the full sets, where they are


@pytest.mark.parametrize(
    ("name", "folder", "train_counts", "test_counts"),
    [
        (
            "mnist",
            "MNIST",
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        ),
        ("fashion_mnist", "FashionMNIST", [6000] * 10, [1000] * 10),
    ],
)
def test_full_set(name: str, folder: str, train_counts: list[int], test_counts: list[int]) -> None:
    if not (REAL_DATA / folder).is_dir():
        pytest.skip(f"needs the full {folder} files, which are not part of the project")
    dataset = load_dataset(name, data_dir=REAL_DATA)
    assert dataset.input_shape == (1, 28, 28)
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert counts(dataset.train) == train_counts
    assert counts(dataset.test) == test_counts
    assert dataset.normalization == Normalization(255.0, (0.1307,), (0.3081,))
    if name == "mnist":
        values = dataset.train.images.double() / 255
        assert values.mean().item() == pytest.approx(0.1307, abs=5e-5)
        assert values.std().item() == pytest.approx(0.3081, abs=5e-5)


# choices


@pytest.mark.parametrize(
    ("name", "hint"), [("fashion-mnist", "fashion_mnist"), ("MNIST", "mnist"), ("digit", "digits")]
)
def test_unknown_name_lists_the_valid_ones_and_the_closest(name: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"{name}.*{', '.join(DATASETS)}; did you mean '{hint}'"):
        load_dataset(name)


def test_unknown_name_without_a_close_one_makes_no_suggestion() -> None:
    with pytest.raises(DataError, match=f"choose one of {', '.join(DATASETS)}$"):
        load_dataset("svhn")


def test_validation_is_a_stratified_part_of_the_training_images(digits: Dataset) -> None:
    chosen = load_dataset("digits", validation_size=300)
    assert chosen.validation is not None
    assert (len(chosen.train), len(chosen.validation)) == (1137, 300)
    assert same(chosen.test, digits.test)
    together = torch.cat([chosen.train.images, chosen.validation.images]).flatten(1)
    whole = digits.train.images.flatten(1)
    assert sorted(together.tolist()) == sorted(whole.tolist())
    for got, available in zip(counts(chosen.validation), counts(digits.train), strict=True):
        assert got == pytest.approx(available * 300 / 1437, abs=1)


def test_validation_depends_on_split_seed_only() -> None:
    first = load_dataset("digits", validation_size=300, split_seed=1)
    torch.manual_seed(7)
    again = load_dataset("digits", validation_size=300, split_seed=1, train_limit=50)
    other = load_dataset("digits", validation_size=300, split_seed=2)
    assert first.validation is not None
    assert again.validation is not None
    assert other.validation is not None
    assert same(first.validation, again.validation)
    assert not torch.equal(first.validation.images, other.validation.images)


def test_limits_take_class_balanced_parts(digits: Dataset) -> None:
    chosen = load_dataset("digits", train_limit=100, test_limit=50)
    assert (len(chosen.train), len(chosen.test)) == (100, 50)
    assert all(9 <= count <= 11 for count in counts(chosen.train))
    assert all(4 <= count <= 6 for count in counts(chosen.test))
    everything = load_dataset("digits", train_limit=1437, test_limit=360)
    assert same(everything.train, digits.train)
    assert same(everything.test, digits.test)


def test_limited_training_images_are_not_validation_images() -> None:
    chosen = load_dataset("digits", validation_size=400, train_limit=1037)
    assert chosen.validation is not None
    kept = {image.numpy().tobytes() for image in chosen.train.images}
    assert not any(image.numpy().tobytes() in kept for image in chosen.validation.images)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"validation_size": -1}, "validation_size must lie in 0..1436 here, got -1"),
        ({"validation_size": 1437}, "validation_size must lie in 0..1436 here, got 1437"),
        ({"validation_size": 0.2}, "validation_size counts samples.*integer; got 0.2"),
        ({"train_limit": 0}, "train_limit must lie in 1..1437 here, got 0"),
        ({"train_limit": 1438}, "train_limit must lie in 1..1437 here, got 1438"),
        ({"train_limit": 1038, "validation_size": 400}, "train_limit must lie in 1..1037 here, got 1038"),
        ({"train_limit": True}, "train_limit counts samples.*got True"),
        ({"test_limit": 0}, "test_limit must lie in 1..360 here, got 0"),
        ({"test_limit": 361}, "test_limit must lie in 1..360 here, got 361"),
        ({"mean": [0.1, 0.2]}, "one value per channel"),
        ({"mean": [0.1] * 3, "std": [0.2] * 3}, r"need 1 value\(s\), one per channel"),
        ({"mean": 0.1}, "mean must be a list with one number per channel, got 0.1"),
        ({"mean": ["a"]}, "mean must be a list with one number per channel"),
        ({"mean": [math.nan]}, "mean must be finite"),
        ({"std": [0.0]}, "std must be positive and finite"),
        ({"std": [-1.0]}, "std must be positive and finite"),
        ({"std": [math.inf]}, "std must be positive and finite"),
    ],
)
def test_choices_that_do_not_fit_are_refused(choice: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset("digits", **choice)  # type: ignore[arg-type]


def test_mean_and_std_replace_the_own_ones() -> None:
    dataset = load_dataset("digits", mean=[0.0], std=[1])
    assert dataset.normalization == Normalization(16.0, (0.0,), (1.0,))
    assert load_dataset("digits", std=[0.5]).normalization == Normalization(16.0, (0.3054,), (0.5,))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 2**31), st.data())
def test_every_prefix_of_the_stratified_order_is_balanced(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    size = data.draw(st.integers(0, len(labels)))
    got = labels[order[:size]].bincount(minlength=len(sizes))
    slack = 1 + len(sizes) / 2
    for count, available in zip(got.tolist(), sizes, strict=True):
        assert abs(count - available * size / len(labels)) <= slack


# splits


def small_split(n: int = 6, channels: int = 1) -> Split:
    images = torch.arange(n * channels * 4, dtype=torch.uint8).reshape(n, channels, 2, 2)
    return Split(images, torch.arange(n) % 3)


def test_subset_takes_indices_in_order_and_copies() -> None:
    split = small_split()
    part = split.subset([4, 1, 1])
    assert part.labels.tolist() == [1, 1, 1]
    assert torch.equal(part.images, split.images[[4, 1, 1]])
    part.images.zero_()
    assert int(split.images[4].sum()) > 0
    assert len(split.subset([])) == 0


def test_subset_refuses_what_is_not_an_index() -> None:
    split = small_split()
    with pytest.raises(DataError, match=r"integer indices, got torch.bool; use mask.nonzero"):
        split.subset(split.labels == 1)
    with pytest.raises(DataError, match=r"integer indices, got torch.float32"):
        split.subset(torch.tensor([0.5]))
    with pytest.raises(IndexError):
        split.subset([6])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), r"uint8 \[N, C, H, W\], got float32 \[2, 1, 2, 2\]"),
        (torch.zeros(2, 2, 2).byte(), torch.zeros(2).long(), r"got uint8 \[2, 2, 2\]"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2).int(), r"int64 \[N\], got int32 \[2\]"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2, 1).long(), r"int64 \[N\], got int64 \[2, 1\]"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(3).long(), "2 images but 3 labels"),
    ],
)
def test_split_checks_its_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split(images, labels)


def test_dataset_checks_that_its_parts_fit(digits: Dataset) -> None:
    with pytest.raises(DataError, match="test images are"):
        replace(digits, test=small_split())
    with pytest.raises(DataError, match="the validation split is empty"):
        replace(digits, validation=digits.test.subset([]))
    with pytest.raises(DataError, match=r"train labels must lie in 0..8, found 0..9"):
        replace(digits, num_classes=9, class_names=digits.class_names[:9])
    with pytest.raises(DataError, match=r"test labels must lie in 0..9, found -1..-1"):
        replace(digits, test=Split(digits.test.images, torch.full_like(digits.test.labels, -1)))
    with pytest.raises(DataError, match="10 names for 11 classes"):
        replace(digits, num_classes=11)


# network input


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_to_input_is_the_plain_formula_in_the_dtype(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    result = to_input(images, Normalization(255.0, mean, std), dtype=dtype)
    assert result.dtype == dtype
    assert result.shape == images.shape
    for c in range(3):
        own_mean, own_std = torch.tensor(mean[c], dtype=dtype), torch.tensor(std[c], dtype=dtype)
        expected = (images[:, c].to(dtype) / torch.tensor(255.0, dtype=dtype) - own_mean) / own_std
        assert torch.equal(result[:, c], expected)


def test_to_input_equals_numpy_bit_by_bit(digits: Dataset) -> None:
    images = digits.train.images[:50]
    expected = images.numpy().astype(np.float32) / np.float32(16)
    expected = (expected - np.float32(digits.normalization.mean[0])) / np.float32(digits.normalization.std[0])
    before = images.clone()
    assert np.array_equal(to_input(images, digits.normalization).numpy(), expected)
    assert torch.equal(images, before)


def test_to_input_refuses_what_is_not_stored_data(digits: Dataset) -> None:
    normalization = digits.normalization
    with pytest.raises(DataError, match=r"uint8 images \[B, 1, H, W\], got float32"):
        to_input(torch.zeros(1, 1, 8, 8), normalization)
    with pytest.raises(DataError, match=r"got uint8 \[1, 3, 8, 8\]"):
        to_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), normalization)
    with pytest.raises(DataError, match=r"got uint8 \[1, 8, 8\]"):
        to_input(torch.zeros(1, 8, 8, dtype=torch.uint8), normalization)
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch.int64"):
        to_input(digits.test.images, normalization, dtype=torch.int64)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_normalization_refuses_a_scale_without_meaning(scale: float) -> None:
    with pytest.raises(DataError, match="input_scale must be positive and finite"):
        Normalization(scale, (0.0,), (1.0,))
