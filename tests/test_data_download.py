"""Downloads from a server of the test's own: checked, resumed, from the next mirror, or with one clear error."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data_idx import IMAGES, LABELS, TEST_IMAGES, TEST_LABELS, encode

from ide_snn.data import DataError, cifar, load_dataset, mnist
from ide_snn.data.download import Remote

pytest.importorskip("pooch", reason="needs pooch: pip install -e '.[download]'")
CONTENT = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; cuts the next answers after so many bytes as `cuts` says; notes the ranges it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        self.knows_ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.ranges.append(wanted)
        content = server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.knows_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.files["file.bin"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def remote(*mirrors: str, content: bytes = CONTENT) -> Remote:
    return Remote("Some data", {"file.bin": md5(content)}, mirrors)


def test_a_file_is_fetched_and_nothing_else_left(server: Server, tmp_path: Path) -> None:
    remote(server.address).fetch(["file.bin"], tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["file.bin"]
    remote(server.address).fetch(["file.bin"], tmp_path / "new" / "folder")
    assert server.ranges == [None]  # what is there is not fetched again


def test_what_was_cut_off_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000]
    with pytest.raises(
        DataError, match=r"file.bin could not be .*ended after 300000 of 700000 bytes; the next attempt"
    ):
        remote(server.address).fetch(["file.bin"], tmp_path)
    assert not (tmp_path / "file.bin").exists()
    server.cuts = [200_000]
    remote(server.address, server.address).fetch(["file.bin"], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.knows_ranges = [300_000], False
    remote(server.address, server.address).fetch(["file.bin"], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_that_is_the_whole_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.bin.part").write_bytes(CONTENT)
    remote(server.address).fetch(["file.bin"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_the_next_mirror_is_tried(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ide_snn.data"):
        remote(server.address + "gone/", "http://127.0.0.1:9/", server.address).fetch(["file.bin"], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert "gone/file.bin failed: HTTP Error 404" in caplog.text


def test_other_content_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file.bin could not be downloaded from http.*hash.*; to do without, put"):
        remote(server.address, content=b"other").fetch(["file.bin"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_says_what_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = ("http://127.0.0.1:9/", "http://127.0.0.1:9/b/")
    monkeypatch.setattr(
        mnist, "_MNIST", replace(mnist._MNIST, remote=replace(mnist._MNIST.remote, mirrors=unreachable))
    )
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", data_dir=tmp_path, download=True)
    message = str(caught.value)
    for name in (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS):
        assert f"{name}.gz" in message
    assert f"into {tmp_path / 'MNIST' / 'raw'}" in message
    assert "127.0.0.1:9/b/" in message
    assert "\n" not in message


def test_without_pooch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=rf"\[download\].*put cifar-10-python.tar.gz into {tmp_path}"):
        load_dataset("cifar10", data_dir=tmp_path, download=True)


def test_mnist_fetches_what_is_missing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {
        IMAGES: np.zeros((3, 28, 28), np.uint8),
        LABELS: np.arange(3, dtype=np.uint8),
        TEST_IMAGES: np.ones((2, 28, 28), np.uint8),
        TEST_LABELS: np.arange(2, dtype=np.uint8),
    }
    server.files = {f"{name}.gz": gzip.compress(encode(array), mtime=0) for name, array in arrays.items()}
    published = Remote("Fashion-MNIST", {name: md5(c) for name, c in server.files.items()}, (server.address,))
    monkeypatch.setattr(mnist, "_FASHION_MNIST", replace(mnist._FASHION_MNIST, remote=published))
    monkeypatch.setattr(mnist, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / LABELS).write_bytes(encode(np.full(3, 7, np.uint8)))  # unpacked, and one's own
    dataset = load_dataset("fashion_mnist", data_dir=tmp_path, download=True)
    assert dataset.train.labels.tolist() == [7, 7, 7]
    assert dataset.test.labels.tolist() == [0, 1]
    assert len(server.ranges) == 3
    load_dataset("fashion_mnist", data_dir=tmp_path, download=True)
    assert len(server.ranges) == 3


def test_cifar_fetches_its_archive(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_data_cifar import ROWS, check, write_archive

    (tmp_path / "server").mkdir()
    archive = write_archive(tmp_path / "server", "cifar100", "python").read_bytes()
    server.files = {"cifar-100-python.tar.gz": archive}
    published = Remote("CIFAR-100", {"cifar-100-python.tar.gz": md5(archive)}, (server.address,))
    small = replace(cifar.CIFAR100, train_rows=ROWS, test_rows=ROWS, remote=published)
    monkeypatch.setattr(cifar, "CIFAR100", small)
    for _ in range(2):
        check(load_dataset("cifar100", data_dir=tmp_path, download=True), "cifar100")
    assert len(server.ranges) == 1
    with pytest.raises(DataError, match="no data_dir was given"):
        load_dataset("cifar100", download=True)


def test_the_checksums_are_there_for_every_file_and_mirrors_end_in_a_slash() -> None:
    for source in (mnist._MNIST, mnist._FASHION_MNIST, cifar.CIFAR10, cifar.CIFAR100):
        published = source.remote
        assert all(len(value) == 32 and int(value, 16) for value in published.md5.values())
        assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in published.mirrors)
    for source in (mnist._MNIST, mnist._FASHION_MNIST):
        assert set(source.remote.md5) == {f"{name}.gz" for pair in mnist.FILES.values() for name in pair}
    for name in ("CIFAR10", "CIFAR100"):
        source = getattr(cifar, name)
        assert set(source.remote.md5) == {source.forms[0].archive}
