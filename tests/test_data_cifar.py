"""CIFAR-10 and CIFAR-100 files as their authors wrote them, damaged ones, and pickles that want more than data."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DataError, Dataset, Split, cifar, load_dataset
from ide_snn.data.unpickle import PickledArray, read_pickled_dict

ROWS = 20  # images per file, in place of 10,000 or 50,000
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}
ARCHIVES = {key: f"{key[0].replace('cifar', 'cifar-')}-{key[1]}.tar.gz" for key in FOLDERS}


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(cifar, name, replace(getattr(cifar, name), train_rows=ROWS, test_rows=ROWS))


class Python2:
    """Writes pickles of protocol 2 as Python 2 did, opcode by opcode: its str is a byte string."""

    def dump(self, value: object) -> bytes:
        return b"\x80\x02" + self._encode(value) + b"."

    def _encode(self, value: object) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(self._encode(k) + self._encode(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(self._encode, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self._encode, value)) + b"t"
        if isinstance(value, str):
            return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, bool) or value is None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        assert isinstance(value, np.ndarray)
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + self._encode((0,)) + self._encode("b")
        kind = b"cnumpy\ndtype\n" + self._encode((value.dtype.str[1:], 0, 1)) + b"R"
        kind += self._encode((3, "|", None, None, None, -1, -1, 0)) + b"b"
        state = b"(" + self._encode(1) + self._encode(value.shape) + kind + self._encode(False)
        return empty + b"tR" + state + self._encode(value.tobytes()) + b"tb"


def python3(value: object) -> bytes:
    """As a tool of today would write it again."""
    return pickle.dumps(value, protocol=2)


def table(name: str, file: str) -> tuple[np.ndarray, list[int]]:
    """Random pixels [ROWS, 3072] and labels of one file, always the same."""
    rng = np.random.default_rng(sum(file.encode()))
    return rng.integers(0, 256, (ROWS, 3072), dtype=np.uint8), rng.integers(0, int(name[5:]), ROWS).tolist()


def file_names(name: str) -> list[str]:
    return [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]


def contents(name: str, form: str, dump=None) -> dict[str, bytes]:  # type: ignore[no-untyped-def]
    """The files of a data set, its pickles written by `dump` (default: as Python 2 did)."""
    dump = dump or Python2().dump
    classes = [f"class {k}".replace(" ", "_") for k in range(int(name[5:]))]
    fine = "" if name == "cifar10" else "fine_"
    files = {}
    for file in file_names(name):
        pixels, labels = table(name, file)
        if form == "binary":
            coarse = b"\x13" if fine else b""
            records = (coarse + bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))
            files[f"{file}.bin"] = b"".join(records)
        else:
            batch = {"batch_label": f"part of {name}", f"{fine}labels": labels, "data": pixels, "filenames": ["a.png"]}
            files[file] = dump({**batch, "coarse_labels": [19] * ROWS} if fine else batch)
    if form == "binary":
        files["fine_label_names.txt" if fine else "batches.meta.txt"] = "\n".join([*classes, ""]).encode()
    else:
        names = {f"{fine}label_names": classes}
        files["meta" if fine else "batches.meta"] = dump({**names, "coarse_label_names": ["x"]} if fine else names)
    return files


def write_folder(data_dir: Path, name: str, form: str, **options: object) -> Path:
    folder = data_dir / FOLDERS[name, form]
    folder.mkdir(parents=True)
    for file, content in contents(name, form, **options).items():  # type: ignore[arg-type]
        (folder / file).write_bytes(content)
    return folder


def write_archive(data_dir: Path, name: str, form: str) -> Path:
    path = data_dir / ARCHIVES[name, form]
    with tarfile.open(path, "w:gz") as archive:
        for file, content in {**contents(name, form), "readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(f"{FOLDERS[name, form]}/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def load(name: str, data_dir: Path, **options: object) -> Dataset:
    return load_dataset(name, data_dir=data_dir, **{"cache": "none", **options})


def check(dataset: Dataset, name: str) -> None:
    *train, test = file_names(name)
    for split, files in ((dataset.train, train), (dataset.test, [test])):
        assert isinstance(split, Split)
        tables = [table(name, file) for file in files]
        pixels = np.concatenate([pixels for pixels, _ in tables])
        assert np.array_equal(split.images.numpy().reshape(len(pixels), -1), pixels)
        assert split.labels.tolist() == [label for _, labels in tables for label in labels]
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.num_classes == int(name[5:])
    assert dataset.class_names[1] == "class_1"
    assert dataset.title == name.upper().replace("CIFAR", "CIFAR-")


# whole files


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_both_sets_in_every_form(tmp_path: Path, name: str, form: str, write) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, name, form)
    check(load(name, tmp_path), name)


def test_pixels_are_red_green_blue_planes_in_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "cifar10", "binary")
    content = bytearray((folder / "test_batch.bin").read_bytes())
    content[1 : 1 + 3072] = bytes(3072)
    content[1 + 2 * 1024 + 5 * 32 + 7] = 200  # blue, row 5, column 7
    (folder / "test_batch.bin").write_bytes(content)
    image = load("cifar10", tmp_path).test.images[0]
    assert image.nonzero().tolist() == [[2, 5, 7]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_files_written_again_by_python_3(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, name, "python", dump=python3)
    check(load(name, tmp_path), name)


def test_the_second_time_the_cache_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_archive(tmp_path, "cifar10", "python")
    check(load("cifar10", tmp_path, cache="auto"), "cifar10")
    with caplog.at_level("INFO", logger="ide_snn.data"):
        check(load("cifar10", tmp_path, cache="auto"), "cifar10")
    assert f"decoded data read from {tmp_path / '.ide_snn_cache'}" in caplog.text


def test_the_real_sizes_are_the_published_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    sizes = [(s.train_rows * len(s.forms[0].train), s.test_rows) for s in (cifar.CIFAR10, cifar.CIFAR100)]
    assert sizes == [(50_000, 10_000)] * 2
    write_folder(tmp_path, "cifar10", "python")
    with pytest.raises(DataError, match=r"data_batch_1 .*shape \(10000, 3072\), found \(20, 3072\)"):
        load("cifar10", tmp_path)


# what is wrong with others


def test_missing_files_say_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path)
    for form in ("python", "binary"):
        assert str(tmp_path / FOLDERS["cifar10", form]) in str(caught.value)
        assert str(tmp_path / ARCHIVES["cifar10", form]) in str(caught.value)
    assert "dataset.download=true" in str(caught.value)
    with pytest.raises(DataError, match=r"<data_dir>/cifar-100-python, .*no data_dir was given"):
        load_dataset("cifar100")
    folder = write_folder(tmp_path, "cifar10", "python")
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-py is incomplete: it lacks data_batch_3\."):
        load("cifar10", tmp_path)


def test_an_archive_without_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / ARCHIVES["cifar10", "python"]
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        archive.addfile(info, io.BytesIO(b""))
    with pytest.raises(DataError, match=rf"{path} is incomplete: it lacks cifar-10-batches-py/data_batch_2"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("form", ["python", "binary"])
def test_truncated_files_and_archives_are_named(tmp_path: Path, form: str, part: float) -> None:
    for write, file in ((write_folder, "data_batch_2" + ".bin" * (form == "binary")), (write_archive, None)):
        path = write(tmp_path, "cifar10", form)
        path = path if file is None else path / file
        content = path.read_bytes()
        path.write_bytes(content[: min(int(len(content) * part), len(content) - 1)])
        with pytest.raises(DataError, match=str(path if file is None else file)):
            load("cifar10", tmp_path)
        path.write_bytes(content + b"\0" if file is None else content)
        if file is not None:  # so that the archive is looked at
            path.parent.rename(tmp_path / f"done-{form}")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_change_of_one_bit_of_an_archive_passes_as_other_data(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    with small():
        path = write_archive(folder, "cifar100", "python")
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            check(load("cifar100", folder), "cifar100")  # a bit of gzip's time stamp, for example, does no harm


@contextlib.contextmanager
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "CIFAR100", replace(cifar.CIFAR100, train_rows=ROWS, test_rows=ROWS))
        yield


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_an_error_that_names_it(data: st.DataObject) -> None:
    pixels, labels = table("cifar10", "test_batch")
    content = bytearray(Python2().dump({"labels": labels, "data": pixels[:1]}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert isinstance(read_pickled_dict(bytes(content), "some file"), dict)


def changed(**changes: object) -> dict[str, object]:
    pixels, labels = table("cifar10", "test_batch")
    batch = {"labels": labels, "data": pixels, **changes}
    return {key: value for key, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(labels=[0] * (ROWS - 1)), "list of 20 whole numbers as labels"),
        (changed(labels=["a"] * ROWS), "list of 20 whole numbers"),
        (changed(labels=[0] * (ROWS - 1) + [10]), r"labels must lie in 0..9, found 0..10"),
        (changed(labels=[0] * (ROWS - 1) + [-1]), r"labels must lie in 0..9, found -1..0"),
        (changed(labels=None), "lacks labels"),
        (changed(data=None), "lacks data"),
        (changed(data=[1, 2]), r"shape \(20, 3072\), found \(\)"),
        (changed(data=np.zeros((ROWS, 3071), np.uint8)), r"found \(20, 3071\)"),
        (changed(data=np.zeros((ROWS, 3072), np.int16)), "not uint8"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(tmp_path: Path, batch: dict[str, object], message: str) -> None:
    folder = write_folder(tmp_path, "cifar10", "python")
    (folder / "test_batch").write_bytes(Python2().dump(batch))
    with pytest.raises(DataError, match=rf"test_batch.*{message}"):
        load("cifar10", tmp_path)


def test_wrong_names_of_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "cifar10", "python")
    (folder / "batches.meta").write_bytes(Python2().dump({"label_names": ["cat"]}))
    with pytest.raises(DataError, match=r"batches.meta has 1 names for 10 classes"):
        load("cifar10", tmp_path)
    (folder / "batches.meta").write_bytes(Python2().dump([1]))
    with pytest.raises(DataError, match=r"batches.meta holds no dictionary, but a list"):
        load("cifar10", tmp_path)


# pickles that want more than data


class Malicious:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@pytest.mark.parametrize("function", ["system", "exec", "getattr", "load", "import"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, function: str) -> None:
    mark = tmp_path / "executed"
    attack = {
        "system": Malicious(os.system, f"touch {mark}"),
        "exec": Malicious(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": Malicious(getattr, "text", "upper"),
        "load": Malicious(np.save, str(mark), 1),
        "import": Malicious(__import__, "this"),
    }[function]
    folder = write_folder(tmp_path, "cifar10", "python")
    for protocol in (0, 2, 4):
        (folder / "data_batch_1").write_bytes(pickle.dumps({"data": attack}, protocol=protocol))
        with pytest.raises(DataError, match=r"data_batch_1 is damaged or unsafe .*asks for \S+, which is not data"):
            load("cifar10", tmp_path)
    assert not list(tmp_path.glob("executed*"))


def test_only_plain_arrays_of_bytes_are_understood() -> None:
    content = pickle.dumps({"data": np.array([object()], dtype=object)}, protocol=2)
    with pytest.raises(DataError, match=r"some file .*builtin\S*.object"):
        read_pickled_dict(content, "some file")
    pixels = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for array in (pixels, np.ascontiguousarray(pixels)):
            content = pickle.dumps({b"data": array, b"batch_label": b"", "filenames": [b"a.png"]}, protocol)
            found = read_pickled_dict(content, "some file")
            assert isinstance(found["data"], PickledArray)
            assert np.array_equal(found["data"].to_uint8(), pixels)
            assert (found["batch_label"], found["filenames"]) == (b"", [b"a.png"])
    with pytest.raises(DataError, match="takes 0 positional arguments"):
        read_pickled_dict(b"\x80\x02}U\x01dc__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85Rs.", "some file")
    with pytest.raises(ValueError, match="incomplete"):
        PickledArray().to_uint8()
    with pytest.raises(DataError, match="latin1"):
        read_pickled_dict(b"\x80\x02}U\x01dc_codecs\nencode\nX\x01\x00\x00\x00aU\x05utf-7\x86Rs.", "some file")
