"""The table of results for papers and plots: a row per line, as CSV and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ide_snn.report.lines import Line, Spread
from ide_snn.report.runs_table import csv_text
from ide_snn.report.tables import COLUMNS, notes

__all__ = ["results_csv", "results_latex"]

TITLES = (
    *("Data", "Network", "Neuron", "T"),
    *("Paper: mean ± std (best)", "Ours: best epoch", "Ours: last epoch", "Seeds", "Failed solves"),
)
PRINTED = tuple(column for column in COLUMNS if column.title in TITLES)
# what LaTeX takes for a command, and characters that its usual fonts lack
LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "[": "{[}",  # after the end of a row, that and the star would be arguments of it
    "*": "{*}",
}


def results_csv(lines: Sequence[Line]) -> str:
    """All lines that were run; accuracies are fractions, `std` is the sample standard deviation over the seeds.

    A single seed has none. `epochs` and `planned_epochs` are the smallest of the runs.
    """
    return csv_text([_row(line) for line in lines if line.runs])


def _row(line: Line) -> dict[str, Any]:
    cells = {column.title: column.text(line) for column in PRINTED}
    row: dict[str, Any] = {
        "line": line.label,
        **{name.lower(): cells[name] for name in ("Data", "Network", "Neuron")},
        "time_steps": line.time_steps,
        "seeds": len(line.runs),
        "epochs": min(run.epochs for run in line.runs),
        "planned_epochs": min(run.planned_epochs for run in line.runs),
        "as_in_paper": str(line.as_in_paper).lower(),
    }
    for name, value in (("best", line.best), ("last", line.last)):
        row |= _spread(f"test_accuracy_{name}", value)
    paper = line.paper if line.comparable else None
    return {
        **row,
        "paper_test_accuracy_mean": None if paper is None else round(paper.mean / 100, 6),
        "paper_test_accuracy_std": None if paper is None else round(paper.std / 100, 6),
        "notes": notes(line),
    }


def _spread(name: str, value: Spread | None) -> dict[str, float | None]:
    return {f"{name}_mean": None if value is None else value.mean, f"{name}_std": None if value is None else value.std}


def results_latex(lines: Sequence[Line]) -> str:
    r"""A `tabular` of all lines that were run, for \input; it needs the package booktabs.

    What is not as in the paper is said below the table, a letter for each of these texts.
    """
    letters: dict[str, str] = {}
    rows = []
    for line in lines:
        if not line.runs:
            continue
        cells = [_escape(column.text(line)) for column in PRINTED]
        if text := notes(line):
            cells[0] += rf"\textsuperscript{{{letters.setdefault(text, _letter(len(letters)))}}}"
        rows.append(cells)
    align = "".join("r" if column.numeric else "l" for column in PRINTED)
    head = [_escape(column.title) for column in PRINTED]
    body = [rf"{' & '.join(cells)} \\" for cells in rows]
    below = [rf"\par\noindent\textsuperscript{{{letter}}} {_escape(text)}" for text, letter in letters.items()]
    beyond_latin_1 = any(ord(character) > 255 for character in "".join([*body, *below]))
    return "\n".join(
        [
            r"% \usepackage{booktabs}; test accuracy in %, mean and sample standard deviation over the seeds",
            *(["% some characters need lualatex or xelatex"] if beyond_latin_1 else []),
            rf"\begin{{tabular}}{{@{{}}{align}@{{}}}}",
            r"\toprule",
            rf"{' & '.join(head)} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *([r"{\footnotesize", *below, r"\par}"] if below else []),
            "",
        ]
    )


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    first = "" if number < 26 else _letter(number // 26 - 1)
    return first + chr(ord("a") + number % 26)


def _escape(text: str) -> str:
    """On one line: an empty one would begin a paragraph."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
