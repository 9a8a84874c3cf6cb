"""Reading and writing files: the error for data that cannot be used, atomic writes, one writer to a folder."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["DataError", "FolderInUseError", "sole_writer", "write_atomically"]

log = logging.getLogger(__name__)

LOCK = ".lock"

_held = threading.local()


class DataError(ValueError):
    """A problem with a data file or with the choice of a data set."""


class FolderInUseError(FileExistsError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps all others that ask from writing to `folder`; may be nested.

    The lock is the system's (flock): it ends with the process, whatever becomes of that. Where the system has none, on
    Windows and on some network file systems, nothing is kept from anybody, which the log says.

    Raises:
        FolderInUseError: somebody else writes to it.
    """
    folders: set[Path] = _held.__dict__.setdefault("folders", set())
    folder = folder.resolve()
    if folder in folders:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "wb") as file:
        if fcntl is None:
            log.warning("%s is not locked: this system has no flock. Do not train in it twice at once", folder)
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUseError(
                    f"another process is training in {folder}: wait for it or stop it, or choose another folder "
                    "(hydra.run.dir)"
                ) from None
            except OSError as error:
                log.warning("%s cannot be locked (%s): do not train in it twice at once", folder, error)
        folders.add(folder)
        try:
            yield
        finally:
            folders.discard(folder)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place at once.

    Whatever happens, `path` holds either its old content or all of the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the new name survives a power cut only once the folder is on disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
