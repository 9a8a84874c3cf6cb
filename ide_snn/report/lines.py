"""Runs beside the paper: which runs are seeds of the same thing, which row they belong to, and what is different.

A run belongs to a row by its data, network and kind of neuron, and follows the row's recipe if every option that
bears on the result is the recipe's. Names play no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ide_snn.checkpoint import flatten
from ide_snn.config import config_to_dict, load_config
from ide_snn.paper import ROWS, STAND_INS, TITLES, PaperRow
from ide_snn.report.collect import Run
from ide_snn.resuming import CHANGEABLE

__all__ = ["Change", "Line", "Note", "Spread", "compare", "lines", "spread"]

# Options that do not bear on the result, besides those that a resumed run may change
NEUTRAL = frozenset(
    {
        *CHANGEABLE,
        "seed",
        "name",
        "trainer.evaluation_batch_size",
    }
)
UNSET = "unset"
DATA = "data"  # no option, but what tells apart data sets of one name
# Values of an option that compute the same up to rounding
ALIKE = {"precision.name": ("float32", "exact")}
# Options of the data set that are compared even where the data are a stand-in: the others say which data they are
OF_ANY_DATA = frozenset(
    f"dataset.{name}"
    for name in ("train_limit", "test_limit", "validation_size", "crop_padding", "flip", "mean", "std")
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; one value has no deviation."""

    mean: float
    std: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


@dataclass(frozen=True)
class Change:
    """An option in which runs differ from the recipe."""

    key: str
    recipe: Any
    run: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.recipe)} -> {_show(self.run)}"


@dataclass(frozen=True)
class Note:
    """What a reader must know of a line; `kind` is one of `KINDS`."""

    kind: str
    text: str


# kind -> what the lines with such a note are called, from the gravest
KINDS = {
    "stand-in": "On other data than the paper's",
    "less data": "With fewer images or recordings",
    "shorter": "Ran shorter",
    "unfinished": "In progress or cut off",
    "changed": "With other settings than the paper's recipe",
    "repeated": "Found more than once",
}


@dataclass(frozen=True)
class Line:
    """Runs that differ in the seed only; one that is not finished stands alone.

    Attributes:
        label: the experiment's name, and the data's where they are a stand-in.
        paper: the row they belong to, None where the paper has none.
        runs: one per seed, in the order of the seeds; empty for a row that nothing was run for.
        repeated: further runs of the same seeds, which are not counted.
        finished: whether the runs are.
        data_note: why the data are not those of the row; None where they are or where there is no row.
        less_data: what of the row's data is missing, None where nothing is known to be.
        changes: to the row's recipe.
        differing: in which options, as key=value, it differs from others of its name; they are in the label too.
    """

    label: str
    paper: PaperRow | None
    runs: tuple[Run, ...] = ()
    repeated: tuple[Run, ...] = ()
    finished: bool = False
    data_note: str | None = None
    less_data: str | None = None
    changes: tuple[Change, ...] = ()
    differing: tuple[str, ...] = ()

    @property
    def as_in_paper(self) -> bool:
        """The row's recipe on the row's data, to the end."""
        deviates = self.changes or self.data_note or self.less_data
        return self.paper is not None and self.finished and not deviates

    @property
    def comparable(self) -> bool:
        """On the same training and test data as the row."""
        limited = any(
            change.key in ("dataset.train_limit", "dataset.test_limit", "dataset.validation_size")
            for change in self.changes
        )
        return self.paper is not None and not (self.data_note or self.less_data or limited)

    @property
    def best(self) -> Spread | None:
        return self._spread(lambda run: run.best)

    @property
    def last(self) -> Spread | None:
        return self._spread(lambda run: run.last)

    def _spread(self, value: Callable[[Run], float]) -> Spread | None:
        return spread([value(run) for run in self.runs]) if self.runs else None

    @property
    def data_title(self) -> str:
        if not self.runs:
            assert self.paper is not None
            return self.paper.data_title
        if self.paper is None or self.data_note:
            return title_of(self.runs[0])
        return self.paper.data_title + (" (part)" if self.less_data else "")

    @property
    def time_steps(self) -> int:
        return int(self.runs[0].config["time_steps"]) if self.runs else self.paper.time_steps  # type: ignore[union-attr]

    @property
    def notes(self) -> tuple[Note, ...]:
        """The gravest first."""
        return tuple(sorted(_notes(self), key=lambda note: list(KINDS).index(note.kind)))


def title_of(run: Run) -> str:
    """What the data of a run are called."""
    name = str(run.config["dataset"]["name"])
    return run.dataset_title or TITLES.get(name, name)


def lines(runs: Iterable[Run]) -> list[Line]:
    """The paper's rows in their order, each with all that was run for it, then what the paper does not have."""
    groups: dict[Any, list[Run]] = {}
    heads: dict[Any, Line] = {}
    for run in runs:
        head = _head(run)
        key = _key(head, run)
        heads.setdefault(key, head)
        groups.setdefault(key, []).append(run)
    found = [_with_runs(heads[key], part) for key, members in groups.items() for part in _by_data(members)]
    result: list[Line] = []
    for row in ROWS:
        own = [line for line in found if line.paper == row]
        result += sorted(
            _told_apart(own),
            key=lambda line: (not line.as_in_paper, len(line.changes), not line.finished, line.runs[0].seed),
        )
        if not own:
            result.append(Line(row.experiment, row))
    return result + sorted(_told_apart([line for line in found if line.paper is None]), key=lambda line: line.label)


def _told_apart(members: Sequence[Line]) -> list[Line]:
    """Lines of one name get the options in which they differ into their labels, such as `name (solver.tol=0.1)`.

    One that is as in the paper keeps its name.
    """
    known = {id(line): _what_is_told(line.runs[0]) for line in members}
    result = []
    for line in members:
        alike = [known[id(other)] for other in members if other.label == line.label]
        own = () if line.as_in_paper else tuple(_differing(known[id(line)], alike))
        label = f"{line.label} ({', '.join(own)})" if own else line.label
        result.append(replace(line, label=label, differing=own))
    return result


def _what_is_told(run: Run) -> Mapping[str, Any]:
    """Options, and the beginning of the data's digest, by which folders of one name are told apart."""
    digest = {} if run.data_digest is None else {DATA: run.data_digest[:8]}
    return {**flatten(run.config), **digest}


def _differing(own: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> list[str]:
    """key=value of the options of `own` that others have otherwise; of a group of another name the name says enough."""
    found = []
    for key, value in own.items():
        group = f"{key.rpartition('.')[0]}.name"
        others = every if key == group else [other for other in every if other.get(group) == own.get(group)]
        if key == DATA and any(key not in other for other in others):  # unknown is not different
            continue
        if key not in NEUTRAL and any(other.get(key, UNSET) != value for other in others):
            found.append(f"{key.removesuffix('.name')}={_show(value)}")
    return found


def _head(run: Run) -> Line:
    """What a run would be as a line of its own, without the run."""
    row = _row(run)
    label, title = str(run.config.get("name", "unnamed")), title_of(run)
    if row is None:
        return Line(label, None, finished=run.finished)
    same_name = run.config["dataset"]["name"] == row.data
    changes = tuple(
        change
        for change in compare(_recipe(row.experiment), run.config)
        if same_name or _bears_on_other_data(change.key)
    )
    less = _less_data(row, run, changes)
    stand_in = None if same_name and title.startswith(row.data_title) else f"{title}, a stand-in for {row.data_title}"
    if stand_in:
        label = f"{row.experiment} on {title}"
    elif not changes:
        label = row.experiment
    return Line(label, row, (), (), run.finished, stand_in, less, changes)


def _bears_on_other_data(key: str) -> bool:
    return not key.startswith("dataset.") or key in OF_ANY_DATA


def _row(run: Run) -> PaperRow | None:
    """The paper's row on these data with this network and kind of neuron, that of the same T if there is one."""
    config = run.config
    data = STAND_INS.get(title_of(run), config["dataset"]["name"])
    own = (data, config["model"]["name"], config["neuron"]["name"])
    candidates = [row for row in ROWS if (row.data, row.model, row.neuron) == own]
    return min(candidates, key=lambda row: abs(row.time_steps - config["time_steps"]), default=None)


@cache
def _recipe(experiment: str) -> Mapping[str, Any]:
    return flatten(config_to_dict(load_config([f"experiment={experiment}"])))


def compare(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> list[Change]:
    """Options of a run's `config` that differ from the flat `recipe` and bear on the result, the seed apart.

    One that the run does not know is left out.
    """
    own = flatten(config)
    keys = [key for key in {**recipe, **own} if key in own and key not in NEUTRAL]
    changes = [Change(key, recipe.get(key, UNSET), own[key]) for key in keys if recipe.get(key, UNSET) != own[key]]
    other_groups = {change.key for change in changes if change.key.endswith(".name")}
    return [
        change
        for change in changes
        # a member of a group that the recipe does not have is told by its name and not by its defaults
        if not _are_alike(change)
        and not (change.recipe == UNSET and f"{change.key.rpartition('.')[0]}.name" in other_groups)
    ]


def _are_alike(change: Change) -> bool:
    alike = ALIKE.get(change.key, ())
    return change.recipe in alike and change.run in alike


def _less_data(row: PaperRow, run: Run, changes: Sequence[Change]) -> str | None:
    """What the run says of its data, or what its number of steps tells, where the options do not explain it."""
    explained = {change.key for change in changes}
    parts = []
    for part, full in (("train", row.train_samples), ("test", row.test_samples)):
        what = "training" if part == "train" else "test"
        if explained & {f"dataset.{part}_limit", "dataset.validation_size" if part == "train" else ""}:
            continue
        count, bounds = run.samples(part), run.train_samples_bounds if part == "train" else None
        if count is not None and count != full:
            parts.append(f"{count:,} of {full:,} {what} samples")
        elif count is None and bounds is not None and not bounds[0] <= full <= bounds[1]:
            parts.append(f"{bounds[0]:,} to {bounds[1]:,} of {full:,} {what} samples, by the number of steps")
    return ", ".join(parts) or None


def _key(head: Line, run: Run) -> Any:
    """Equal for runs that differ in the seed only."""
    if not run.finished:
        return run.folder
    if head.paper is not None:
        changes = tuple(map(str, head.changes))
        return (head.paper.experiment, head.label, head.data_note, head.less_data, changes)
    own = {key: str(value) for key, value in flatten(run.config).items() if key not in NEUTRAL}
    return (head.label, run.dataset_title, tuple(sorted(own.items())))


def _by_data(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs on different data apart; runs that do not say which are with the others if these agree."""
    parts: dict[str | None, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.data_digest, []).append(run)
    return list(parts.values()) if len(set(parts) - {None}) > 1 else [list(runs)]


def _with_runs(head: Line, runs: Sequence[Run]) -> Line:
    """Each seed once: the run that came furthest, of equals the first by path."""
    ordered = sorted(runs, key=lambda run: (run.seed, -run.epochs, run.folder))
    first = {run.seed: run for run in reversed(ordered)}
    counted = tuple(first[seed] for seed in sorted(first))
    return replace(head, runs=counted, repeated=tuple(run for run in ordered if run not in counted))


def _notes(line: Line) -> list[Note]:
    notes = []
    if line.data_note:
        notes.append(Note("stand-in", f"ran on {line.data_note}"))
    if line.less_data:
        notes.append(Note("less data", line.less_data))
    notes += [_change_note(change) for change in line.changes]
    if line.runs and not line.finished:
        notes += [Note("unfinished", _progress(run)) for run in line.runs]
    if line.repeated:
        folders = ", ".join(str(run.folder) for run in line.repeated)
        notes.append(Note("repeated", f"the same seeds were found again and not counted: {folders}"))
    if any(run.result is not None and run.result.get("best_selected_on") == "validation" for run in line.runs):
        notes.append(Note("changed", "best epoch chosen on the validation split; the paper's on the test set"))
    return notes


def _change_note(change: Change) -> Note:
    key, recipe, own = change.key, change.recipe, change.run
    if key == "trainer.epochs" and own < recipe:
        return Note("shorter", f"{own} of the paper's {recipe} epochs")
    if key in ("dataset.train_limit", "dataset.test_limit") and own is not None:
        return Note("less data", f"{own:,} {'training' if 'train' in key else 'test'} samples only")
    if key == "time_steps":
        return Note("changed", f"T = {own} instead of {recipe}")
    if key == "trainer.batch_size":
        return Note("changed", f"batches of {own} instead of {recipe}")
    return Note("changed", str(change))


def _progress(run: Run) -> str:
    plan = f"seed {run.seed}: epoch {run.epochs} of {run.planned_epochs}"
    if run.failure:
        return f"{plan}, failed: {run.failure}"
    return f"{plan}, in progress or cut off; last written {run.written:%Y-%m-%d %H:%M} UTC"


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
