"""Run folders as training leaves them, with numbers of one's choice; for the tests of the report."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ide_snn.config import load_config, to_yaml
from ide_snn.schemas import Config

VERSIONS = {
    "ide_snn": "0.1.0",
    "git_commit": "0123456789abcdef",
    "git_modified": True,
    "device": "x86_64",
    "cuda": None,
}


@functools.cache
def composed(*overrides: str) -> Config:
    return load_config(overrides)


def write_run(
    folder: Path,
    *overrides: str,
    seed: int = 0,
    accuracies: Sequence[float],
    finished: bool = True,
    steps: int = 469,
    **result: Any,
) -> Path:
    """A run with these test accuracies, one per epoch; `result` adds to result.json."""
    config = replace(composed(*overrides), seed=seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "versions.json").write_text(json.dumps(VERSIONS))
    rows = [
        {
            "epoch": number,
            "step": steps * number,
            "train_loss": 1.0 / number,
            "train_accuracy": accuracy,
            "test_loss": 2.0 / number,
            "test_accuracy": accuracy,
            "firing_rate_population_1": 0.1,
            "firing_rate_population_2": 0.3,
            "solver_failures": 1,
            "seconds": 60.0 * number,
        }
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        content = {
            "test_accuracy_last": accuracies[-1],
            "test_accuracy_best": max(accuracies),
            "best_selected_on": "test",
            "epochs": len(accuracies),
            "parameters": 1234,
            "neurons": 56,
            "solves": steps * len(accuracies),
            "seed": seed,
        }
        (folder / "result.json").write_text(json.dumps({**content, **result}))
    return folder


def rising(best: float, last: float, epochs: int = 100) -> list[float]:
    """Accuracies of so many epochs with this best and this last value."""
    return [best - 0.1] * (epochs - 2) + [best, last]
