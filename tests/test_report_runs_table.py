"""runs.csv: one row per run, with the options in which runs differ."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from run_folders import rising, write_run

from ide_snn.report import collect, lines, write_report
from ide_snn.report.runs_table import to_csv

FASHION = "experiment=fashion_mnist_f400_if"


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_row_per_run_with_what_was_measured(tmp_path: Path) -> None:
    for seed in (3, 4):
        write_run(tmp_path / f"s{seed}", FASHION, seed=seed, accuracies=rising(0.9 + seed / 1000, 0.89))
    first, second = rows_of(to_csv(lines(collect(tmp_path).runs)))
    assert first == {
        "line": "fashion_mnist_f400_if",
        "folder": str(tmp_path / "s3"),
        "counted": "true",
        "finished": "true",
        "seed": "3",
        "epochs": "100",
        "best_epoch": "99",
        "test_accuracy_best": "0.903",
        "test_accuracy_last": "0.89",
        "test_loss_last": "0.02",
        "train_loss_last": "0.01",
        "paper_test_accuracy_mean": "0.9004",
        "seconds": "6000.0",
        "firing_rate": "0.2",
        "solver_failures": "100",
        "solves": "46900",
        "parameters": "1234",
        "neurons": "56",
    }
    assert (second["seed"], second["test_accuracy_best"]) == ("4", "0.904")


def test_columns_for_the_options_in_which_runs_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "gmres", "solver.tol=0.01", accuracies=[0.5])
    write_run(tmp_path / "anderson", "solver=anderson", "schedule=step", "schedule.milestones=[3,5]", accuracies=[0.6])
    write_run(tmp_path / "clip", "trainer.gradient_clip=1.5", "dataset.crop_padding=0", accuracies=[0.7])
    rows = {Path(row["folder"]).name: row for row in rows_of(to_csv(lines(collect(tmp_path).runs)))}
    assert [rows[name]["solver.name"] for name in ("gmres", "anderson", "clip")] == ["gmres", "anderson", "gmres"]
    assert rows["gmres"]["solver.tol"] == "0.01"
    assert rows["anderson"]["schedule.milestones"] == "[3,5]"
    assert rows["gmres"]["trainer.gradient_clip"] == ""
    assert rows["clip"]["trainer.gradient_clip"] == "1.5"
    assert rows["gmres"]["solver.memory"] == "", "GMRES has no such option"
    assert rows["anderson"]["solver.memory"] != ""
    assert "dataset.crop_padding" not in rows["clip"], "the same in all of them"
    assert rows["clip"]["paper_test_accuracy_mean"] == ""


def test_repeated_and_unfinished_runs_are_there_and_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", FASHION, accuracies=rising(0.9, 0.89))
    write_run(tmp_path / "b", FASHION, accuracies=rising(0.9, 0.89))
    write_run(tmp_path / "c", FASHION, accuracies=[0.3, 0.4], finished=False)
    rows = {Path(row["folder"]).name: row for row in rows_of(to_csv(lines(collect(tmp_path).runs)))}
    assert {name: row["counted"] for name, row in rows.items()} == {"a": "true", "b": "false", "c": "true"}
    assert {name: row["finished"] for name, row in rows.items()} == {"a": "true", "b": "true", "c": "false"}
    assert rows["c"]["neurons"] == "", "known once a run is finished"


@pytest.mark.parametrize("label", ["with, comma", 'with "quotes"'])
def test_the_file_is_written_beside_the_report(tmp_path: Path, label: str) -> None:
    write_run(tmp_path / "runs", f"name='{label}'", accuracies=[0.5])
    page = write_report(tmp_path, tmp_path / "out", figures=False)
    (row,) = rows_of((page.parent / "runs.csv").read_text(encoding="utf-8"))
    assert row["line"] == label


def test_no_readable_run_gives_an_empty_table(tmp_path: Path) -> None:
    broken = write_run(tmp_path / "broken", accuracies=[0.5])
    (broken / "metrics.csv").unlink()
    page = write_report(tmp_path, tmp_path / "out", figures=False)
    assert rows_of((page.parent / "runs.csv").read_text()) == []
