"""C kernels, compiled for this processor at their first use by the system's C compiler and kept in a cache folder.

A kernel is optional everywhere: `library` says in one sentence why there is none, and the caller says what it did
instead. Nothing is compiled on import.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No contraction of a * b + c to one rounding: the kernels promise the rounding of the torch operations they replace.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-std=gnu11",
)

# Starting a thread, beside those of torch that still wait actively for work, costs what a few 100,000 numbers do.
WORTH_A_THREAD = 1 << 20


class NativeUnavailable(RuntimeError):
    """There is no compiled kernel; the message says why and what to do."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $IDE_SNN_CACHE, else ide_snn/ in the user's cache folder."""
    if "IDE_SNN_CACHE" in os.environ:
        return Path(os.environ["IDE_SNN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ide_snn"


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The kernels of csrc/`name`.c.

    Raises:
        NativeUnavailable: no compiler, or it failed.
    """
    source = SOURCES / f"{name}.c"
    compiler = _compiler()
    # machines that share a cache folder must not share code made for another processor
    identity = "\n".join((source.read_text(), " ".join(FLAGS), _version(compiler), _processor()))
    target = cache_folder() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailable(f"the compiled kernel {target} cannot be loaded: {error}") from error


@functools.cache
def why_unavailable(name: str) -> str | None:
    """None where `library(name)` works, else the reason."""
    try:
        library(name)
    except NativeUnavailable as error:
        return str(error)
    return None


def on_all_threads(call: Callable[[], None], elements: int) -> None:
    """Runs `call`, which releases the interpreter's lock, on as many threads as torch uses; raises what one raised.

    Args:
        elements: numbers that are read or written; few are left to the calling thread.
    """
    if elements < WORTH_A_THREAD:
        call()
        return
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    others = [threading.Thread(target=guarded, daemon=True) for _ in range(torch.get_num_threads() - 1)]
    for thread in others:
        thread.start()
    guarded()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def _compiler() -> str:
    named = os.environ.get("CC")
    for candidate in (named,) if named else ("cc", "gcc", "clang"):
        found = shutil.which(candidate)
        if found:
            return found
    raise NativeUnavailable(
        f"the C compiler {named!r} named by CC was not found"
        if named
        else "there is no C compiler: install gcc or clang, or name one in the environment variable CC"
    )


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # into a file of its own, then renamed: two runs may compile at the same time
        handle, scratch = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {target.parent} ({error}): set IDE_SNN_CACHE to a folder") from error
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", scratch], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed on {source.name}: {done.stderr.strip()[-500:]}")
        os.replace(scratch, target)
        log.info("compiled %s to %s", source.name, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
