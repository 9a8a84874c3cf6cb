"""Decoded data in a file, so that archives and thousands of small files are read once.

A cache file is an uncompressed .npz without pickled objects. It holds a hash of what it was made from (paths,
sizes and times of change of the files, and the options that matter) and is made anew when that has changed or
when its checksums show damage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ide_snn.files import DataError, write_atomically

__all__ = ["Cache"]

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the meaning of the stored arrays changes
FOLDER = ".ide_snn_cache"
NO_FOLDERS = ("", "false", "true", "no", "yes", "off", "on", "null", "none", "auto")  # ./false is a folder
IDENTITY = "identity"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Cache:
    """Where decoded data are kept.

    Args:
        choice: `auto` is <data_dir>/.ide_snn_cache, or ide_snn in the user's cache folder (XDG_CACHE_HOME) where the
            data cannot be written to; `none` keeps nothing; anything else is a folder.
        data_dir: the folder of the data, or None.
    """

    choice: str
    data_dir: Path | None

    def __post_init__(self) -> None:
        if self.choice not in ("auto", "none") and self.choice.lower() in NO_FOLDERS:
            raise DataError(f"dataset.cache: {self.choice!r} is not a choice; choose auto, none, or a folder")

    @property
    def folder(self) -> Path | None:
        """The folder, or None for `none`."""
        if self.choice == "none":
            return None
        if self.choice != "auto":
            return Path(self.choice).expanduser()
        if self.data_dir is not None:
            beside = self.data_dir / FOLDER
            if _is_writable(beside if beside.is_dir() else self.data_dir):
                return beside
        home = os.environ.get("XDG_CACHE_HOME")
        return (Path(home) if home else Path.home() / ".cache") / "ide_snn"

    def load(
        self,
        name: str,
        root: Path,
        files: Sequence[Path],
        options: Mapping[str, object],
        build: Callable[[], Arrays],
    ) -> Arrays:
        """The arrays that `build` makes, from the cache where it holds them.

        Args:
            name: of the data set; the file's name begins with it.
            root: the archive or folder of the data.
            files: all files that are read.
            options: choices the arrays depend on; plain values.
            build: reads the files.

        Raises:
            DataError: a chosen folder cannot be written to, or from `build`.
        """
        folder = self.folder
        if folder is None:
            return build()
        what = [str(root.resolve()), dict(options)]
        path = folder / f"{name}-{_digest(what)[:16]}.npz"
        identity = _digest([FORMAT, what, [_state(file) for file in files]])
        arrays = _read(path, identity)
        if arrays is None:
            arrays = build()
            self._write(path, identity, arrays)
        return arrays

    def _write(self, path: Path, identity: str, arrays: Arrays) -> None:
        content: dict[str, Any] = {IDENTITY: np.array(identity), **arrays}
        try:
            write_atomically(path, lambda file: np.savez(file, **content))
        except OSError as error:
            if self.choice != "auto":
                raise DataError(f"dataset.cache: {path} cannot be written ({error})") from error
            logger.warning(
                "the decoded data could not be kept in %s (%s); they are decoded again next time", path, error
            )
        else:
            logger.info("decoded data kept in %s (%.0f MB)", path, path.stat().st_size / 1e6)


def _is_writable(folder: Path) -> bool:
    """False for a folder marked read-only, whatever the superuser could do."""
    return folder.is_dir() and folder.stat().st_mode & 0o222 != 0 and os.access(folder, os.W_OK)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state(file: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error})") from error
    return str(file), status.st_size, status.st_mtime_ns


def _read(path: Path, identity: str) -> Arrays | None:
    """The arrays, or None where the file is missing, of other data, or damaged."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares all checksums, which np.load does not do for every damage
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with np.load(path, allow_pickle=False) as content:
            if str(content[IDENTITY]) != identity:
                logger.info("the data have changed since %s was made; they are decoded again", path)
                return None
            arrays = {name: content[name] for name in content.files if name != IDENTITY}
    except Exception as error:  # there is no end to what a damaged zip file can raise; all of it means the same here
        logger.warning("%s is damaged (%s: %s); the data are decoded again", path, type(error).__name__, error)
        return None
    logger.info("decoded data read from %s", path)
    return arrays
