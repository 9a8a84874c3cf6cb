"""Arrays of one's own in one .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ide_snn.config import ConfigError, build_dataset, build_loaders, load_config
from ide_snn.data import DataError, Dataset, EventSplit, Normalization, Split, load_dataset
from ide_snn.run import evaluate_checkpoint, train
from ide_snn.schemas import EvaluateConfig

Array = NDArray[Any]
SIZES = {"train": 12, "test": 6, "val": 5}


def pictures(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(count: int) -> Array:
    return np.arange(count) % 3


def arrays(shape: tuple[int, ...] = (1, 6, 5), parts: tuple[str, ...] = ("train", "test")) -> dict[str, Array]:
    content = {}
    for number, part in enumerate(parts):
        content[f"{part}_images"] = pictures(SIZES[part], *shape, seed=number)
        content[f"{part}_labels"] = labels(SIZES[part])
    return content


def frames(count: int, *, time_steps: int = 4, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random((count, time_steps, 2, 5, 3)) < 0.3


def recordings(**options: int) -> dict[str, Array]:
    content: dict[str, Array] = {}
    for number, part in enumerate(("train", "test")):
        content[f"{part}_images"] = frames(SIZES[part], seed=number, **options)
        content[f"{part}_labels"] = labels(SIZES[part])
    return content


def save(folder: Path, content: dict[str, Array]) -> Path:
    path = folder / "mine.npz"
    np.savez_compressed(path, **content)  # type: ignore[arg-type]
    return path


def load(folder: Path, content: dict[str, Array], name: str = "npz", **options: Any) -> Dataset:
    return load_dataset(name, path=str(save(folder, content)), **options)


def images_of(split: Split | EventSplit | None) -> Array:
    assert isinstance(split, Split)
    return split.images.numpy()


# images


def test_images_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    content = arrays()
    dataset = load(tmp_path, content)
    np.testing.assert_array_equal(images_of(dataset.train), content["train_images"])
    np.testing.assert_array_equal(images_of(dataset.test), content["test_images"])
    assert dataset.train.labels.tolist() == content["train_labels"].tolist()
    assert (dataset.name, dataset.title, dataset.num_classes) == ("npz", "mine.npz", 3)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.validation is None
    assert dataset.normalization == Normalization(255.0, (0.5,), (0.5,))


@pytest.mark.parametrize("kind", ["channels first", "channels last", "no channels"])
def test_all_layouts_become_channels_first(tmp_path: Path, kind: str) -> None:
    channels = 1 if kind == "no channels" else 3
    content = arrays((channels, 6, 5))
    wanted = content["train_images"]
    for part in ("train_images", "test_images"):
        if kind == "channels last":
            content[part] = content[part].transpose(0, 2, 3, 1)
        elif kind == "no channels":
            content[part] = content[part][:, 0]
    dataset = load(tmp_path, content, channels=channels)
    np.testing.assert_array_equal(images_of(dataset.train), wanted)
    assert dataset.input_shape == (channels, 6, 5)


def test_where_both_layouts_fit_channels_come_first(tmp_path: Path) -> None:
    content = {key: value[..., :3] for key, value in arrays((3, 6, 5)).items() if "images" in key}
    content |= {key: value for key, value in arrays().items() if "labels" in key}
    dataset = load(tmp_path, content, channels=3)
    np.testing.assert_array_equal(images_of(dataset.train), content["train_images"])


def test_files_of_medmnist_and_of_keras(tmp_path: Path) -> None:
    medmnist = arrays((28, 28), parts=("train", "val", "test"))
    medmnist = {key: value[:, None].astype(np.uint8) if "labels" in key else value for key, value in medmnist.items()}
    first = load(tmp_path, medmnist)
    keras = {f"{'x' if 'images' in key else 'y'}_{key.split('_')[0]}": value for key, value in medmnist.items()}
    second = load(tmp_path, keras)
    for dataset in (first, second):
        assert (len(dataset.train), len(dataset.test), len(images_of(dataset.validation))) == (12, 6, 5)
        np.testing.assert_array_equal(images_of(dataset.validation)[:, 0], medmnist["val_images"])
        assert dataset.train.labels.tolist() == labels(12).tolist()


def test_names_of_classes(tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "eel", "fox"])
    dataset = load(tmp_path, {**arrays(), "class_names": names})
    assert (dataset.class_names, dataset.num_classes) == (("cat", "dog", "eel", "fox"), 4)
    assert load(tmp_path, {**arrays(), "class_names": names.astype("S")}).class_names == dataset.class_names
    with pytest.raises(DataError, match=r"labels must lie in 0..1, found 0..2"):
        load(tmp_path, {**arrays(), "class_names": names[:2]})


def test_the_validation_part_is_the_file_s(tmp_path: Path) -> None:
    content = arrays(parts=("train", "val", "test"))
    with pytest.raises(DataError, match=r"validation_size must be 0: mine.npz has a validation part"):
        load(tmp_path, content, validation_size=3)
    limited = load(tmp_path, content, train_limit=6)
    assert len(limited.train) == 6
    assert limited.validation is not None
    assert len(limited.validation) == 5
    assert len(load(tmp_path, arrays(), validation_size=3).train) == 9


# events


@pytest.mark.parametrize("binary", [True, False])
def test_frames_are_those_of_the_file(tmp_path: Path, binary: bool) -> None:
    content = recordings()
    if not binary:
        for part in ("train_images", "test_images"):
            content[part] = content[part] * pictures(*content[part].shape)
    dataset = load(tmp_path, content, "npz_events", time_steps=3)
    assert isinstance(dataset.train, EventSplit)
    found = dataset.train.batch(torch.tensor([7, 2]))
    assert found.dtype == (torch.bool if binary else torch.uint8)
    np.testing.assert_array_equal(found.numpy(), content["train_images"][[7, 2], :3].swapaxes(0, 1))
    assert (dataset.input_shape, dataset.train.time_steps, dataset.normalization) == ((2, 5, 3), 3, None)


def test_recordings_that_are_too_short(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"have 4 frames, fewer than time_steps=5: set time_steps=4"):
        load(tmp_path, recordings(), "npz_events", time_steps=5)


# what is refused


def replaced(key: str, value: Array) -> dict[str, Array]:
    return {**arrays(), key: value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (replaced("train_images", pictures(12, 1, 6, 5) / 255), r"images must be uint8 .*got float64 \[12, 1, 6, 5\]"),
        (replaced("train_images", pictures(12, 30)), r"got uint8 \[12, 30\]"),
        (replaced("train_images", pictures(11, 1, 6, 5)), "train_images and train_labels: there are 11 images but 12"),
        (replaced("test_images", pictures(6, 1, 5, 6)), "test images are"),
        (replaced("train_labels", np.eye(12)), r"labels must be integers \[N\], one class of each, got float64"),
        (replaced("train_labels", np.eye(12, dtype=int)), r"got int64 \[12, 12\]"),
        (replaced("train_labels", np.array(3)), r"got int64 \[\]"),
        (replaced("train_labels", labels(12) - 1), r"labels must lie in 0..2, found -1..1"),
        (replaced("test_labels", labels(5)), "there are 6 images but 5 labels"),
        ({k: v for k, v in arrays().items() if k != "test_labels"}, "of test_images and test_labels one is missing"),
        ({k: v for k, v in arrays().items() if "test" not in k}, "has no test part; wanted in it: train_images.*found"),
        (replaced("class_names", np.array([{}], dtype=object)), "allow_pickle"),
        (replaced("class_names", np.array("cat")), r"different texts \[classes\], got <U3 \[\]"),
        (replaced("class_names", np.array(["a", "a", "b"])), "different texts"),
        (replaced("class_names", np.arange(3)), "different texts"),
        (replaced("class_names", np.array([], dtype=str)), "different texts"),
        (replaced("train_labels", np.where(labels(12) == 2, 1 << 40, 0)), r"reach 1099511627776, but there are 18"),
        (replaced("train_images", pictures(12, 6, 5, 3)), r"uint8 \[12, 6, 5, 3\] have no dimension of 1 channel"),
        (
            {**arrays(), "test_images": pictures(0, 1, 6, 5), "test_labels": labels(0)},
            "test_labels: there are no samples",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: dict[str, Array], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content)
    assert "mine.npz" in str(caught.value) or "npz:" in str(caught.value)


def test_frames_that_do_not_fit(tmp_path: Path) -> None:
    content = recordings()
    with pytest.raises(DataError, match=r"frames must be \[N, T, C, H, W\].*got uint8 \[12, 1, 6, 5\]"):
        load(tmp_path, arrays(), "npz_events", time_steps=2)
    with pytest.raises(DataError, match="time_steps must be at least 1, got 0"):
        load(tmp_path, content, "npz_events", time_steps=0)
    nothing = {**content, "test_images": content["test_images"][:0], "test_labels": labels(0)}
    with pytest.raises(DataError, match="there are no samples"):
        load(tmp_path, nothing, "npz_events", time_steps=2)
    content["train_images"] = content["train_images"].astype(np.float32)
    with pytest.raises(DataError, match="got float32"):
        load(tmp_path, content, "npz_events", time_steps=2)


def test_files_that_are_missing_damaged_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder or file .*other.npz; wanted in it"):
        load_dataset("npz", data_dir=tmp_path, path="other.npz")
    with pytest.raises(DataError, match="no data_dir was given"):
        load_dataset("npz", path="mine.npz")
    path = save(tmp_path, arrays())
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 3 : len(whole) // 3 + 40] = bytes(40)
    for content in (whole[: len(whole) // 2], b"no such thing", b"", bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"mine.npz cannot be read, is damaged"):
            load_dataset("npz", path=str(path))
    with zipfile.ZipFile(path, "w") as archive:  # members that are no arrays: numpy gives their bytes
        for name in arrays():
            archive.writestr(f"{name}.npy", b"no such thing")
    with pytest.raises(DataError, match="train_images is no array"):
        load_dataset("npz", path=str(path))
    encrypted = bytearray(whole)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of every member, at both places
        at = -1
        while (at := encrypted.find(signature, at + 1)) >= 0:
            encrypted[at + flags] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(DataError, match=r"cannot be read.*encrypted"):
        load_dataset("npz", path=str(path))
    with open(path, "wb") as file:
        np.save(file, pictures(3, 4))
    with pytest.raises(DataError, match="holds one array only"):
        load_dataset("npz", path=str(path))
    with pytest.raises(DataError, match=r"cannot be read.*directory"):
        load_dataset("npz", path=str(tmp_path))


# configured


def overrides(path: Path, name: str, *more: str) -> list[str]:
    shape = "[1,6,5]" if name == "npz" else "[2,5,3]"
    small = ["model.hidden=10", "trainer.epochs=1", "trainer.progress=false", "device=cpu", "trainer.batch_size=6"]
    own = [f"dataset={name}", f"dataset.path={path}", f"dataset.input_shape={shape}", "dataset.num_classes=3"]
    return [*own, "time_steps=3", *small, *more]


@pytest.mark.parametrize("name", ["npz", "npz_events"])
def test_a_run_and_its_evaluation(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, recordings() if name == "npz_events" else arrays(parts=("train", "val", "test")))
    result = train(load_config(overrides(path, name)), tmp_path / "run")
    assert result.best_selected_on == ("validation" if name == "npz" else "test")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.pt")
    assert torch.load(checkpoint, weights_only=True)["data"]["title"] == "mine.npz"
    report = evaluate_checkpoint(EvaluateConfig(checkpoint, None, None, None, "cpu", None))
    assert report["accuracy"] == pytest.approx(result.test_accuracy_last)
    capsys.readouterr()


def test_channels_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = save(tmp_path, arrays((6, 5, 3)))
    colours = ["dataset.input_shape=[3,6,5]", "dataset.mean=[0.1,0.2,0.3]", "dataset.std=[1,1,1]", "dataset.flip=true"]
    config = load_config(overrides(path, "npz", *colours))
    dataset = build_dataset(config)
    assert dataset.normalization == Normalization(255.0, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert build_loaders(config, dataset, torch.device("cpu")).train.augmentation.flip
    with pytest.raises(ConfigError, match=r"set dataset.input_shape=\[3,6,5\]"):
        build_dataset(load_config(overrides(path, "npz", *colours[1:], "dataset.input_shape=[3,5,6]")))
