"""Checkpoints: whole or not at all, safe to load, and never loaded into the wrong model."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ide_snn.checkpoint import (
    CheckpointError,
    alike,
    config_differences,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_atomically,
)


def save(path: Path, model: nn.Module) -> None:
    save_checkpoint(path, model, config={"a": {"b": 1}}, data={}, progress={"epoch": 2}, training={"x": [1.5]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "new" / "folder" / "last.pt"
    save(path, model)
    checkpoint = load_checkpoint(path)
    load_weights(other, checkpoint)
    assert torch.equal(other.weight, model.weight)
    assert (checkpoint.config, checkpoint.progress) == ({"a": {"b": 1}}, {"epoch": 2})
    assert checkpoint.training == {"x": [1.5]}
    content = torch.load(path, weights_only=True)
    assert content["format"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def look(file: Any) -> None:
        file.write(b"new")
        assert path.read_bytes() == b"old"

    write_atomically(path, look)
    assert path.read_bytes() == b"new"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_run_folder_is_answered_with_its_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder: .*of which it has none"):
        load_checkpoint(tmp_path)
    for name in ("best", "last"):
        save(tmp_path / "checkpoints" / f"{name}.pt", nn.Linear(3, 2))
    best, last = (re.escape(str(tmp_path / "checkpoints" / f"{name}.pt")) for name in ("best", "last"))
    with pytest.raises(CheckpointError, match=f"is a folder: give one of its checkpoints, {best}, {last}$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such file"),
        (b"", "damaged or truncated"),
        (b"weights: 3", "damaged or truncated"),
        ("truncated", "damaged or truncated"),
        ({"state_dict": {}}, "lacks .*format"),
        ([1, 2], "not a checkpoint"),
        ({"format": 9, "config": {}, "data": {}, "model": {}, "progress": {}, "training": None}, "format 9"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "file.pt"
    if content == "truncated":
        save(path, nn.Linear(3, 2))
        path.write_bytes(path.read_bytes()[:-700])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_loading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Evil()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError):
            load_checkpoint(name)
    assert not Path("executed").exists()


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save(path, nn.Linear(3, 2))
    wide, deep = nn.Linear(4, 2), nn.Sequential(nn.Linear(3, 2))
    before = wide.weight.clone()
    with pytest.raises(CheckpointError, match=r"another model: weight has shape \(2, 3\), the model's \(2, 4\)"):
        load_weights(wide, load_checkpoint(path))
    assert torch.equal(wide.weight, before)
    with pytest.raises(CheckpointError, match=r"lacks 0.weight.* 1 more"):
        load_weights(deep, load_checkpoint(path))


def test_differences_name_the_key_and_both_values() -> None:
    old = {"seed": 0, "solver": {"name": "gmres", "tol": 1e-3}, "device": "cpu", "gone": 1}
    new = {"seed": 0, "solver": {"name": "gmres", "tol": 1e-4}, "device": "cuda", "extra": None}
    assert config_differences(old, new, ignore=("device",)) == [
        "solver.tol: 0.001 -> 0.0001",
        "gone: 1 -> (unset)",
        "extra: (unset) -> None",
    ]
    assert config_differences(old, old) == []


NAN = float("nan")


@pytest.mark.parametrize(
    ("first", "second", "rel_tol", "expected"),
    [
        (1.0, 1.0 + 1e-7, 0.0, False),
        (1.0, 1.0 + 1e-7, 1e-6, True),
        (1.0, 1.0 + 1e-5, 1e-6, False),
        (1, 1.0 + 1e-7, 1e-6, True),
        (1, 1.0, 0.0, True),
        (20240101, 20240102, 1e-6, False),
        (2**53, 2**53 + 1, 0.0, False),
        (10**400, 10**400, 0.0, True),
        (NAN, NAN, 0.0, True),
        (NAN, 1.0, 1e-6, False),
        ([1.0, {"x": NAN}], [1.0 + 1e-7, {"x": NAN}], 1e-6, True),
        ([1.0, {"x": 2.0}], [1.0, {"x": 2.0 + 1e-7}], 0.0, False),
        ([1.0], (1.0,), 0.0, True),
        ([1.0], [1.0, 2.0], 0.0, False),
        ({"x": 1}, {"y": 1}, 0.0, False),
        ("a", "a", 0.0, True),
        ("1", 1, 0.0, False),
        (None, 0, 0.0, False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0, True),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-6]), 1e-5, True),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-6]), 0.0, False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), 0.0, False),
        (torch.ones(2), torch.ones(1), 0.0, False),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0, True),
        (torch.tensor([True]), torch.tensor([False]), 0.0, False),
        (torch.ones(2), [1.0, 1.0], 0.0, False),
        ([1.0, 1.0], torch.ones(2), 0.0, False),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), 0.0, True),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse(), 0.0, False),
        ({"m": [torch.ones(1)]}, {"m": [torch.ones(1) + 1e-6]}, 1e-5, True),
    ],
)
def test_what_says_the_same(first: Any, second: Any, rel_tol: float, expected: bool) -> None:
    assert alike(first, second, rel_tol) is expected
    assert alike(second, first, rel_tol) is expected
