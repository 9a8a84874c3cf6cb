"""Images of one's own: folders and archives, what is wrong with them, and a configured run."""

from __future__ import annotations

import contextlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.config import ConfigError, build_dataset, build_loaders, load_config
from ide_snn.data import Augmentation, DataError, Dataset, Normalization, Split, archive, load_dataset
from ide_snn.run import predict_image, train
from ide_snn.schemas import PredictConfig

Image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install -e '.[images]'")
REAL = PROJECT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"
SUFFIXES = {"folder": "", "tar": ".tar", "tar.gz": ".tar.gz", "tar.xz": ".tar.xz", "tar.bz2": ".tar.bz2", "zip": ".zip"}
CLASSES = ("cat", "dog", "eel")


def pixels(name: str, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    """The random image that a file of this name holds."""
    rng = np.random.default_rng(sum(name.encode()))
    return rng.integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray, kind: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def tree(n_train: int = 3, n_test: int = 2, shape: tuple[int, ...] = (6, 5, 3)) -> dict[str, bytes]:
    names = [
        f"{part}/{c}/{k}.png" for part, n in (("train", n_train), ("test", n_test)) for c in CLASSES for k in range(n)
    ]
    return {name: png(pixels(name, shape)) for name in reversed(names)}


def write(folder: Path, kind: str, files: Mapping[str, bytes]) -> Path:
    """The files as a folder or archive `images`."""
    path = folder / f"images{SUFFIXES[kind]}"
    if kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + kind[4:]) as packed:  # type: ignore[call-overload]
            folders = {str(parent) for name in files for parent in list(Path(name).parents)[:-1]}
            for name in sorted(folders):
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE
                packed.addfile(info)
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return path


def load(data_dir: Path, path: Path | str = "images", **options: object) -> Dataset:
    return load_dataset("image_folder", data_dir=data_dir, path=str(path), **{"cache": "none", **options})


# whole folders and archives


@pytest.mark.parametrize("kind", SUFFIXES)
def test_every_form_holds_the_same_images(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, {**tree(), "README.txt": b"hello", "train/cat/.hidden.png": b"", "train/x.png": b""})
    dataset = load(tmp_path, path.name)
    assert (dataset.name, dataset.title, dataset.class_names) == ("image_folder", path.name, CLASSES)
    assert dataset.input_shape == (3, 6, 5)
    for part, split, count in (("train", dataset.train, 3), ("test", dataset.test, 2)):
        assert isinstance(split, Split)
        assert split.labels.tolist() == [label for label in range(3) for _ in range(count)]
        names = [f"{part}/{c}/{k}.png" for c in CLASSES for k in range(count)]
        for image, name in zip(split.images, names, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(name))
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


def test_kinds_of_images_channels_and_sizes(tmp_path: Path) -> None:
    files = tree()
    files["train/cat/9.JPG"] = png(np.full((6, 5, 3), 200, np.uint8), "jpeg", quality=95)
    files["train/eel/9.bmp"] = png(pixels("grey", (6, 5)), "bmp")
    path = write(tmp_path, "folder", files)
    dataset = load(tmp_path)
    assert isinstance(dataset.train, Split)
    assert int((dataset.train.images[3].int() - 200).abs().max()) <= 2
    assert torch.equal(dataset.train.images[-1], torch.from_numpy(pixels("grey", (6, 5))).expand(3, 6, 5))
    grey = load(tmp_path, path, channels=1, image_size=[4, 8])
    assert grey.input_shape == (1, 4, 8)
    assert grey.normalization == Normalization(255.0, (0.5,), (0.5,))
    with pytest.raises(DataError, match="1 or 3 channels, not for 2"):
        load(tmp_path, channels=2)


def test_the_cache_follows_the_files(tmp_path: Path) -> None:
    write(tmp_path, "folder", tree())
    write(tmp_path, "zip", tree())
    for path in ("images", "images.zip"):
        first = load(tmp_path, path, cache="auto")
        again = load(tmp_path, path, cache="auto")
        assert isinstance(first.train, Split)
        assert isinstance(again.train, Split)
        assert torch.equal(first.train.images, again.train.images)
        assert again.class_names == CLASSES
    (tmp_path / "images" / "train" / "cat" / "0.png").write_bytes(png(np.zeros((6, 5, 3), np.uint8)))
    (tmp_path / "images" / "train" / "cat" / "1.png").unlink()
    changed = load(tmp_path, cache="auto")
    assert len(changed.train) == 8
    assert isinstance(changed.train, Split)
    assert int(changed.train.images[0].max()) == 0
    assert len(list((tmp_path / ".ide_snn_cache").iterdir())) == 2
    assert load(tmp_path, cache="auto", image_size=[3, 3]).input_shape == (3, 3, 3)


# what is wrong with others


def test_missing_and_other_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no folder or file {tmp_path}/images; wanted in it: train/<class>/<image>"):
        load(tmp_path)
    with pytest.raises(DataError, match="path=images is relative to data_dir, but no data_dir"):
        load_dataset("image_folder", path="images")
    with pytest.raises(DataError, match="image_folder needs path"):
        load_dataset("image_folder", data_dir=tmp_path)
    path = write(tmp_path, "tar", {"images/train/cat/0.png": png(pixels("a"))})
    with pytest.raises(DataError, match=rf"{path} holds no image for train; wanted in it"):
        load(tmp_path, path)
    path = write(tmp_path, "tar", {"train/cat/0.png": png(pixels("a"))})
    with pytest.raises(DataError, match=rf"{path} holds no image for test"):
        load(tmp_path, path)
    path = write(tmp_path, "tar", {**tree(), "test/fox/0.png": png(pixels("a"))})
    with pytest.raises(DataError, match=rf"{path}: train and test must have the same classes; only one has fox"):
        load(tmp_path, path)
    for size in ([4], [0, 4], [1, 2, 3]):
        with pytest.raises(DataError, match=r"image_size must be \[height, width\]"):
            load(tmp_path, path, image_size=size)


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_damaged_image_is_named_with_its_archive(tmp_path: Path, kind: str) -> None:
    files = tree()
    name = "test/dog/1.png"
    whole = files[name]
    for damaged in (b"", whole[:30], whole[: len(whole) // 2], whole[:60] + b"\0\0\0\0" + whole[64:], b"no image"):
        path = write(tmp_path, kind, {**files, name: damaged})
        with pytest.raises(DataError, match=rf"{path}: {name} "):
            load(tmp_path, path)
    path = write(tmp_path, kind, {**files, name: png(pixels("a", (6, 4, 3)))})
    with pytest.raises(DataError, match=r"6 x \d pixels, others have 6 x \d: set dataset.image_size=\[6,\d\]"):
        load(tmp_path, path)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("kind", list(SUFFIXES)[1:])
def test_a_truncated_archive_is_named(tmp_path: Path, kind: str, part: float) -> None:
    path = write(tmp_path, kind, tree())
    content = path.read_bytes()
    if kind == "tar":  # ends with blocks of zeros, only the first of which means something
        content = content.rstrip(b"\0")
    path.write_bytes(content[: min(int(len(content) * part), len(content) - 1)])
    with pytest.raises(DataError, match=str(path)):
        load(tmp_path, path)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["tar.gz", "tar.xz", "tar.bz2", "zip"]), st.data())
def test_no_change_of_one_bit_passes_as_other_images(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("images")
    files = tree(1, 1)
    path = write(folder, kind, files)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        for member in list(archive.members(path)):  # damage may show at the very end
            # a zip file keeps names without a checksum
            assert member.content == files.get("/".join(member.parts), member.content)
            assert member.content in files.values()


def test_a_damaged_header_within_a_tar_does_not_end_it(tmp_path: Path) -> None:
    path = write(tmp_path, "tar", tree())
    content = bytearray(path.read_bytes())
    position = content.index(b"test/dog/1.png")
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is damaged.*checksum"):
        load(tmp_path, path)


@pytest.mark.parametrize("name", ["../escape/x/0.png", "train/../../0.png", "/etc/0.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path, kind, {**tree(), name: png(pixels("a"))})
    with pytest.raises(DataError, match=rf"{path}: the name {name} leads out of the archive"):
        load(tmp_path, path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels("secret")))
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as packed:
        info = tarfile.TarInfo("train/cat/0.png")
        info.type, info.linkname = kind, str(secret)
        packed.addfile(info)
    with pytest.raises(DataError, match=rf"{path}: train/cat/0.png is a link or a device"):
        load(tmp_path, path)


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        info = zipfile.ZipInfo("train/cat/0.png")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="is a link or a device"):
        load(tmp_path, path)


def test_a_member_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST_FILE", 1000)
    path = write(tmp_path, "tar.gz", {**tree(), "train/cat/7.png": bytes(1001)})
    with pytest.raises(DataError, match=r"train/cat/7.png has 1001 bytes, more than the 1000"):
        load(tmp_path, path)


# configured


def overrides(data_dir: Path, *more: str) -> list[str]:
    shape = ["dataset.input_shape=[3,6,5]", "dataset.num_classes=3"]
    return ["dataset=image_folder", f"data_dir={data_dir}", "dataset.cache=none", "time_steps=3", *shape, *more]


def test_the_data_are_checked_against_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, "folder", tree())
    dataset = build_dataset(load_config(overrides(tmp_path, "dataset.title=pets", "dataset.mean=[0.1,0.2,0.3]")))
    assert dataset.title == "pets"
    assert dataset.normalization == Normalization(255.0, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    for wrong, message in (
        ("dataset.input_shape=[3,32,32]", r"data have \(3, 6, 5\): set dataset.input_shape=\[3,6,5\]"),
        ("dataset.num_classes=10", r"data have 3: set dataset.num_classes=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_dataset(load_config(overrides(tmp_path, wrong)))
    grey = ["dataset.input_shape=[1,4,4]", "dataset.image_size=[4,4]", "dataset.mean=[0]", "dataset.std=[1]"]
    assert build_dataset(load_config(overrides(tmp_path, *grey))).input_shape == (1, 4, 4)
    with pytest.raises(ConfigError, match=r"unknown option dataset.download.*dataset.path"):
        load_config(overrides(tmp_path, "dataset.download=true"))


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    write(tmp_path, "folder", tree())
    changed = ["dataset.crop_padding=2", "dataset.flip=true", "dataset.validation_size=3", "trainer.batch_size=6"]
    config = load_config(overrides(tmp_path, *changed))
    dataset = build_dataset(config)
    loaders = build_loaders(config, dataset, torch.device("cpu"))
    assert loaders.train.augmentation == Augmentation(2, True)
    assert loaders.validation is not None
    assert loaders.test.augmentation == loaders.validation.augmentation == Augmentation()
    with pytest.raises(ConfigError, match="crop_padding"):
        build_loaders(load_config(overrides(tmp_path, "dataset.crop_padding=-1")), dataset, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"crop_padding=5 leaves windows .* 6 x 5 pixels: it must be less than 5"):
        build_loaders(load_config(overrides(tmp_path, "dataset.crop_padding=5")), dataset, torch.device("cpu"))
    build_loaders(load_config(overrides(tmp_path, "dataset.crop_padding=4")), dataset, torch.device("cpu"))


def test_a_run_and_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "zip", tree())
    more = [f"dataset.path={path}", "model.hidden=10", "trainer.epochs=1", "trainer.progress=false", "device=cpu"]
    train(load_config(overrides(tmp_path, *more)), tmp_path / "run")
    image = tmp_path / "one.png"
    image.write_bytes(png(pixels("a")))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.pt")
    report = predict_image(PredictConfig(checkpoint, str(image), None, False, "cpu"))
    assert set(report["probabilities"]) == set(CLASSES)
    assert torch.load(checkpoint, weights_only=True)["data"]["title"] == "images.zip"
    assert "cat" in capsys.readouterr().out


# the real images


def test_the_jpeg_copy_of_cifar10_begins_as_it_should() -> None:
    if not REAL.is_file():
        pytest.skip("needs cifar10_jpeg.tar.xz, which is not part of the project")
    config = load_config(["dataset=cifar10_jpeg"])
    assert (config.dataset.crop_padding, config.dataset.flip) == (4, True)  # type: ignore[attr-defined]
    assert config.dataset.title == "CIFAR-10 (JPEG copy)"  # type: ignore[attr-defined]
    found = archive.members(REAL)
    for member in (next(found), next(found)):
        assert member.parts[:2] == ("train", "airplane")
        assert Image.open(io.BytesIO(member.content)).size == (32, 32)
    found.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_jpeg_copy_of_cifar10_is_complete(tmp_path: Path) -> None:
    if not REAL.is_file():
        pytest.skip("needs cifar10_jpeg.tar.xz, which is not part of the project")
    dataset = load(REAL.parent, REAL, cache=str(tmp_path))
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    assert isinstance(dataset.train, Split)
    values = dataset.train.images.double().mean((0, 2, 3)) / 255
    assert values.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
