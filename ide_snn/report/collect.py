"""Run folders, as training left them, into plain values; nothing is unpickled, and no folder can stop the others.

A run's folder holds config.yaml and metrics.csv; result.json once it is finished; versions.json; failure.json
where `scripts/reproduce.py` saw it fail.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ide_snn.config import ConfigError, config_from_dict, config_to_dict
from ide_snn.hydra_tools import read_config_file

__all__ = ["BrokenRunError", "Collection", "ReportError", "Run", "Unreadable", "collect", "read_json", "read_run"]

FILES = ("config.yaml", "metrics.csv", "result.json", "failure.json")
Row = Mapping[str, float | None]


class ReportError(ValueError):
    """There is nothing to report on."""


class BrokenRunError(ValueError):
    """A run's folder cannot be read; the message names the file."""


@dataclass(frozen=True)
class Run:
    """One run. Accuracies are fractions of the test set, times are seconds.

    Attributes:
        folder: where it lies.
        config: the resolved configuration, plain containers.
        rows: metrics.csv, one per epoch; never empty.
        result: result.json, None while there is none.
        versions: versions.json, None where there is none.
        failure: what stopped it, None where nothing is known to have.
        written: when metrics.csv was last written, UTC.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    result: Mapping[str, Any] | None
    versions: Mapping[str, Any] | None
    failure: str | None
    written: datetime

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def planned_epochs(self) -> int:
        return int(self.config["trainer"]["epochs"])

    @property
    def epochs(self) -> int:
        """Epochs completed."""
        return int(self.rows[-1]["epoch"] or 0)

    @property
    def finished(self) -> bool:
        """False while it runs, if it was cut off, and if it was finished once and is being continued."""
        return self.result is not None and self.epochs == self.result["epochs"] >= self.planned_epochs

    @property
    def last(self) -> float:
        """Test accuracy after the last epoch."""
        return self.rows[-1]["test_accuracy"] or 0.0

    @property
    def best_row(self) -> Row:
        """The first of the epochs with the highest accuracy, on the validation split where there is one."""
        key = "validation_accuracy" if "validation_accuracy" in self.rows[0] else "test_accuracy"
        return max(self.rows, key=lambda row: row[key] or 0.0)

    @property
    def best(self) -> float:
        """Test accuracy of the best epoch."""
        return self.best_row["test_accuracy"] or 0.0

    @property
    def seconds(self) -> float:
        return self.rows[-1]["seconds"] or 0.0

    @property
    def firing_rate(self) -> float | None:
        """Spikes per neuron and step on the test set after the last epoch, mean over the populations."""
        rates = [value for key, value in self.rows[-1].items() if key.startswith("firing_rate_") and value is not None]
        return sum(rates) / len(rates) if rates else None

    @property
    def failed_solves(self) -> int:
        return int(sum(row.get("solver_failures") or 0 for row in self.rows))

    @property
    def solves(self) -> int | None:
        """Solves in training, one per block and batch; known once the run is finished."""
        return None if self.result is None else self.result.get("solves")

    @property
    def dataset_title(self) -> str | None:
        """What the data called themselves, None where the run does not say."""
        return (self.result or {}).get("dataset_title") or self.config["dataset"].get("title")

    @property
    def data_digest(self) -> str | None:
        """Of all images and labels; None where the run does not say."""
        return (self.result or {}).get("data_digest")

    def samples(self, part: str) -> int | None:
        """Number of `part`, train or test, samples; None where the run does not say."""
        value = (self.result or {}).get(f"{part}_samples")
        return None if value is None else int(value)

    @property
    def train_samples_bounds(self) -> tuple[int, int] | None:
        """(least, most) training samples, from the optimiser steps of the first epoch; None after 0 epochs."""
        first, trainer = self.rows[0], self.config["trainer"]
        if first["epoch"] != 1 or not first.get("step"):
            return None
        steps, batch = int(first["step"] or 0), int(trainer["batch_size"])
        per_step = batch * int(trainer.get("accumulation", 1))
        most = steps * per_step + (batch - 1 if trainer.get("drop_last") else 0)
        return (steps - 1) * per_step + 1, most


@dataclass(frozen=True)
class Unreadable:
    """A folder that looks like a run but gives no numbers, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Collection:
    """All that was found below `root`."""

    root: Path
    runs: tuple[Run, ...]
    unreadable: tuple[Unreadable, ...]


def collect(root: str | Path) -> Collection:
    """Every run below `root`, `root` itself included, in the order of their paths; hidden folders are left out.

    Raises:
        ReportError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ReportError(f"runs={root}: there is no such folder")
    runs: list[Run] = []
    unreadable: list[Unreadable] = []
    for path, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if set(FILES) & set(files):
            try:
                runs.append(read_run(Path(path)))
            except BrokenRunError as error:
                unreadable.append(Unreadable(Path(path), str(error)))
    return Collection(root, tuple(runs), tuple(unreadable))


def read_run(folder: Path) -> Run:
    """One run.

    Raises:
        BrokenRunError: a file is missing, truncated or contradicts another one.
    """
    failure = read_json(folder / "failure.json")
    reason = None if failure is None else str(failure.get("error"))
    config_file, metrics_file = folder / "config.yaml", folder / "metrics.csv"
    for path in (config_file, metrics_file):
        if not path.is_file():
            raise BrokenRunError(f"failed: {reason}" if reason else f"there is no {path.name}")
    run = Run(
        folder,
        _read_config(config_file),
        _read_metrics(metrics_file),
        read_json(folder / "result.json"),
        read_json(folder / "versions.json"),
        reason,
        datetime.fromtimestamp(metrics_file.stat().st_mtime, timezone.utc),
    )
    _check(run)
    return run


def _read_config(path: Path) -> Mapping[str, Any]:
    """In the present form; as it stands where this version has no such options, and the lines will tell them."""
    try:
        content = read_config_file(path)
    except ConfigError as error:
        raise BrokenRunError(str(error)) from error
    try:
        return config_to_dict(config_from_dict(content))
    except ConfigError:
        return content


def _check(run: Run) -> None:
    """Refuse what would fail later, and a result.json that says something else than metrics.csv."""
    try:
        _ = run.seed, run.planned_epochs, run.config["trainer"]["batch_size"]
        for group in ("dataset", "model", "neuron"):
            _ = run.config[group]["name"]
        _ = run.config["neuron"]["leak"], run.config["time_steps"]
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenRunError(f"config.yaml is not that of a training run: {error!r}") from error
    if run.result is None:
        return
    for name, expected in (("test_accuracy_last", run.last), ("test_accuracy_best", run.best)):
        found = run.result.get(name)
        if not isinstance(found, (int, float)) or not isinstance(run.result.get("epochs"), int):
            raise BrokenRunError(f"result.json has no {name} or no epochs")
        if run.epochs == run.result["epochs"] and not math.isclose(found, expected, abs_tol=1e-9):
            raise BrokenRunError(f"result.json says {name} = {found}, metrics.csv {expected}")


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None where there is none.

    Raises:
        BrokenRunError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenRunError(f"{path.name} is damaged or truncated: {error}") from error
    if not isinstance(content, dict):
        raise BrokenRunError(f"{path.name} holds no named values")
    return content


def _read_metrics(path: Path) -> tuple[Row, ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except ValueError as error:
        raise BrokenRunError(f"{path.name} is not text: {error}") from error
    if len(lines) < 2:
        raise BrokenRunError(f"{path.name} holds no epoch")
    header = lines[0]
    for name in ("epoch", "test_accuracy", "seconds"):
        if name not in header:
            raise BrokenRunError(f"{path.name} has no column {name}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            values = [float(cell) if cell else None for cell in line]
            row = dict(zip(header, values, strict=True))
        except ValueError as error:
            raise BrokenRunError(f"line {number} of {path.name} is damaged or truncated") from error
        if row["epoch"] is None or row["test_accuracy"] is None:
            raise BrokenRunError(f"line {number} of {path.name} has no epoch or no accuracy")
        rows.append(row)
    return tuple(rows)
