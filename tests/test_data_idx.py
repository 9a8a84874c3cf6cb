"""IDX files and the folders in which MNIST and Fashion-MNIST lie, whole and damaged."""

import contextlib
import gzip
import logging
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DataError, Normalization, load_dataset, mnist
from ide_snn.data.idx import read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def encode(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def read_error(path: Path, content: bytes, item_shape: tuple[int, ...] = (2, 3)) -> str:
    """The message with which reading `content` fails."""
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path, item_shape)
    assert str(path) in str(caught.value)
    return str(caught.value)


GOOD = encode(np.arange(24, dtype=np.uint8).reshape(4, 2, 3))
PACKED = gzip.compress(GOOD, mtime=0)


# the format


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes.fromhex("00000803 00000002 00000001 00000003  010203 0405ff"))
    assert read_idx(path, (1, 3)).tolist() == [[[1, 2, 3]], [[4, 5, 255]]]
    path.write_bytes(bytes.fromhex("00000801 00000003  070009"))
    assert read_idx(path, ()).tolist() == [7, 0, 9]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)) | st.tuples(st.integers(1, 50)),
    compressed=st.booleans(),
    misnamed=st.booleans(),
    data=st.data(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    compressed: bool,
    misnamed: bool,
    data: st.DataObject,
) -> None:
    size = math.prod(shape)
    values = data.draw(st.binary(min_size=size, max_size=size))
    array = np.frombuffer(values, dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / ("file.gz" if compressed != misnamed else "file")
    path.write_bytes(gzip.compress(encode(array)) if compressed else encode(array))
    result = read_idx(path, shape[1:])
    assert result.dtype == torch.uint8
    assert result.shape == shape
    assert np.array_equal(result.numpy(), array)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_lengths_must_match_the_header(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "file"
    message = read_error(path, pack(GOOD[:-1]))
    assert "promises 24 bytes of data (4 x 2 x 3), found only 23" in message
    assert "found only 0" in read_error(path, pack(GOOD[:16]))
    assert "promises 24 bytes of data (4 x 2 x 3), found more" in read_error(path, pack(GOOD + b"\0"))
    assert "ends within its header: expected 16 bytes, found 15" in read_error(path, pack(GOOD[:15]))
    assert "ends within its header: expected 16 bytes, found 3" in read_error(path, pack(GOOD[:3]))
    assert "ends within its header: expected 16 bytes, found 0" in read_error(path, pack(b""))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_header_must_be_the_expected_one(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "file"
    message = read_error(path, pack(GOOD), item_shape=())
    assert "starts with 0x00000803, expected 0x00000801 (uint8, 1 dimension(s))" in message
    message = read_error(path, pack(b"\0\0\x0d" + GOOD[3:]))
    assert "starts with 0x00000d03, expected 0x00000803" in message
    assert "starts with 0x3c68746d" in read_error(path, pack(b"<html>not found</html>"))
    assert "holds items of 2 x 3, expected 3 x 2" in read_error(path, pack(GOOD), item_shape=(3, 2))
    assert "holds no items" in read_error(path, pack(GOOD[:4] + struct.pack(">3I", 0, 2, 3)))


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    assert "cannot be read" in read_error(path, PACKED[:-4])  # the length at the end
    assert "cannot be read" in read_error(path, PACKED[: len(PACKED) // 2])
    assert "cannot be read" in read_error(path, PACKED[:2])
    assert "cannot be read" in read_error(path, PACKED + b"rubbish")
    crc = bytes([PACKED[-8] ^ 1])
    assert "CRC" in read_error(path, PACKED[:-8] + crc + PACKED[-7:])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_one_bit_passes_as_other_data(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    position, bit = data.draw(st.integers(0, len(PACKED) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(PACKED)
    damaged[position] ^= 1 << bit
    path = tmp_path_factory.mktemp("idx") / "file.gz"
    path.write_bytes(damaged)
    with contextlib.suppress(DataError):
        # a bit of the time stamp in gzip's header, for example, does no harm
        assert torch.equal(read_idx(path, (2, 3)).flatten(), torch.arange(24, dtype=torch.uint8))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_a_header_that_promises_gigabytes_takes_no_memory(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    header = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2, 3)
    tracemalloc.start()
    try:
        message = read_error(tmp_path / "file", pack(header + bytes(1000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert f"promises {(2**32 - 1) * 6} bytes" in message
    assert "found only 1000" in message
    assert peak < 8 << 20


def test_a_path_that_is_no_readable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such-file"):
        read_idx(tmp_path / "no-such-file", ())
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, ())


# the folders


def fill(folder: Path, *, n_train: int = 20, n_test: int = 10, seed: int = 0, compressed: bool = True) -> Path:
    """Write the four files of a small data set of random images."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for count, images, labels in ((n_train, IMAGES, LABELS), (n_test, TEST_IMAGES, TEST_LABELS)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in ((images, pixels), (labels, np.arange(count, dtype=np.uint8) % 10)):
            put(folder, name, encode(array), compressed=compressed)
    return folder


def put(folder: Path, name: str, content: bytes, *, compressed: bool = True) -> Path:
    path = folder / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(content, compresslevel=1) if compressed else content)
    return path


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where Debian's package would be: a folder of the test's own, absent until it is filled."""
    folder = tmp_path / "debian" / "fashion-mnist"
    monkeypatch.setattr(mnist, "DEBIAN_FASHION_MNIST", folder)
    return folder


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("compressed", [False, True])
def test_torchvision_layout(
    tmp_path: Path, name: str, folder: str, compressed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    raw = fill(tmp_path / folder / "raw", compressed=compressed)
    with caplog.at_level(logging.INFO, logger="ide_snn.data"):
        dataset = load_dataset(name, data_dir=str(tmp_path))
    assert f"read from {raw}" in caplog.text
    assert dataset.name == name
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.train.labels.tolist() == list(range(10)) * 2
    assert dataset.test.labels.tolist() == list(range(10))
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    assert np.array_equal(dataset.train.images.numpy()[:, 0], expected)
    assert dataset.normalization == Normalization(255.0, (0.1307,), (0.3081,))
    assert dataset.class_names[9] == ("9" if name == "mnist" else "Ankle boot")


def test_a_plain_file_is_preferred_to_its_gz(tmp_path: Path) -> None:
    raw = fill(tmp_path / "MNIST" / "raw")
    put(raw, LABELS, encode(np.full(20, 7, dtype=np.uint8)), compressed=False)
    assert load_dataset("mnist", data_dir=tmp_path).train.labels.tolist() == [7] * 20


@pytest.mark.parametrize("with_data_dir", [False, True])
def test_fashion_mnist_from_debian(
    tmp_path: Path, no_debian_package: Path, with_data_dir: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fill(no_debian_package)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    with caplog.at_level(logging.INFO, logger="ide_snn.data"):
        dataset = load_dataset("fashion_mnist", data_dir=tmp_path if with_data_dir else None)
    assert len(dataset.train) == 20
    assert f"Fashion-MNIST: read from {no_debian_package}" in caplog.text


def test_data_dir_comes_before_debian(tmp_path: Path, no_debian_package: Path) -> None:
    fill(no_debian_package)
    fill(tmp_path / "FashionMNIST" / "raw", n_train=30)
    assert len(load_dataset("fashion_mnist", data_dir=tmp_path).train) == 30


def test_missing_mnist_says_where_what_and_how(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"MNIST was not found. Looked in: {tmp_path / 'MNIST' / 'raw'}. ")
    for name in (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS):
        assert f"{name}[.gz]" in message
    assert "torchvision's datasets.MNIST(data_dir, download=True)" in message
    assert "Debian" not in message


def test_missing_fashion_mnist_names_both_places(tmp_path: Path, no_debian_package: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("fashion_mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert f"Looked in: {tmp_path / 'FashionMNIST' / 'raw'}; {no_debian_package}. " in message
    assert "datasets.FashionMNIST(data_dir, download=True)" in message
    assert "dataset-fashion-mnist" in message


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_without_a_data_dir_the_message_asks_for_one(name: str) -> None:
    with pytest.raises(DataError, match="but no data_dir was given"):
        load_dataset(name)


def test_an_incomplete_folder_is_an_error_and_not_passed_over(tmp_path: Path, no_debian_package: Path) -> None:
    fill(no_debian_package)
    raw = fill(tmp_path / "FashionMNIST" / "raw")
    (raw / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(DataError, match=rf"raw is incomplete: it lacks {TEST_LABELS}\[.gz\]\. To get it: "):
        load_dataset("fashion_mnist", data_dir=tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    raw = fill(tmp_path / "MNIST" / "raw")
    labels = (raw / f"{LABELS}.gz").read_bytes()

    put(raw, LABELS, encode(np.zeros(19, dtype=np.uint8)))
    with pytest.raises(DataError, match=rf"{LABELS}.gz holds 19 labels, but .*{IMAGES}.gz holds 20 images"):
        load_dataset("mnist", data_dir=tmp_path)
    put(raw, LABELS, encode(np.full(20, 10, dtype=np.uint8)))
    with pytest.raises(DataError, match=rf"{LABELS}.gz: labels must lie in 0..9, found 10"):
        load_dataset("mnist", data_dir=tmp_path)
    (raw / f"{LABELS}.gz").write_bytes(labels[:-1])
    with pytest.raises(DataError, match=rf"{LABELS}.gz cannot be read.*remove it first.*dataset.download=true"):
        load_dataset("mnist", data_dir=tmp_path)
    put(raw, LABELS, gzip.decompress(labels))
    put(raw, TEST_IMAGES, encode(np.zeros((10, 32, 32), dtype=np.uint8)))
    with pytest.raises(DataError, match=rf"{TEST_IMAGES}.gz holds items of 32 x 32, expected 28 x 28"):
        load_dataset("mnist", data_dir=tmp_path)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "sets" / "MNIST" / "raw")
    assert len(load_dataset("mnist", data_dir="~/sets").train) == 20
