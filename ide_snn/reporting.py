"""What a run leaves behind besides checkpoints: metrics.csv, result.json, TensorBoard, versions.json."""

from __future__ import annotations

import csv
import io
import json
import logging
import platform
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ide_snn
from ide_snn.checkpoint import write_atomically

__all__ = ["RunLog", "record_versions", "versions", "warnings_and_errors_in_log_files", "write_csv", "write_json"]

log = logging.getLogger(__name__)

Row = Mapping[str, float | int | None]


@contextmanager
def warnings_and_errors_in_log_files() -> Iterator[None]:
    """What Python's warnings and the exception that ends this scope say also goes to the log's files.

    On the terminal they are shown by others.
    """
    show = warnings.showwarning

    def show_and_keep(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        show(message, category, *place, **options)
        _to_files(logging.WARNING, f"{category.__name__}: {message}")

    warnings.showwarning = show_and_keep
    try:
        yield
    except Exception as error:
        _to_files(logging.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        warnings.showwarning = show


def _to_files(level: int, text: str) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, level, __file__, 0, text, (), None))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row. The whole file is written each time, so a resumed run has no row twice."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def versions(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    on_gpu = device.type == "cuda"
    return {
        "ide_snn": ide_snn.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_modified": bool(changes) if (changes := _git("status", "--porcelain")) is not None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
    }


def record_versions(path: Path, now: Mapping[str, Any], *, resumed: bool) -> None:
    """Writes versions.json: those of now and, under `earlier`, others that parts of a resumed run had, oldest first."""
    earlier: list[Mapping[str, Any]] = []
    if resumed and path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [dict(one) for one in (*before.pop("earlier", ()), before)]
        except (ValueError, AttributeError, TypeError) as error:
            log.warning("%s is damaged (%s): what it said of the run's earlier parts is lost", path, error)
    earlier = [one for one in earlier if one != now]
    write_json(path, {**now, "earlier": earlier} if earlier else now)


def _git(*command: str) -> str | None:
    """Output of a git command in the clone the package was installed from, None where there is none."""
    root = Path(ide_snn.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class RunLog:
    """TensorBoard scalars over optimiser steps and metrics.csv, in one folder; does nothing without a folder.

    `purge_step`: a resumed run repeats the steps from there on, so TensorBoard hides what it has of them.
    """

    def __init__(self, folder: Path | None, purge_step: int | None) -> None:
        self.folder = folder
        self._writer: Any = None
        if folder is not None:
            # importing TensorBoard takes a second or two, which only training has to pay
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def scalars(self, values: Row, step: int) -> None:
        for key, value in values.items():
            if self._writer is not None and value is not None:
                self._writer.add_scalar(_tag(key), value, step)

    def epoch(self, rows: Sequence[Row], step: int) -> None:
        """Write what the last of `rows` says."""
        if self.folder is not None:
            write_csv(self.folder / "metrics.csv", rows)
            self.scalars(rows[-1], step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tag(key: str) -> str:
    """train_loss -> train/loss, so that TensorBoard groups the curves."""
    for group in ("train", "test", "validation", "solver", "gradient", "firing_rate", "feedback"):
        if key.startswith(f"{group}_"):
            return f"{group}/{key.removeprefix(f'{group}_')}"
    return f"run/{key}"
