"""What the report says in words and tables, apart from how it is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ide_snn.paper import NETWORKS, ROWS
from ide_snn.report.collect import Collection, Run
from ide_snn.report.lines import KINDS, Line, Spread

__all__ = ["COLUMNS", "Column", "Machine", "Statement", "format_time", "machines", "notes", "percent", "statements"]

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One column of the table of results; `text` gives the cell of a line."""

    title: str
    text: Callable[[Line], str]
    numeric: bool = True


@dataclass(frozen=True)
class Statement:
    """A point of the summary: what it is about, and its items, which may stand in one line if `short`."""

    title: str
    items: tuple[str, ...]
    short: bool = False


@dataclass(frozen=True)
class Machine:
    """Versions and device, and the runs made with them."""

    values: tuple[tuple[str, str], ...]
    runs: int


def percent(value: Spread | None) -> str:
    """Mean and standard deviation of fractions, in %."""
    if value is None:
        return "not run"
    deviation = "" if value.std is None else f" ± {100 * value.std:.2f}"
    return f"{100 * value.mean:.2f}{deviation}"


def format_time(seconds: float) -> str:
    """In the unit a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _network(line: Line) -> str:
    name = line.paper.model if line.paper else str(line.runs[0].config["model"]["name"])
    return NETWORKS.get(name, name)


def _neuron(line: Line) -> str:
    if line.paper is not None:  # another leak than the recipe's is among the changes
        return line.paper.neuron.upper()
    neuron = line.runs[0].config["neuron"]
    leak = "" if neuron["leak"] == 1 else f", leak {neuron['leak']:g}"
    return f"{str(neuron['name']).upper()}{leak}"


def _paper(line: Line) -> str:
    row = line.paper
    return NONE if row is None else f"{row.mean:.2f} ± {row.std:.2f} ({row.best:.2f})"


def _difference(line: Line) -> str:
    """Of the means of the best epochs, in points; on other data or before the end it would mean nothing."""
    if line.paper is None or line.best is None or not (line.comparable and line.finished):
        return NONE
    return f"{100 * line.best.mean - line.paper.mean:+.2f}"


def _counted(name: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        values = {run.result[name] for run in line.runs if run.result is not None and run.result.get(name) is not None}
        same_network = not any(
            c.key.startswith(("model.", "method.", "encoder.", "dataset.input_shape")) for c in line.changes
        )
        if not values and line.paper is not None and same_network:
            values = {getattr(line.paper, name)}
        return ", ".join(f"{value:,}" for value in sorted(values)) or NONE

    return text


def _epochs(line: Line) -> str:
    if not line.runs:
        return NONE
    done = sorted({run.epochs for run in line.runs})
    span = str(done[0]) if len(done) == 1 else f"{done[0]}–{done[-1]}"
    # a row of the paper was planned as the paper did it
    recipe = [change.recipe for change in line.changes if change.key == "trainer.epochs"]
    return f"{span} of {(recipe or [line.runs[0].planned_epochs])[0]}"


def _rate(line: Line) -> str:
    rates = [run.firing_rate for run in line.runs if run.firing_rate is not None]
    return f"{math.fsum(rates) / len(rates):.3f}" if rates else NONE


def _time(line: Line) -> str:
    return format_time(math.fsum(run.seconds for run in line.runs) / len(line.runs)) if line.runs else NONE


def _failed(line: Line) -> str:
    if not line.runs:
        return NONE
    failed = sum(run.failed_solves for run in line.runs)
    solves = [run.solves for run in line.runs]
    total = None if None in solves else sum(value for value in solves if value is not None)
    return f"{failed:,}" if total is None else f"{failed:,} of {total:,}"


def _best_run(line: Line) -> str:
    return f"{100 * max(run.best for run in line.runs):.2f}" if line.runs else NONE


COLUMNS = (
    Column("Data", lambda line: line.data_title, numeric=False),
    Column("Network", _network, numeric=False),
    Column("Neuron", _neuron, numeric=False),
    Column("T", lambda line: str(line.time_steps)),
    Column("Paper: mean ± std (best)", _paper),
    Column("Ours: best epoch", lambda line: percent(line.best)),
    Column("Ours: last epoch", lambda line: percent(line.last) if line.runs else NONE),
    Column("Ours: best run", _best_run),
    Column("Ours − paper", _difference),
    Column("Seeds", lambda line: _numbers([run.seed for run in line.runs]) or NONE),
    Column("Epochs", _epochs),
    Column("Neurons", _counted("neurons")),
    Column("Parameters", _counted("parameters")),
    Column("Firing rate", _rate),
    Column("Time per run", _time),
    Column("Failed solves", _failed),
)


def notes(line: Line) -> str:
    """What is special about a line, led by the name where it is not that of the row."""
    texts = [note.text for note in line.notes]
    if line.paper is None:
        texts.insert(0, "not in the paper's tables")
    named = line.paper is not None and line.label == line.paper.experiment
    return "; ".join(texts) if named or not texts else f"{line.label}: {'; '.join(texts)}"


def statements(lines: Sequence[Line], collection: Collection) -> list[Statement]:
    """What was run as in the paper, what was not, and what deviates; empty points are left out."""
    exact = [line for line in lines if line.as_in_paper]
    touched = {line.paper for line in lines if line.runs}
    untouched = [row for row in ROWS if row not in touched]
    points = [
        Statement(
            f"Run as in the paper, to the end: {len(exact)} of its {len(ROWS)} rows",
            tuple(f"{line.label} ({_seeds(line.runs)})" for line in exact),
            short=True,
        )
    ]
    for kind, title in KINDS.items():
        points.append(Statement(title, tuple(_deviations(lines, kind))))
    points += [
        Statement(
            f"Not run: {len(untouched)} of the paper's {len(ROWS)} rows",
            tuple(row.experiment for row in untouched),
            short=True,
        ),
        Statement(
            "Not in the paper's tables",
            tuple(f"{line.label} ({_seeds(line.runs)})" for line in lines if line.paper is None),
            short=True,
        ),
        Statement(
            "Folders without usable numbers",
            tuple(f"{bad.folder}: {bad.reason}" for bad in collection.unreadable),
        ),
    ]
    return [point for number, point in enumerate(points) if point.items or number == 0]


def _deviations(lines: Sequence[Line], kind: str) -> Iterable[str]:
    for line in lines:
        texts = [note.text for note in line.notes if note.kind == kind]
        if texts:
            yield f"{line.label}: {'; '.join(texts)}"


def _seeds(runs: Sequence[Run]) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {_numbers([run.seed for run in runs])}"


def _numbers(values: Sequence[int]) -> str:
    """0–4 for five in a row, else one by one."""
    if len(values) > 2 and list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(map(str, values))


def machines(runs: Iterable[Run]) -> list[Machine]:
    """The different machines and versions, with the number of runs of each; a resumed run may be of several."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for run in runs:
        last = {} if run.versions is None else run.versions
        own = {_versions_as_text(versions): None for versions in (last, *last.get("earlier", ()))}
        for values in own:
            counts[values] = counts.get(values, 0) + 1
    return [Machine(values, count) for values, count in counts.items()]


def _versions_as_text(versions: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    hidden = ("git_modified", "earlier")
    values = tuple((key, _text(key, value)) for key, value in versions.items() if key not in hidden)
    if versions.get("git_modified"):
        values = tuple((k, f"{v} with changes" if k == "git_commit" else v) for k, v in values)
    return values


def _text(key: str, value: object) -> str:
    if value is None:
        return NONE
    return str(value)[:12] if key == "git_commit" else str(value)
