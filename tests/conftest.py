"""Shared by all tests: where the golden values and the optional data sets lie, and small helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]

# The tests' tensors are small: a second thread only waits, badly so on a busy machine.
torch.set_num_threads(1)


def golden_dir() -> Path:
    """GOLDEN_DIR, or the project's copy.

    Raises:
        RuntimeError: if GOLDEN_DIR is set but empty or not a folder; that must fail, not skip.
    """
    value = os.environ.get("GOLDEN_DIR")
    path = PROJECT / "tests" / "golden" if value is None else Path(value)
    if value == "" or not path.is_dir():
        raise RuntimeError(f"GOLDEN_DIR={value!r} is not a folder with golden files")
    return path


def golden_files(pattern: str) -> list[Path]:
    """Every golden file that matches; none at all is an error.

    Raises:
        RuntimeError: if there is none.
    """
    files = sorted(golden_dir().glob(pattern))
    if not files:
        raise RuntimeError(f"no golden file matches {golden_dir() / pattern}")
    return files


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state and leaves the defaults as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
