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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No contraction of a * b + c to one rounding: kernels of elementwise operations have the rounding of torch's.
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

# Where nothing of the kind is promised.
FLAGS_OF = {"dense": ("-ffp-contract=fast",)}

MOST_KEPT = 1 << 26  # bytes of scratch memory, per thread
COUNTERS = ("next", "threads", "finished", "phases", "entered", "left")  # fields of works that kernels count in
LINE = 64  # bytes that are read and written together
WORTH_THREADS = 1 << 16  # numbers: below, waking them costs more than they save


_own = threading.local()


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
    keep_freed_memory()
    source = SOURCES / f"{name}.c"
    compiler = _compiler()
    # machines that share a cache folder must not share code made for another processor
    flags = (*FLAGS, *FLAGS_OF.get(name, ()))
    texts = [path.read_text() for path in (source, *sorted(SOURCES.glob("*.h")))]
    identity = "\n".join((*texts, " ".join(flags), _version(compiler), _processor()))
    target = cache_folder() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, flags, source, target)
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


def run(name: str, kernel: str, work: ctypes.Structure, elements: int, most: int | None = None) -> None:
    """Runs `kernel(work)` of csrc/`name`.c on as many threads as torch uses, torch's own where they can be had.

    Threads of our own would share the processors with torch's, which wait actively for their next work.

    Args:
        kernel: a C function of one pointer, whose callers share the work among them.
        work: what it points to.
        elements: numbers that are read or written; few are left to the calling thread.
        most: threads, if fewer than torch uses.

    Raises:
        NativeUnavailable: see `library`.
    """
    function, address = _kernel(name, kernel)
    threads, argument = torch.get_num_threads(), ctypes.byref(work)
    threads = threads if most is None else min(threads, most)
    if elements < WORTH_THREADS or threads == 1:
        function(argument)
        return
    team = _torch_threads()
    if team is not None:
        team(address, argument, threads, 0)
        return
    others = [threading.Thread(target=function, args=(argument,), daemon=True) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    function(argument)
    for thread in others:
        thread.join()


@dataclass(frozen=True)
class Factor:
    """A linear map of single samples as a kernel `Apply` (csrc/apply.h).

    Attributes:
        library, kernel: csrc/`library`.c and the function in it.
        work, keep: what the function is given, and everything that it points to.
        size: numbers per sample of the result.
        together: samples that are best multiplied at a time.
        scratch, scratch_each: bytes that a thread needs, and those for every sample that is multiplied at a time.
    """

    library: str
    kernel: str
    work: ctypes.Structure
    keep: tuple[Any, ...]
    size: int
    together: int = 1
    scratch: int = 0
    scratch_each: int = 0


class _Stage(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "work")),
        *((name, ctypes.c_int64) for name in ("entered", "left")),
        ("padding", ctypes.c_int64 * 4),
    ]


class _Counter(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("size", ctypes.c_int64)]


class _Sequence(ctypes.Structure):
    _fields_ = [
        *(("stages", ctypes.c_void_p), ("count", ctypes.c_int64)),
        *(("counters", ctypes.c_void_p), ("counted", ctypes.c_int64)),
    ]


@dataclass(frozen=True)
class Stage:
    """A call of a kernel: `run` without running it. `keep` is what `work` points to.

    To be run once: kernels count in their works, and `Stages` alone puts that back.
    """

    library: str
    kernel: str
    work: ctypes.Structure
    elements: int
    keep: tuple[Any, ...] = ()

    def run(self) -> None:
        run(self.library, self.kernel, self.work, self.elements)


class Stages:
    """Stages to be run again and again, one after the other on threads that are woken once.

    Their works keep their addresses. Before every run what kernels have counted in them is put back to 0. Threads are
    at most as many as torch uses now: memory was laid out for these.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._stages = tuple(stages)
        links = (_Stage * len(self._stages))(
            *[_Stage(address(stage.library, stage.kernel), ctypes.addressof(stage.work)) for stage in self._stages]
        )
        counting = (*(stage.work for stage in self._stages), *links)
        found = [_Counter(*c) for work in counting for c in _counters(type(work), ctypes.addressof(work))]
        counters = (_Counter * len(found))(*found)
        self._work = _Sequence(ctypes.addressof(links), len(links), ctypes.addressof(counters), len(counters))
        self._keep = links, counters
        self._threads = torch.get_num_threads()
        self._clear, self._elements = _kernel("sequence", "clear")[0], sum(stage.elements for stage in self._stages)

    def run(self) -> None:
        self._clear(ctypes.byref(self._work))
        run("sequence", "sequence", self._work, self._elements, self._threads)


def _counters(kind: type[ctypes.Structure], place: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the fields that kernels count in, of a structure at `place`."""
    for name, inner, *_ in kind._fields_:
        field = getattr(kind, name)
        if name in COUNTERS:
            yield place + field.offset, field.size
        elif issubclass(inner, ctypes.Structure):
            yield from _counters(inner, place + field.offset)


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc keep what tensors of up to 32 MB leave behind for the next ones.

    It gives blocks back to the system, whose new pages have to be mapped and cleared in every step, until it has seen
    one as large freed (mallopt(3), M_MMAP_THRESHOLD): this one, whose pages are never touched. From then on it returns
    what lies at the end of its memory beyond 64 MB. Elsewhere nothing happens.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def scratch(size: int, *, own: bool = False) -> torch.Tensor:
    """At least `size` bytes for one call of a kernel; the next call in this thread may get the same.

    What is allocated anew in every step comes from the system in pages that have to be cleared.

    Args:
        own: memory that nobody else gets, for a kernel that is run again and again.
    """
    memory: torch.Tensor | None = None if own else getattr(_own, "memory", None)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
        if own:
            return memory
        if size <= MOST_KEPT:
            _own.memory = memory
    return memory


def lines(size: int) -> int:
    """Bytes in whole lines."""
    return -(-size // LINE) * LINE


def address(name: str, kernel: str) -> int:
    """Where the function `kernel` of csrc/`name`.c is, for other kernels to call."""
    found = _kernel(name, kernel)[1].value
    assert found is not None  # a function that was found is somewhere
    return found


@functools.cache
def _kernel(name: str, kernel: str) -> tuple[Any, ctypes.c_void_p]:
    """The function and its address."""
    function = getattr(library(name), kernel)
    return function, ctypes.cast(function, ctypes.c_void_p)


@functools.cache
def _torch_threads() -> Any:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP runtime that torch has loaded, or None."""
    try:
        team = ctypes.CDLL(None).GOMP_parallel
        team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        return team
    except (AttributeError, OSError, TypeError):  # another runtime, or a system without a global namespace
        return None


def is_plain(x: torch.Tensor) -> bool:
    """True where a kernel can be given the address of x: contiguous float32 on a CPU, of torch's own types."""
    is_torchs = type(x) in (torch.Tensor, torch.nn.Parameter)
    is_float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_torchs and is_float32 and x.is_contiguous() and not x.is_neg()


def pointer(x: torch.Tensor | None) -> int | None:
    """The address of x; NULL for None."""
    return None if x is None else x.data_ptr()


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


def _compile(compiler: str, flags: Sequence[str], source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # into a file of its own, then renamed: two runs may compile at the same time
        handle, scratch = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {target.parent} ({error}): set IDE_SNN_CACHE to a folder") from error
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", scratch], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed on {source.name}: {done.stderr.strip()[-500:]}")
        os.replace(scratch, target)
        log.info("compiled %s to %s", source.name, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
