"""The cache of decoded data: read when nothing changed, made anew when something did, never trusted when damaged."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DataError
from ide_snn.data.cache import Arrays, Cache


class Source:
    """A file of bytes that is decoded by counting how often."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "source"
        self.path.write_bytes(b"abc")
        self.decoded = 0

    def build(self) -> Arrays:
        self.decoded += 1
        content = np.frombuffer(self.path.read_bytes(), dtype=np.uint8)
        return {"bytes": content, "names": np.array(["a", "bä"])}

    def load(self, cache: Cache, **options: object) -> Arrays:
        return cache.load("test", self.path, [self.path], options, self.build)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "data").mkdir()
    return Source(tmp_path / "data")


def test_decoded_once(source: Source) -> None:
    cache = Cache("auto", source.path.parent)
    for _ in range(3):
        arrays = source.load(cache)
        assert arrays["bytes"].tolist() == list(b"abc")
        assert arrays["names"].tolist() == ["a", "bä"]
        assert arrays["bytes"].dtype == np.uint8
    assert source.decoded == 1
    (file,) = (source.path.parent / ".ide_snn_cache").iterdir()
    assert file.name.startswith("test-")


def test_changed_files_are_decoded_again_into_the_same_place(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache("auto", source.path.parent)
    source.load(cache)
    source.path.write_bytes(b"abcd")
    with caplog.at_level(logging.INFO, logger="ide_snn.data"):
        assert source.load(cache)["bytes"].tolist() == list(b"abcd")
    assert "the data have changed" in caplog.text
    os.utime(source.path, ns=(1, 1))
    source.load(cache)
    assert source.decoded == 3
    assert len(list((source.path.parent / ".ide_snn_cache").iterdir())) == 1


def test_options_have_caches_of_their_own(source: Source) -> None:
    cache = Cache("auto", source.path.parent)
    for _ in range(2):
        source.load(cache, size=3)
        source.load(cache, size=4)
    assert source.decoded == 2


def test_none_keeps_nothing(source: Source) -> None:
    cache = Cache("none", source.path.parent)
    source.load(cache)
    source.load(cache)
    assert source.decoded == 2
    assert [path.name for path in source.path.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("choice", ["false", "False", "off", "null", "", "None", "Auto"])
def test_a_switch_is_no_folder(choice: str) -> None:
    with pytest.raises(DataError, match=r"dataset\.cache: .* is not a choice; choose auto, none, or a folder"):
        Cache(choice, None)
    assert Cache("./false", None).folder == Path("false")


def test_a_folder_of_ones_own(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    source.load(Cache(str(folder), source.path.parent))
    assert len(list(folder.iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"dataset.cache: .*file.* cannot be written"):
        source.load(Cache(str(tmp_path / "file"), None))


def test_read_only_data_are_cached_in_the_users_folder(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source.path.parent.chmod(0o555)
    try:
        source.load(Cache("auto", source.path.parent))
        source.load(Cache("auto", source.path.parent))
    finally:
        source.path.parent.chmod(0o755)
    assert source.decoded == 1
    assert len(list((tmp_path / "cache" / "ide_snn").iterdir())) == 1
    assert not (source.path.parent / ".ide_snn_cache").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Cache("auto", None).folder == tmp_path / "home" / ".cache" / "ide_snn"


def test_a_cache_that_cannot_be_kept_is_no_error(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert source.load(Cache("auto", None))["bytes"].tolist() == list(b"abc")
    assert "could not be kept" in caplog.text


def test_a_missing_source_is_named(source: Source) -> None:
    source.path.unlink()
    with pytest.raises(DataError, match=str(source.path)):
        source.load(Cache("auto", source.path.parent))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_seen_and_repaired(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    source = Source(tmp_path_factory.mktemp("data"))
    cache = Cache("auto", source.path.parent)
    source.load(cache)
    (file,) = (source.path.parent / ".ide_snn_cache").iterdir()
    whole = file.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(whole[:position])
    else:
        file.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << data.draw(st.integers(0, 7))]) + whole[position + 1 :]
        )
    arrays = source.load(cache)
    assert arrays["bytes"].tolist() == list(b"abc")
    assert arrays["names"].tolist() == ["a", "bä"]
    assert set(arrays) == {"bytes", "names"}
    assert source.decoded in (1, 2)
    source.load(cache)
    assert source.decoded in (1, 2)  # it was written again


def test_a_damaged_shape_does_not_cut_the_data(source: Source) -> None:
    source.path.write_bytes(bytes(10_000))
    cache = Cache("auto", source.path.parent)
    source.load(cache)
    (file,) = (source.path.parent / ".ide_snn_cache").iterdir()
    whole = file.read_bytes()
    assert whole.count(b"(10000,)") == 1
    file.write_bytes(whole.replace(b"(10000,)", b"(1000, )"))
    assert source.load(cache)["bytes"].shape == (10_000,)


def test_damage_is_logged_and_nothing_half_written_stays(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache("auto", source.path.parent)
    source.load(cache)
    (file,) = (source.path.parent / ".ide_snn_cache").iterdir()
    file.write_bytes(b"rubbish")
    source.load(cache)
    assert f"{file} is damaged" in caplog.text
    source.path.write_bytes(b"other")

    def fail() -> Arrays:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        cache.load("test", source.path, [source.path], {}, fail)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
