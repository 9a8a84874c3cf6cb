"""results.csv and results.tex: a row per line of the report."""

from __future__ import annotations

import csv
import io
import os
import statistics
from pathlib import Path

import pytest
from run_folders import rising, write_run

from ide_snn.report import collect, lines, write_report
from ide_snn.report.exports import results_csv, results_latex

FASHION = "experiment=fashion_mnist_f400_if"


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_row_per_line_with_mean_and_deviation(tmp_path: Path) -> None:
    best = [0.901, 0.904, 0.911]
    for seed, value in enumerate(best):
        write_run(tmp_path / f"s{seed}", FASHION, seed=seed, accuracies=rising(value, value - 0.01))
    write_run(tmp_path / "other", FASHION, "solver=anderson", accuracies=[0.5], finished=False)
    first, second = rows_of(results_csv(lines(collect(tmp_path).runs)))
    assert first["line"] == "fashion_mnist_f400_if"
    assert [first[name] for name in ("data", "network", "neuron", "time_steps", "seeds")] == [
        *("Fashion-MNIST", "F400", "IF", "5", "3")
    ]
    assert (first["epochs"], first["planned_epochs"], first["as_in_paper"]) == ("100", "100", "true")
    assert float(first["test_accuracy_best_mean"]) == pytest.approx(statistics.mean(best))
    assert float(first["test_accuracy_best_std"]) == pytest.approx(statistics.stdev(best))
    assert float(first["test_accuracy_last_mean"]) == pytest.approx(statistics.mean(best) - 0.01)
    assert (first["paper_test_accuracy_mean"], first["notes"]) == ("0.9004", "")
    assert (second["seeds"], second["test_accuracy_best_std"], second["as_in_paper"]) == ("1", "", "false")
    assert (second["epochs"], second["planned_epochs"]) == ("1", "100")
    assert "epoch 1 of 100" in second["notes"]


def test_a_table_for_latex(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", FASHION, seed=seed, accuracies=rising(0.9 + seed / 100, 0.89))
    write_run(tmp_path / "own", "dataset=digits", "name='50%_{of}_a & b^2'", accuracies=[0.5])
    table = results_latex(lines(collect(tmp_path).runs)).splitlines()
    first, last = table.index(r"\midrule") + 1, table.index(r"\bottomrule")
    assert table[first:last] == [
        r"Fashion-MNIST & F400 & IF & 5 & 90.04 $\pm$ 0.09 (90.14) & 90.50 $\pm$ 0.71 & 89.00 $\pm$ 0.00 & 0, 1 & "
        r"200 of 93,800 \\",
        r"digits\textsuperscript{a} & fc & LIF, leak 0.95 & 10 & -- & 50.00 & 50.00 & 0 & 1 of 469 \\",
    ]
    size, below, end = table[table.index(r"\end{tabular}") + 1 :]
    assert (size, end) == (r"{\footnotesize", r"\par}")
    assert below.startswith(r"\par\noindent\textsuperscript{a} 50\%\_\{of\}\_a \& b\textasciicircum{}2: not in")


def test_a_letter_for_every_text_and_one_text_for_many_lines(tmp_path: Path) -> None:
    for number in range(28):
        write_run(tmp_path / f"n{number}", "dataset=digits", f"name=own{number}", accuracies=[0.5])
    for model in ("if", "lif"):
        recipe = f"experiment=fashion_mnist_f400_{model}"
        write_run(tmp_path / model, recipe, "trainer.epochs=1", accuracies=[0.5])
    text = results_latex(lines(collect(tmp_path).runs))
    assert text.count(r"\textsuperscript{a}") == 3  # two lines share a text
    assert r"\textsuperscript{z}" in text
    assert text.count(r"\textsuperscript{ac}") == 2
    assert r"\textsuperscript{ad}" not in text


def test_what_latex_would_take_for_something_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", "dataset=digits", "name='[x] *'", accuracies=[0.5])
    (run / "failure.json").write_text('{"error": "first line\\n\\nthird line"}')
    text = results_latex(lines(collect(tmp_path).runs))
    assert "{[}x] {*}: not in" in text
    assert "lualatex" not in text
    assert "\n\n" not in text.rstrip()
    write_run(tmp_path / "two", "dataset=digits", "name='α → ≤'", accuracies=[0.5])
    assert text.splitlines()[0] == results_latex(lines(collect(tmp_path).runs)).splitlines()[0]
    assert "% some characters need lualatex" in results_latex(lines(collect(tmp_path).runs)).splitlines()[1]


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / os.fsdecode(b"\xff"), "dataset=digits", accuracies=[0.5])
    folder = write_report(tmp_path / "runs", tmp_path / "report", figures=False).parent
    assert r"\udcff" in (folder / "runs.csv").read_text(encoding="utf-8")


def test_they_lie_beside_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", FASHION, accuracies=[0.5])
    folder = write_report(tmp_path / "runs", tmp_path / "report", figures=False).parent
    (row,) = rows_of((folder / "results.csv").read_text(encoding="utf-8"))
    assert row["test_accuracy_last_mean"] == "0.5"
    assert r"\begin{tabular}" in (folder / "results.tex").read_text(encoding="utf-8")
