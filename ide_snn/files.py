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


class DataError(ValueError):
    """A problem with a data file or with the choice of a data set."""


class _Held(threading.local):
    """Folders that this thread writes to."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()


_held = _Held()
_locks: set[BinaryIO] = set()  # open files, of all threads


def _let_go() -> None:
    """In a forked process: the locks are its parent's, and would outlive that."""
    for file in _locks:
        file.close()
    _locks.clear()
    _held.folders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class FolderInUseError(FileExistsError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps all others that ask from writing to `folder`; may be nested.

    The lock is the system's (flock): it ends with the process, whatever becomes of that. Where the system has none, on
    Windows and on some network file systems, nothing is kept from anybody, which the log says.

    Raises:
        FolderInUseError: somebody else writes to it.
        OSError: it cannot be made, or written to.
    """
    folder = folder.resolve()
    if folder in _held.folders:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        _lock(file, folder)
        _held.folders.add(folder)
        _locks.add(file)
        try:
            yield
        finally:
            _held.folders.discard(folder)
            _locks.discard(file)
            if fcntl is not None:
                with contextlib.suppress(OSError):  # of a file system without locks
                    fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: BinaryIO, folder: Path) -> None:
    if fcntl is None:
        log.warning("%s is not locked: this system has no flock. Do not train in it twice at once", folder)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(
            f"another process is training in {folder}: wait for it or stop it, or choose another folder"
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not train in it twice at once", folder, error)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place at once.

    Whatever happens, `path` holds either its old content or all of the new one.

    Raises:
        OSError: it cannot be written, with `path` in the message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a full disk
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    if os.name == "posix":  # the new name survives a power cut only once the folder is on disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
