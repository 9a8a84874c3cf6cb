"""The report as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ide_snn.report.lines import Line
from ide_snn.report.tables import COLUMNS, Machine, Statement, notes

__all__ = ["Page", "to_html", "to_markdown"]

TITLE = "Feedback spiking networks: our runs beside the paper"
UNITS = "Test accuracy in %: mean ± standard deviation over the seeds."
NOTES = (
    "Paper: Xiao et al., Training Feedback Spiking Neural Networks by Implicit Differentiation on the Equilibrium "
    "State, NeurIPS 2021 (arXiv 2109.14247), section 5.",
    "Ours: mean ± std over the seeds. std is the sample standard deviation (n - 1) over the seeds; "
    "a single seed has none.",
    "Best epoch: of each seed the epoch with the highest test accuracy, as in the paper, so it is slightly optimistic; "
    "last epoch: no choice. Ours − paper: difference of the means of the best epochs, in points; none on "
    "other data or before the end.",
    "Neurons count the input, the populations and the classes. Firing rate: spikes per neuron and step on the test set "
    "after the last epoch, mean over the populations and the seeds.",
    "Time per run is wall-clock time on the machines below, whatever else they were doing.",
)


@dataclass(frozen=True)
class Page:
    """All that is printed.

    Attributes:
        source: the folder with the runs.
        written: when, as text.
        statements, lines, machines: see `ide_snn.report.tables`.
        figures: file name -> (what it shows, PNG).
    """

    source: str
    written: str
    statements: Sequence[Statement]
    lines: Sequence[Line]
    machines: Sequence[Machine]
    figures: Mapping[str, tuple[str, bytes]]


def to_markdown(page: Page) -> str:
    """With links to the figures' files, which lie beside it."""
    parts = [f"# {TITLE}", f"Runs in `{page.source}`, report of {page.written}.", "## What was run"]
    for point in page.statements:
        items = [_cell(item) for item in point.items] or ["none"]
        parts.append("\n".join([f"**{point.title}**\n", *([", ".join(items)] if point.short else _bullets(items))]))
    parts += ["## Results", UNITS, _markdown_table(page.lines)]
    parts += [f"![{text}]({name})" for name, (text, _) in page.figures.items()]
    parts += ["## Machines and versions", _markdown_machines(page.machines)]
    parts += ["## How to read this", "\n".join(_bullets(NOTES))]
    return "\n\n".join(parts) + "\n"


def _bullets(items: Sequence[str]) -> list[str]:
    return [f"- {item}" for item in items]


def _markdown_table(lines: Sequence[Line]) -> str:
    titles = [column.title for column in COLUMNS] + ["Notes"]
    rules = ["---:" if column.numeric else "---" for column in COLUMNS] + ["---"]
    rows = [[column.text(line) for column in COLUMNS] + [notes(line)] for line in lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [titles, rules, *rows])


def _markdown_machines(machines: Sequence[Machine]) -> str:
    return "\n".join(
        f"- {machine.runs} run{'s' if machine.runs != 1 else ''}: "
        + (", ".join(f"{key} {_cell(value)}" for key, value in machine.values) or "not recorded")
        for machine in machines
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def to_html(page: Page) -> str:
    """One file: styles inside, figures as data, no scripts, nothing fetched."""
    body = [
        f"<h1>{TITLE}</h1>",
        f"<p class='quiet'>Runs in <code>{escape(page.source)}</code>, report of {escape(page.written)}.</p>",
        "<h2>What was run</h2>",
        *(_html_statement(point) for point in page.statements),
        "<h2>Results</h2>",
        f"<p class='quiet'>{UNITS}</p>",
        _html_table(page.lines),
        *(_html_figure(text, png) for text, png in page.figures.values()),
        "<h2>Machines and versions</h2>",
        _html_machines(page.machines),
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in NOTES) + "</ul>",
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _html_statement(point: Statement) -> str:
    items = [escape(item) for item in point.items] or ["none"]
    text = f"<p>{', '.join(items)}</p>" if point.short else f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
    return f"<h3>{escape(point.title)}</h3>{text}"


def _html_table(lines: Sequence[Line]) -> str:
    head = "".join(f"<th{_align(column.numeric)}>{escape(column.title)}</th>" for column in COLUMNS)
    rows = []
    for line in lines:
        cells = "".join(f"<td{_align(column.numeric)}>{escape(column.text(line))}</td>" for column in COLUMNS)
        kind = "full" if line.as_in_paper else "partly" if line.runs else "missing"
        rows.append(f"<tr class='{kind}'>{cells}</tr>")
        if text := notes(line):
            rows.append(f"<tr class='note {kind}'><td colspan='{len(COLUMNS)}'><div>{escape(text)}</div></td></tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _align(numeric: bool) -> str:
    return " class='n'" if numeric else ""


def _html_figure(text: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><img alt='{escape(text)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _html_machines(machines: Sequence[Machine]) -> str:
    keys = list(dict.fromkeys(key for machine in machines for key, _ in machine.values))
    head = "".join(f"<th>{escape(key)}</th>" for key in ["runs", *keys])
    rows = []
    for machine in machines:
        values = dict(machine.values)
        cells = [str(machine.runs), *(values.get(key, "not recorded") for key in keys)]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #fff; --line: #d5d9df; --quiet: #59636e; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --back: #14171b; --line: #3a4149; --quiet: #9aa4af; --band: #1d2228; }
  img { filter: invert(.91) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 1600px; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; } ul, h3 + p { margin: .2rem 0; } ul { padding-left: 1.3rem; }
.quiet, figcaption, .note td { color: var(--quiet); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
tbody tr:not(.note) td { border-top: 1px solid var(--line); white-space: nowrap; }
.n { text-align: right; } .note td { padding-top: 0; } .note div { max-width: 75rem; }
.full td { background: var(--band); font-weight: 600; } .missing td { color: var(--quiet); }
figure { margin: 1.5rem 0; } img { max-width: 100%; width: 1000px; height: auto; }
"""
