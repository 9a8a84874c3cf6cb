"""Which golden files the tests read: those of GOLDEN_DIR, and the project's own of the kinds that it does not have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN_KINDS, OWN_GOLDEN, golden_files


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_a_folder_with_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = next(OWN_GOLDEN.glob(kind))
    own = tmp_path / kind.split("/")[0] / f"another {file.name}"
    own.parent.mkdir()
    shutil.copy(file, own)
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    assert golden_files(kind) == [own]
    for other in set(GOLDEN_KINDS) - {kind}:
        assert golden_files(other) == sorted(OWN_GOLDEN.glob(other)) != []


@pytest.mark.parametrize("value", ["", "missing", "."])
def test_no_golden_file_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOLDEN_DIR", value)
    with pytest.raises(RuntimeError, match="golden file"):
        golden_files(GOLDEN_KINDS[0])
