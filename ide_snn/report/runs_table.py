"""One row per run, as CSV: for comparisons and plots of your own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ide_snn.checkpoint import flatten
from ide_snn.report.collect import Run
from ide_snn.report.lines import UNSET, Line

__all__ = ["csv_text", "to_csv"]


def to_csv(lines: Sequence[Line]) -> str:
    """All runs of `lines`, repeated ones too; accuracies are fractions, times seconds.

    Behind what was measured follow the options, by their names on the command line, in which any two of the runs
    differ: numbers and words as they are, lists as JSON, empty where null or where a run has no such option.
    """
    runs = [(line, run) for line in lines for run in (*line.runs, *line.repeated)]
    options = [{key: _cell(value) for key, value in flatten(run.config).items()} for _, run in runs]
    known = dict.fromkeys(key for own in options for key in own if key != "seed")
    keys = [key for key in known if _differs(key, options)]
    rows = [
        {**_measured(line, run), **{key: own.get(key) for key in keys}}
        for (line, run), own in zip(runs, options, strict=True)
    ]
    return csv_text(rows)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns, the first line their names; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _differs(key: str, options: Sequence[Mapping[str, Any]]) -> bool:
    return len({own.get(key, UNSET) for own in options}) > 1


def _measured(line: Line, run: Run) -> dict[str, Any]:
    result = run.result or {}
    return {
        "line": line.label,
        "folder": str(run.folder),
        "counted": _cell(run in line.runs),
        "finished": _cell(run.finished),
        "seed": run.seed,
        "epochs": run.epochs,
        "best_epoch": int(run.best_row["epoch"] or 0),
        "test_accuracy_best": run.best,
        "test_accuracy_last": run.last,
        "test_loss_last": run.rows[-1].get("test_loss"),
        "train_loss_last": run.rows[-1].get("train_loss"),
        "paper_test_accuracy_mean": round(line.paper.mean / 100, 6) if line.paper and line.comparable else None,
        "seconds": run.seconds,
        "firing_rate": run.firing_rate,
        "solver_failures": run.failed_solves,
        "solves": run.solves,
        "parameters": result.get("parameters"),
        "neurons": result.get("neurons"),
    }


def _cell(value: Any) -> Any:
    """As the command line takes it: true, [1,2]; null is an empty cell."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, (bool, list)) else value
