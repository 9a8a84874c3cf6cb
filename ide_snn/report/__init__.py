"""From run folders to report.md, report.html, tables and figures: our runs beside the paper's results.

write_report("runs/paper", "report")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from ide_snn.files import write_atomically
from ide_snn.report.collect import Collection, ReportError, collect
from ide_snn.report.exports import results_csv, results_latex
from ide_snn.report.figures import learning_curves, overview
from ide_snn.report.lines import Line, lines
from ide_snn.report.pages import Page, to_html, to_markdown
from ide_snn.report.runs_table import to_csv
from ide_snn.report.tables import machines, statements

__all__ = ["Collection", "Line", "ReportError", "collect", "lines", "write_report"]

LONGEST_STEM = 100  # of file names, of which file systems take 255 bytes


def write_report(runs: str | Path, output: str | Path, *, figures: bool = True) -> Path:
    """Read every run below `runs` and write report.md, report.html, the tables and PNGs into `output`.

    The tables: results.csv and results.tex have a row per line of the report, runs.csv one per run.

    Returns the path of report.html.

    Raises:
        ReportError: there is no run below `runs`.
        ImportError: matplotlib is missing, which figures need.
    """
    collection = collect(runs)
    if not collection.runs and not collection.unreadable:
        raise ReportError(f"runs={runs}: there is no run in this folder or below it")
    table = lines(collection.runs)
    page = Page(
        source=str(runs),
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        statements=statements(table, collection),
        lines=table,
        machines=machines(collection.runs),
        figures=_figures(table) if figures else {},
    )
    output = Path(output)
    for name, (_, png) in page.figures.items():
        _write(output / name, png)
    _write(output / "report.md", to_markdown(page))
    _write(output / "runs.csv", to_csv(table))
    _write(output / "results.csv", results_csv(table))
    _write(output / "results.tex", results_latex(table))
    _write(output / "report.html", to_html(page))
    return output / "report.html"


def _figures(table: Sequence[Line]) -> dict[str, tuple[str, bytes]]:
    """File name -> what it shows and the PNG."""
    found: dict[str, tuple[str, bytes]] = {}
    if any(line.runs and line.paper for line in table):
        text = "Test accuracy of the best epoch, ours and the paper's, on the data of which a row was run"
        found["overview.png"] = (text, overview(table))
    for line in table:
        if line.runs:
            kinds = dict.fromkeys(note.kind for note in line.notes if note.kind != "repeated")
            aside = f" ({', '.join(kinds)})" if kinds else ""
            found[_file_name(line, found)] = (f"Learning curves of {line.label}{aside}", learning_curves(line))
    return found


def _file_name(line: Line, taken: dict[str, tuple[str, bytes]]) -> str:
    stem = "curves_" + re.sub(r"[^A-Za-z0-9_.-]+", "_", line.label).strip("_")[:LONGEST_STEM]
    number = 1
    while (name := f"{stem}{'' if number == 1 else f'_{number}'}.png") in taken:
        number += 1
    return name


def _write(path: Path, content: bytes | str) -> None:
    # names of folders need not be text
    raw = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    write_atomically(path, lambda file: file.write(raw))
