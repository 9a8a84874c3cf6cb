"""One writer to a folder of a run, and a run that goes on elsewhere: on the same data, with its versions recorded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from test_training_resume import at_batch, tiny
from torch import nn

from ide_snn.checkpoint import Checkpoint, CheckpointError
from ide_snn.config import config_from_dict, config_to_dict, load_config
from ide_snn.data import DeviceLoader, load_dataset
from ide_snn.data_record import as_in_training, data_differences, data_section
from ide_snn.files import FolderInUseError, sole_writer
from ide_snn.reporting import record_versions
from ide_snn.reproduce import attempt
from ide_snn.run import evaluate_checkpoint, train
from ide_snn.schemas import EvaluateConfig
from ide_snn.training import FitResult, fit

__all__ = ["at_batch"]  # a fixture

AtBatch = Callable[[int, Callable[[], None]], None]

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
    (tmp_path / "failure.json").write_text("of the other process")
    before = files(tmp_path)
    for resume in ("none", "auto"):
        with pytest.raises(FolderInUseError, match=r"another process is training in .* wait for it or stop it"):
            train(tiny(f"resume={resume}"), tmp_path)
    with pytest.raises(FolderInUseError):
        fit_linear(tmp_path)
    assert "another process is training" in str(attempt(tiny(), tmp_path).error)
    assert files(tmp_path) == before
    other_process.kill()
    other_process.wait()
    assert train(tiny("trainer.epochs=1"), tmp_path).epochs == 1  # the lock ended with the process


def fit_linear(run_dir: Path, **options: object) -> FitResult:
    """A training loop of one's own."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = load_dataset("digits")
    loader = DeviceLoader(data.test, batch_size=60, normalization=data.normalization, shuffle=False, seed=0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    return fit(net, loader, loader, optimizer=sgd, epochs=1, run_dir=run_dir, progress=False, **options)  # type: ignore[arg-type]


FORKS = """
import os, pathlib, sys, time
from ide_snn.files import sole_writer
folder = pathlib.Path(sys.argv[1])
with sole_writer(folder):
    os.fork() or time.sleep(600)  # the child is such as a worker that loads data
    print("held", flush=True)
    sys.stdin.readline()
with sole_writer(folder):
    print("again", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_processes_that_a_writer_forks_hold_nothing(tmp_path: Path) -> None:
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", FORKS, str(tmp_path)]
    with subprocess.Popen(command, text=True, cwd=PROJECT, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(FolderInUseError), sole_writer(tmp_path):
                pass
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "again\n"  # with the child alive
            process.kill()
            process.wait()
            with sole_writer(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_writer_may_ask_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("a user's")
    for _ in range(2):
        with sole_writer(tmp_path), sole_writer(tmp_path):
            pass
    assert (tmp_path / ".lock").read_text() == "a user's"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("title", "Fashion-MNIST", "title: Fashion-MNIST -> digits"),
        ("train_samples", 60000, "train_samples: 60000 -> 200"),
        ("class_names", list("9876543210"), "class_names: .*'9'.* -> .*'0'"),
        ("mean", [0.5], "mean: "),
        ("digest", "0", "digest: 0 -> "),
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
    assert not caplog.records
    content["data"]["digest"] = "0"
    torch.save(content, path)
    with caplog.at_level(logging.WARNING, "ide_snn"):
        evaluate_checkpoint(evaluation(path))
    assert "digits has other images or labels than when this was trained" in caplog.text
    content["data"]["title"] = "other digits"
    torch.save(content, path)
    with caplog.at_level(logging.WARNING, "ide_snn"):
        assert evaluate_checkpoint(evaluation(path))["loss"] == expected["loss"]
    assert "trained on other digits, now on digits" in caplog.text
    content["data"]["mean"] = [3.0]  # of the images that it was trained on
    torch.save(content, path)
    assert evaluate_checkpoint(evaluation(path))["loss"] != expected["loss"]
    content["data"]["class_names"] = ["zero", *map(str, range(1, 10))]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"trained on the classes zero, 1, .* but the data have 0, 1, .*data_dir"):
        evaluate_checkpoint(evaluation(path))


def test_classes_of_imported_checkpoints_may_be_numbers(caplog: pytest.LogCaptureFixture) -> None:
    data = load_dataset("digits")
    named = dataclasses.replace(data, class_names=tuple("abcdefghij"))
    for names in (list("0123456789"), None):
        content = {} if names is None else {"class_names": names}
        checkpoint = Checkpoint(Path("a.pt"), {}, content, {}, {}, None)
        caplog.clear()
        assert as_in_training(named, checkpoint).class_names == named.class_names
        assert ("numbers for names: taken to be, in order, a, b," in caplog.text) is (names is not None)


def test_the_digest_is_of_all_parts() -> None:
    data = load_dataset("digits", validation_size=100)
    assert data.validation is not None
    found = {data_section(data)["digest"], data_section(load_dataset("digits", validation_size=100))["digest"]}
    assert len(found) == 1
    for part in ("train", "test", "validation"):
        split = getattr(data, part)
        for field in ("images", "labels"):
            changed = getattr(split, field).clone()
            changed[-1] = 1 - changed[-1].clamp(max=1)
            other = dataclasses.replace(data, **{part: dataclasses.replace(split, **{field: changed})})
            found.add(data_section(other)["digest"])
    assert len(found) == 7


def test_versions_of_earlier_parts_are_kept(tmp_path: Path, at_batch: AtBatch) -> None:
    options = ("trainer.epochs=1", "schedule=step")
    train(tiny(*options), tmp_path)
    path = tmp_path / "versions.json"
    now = json.loads(path.read_text())
    assert "earlier" not in now
    before = {**now, "torch": "1.0"}
    path.write_text(json.dumps(before))

    def power_cut() -> None:
        raise MemoryError

    at_batch(2, power_cut)
    with pytest.raises(MemoryError):
        train(tiny("resume=auto", "schedule=step", "trainer.epochs=2"), tmp_path)
    assert json.loads(path.read_text()) == {**now, "earlier": [before]}
    assert "epochs: 2" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "checkpoints" / "last.pt").unlink()
    train(tiny("resume=auto", *options), tmp_path)  # anew: nothing of what was before is in it
    assert json.loads(path.read_text()) == now


@pytest.mark.parametrize("content", ["{", "[]", '{"earlier": null}', '{"earlier": [1]}'])
def test_damaged_versions_are_said_and_lost(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "versions.json"
    path.write_text(content)
    record_versions(path, {"torch": "2"}, resumed=True)
    assert json.loads(path.read_text()) == {"torch": "2"}
    assert "versions.json is damaged" in caplog.text


def test_a_checkpoint_that_named_a_switch_as_its_cache_is_read() -> None:
    content = config_to_dict(load_config(["dataset=image_folder"]))
    for cache in ("False", "None"):
        content["dataset"]["cache"] = cache
        assert config_from_dict(content).dataset.cache == "auto"
    content["dataset"]["cache"] = "decoded"
    assert config_from_dict(content).dataset.cache == "decoded"
