"""Shared by all tests: where the golden values and the optional data sets lie, and small helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
OWN_GOLDEN = PROJECT / "tests" / "golden"
GOLDEN_KINDS = ("equilibrium/*.npz", "spikingjelly/*.npz", "original_checkpoints/*.pth.tar")

# The tests' tensors are small: a second thread only waits, badly so on a busy machine.
torch.set_num_threads(1)


def golden_dir() -> Path:
    """GOLDEN_DIR, or the project's copy.

    Raises:
        RuntimeError: if GOLDEN_DIR is set but empty or not a folder; that must fail, not skip.
    """
    value = os.environ.get("GOLDEN_DIR")
    path = OWN_GOLDEN if value is None else Path(value)
    if value == "" or not path.is_dir():
        raise RuntimeError(f"GOLDEN_DIR={value!r} is not a folder with golden files")
    return path


def golden_files(pattern: str) -> list[Path]:
    """Every golden file that matches one of `GOLDEN_KINDS`; the project's own where GOLDEN_DIR has none of the kind.

    Raises:
        RuntimeError: if the folder has none of any kind.
    """
    assert pattern in GOLDEN_KINDS
    folder = golden_dir()
    if not any(any(folder.glob(kind)) for kind in GOLDEN_KINDS):
        raise RuntimeError(f"{folder} has no golden file: {', '.join(GOLDEN_KINDS)}")
    return sorted(folder.glob(pattern)) or sorted(OWN_GOLDEN.glob(pattern))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state and leaves the defaults as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
