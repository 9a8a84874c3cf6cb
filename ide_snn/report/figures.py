"""The report's figures as PNG: learning curves, and our results beside the paper's."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ide_snn.paper import NETWORKS, TITLES
from ide_snn.report.collect import Run
from ide_snn.report.lines import Line, spread
from ide_snn.report.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curves", "overview"]

OURS, PAPER, TRAIN, FAINT = "#1f6fb2", "#c4590b", "#5f7f2f", "#8a8a8a"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "axes.titlesize": 11,
}


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install -e '.[viz]', or set figures=false") from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)


def learning_curves(line: Line) -> bytes:
    """Test accuracy and loss of each epoch: the mean over the seeds with a band of one standard deviation.

    The band ends where the first seed does; behind it every seed is drawn by itself.
    """
    figure = _figure(10, 3.8)
    with _style():
        accuracy, loss = figure.subplots(1, 2)
        _curve(accuracy, line.runs, "test_accuracy", 100, OURS, "test")
        if line.paper is not None and line.comparable:
            mean, std = line.paper.mean, line.paper.std
            accuracy.axhspan(mean - std, mean + std, color=PAPER, alpha=0.25, linewidth=0)
            accuracy.axhline(mean, color=PAPER, linewidth=1.2, linestyle="--", label=f"paper {mean:.2f} ± {std:.2f}")
        accuracy.set(xlabel="epoch", ylabel="test accuracy, %", title="Test accuracy")
        accuracy.set_ylim(*_accuracy_limits(line))
        _curve(loss, line.runs, "test_loss", 1, OURS, "test")
        _curve(loss, line.runs, "train_loss", 1, TRAIN, "training, with dropout")
        loss.set(xlabel="epoch", ylabel="cross entropy", title="Loss")
        for axes in (accuracy, loss):
            axes.legend(fontsize=9)
            _whole_epochs(axes)
        figure.suptitle(_headline(line), fontsize=11)
        return _png(figure)


def _headline(line: Line) -> str:
    seeds = len(line.runs)
    band = f"mean of {seeds} seeds, band: ± 1 standard deviation" if seeds > 1 else f"seed {line.runs[0].seed}"
    return f"{textwrap.fill(line.label, 110)}\n{line.data_title}, T = {line.time_steps}; {band}"


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _accuracy_limits(line: Line) -> tuple[float, float]:
    """Of the epochs after the first twentieth: their steep rise would flatten the rest."""
    values = []
    for run in line.runs:
        kept = run.rows[min(len(run.rows) // 20, len(run.rows) - 1) :]
        values += [100 * (row["test_accuracy"] or 0.0) for row in kept]
    if line.paper is not None and line.comparable:
        values += [line.paper.mean - line.paper.std, line.paper.mean + line.paper.std]
    margin = 0.05 * (max(values) - min(values)) + 0.1
    return min(values) - margin, min(100.5, max(values) + margin)


def _curve(axes: Axes, runs: Sequence[Run], key: str, scale: float, color: str, label: str) -> None:
    curves = []
    for run in runs:
        points = [(row["epoch"], row.get(key)) for row in run.rows]
        curves.append([(epoch, scale * value) for epoch, value in points if epoch is not None and value is not None])
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    common = min(len(curve) for curve in curves)
    epochs = [epoch for epoch, _ in curves[0][:common]]
    at = [spread([curve[number][1] for curve in curves]) for number in range(common)]
    marker = "o" if common < 3 else ""
    axes.plot(epochs, [s.mean for s in at], color=color, linewidth=1.5, marker=marker, label=label)
    if len(curves) > 1:
        low, high = ([s.mean + sign * (s.std or 0.0) for s in at] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=color, alpha=0.25, linewidth=0)
    for curve in curves:
        if len(curve) > common:
            rest = curve[common - 1 :]
            axes.plot([e for e, _ in rest], [v for _, v in rest], color=color, linewidth=0.8, alpha=0.6)


def overview(lines: Sequence[Line]) -> bytes:
    """Test accuracy of the best epoch, ours and the paper's, one panel for each data set of which a row was run."""
    run_for = {line.paper.data for line in lines if line.paper is not None and line.runs}
    panels = [
        (TITLES[data], [line for line in lines if line.paper is not None and line.paper.data == data])
        for data in TITLES
        if data in run_for
    ]
    heights = [len(members) + 1.3 for _, members in panels]
    figure = _figure(9, 0.44 * sum(heights) + 1.1)
    with _style():
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, members) in zip(axes, panels, strict=True):
            _panel(panel, title, members)
        axes[-1].set_xlabel("test accuracy, %")
        handles = _legend_handles()
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)
        return _png(figure)


def _panel(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    low, high = _panel_limits(lines)
    for height, line in enumerate(reversed(lines)):
        row = line.paper
        assert row is not None
        axes.errorbar(row.mean, height + 0.16, xerr=row.std, fmt="D", color=PAPER, markersize=5, capsize=3)
        axes.plot(row.best, height + 0.16, "|", color=PAPER, markersize=9)
        if line.best is None:
            axes.text(low, height - 0.2, " not run", color=FAINT, va="center", fontsize=8)
            continue
        mean, std = 100 * line.best.mean, 100 * (line.best.std or 0.0)
        face = OURS if line.as_in_paper else "white"
        if mean < low:
            axes.text(low, height - 0.16, f" ◁ {percent(line.best)}", color=OURS, va="center", fontsize=8)
            continue
        axes.errorbar(mean, height - 0.16, xerr=std, fmt="o", color=OURS, markersize=6, capsize=3, markerfacecolor=face)
    axes.set_yticks(range(len(lines)), [_tick(line) for line in reversed(lines)], fontsize=9)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlim(low, high)
    axes.set_title(title, loc="left")
    axes.grid(axis="y", visible=False)


def _panel_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Wide enough for the paper's values and for ours unless they lie far below, which an arrow then shows."""
    values = [v for line in lines if line.paper for v in (line.paper.mean - line.paper.std, line.paper.best)]
    width = max(values) - min(values)
    far = min(values) - max(6 * width, 3.0)
    for line in lines:
        if line.best is not None and 100 * line.best.mean >= far:
            std = 100 * (line.best.std or 0.0)
            values += [100 * line.best.mean - std, 100 * line.best.mean + std]
    margin = 0.08 * (max(values) - min(values)) + 0.02
    return min(values) - margin, max(values) + margin


def _tick(line: Line) -> str:
    row = line.paper
    assert row is not None
    text = f"{NETWORKS[row.model]} {row.neuron.upper()}, T = {line.time_steps}"
    kinds = dict.fromkeys(note.kind for note in line.notes if note.kind != "repeated")
    said = {"stand-in": line.data_title}
    if line.differing:
        said["changed"] = textwrap.shorten(", ".join(line.differing), 44, placeholder=" …")
    words = [said.get(kind, kind) for kind in kinds]
    return f"{text}\n{', '.join(words)}" if words else text


def _legend_handles() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=PAPER, marker="D", linestyle="", label="paper, mean ± std"),
        Line2D([], [], color=PAPER, marker="|", markersize=9, linestyle="", label="paper, best"),
        Line2D([], [], color=OURS, marker="o", linestyle="", label="ours, mean ± std"),
        Line2D(
            [], [], color=OURS, marker="o", markerfacecolor="white", linestyle="", label="ours, not as in the paper"
        ),
    ]
