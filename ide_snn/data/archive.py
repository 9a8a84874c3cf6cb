"""The files of a folder, a tar or a zip file, read one after the other and never unpacked to disk."""

from __future__ import annotations

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ide_snn.files import DataError

__all__ = ["Member", "list_folder", "locate", "members"]

LARGEST_FILE = 1 << 28  # bytes; no file of a data set held in memory is as large, so it is a mistake or an attack
# what libraries raise for damaged files; NotImplementedError, a RuntimeError, for forms they do not know
DAMAGE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError)


class Member(NamedTuple):
    """One regular file: the parts of its path inside the folder or archive, and its content."""

    parts: tuple[str, ...]
    content: bytes


def members(path: Path) -> Iterator[Member]:
    """Every regular file of a folder, tar (plain, gz, bz2, xz) or zip file, told by its content.

    Links, devices and names that lead out of an archive are refused, since nothing good can be meant by them.

    Raises:
        DataError: there is no such folder or file, it is damaged, of another kind, or has such a member.
    """
    if path.is_dir():
        yield from _from_folder(path)
        return
    if not path.is_file():
        raise DataError(f"there is no folder or file {path}")
    try:
        if tarfile.is_tarfile(path):
            yield from _from_tar(path)
        elif zipfile.is_zipfile(path):
            yield from _from_zip(path)
        else:
            raise DataError(f"{path} is damaged, or neither a tar nor a zip file")
    except DAMAGE as error:
        raise DataError(f"{path} is damaged or cannot be read ({type(error).__name__}: {error})") from error


def locate(path: str, data_dir: Path | None, layout: str) -> Path:
    """The folder or file at `path`, which is absolute or relative to `data_dir`.

    Raises:
        DataError: there is none; `layout` says what is wanted in it.
    """
    source = Path(path).expanduser()
    if not source.is_absolute():
        if data_dir is None:
            raise DataError(f"path={path} is relative to data_dir, but no data_dir was given")
        source = data_dir.expanduser() / source
    if not source.exists():
        raise DataError(
            f"there is no folder or file {source}; {layout}; choose it with dataset.path=... when training; a "
            "checkpoint expects what it was trained on at the same path (a relative one in data_dir)"
        )
    return source


def list_folder(path: Path) -> list[Path]:
    """All files under a folder, without hidden ones, in order."""
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts))


def _from_folder(path: Path) -> Iterator[Member]:
    for file in list_folder(path):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error})") from error
        yield Member(file.relative_to(path).parts, content)


class _StrictInfo(tarfile.TarInfo):
    """A damaged or missing header is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark of its end")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _from_tar(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:*", tarinfo=_StrictInfo) as archive:
        for info in archive:
            if info.isdir():
                continue
            parts = _safe_parts(path, info.name, info.size, regular=info.isreg())
            file = archive.extractfile(info)
            content = b"" if file is None else file.read()
            if len(content) != info.size:
                raise DataError(f"{path} is truncated within {info.name}")
            yield Member(parts, content)
        stream = archive.fileobj
        while stream is not None and stream.read(1 << 20):  # the checksum of the compression stands at the very end
            pass


def _from_zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on a Unix system
            parts = _safe_parts(path, info.filename, info.file_size, regular=kind in (0, stat.S_IFREG))
            yield Member(parts, archive.read(info))


def _safe_parts(path: Path, name: str, size: int, *, regular: bool) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    if not regular:
        raise DataError(f"{path}: {name} is a link or a device, which is not read; store the files themselves")
    if ".." in parts or name.startswith("/"):
        raise DataError(f"{path}: the name {name} leads out of the archive; make the archive anew")
    if size > LARGEST_FILE:
        raise DataError(f"{path}: {name} has {size} bytes, more than the {LARGEST_FILE} that are read")
    return parts
