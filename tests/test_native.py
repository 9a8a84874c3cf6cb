"""C kernels: compiled once, with reasons where they are not, on any threads."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys

import pytest

from ide_snn import native

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")


@pytest.fixture
def fresh_library(monkeypatch):
    monkeypatch.setattr(native, "library", native.library.__wrapped__)


@NEEDS_COMPILER
@pytest.mark.usefixtures("fresh_library")
def test_kernels_are_compiled_once_into_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path / "kernels"))
    native.library("krylov")
    (made,) = (tmp_path / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    native.library("krylov")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()] == [stamp]


@pytest.mark.usefixtures("fresh_library")
def test_reasons_name_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native.NativeUnavailable, match="named by CC was not found"):
        native.library("events")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.NativeUnavailable, match="failed on events"):
        native.library("events")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CC")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.NativeUnavailable, match="set IDE_SNN_CACHE"):
        native.library("events")


@NEEDS_COMPILER
@pytest.mark.parametrize("name", [source.stem for source in native.SOURCES.glob("*.c")])
@pytest.mark.usefixtures("fresh_library")
def test_every_kernel_compiles_without_a_warning(name: str, tmp_path, monkeypatch) -> None:
    """The other tests of this file are skipped where kernels do not compile."""
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-sign-compare"))
    native.library(name)


@NEEDS_COMPILER
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
def test_freed_memory_of_tensors_is_used_again() -> None:
    program = """
import resource, torch
from ide_snn import native
native.library("elementwise")  # without it nearly every page is mapped anew in every round
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(8):
    before = faults()
    tensors = [torch.ones(2 << 20) for _ in range(3)]  # 8 MB each
    del tensors
print(faults() - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean)
    assert int(found.stdout) < 3 * (8 << 20) / resource.getpagesize() / 10
