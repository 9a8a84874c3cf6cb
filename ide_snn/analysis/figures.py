"""Figures of an analysis, one idea each, as PNG files that can be read from the back of a room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ide_snn.analysis.convergence import ConvergenceCurve
from ide_snn.analysis.cost import AC_PJ, MAC_PJ, Cost
from ide_snn.analysis.horizon import EarlyExit, accuracy_over_time, early_exit
from ide_snn.analysis.model import Analysis
from ide_snn.analysis.rates import PopulationRate, Trace
from ide_snn.analysis.residuals import SolverTrace
from ide_snn.analysis.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["require_matplotlib", "save_figures"]

STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}
RASTER_NEURONS = 100
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
MARKERS = {"fixed_point": "o", "anderson": "s", "broyden": "^", "gmres": "D"}


def save_figures(analysis: Analysis, folder: str | Path, *, title: str = "") -> list[Path]:
    """Draws every figure into `folder` (created) and returns their paths.

    Args:
        analysis: what to draw.
        folder: for the PNG files; those of the same name are replaced.
        title: of the network, put on top of every figure.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(analysis):
            if title:
                figure.suptitle(title, fontsize=10, color=GREY, x=0.99, ha="right")
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], format="png")
    return paths


def require_matplotlib() -> None:
    """Raises ImportError that says what to install; called before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install -e '.[viz]'") from error


def _figures(analysis: Analysis) -> list[tuple[str, Figure]]:
    logits, labels = analysis.horizon.logits, analysis.horizon.labels
    accuracy = accuracy_over_time(logits, labels)
    exits = early_exit(logits, labels, analysis.thresholds)
    cost = analysis.cost.result()
    figures = [
        ("firing_rates", _firing_rates(analysis.rates.result())),
        ("operations", _operations(cost)),
        ("energy", _energy(cost)),
        ("accuracy_over_time", _accuracy(accuracy, analysis.samples)),
        ("early_exit", _early_exit(accuracy, exits)),
    ]
    for sample in dict.fromkeys(each.sample for each in analysis.traces):
        traces = [each for each in analysis.traces if each.sample == sample]
        figures.append((f"raster_sample_{sample}", _raster(traces)))
        for each in traces:
            chosen = analysis.trace_neurons[each.population]
            figures.append((f"membrane_{each.population}_sample_{sample}", _membranes(each, chosen)))
    for prefix, curve in analysis.convergence.result().items():
        if curve.samples:
            figures.append((f"{prefix}equilibrium", _convergence(curve)))
    for prefix, spectrum in analysis.spectrum.result.items():
        figures.append((f"{prefix}spectrum", _spectrum(spectrum)))
    for prefix, solvers in analysis.solvers.items():
        figures.append((f"{prefix}solver_residual", _solvers(solvers)))
    return figures


def _new(rows: int = 1, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of its own, without pyplot and its global state; saved by the Agg backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height))
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _firing_rates(rates: dict[str, PopulationRate]) -> Figure:
    figure, (axes,) = _new()
    names = [_pretty(name) for name in rates]
    if len(names) > 4:
        names = ["\n".join(name.rsplit(" ", 1)) for name in names]
    places = range(len(names))
    both = any(not math.isclose(rate.plain, rate.weighted, rel_tol=1e-6) for rate in rates.values())
    shift, width = (0.2, 0.38) if both else (0.0, 0.5)
    bars = [axes.bar([x - shift for x in places], [rate.plain for rate in rates.values()], width, color=BLUE)]
    if both:
        weighted = [rate.weighted for rate in rates.values()]
        bars.append(axes.bar([x + shift for x in places], weighted, width, color=ORANGE))
        axes.legend(bars, ["plain mean", "weighted by leak$^{T-t}$"], loc="upper right", fontsize=10)
    for each in bars:
        axes.bar_label(each, fmt="%.3f", fontsize=10)
    axes.set_xticks(list(places), names)
    axes.set_xlim(-0.9, len(names) - 0.1)
    axes.set_ylim(0, (1.35 if both else 1.15) * max([1e-3, *(max(r.plain, r.weighted) for r in rates.values())]))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("spikes per neuron and step")
    axes.set_title("Mean firing rate", loc="left")
    return figure


def _operations(cost: Cost) -> Figure:
    from matplotlib.ticker import EngFormatter

    figure, (axes,) = _new(height=1.8 + 0.5 * len(cost.parts))
    names = [_pretty(part.name) for part in cost.parts]
    macs = axes.barh(names, [part.macs for part in cost.parts], color=ORANGE)
    left = [part.macs for part in cost.parts]
    acs = axes.barh(names, [part.acs for part in cost.parts], left=left, color=BLUE)
    axes.bar_label(acs, [f" {_short(part.macs + part.acs)}" for part in cost.parts], fontsize=10)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("operations per sample")
    axes.set_title("Synaptic operations by connection", loc="left")
    axes.legend([macs, acs], ["multiply-accumulate (real input)", "accumulate (per spike)"], fontsize=10, loc="best")
    return figure


def _energy(cost: Cost) -> Figure:
    figure, (axes,) = _new(height=3.2)
    largest = max(cost.energy_pj, cost.ann_energy_pj)
    scale, unit = next(((s, u) for s, u in ((1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ")) if largest >= s), (1.0, "pJ"))
    snn = [MAC_PJ * cost.macs / scale, AC_PJ * cost.acs / scale]
    names = ["this SNN", "equivalent ANN\n(no feedback)", ""]
    ann = cost.ann_energy_pj / scale
    macs = axes.barh(names, [snn[0], ann, 0], color=ORANGE)  # the empty row is for the legend
    acs = axes.barh(names, [snn[1], 0, 0], left=[snn[0], ann, 0], color=BLUE)
    axes.bar_label(acs, [f" {sum(snn):.3g} {unit}", f" {ann:.3g} {unit}", ""])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.18)
    axes.set_xlabel(f"estimated energy per sample in {unit}")
    axes.set_title(f"Energy at {MAC_PJ} pJ per MAC and {AC_PJ} pJ per AC (45 nm)", loc="left")
    axes.legend([macs, acs], ["multiply-accumulate (MAC)", "accumulate (AC)"], fontsize=10, loc="lower right")
    return figure


def _accuracy(accuracy: Sequence[float], samples: int) -> Figure:
    figure, (axes,) = _new()
    steps = list(range(1, len(accuracy) + 1))
    axes.plot(steps, [100 * a for a in accuracy], color=BLUE, marker="o" if len(steps) <= 40 else None)
    axes.annotate(
        f"{100 * accuracy[-1]:.1f} %",
        (steps[-1], 100 * accuracy[-1]),
        textcoords="offset points",
        xytext=(0, -18),
        ha="right",
        color=BLUE,
    )
    _whole_steps(axes, len(steps))
    axes.set_xlabel("time steps t")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"Accuracy after t steps ({samples} samples)", loc="left")
    return figure


def _early_exit(accuracy: Sequence[float], exits: Sequence[EarlyExit]) -> Figure:
    figure, (axes,) = _new()
    steps = list(range(1, len(accuracy) + 1))
    axes.plot(steps, [100 * a for a in accuracy], color=GREY, linewidth=1.5, label="same number of steps for all")
    used, reached = [p.mean_steps for p in exits], [100 * p.accuracy for p in exits]
    axes.plot(used, reached, color=ORANGE, marker="o", label="exit when confident")
    # the first steps of the fixed curve may lie far below what exits reach
    low, high = min(reached), max([*reached, *(100 * a for a in accuracy)])
    margin = max(0.25 * (high - low), 0.5)
    axes.set_ylim(low - margin, high + margin)
    shown: list[tuple[float, float]] = []
    for point in exits:
        place = (point.mean_steps / len(steps), 100 * point.accuracy / (high - low + 2 * margin))
        if all(math.dist(place, other) > 0.07 for other in shown):  # labels on top of each other cannot be read
            shown.append(place)
            axes.annotate(
                f"{point.threshold:g}",
                (point.mean_steps, 100 * point.accuracy),
                textcoords="offset points",
                xytext=(7, -14),
                ha="left",
                fontsize=10,
                color=RED,
            )
    _whole_steps(axes, len(steps))
    axes.set_xlabel("mean time steps used")
    axes.set_ylabel("accuracy in %")
    axes.set_title("Early exit (labels: confidence threshold)", loc="left")
    axes.legend(loc="lower right", fontsize=10)
    return figure


def _raster(traces: Sequence[Trace]) -> Figure:
    figure, panels = _new(len(traces), 1.6 + 2.2 * len(traces))
    for axes, each in zip(panels, traces, strict=True):
        count = min(each.neurons, RASTER_NEURONS)
        chosen = torch.linspace(0, each.neurons - 1, count).round().long()
        steps = len(each.spikes)
        extent = (0.5, steps + 0.5, -0.5, each.neurons - 0.5)
        picture = each.spikes[:, chosen].t().float().numpy()
        axes.imshow(picture, cmap="Greys", aspect="auto", interpolation="nearest", origin="lower", extent=extent)
        axes.grid(visible=False)
        axes.set_ylabel("neuron" if count == each.neurons else f"neuron ({count} shown)")
        axes.set_title(f"Spikes of {_pretty(each.population)}, sample {each.sample}", loc="left")
    _whole_steps(panels[-1], len(traces[0].spikes))
    panels[-1].set_xlabel("time step t")
    return figure


def _membranes(each: Trace, neurons: Sequence[int]) -> Figure:
    figure, panels = _new(len(neurons), 1.6 + 1.5 * len(neurons))
    steps = list(range(1, len(each.spikes) + 1))
    for axes, neuron in zip(panels, neurons, strict=True):
        potential = each.membranes[:, neuron].tolist()
        axes.plot(steps, potential, color=BLUE, marker="o", markersize=4, linewidth=1.2)
        fired = [i for i in range(len(steps)) if each.spikes[i, neuron]]
        axes.scatter([steps[i] for i in fired], [potential[i] for i in fired], s=60, color=RED, zorder=3)
        axes.axhline(each.v_threshold, color=GREY, linestyle="--", linewidth=1.2)
        axes.set_ylabel(f"neuron {neuron}")
        axes.margins(y=0.15)
    panels[0].set_title(
        f"Membrane before reset, {_pretty(each.population)}, sample {each.sample}\n"
        f"(dashed: threshold {each.v_threshold:g}; red: spike)",
        loc="left",
    )
    _whole_steps(panels[-1], len(steps))
    panels[-1].set_xlabel("time step t")
    return figure


def _convergence(curve: ConvergenceCurve) -> Figure:
    figure, (axes,) = _new()
    steps = list(range(1, len(curve.to_equilibrium) + 1))
    marker = "o" if len(steps) <= 40 else None
    axes.loglog(steps, curve.to_equilibrium, color=BLUE, marker=marker, label="to the equilibrium, ||a[t] − a*||")
    axes.loglog(steps, curve.residual, color=ORANGE, marker=marker, label="to its own image, ||a[t] − f(a[t])||")
    if curve.one_over_t and len(steps) > 1:
        end = curve.residual[-1]
        axes.loglog(
            steps, [end * len(steps) / t for t in steps], color=GREY, linestyle="--", linewidth=1.2, label="∝ 1/t"
        )
    _plain_log_steps(axes, len(steps))
    axes.set_xlabel("time steps t")
    axes.set_ylabel("relative distance (of ||a*||)")
    axes.set_title(f"Distance to the equilibrium (mean of {curve.samples} samples)", loc="left")
    axes.legend(fontsize=10)
    return figure


def _spectrum(spectrum: Spectrum) -> Figure:
    figure, (axes,) = _new()
    places = list(range(len(spectrum.norm)))
    axes.scatter(places, spectrum.norm, s=60, color=BLUE, label="‖J‖₂")
    axes.scatter(places, spectrum.eigenvalue, s=60, color=ORANGE, marker="D", label="largest |eigenvalue| of J")
    if spectrum.norm_bound is not None:
        axes.axhline(spectrum.norm_bound, color=GREEN, linestyle="--", linewidth=1.5, label="bound ‖W_fb‖ / V_th")
    axes.axhline(1.0, color=RED, linestyle=":", linewidth=1.5, label="1: contraction ends")
    axes.set_xticks(places)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sample")
    axes.set_ylabel("size (dimensionless)")
    axes.set_title("Ends of the Jacobian's spectrum", loc="left")
    figure.legend(fontsize=10, ncols=4, loc="outside lower center", columnspacing=1.0, handletextpad=0.4)
    return figure


def _solvers(traces: Sequence[SolverTrace]) -> Figure:
    figure, (axes,) = _new()
    for each, color in zip(traces, (GREY, GREEN, ORANGE, BLUE), strict=False):
        label = _pretty(each.solver) + (" (configured)" if each.configured else "")
        values = [max(r, 1e-16) if math.isfinite(r) else math.nan for r in each.residual]
        width = 3.0 if each.configured else 1.8
        products = range(each.first_products, each.first_products + len(values))
        marker = MARKERS.get(each.solver, "o")
        axes.semilogy(products, values, color=color, marker=marker, markersize=6, linewidth=width, label=label)
    axes.axhline(traces[0].tol, color=RED, linestyle=":", linewidth=1.5, label=f"tolerance {traces[0].tol:g}")
    _whole_steps(axes, max(each.first_products + len(each.residual) for each in traces) - 1, first=0)
    axes.set_xlabel("products with Jᵀ")
    axes.set_ylabel("relative residual, worst sample")
    axes.set_title("Backward solve of one batch", loc="left")
    axes.legend(fontsize=10)
    return figure


def _whole_steps(axes: Axes, last: int, first: int = 1) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    axes.set_xlim(first - max(0.02 * (last - first), 0.3), last + max(0.03 * (last - first), 0.3))


def _plain_log_steps(axes: Axes, last: int) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    marks = [t for t in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000) if t <= last]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _pretty(name: str) -> str:
    return name.replace("_", " ")


def _short(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
