"""One writer to a folder of a run, and a run that goes on elsewhere: on the same data, with its versions recorded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from test_training_resume import tiny

from ide_snn.checkpoint import CheckpointError
from ide_snn.files import FolderInUseError, sole_writer
from ide_snn.reporting import record_versions
from ide_snn.reproduce import attempt
from ide_snn.resuming import data_differences
from ide_snn.run import evaluate_checkpoint, train
from ide_snn.schemas import EvaluateConfig

HOLD = """
import pathlib, sys, time
from ide_snn.files import sole_writer
with sole_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    before = files(tmp_path)
    for resume in ("none", "auto"):
        with pytest.raises(FolderInUseError, match=r"another process is training in .* wait for it or stop it"):
            train(tiny(f"resume={resume}"), tmp_path)
    assert "another process is training" in str(attempt(tiny(), tmp_path).error)  # and writes no failure.json there
    assert files(tmp_path) == before
    other_process.kill()
    other_process.wait()
    assert train(tiny("trainer.epochs=1"), tmp_path).epochs == 1  # the lock ended with the process


def test_a_writer_may_ask_again(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "new"), sole_writer(tmp_path / "new"):
        pass
    with sole_writer(tmp_path / "new"):
        pass


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("title", "Fashion-MNIST", "title: Fashion-MNIST -> digits"),
        ("train_samples", 60000, "train_samples: 60000 -> 200"),
        ("class_names", list("9876543210"), "class_names: .*'9'.* -> .*'0'"),
        ("mean", [0.5], "mean: "),
    ],
)
def test_a_run_is_not_resumed_on_other_data(tmp_path: Path, key: str, value: object, match: str) -> None:
    train(tiny("trainer.epochs=1", "schedule=step"), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    content["data"][key] = value
    torch.save(content, path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=rf"other data, so it cannot be resumed: {match}.*set data_dir"):
        train(tiny("resume=auto", "schedule=step", "trainer.epochs=2"), tmp_path)
    assert files(tmp_path) == before
    del content["data"][key]  # as a version that did not record it
    torch.save(content, path)
    assert train(tiny("resume=auto", "schedule=step", "trainer.epochs=2"), tmp_path).epochs == 2


def test_statistics_of_another_machine_may_differ_by_rounding() -> None:
    old = {"mean": [0.1234567, 0.5], "title": "a", "gone": 1}
    assert data_differences(old, {"mean": (0.12345671, 0.5), "title": "a", "new": 2}) == []
    assert data_differences(old, {"mean": (0.1235, 0.5)}) == ["mean: [0.1234567, 0.5] -> (0.1235, 0.5)"]


def evaluation(checkpoint: Path) -> EvaluateConfig:
    return EvaluateConfig(str(checkpoint), time_steps=None, data_dir=None, batch_size=None, device="cpu", output=None)


def test_evaluation_is_on_the_data_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny("trainer.epochs=1"), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    expected = evaluate_checkpoint(evaluation(path))
    content = torch.load(path, weights_only=True)
    content["data"]["title"] = "other digits"
    torch.save(content, path)
    with caplog.at_level(logging.WARNING, "ide_snn"):
        assert evaluate_checkpoint(evaluation(path))["loss"] == expected["loss"]
    assert "trained on other digits, evaluated on digits" in caplog.text
    content["data"]["mean"] = [3.0]  # of the images that it was trained on
    torch.save(content, path)
    assert evaluate_checkpoint(evaluation(path))["loss"] != expected["loss"]
    content["data"]["class_names"] = ["zero", *map(str, range(1, 10))]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"trained on the classes zero, 1, .* but the data have 0, 1, .*data_dir"):
        evaluate_checkpoint(evaluation(path))


def test_versions_of_earlier_parts_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny("trainer.epochs=1", "schedule=step"), tmp_path)
    path = tmp_path / "versions.json"
    now = json.loads(path.read_text())
    assert "earlier" not in now
    before = {**now, "torch": "1.0"}
    path.write_text(json.dumps(before))
    train(tiny("resume=auto", "schedule=step", "trainer.epochs=2"), tmp_path)
    assert json.loads(path.read_text()) == {**now, "earlier": [before]}
    record_versions(path, {**now, "threads": 99})
    assert json.loads(path.read_text())["earlier"] == [before, now]
    path.write_text("{")
    record_versions(path, now)
    assert json.loads(path.read_text()) == now
    assert "versions.json is damaged" in caplog.text
