"""A run stopped at any point and continued ends with the same weights, bit for bit, as one never stopped."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ide_snn import training_run
from ide_snn.checkpoint import CheckpointError, load_checkpoint
from ide_snn.config import load_config
from ide_snn.data import DeviceLoader
from ide_snn.interrupt import StopRequest
from ide_snn.run import train
from ide_snn.schemas import Config

TINY = [
    "model.hidden=16",
    "time_steps=3",
    "dataset.train_limit=200",
    "dataset.test_limit=60",
    "trainer.epochs=3",
    "trainer.threads=null",
    "trainer.progress=false",
    "device=cpu",
    "schedule.warmup_steps=9",
    "optimizer.lr=0.1",
]
STEPS = 7  # per epoch: 200 samples in batches of 32


def tiny(*overrides: str) -> Config:
    return load_config([*TINY, *overrides])


def final_state(run_dir: Path) -> dict[str, Any]:
    """Everything in last.pt that must not depend on interruptions."""
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    progress = dict(checkpoint.progress)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in progress.pop("rows")]
    progress.pop("seconds")
    assert checkpoint.training is not None
    return {"model": checkpoint.model, "training": checkpoint.training, "rows": rows, "progress": progress}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("reference")
    train(tiny(), run_dir)
    return final_state(run_dir)


class Killed(BaseException):
    """Stands for the death of the process: nothing is cleaned up or saved."""


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something when the n-th batch, counted over training and evaluation, is asked for."""
    original = DeviceLoader._batches
    actions: dict[int, Callable[[], None]] = {}
    count = 0

    def batches(self: DeviceLoader, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal count
        for batch in original(self, epoch, start):
            count += 1
            if count in actions:
                actions.pop(count)()
            yield batch

    monkeypatch.setattr(DeviceLoader, "_batches", batches)
    return lambda number, action: actions.__setitem__(count + number, action)


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


# batch 8 is the test set after the first epoch
@pytest.mark.parametrize("number", [1, 3, 7, 8, 9, 16, 17, 20])
def test_stopped_by_a_signal(
    tmp_path: Path,
    reference: dict[str, Any],
    at_batch: Callable[[int, Callable[[], None]], None],
    number: int,
) -> None:
    at_batch(number, terminate)
    result = train(tiny("resume=auto"), tmp_path)
    assert result.interrupted == signal.SIGTERM
    assert not (tmp_path / "result.json").exists()
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt").progress
    in_epoch = (number - 1) % 8 + 1
    assert (saved["epoch"], saved["batches"]) == ((number - 1) // 8, min(in_epoch, STEPS))
    torch.rand(5)  # a new process would not be in this random state
    finished = train(tiny("resume=auto"), tmp_path)
    assert finished.interrupted is None
    assert_same(final_state(tmp_path), reference)
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("number", [2, 8, 9, 12, 16])
def test_killed(
    tmp_path: Path,
    reference: dict[str, Any],
    at_batch: Callable[[int, Callable[[], None]], None],
    number: int,
) -> None:
    at_batch(number, kill)
    with pytest.raises(Killed):
        train(tiny(), tmp_path)
    train(tiny("resume=auto"), tmp_path)
    assert_same(final_state(tmp_path), reference)
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("calls", [1, 2, 4, 5])
def test_killed_while_saving(
    tmp_path: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Between best.pt and last.pt, and between last.pt and metrics.csv."""
    original = training_run.save_checkpoint
    count = 0

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        original(*args, **kwargs)
        count += 1
        if count == calls:
            raise Killed

    monkeypatch.setattr(training_run, "save_checkpoint", save)
    with pytest.raises(Killed):
        train(tiny(), tmp_path)
    monkeypatch.undo()
    result = train(tiny("resume=auto"), tmp_path)
    assert_same(final_state(tmp_path), reference)
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt").progress
    assert best["epoch"] == best["best_epoch"] == result.best_epoch


@pytest.mark.parametrize(
    "options", [["optimizer=adamw", "trainer.accumulation=3"], ["schedule=step", "dataset.validation_size=50"]]
)
def test_other_optimisers_and_schedules(
    tmp_path: Path, at_batch: Callable[[int, Callable[[], None]], None], options: list[str]
) -> None:
    train(tiny(*options), tmp_path / "whole")
    at_batch(4, terminate)
    assert train(tiny(*options), tmp_path / "parts").interrupted
    train(tiny(*options, "resume=auto"), tmp_path / "parts")
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """A test run in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_a_second_stop_request_is_immediate(
    tmp_path: Path, at_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_batch(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def enter() -> None:
        with StopRequest() as stop:
            assert stop.signum is None
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done == [True]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(tiny(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO, "ide_snn"):
        again = train(tiny("resume=auto"), tmp_path)
    assert again == dataclasses.replace(first, already_finished=True)
    assert "is finished" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for name in ("result.json", "metrics.csv"):
        (tmp_path / name).unlink()
        train(tiny("resume=auto"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(before[tmp_path / "result.json"])
    assert (tmp_path / "metrics.csv").read_bytes() == before[tmp_path / "metrics.csv"]


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny("trainer.epochs=0"), tmp_path)
    with pytest.raises(FileExistsError, match="resume=auto"):
        train(tiny("trainer.epochs=0"), tmp_path)


def test_without_a_checkpoint_resume_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ide_snn"):
        assert train(tiny("resume=auto", "trainer.epochs=1"), tmp_path).epochs == 1
    assert "starting anew" in caplog.text


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("optimizer.lr=0.2", "optimizer.lr: 0.1 -> 0.2"),
        ("solver=anderson", "solver.name: gmres -> anderson"),
        ("model.hidden=17", "model.hidden: 16 -> 17"),
        ("trainer.epochs=1", "trainer.epochs: 2 -> 1"),
        ("trainer.epochs=3", "trainer.epochs: 2 -> 3"),  # the cosine depends on it
    ],
)
def test_a_changed_configuration_is_refused(stopped_run: Path, override: str, match: str) -> None:
    before = {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=match) as caught:
        train(tiny("resume=auto", "trainer.epochs=2", override), stopped_run)
    assert "last.pt" in str(caught.value)
    assert {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped")
    train(tiny("trainer.epochs=2"), run_dir)
    return run_dir


def test_what_does_not_change_the_weights_may_change(
    tmp_path: Path, reference: dict[str, Any], at_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    at_batch(10, terminate)
    train(tiny(), tmp_path)
    train(tiny("resume=auto", "data_dir=/elsewhere", "device=auto", "trainer.log_every=1"), tmp_path)
    if not torch.cuda.is_available():
        assert_same(final_state(tmp_path), reference)


def test_the_number_of_threads_may_change(
    tmp_path: Path, reference: dict[str, Any], at_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    at_batch(10, terminate)
    train(tiny(), tmp_path)
    threads = torch.get_num_threads()
    train(tiny("resume=auto", f"trainer.threads={threads + 1}"), tmp_path)
    assert torch.get_num_threads() == threads, "the next run of a sweep has what it asks for"
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert [versions["threads"], *(one["threads"] for one in versions["earlier"])] == [threads + 1, threads]
    found = final_state(tmp_path)["model"]
    for name, value in reference["model"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


def test_a_run_of_a_version_with_fewer_options_can_be_resumed(
    tmp_path: Path, reference: dict[str, Any], at_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    at_batch(10, terminate)
    train(tiny(), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["trainer"]["label_smoothing"], content["config"]["dataset"]["flip"]
    torch.save(content, path)
    train(tiny("resume=auto"), tmp_path)
    assert_same(final_state(tmp_path), reference)


def test_a_run_can_be_made_longer_if_the_schedule_allows_it(tmp_path: Path) -> None:
    train(tiny("schedule=step", "trainer.epochs=3"), tmp_path / "whole")
    train(tiny("schedule=step", "trainer.epochs=1"), tmp_path / "parts")
    longer = train(tiny("schedule=step", "trainer.epochs=3", "resume=auto"), tmp_path / "parts")
    assert longer.epochs == 3
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["epochs"] == 3
    assert "epochs: 3" in (tmp_path / "parts" / "config.yaml").read_text()


def test_a_checkpoint_without_training_state_is_refused(tmp_path: Path) -> None:
    train(tiny("trainer.epochs=1"), tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "best.pt").replace(folder / "last.pt")
    with pytest.raises(CheckpointError, match="no training state"):
        train(tiny("trainer.epochs=1", "resume=auto"), tmp_path)
