"""The Markdown report and the figure of `steps.py`, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import markdown

Result = dict[str, Any]


def report(results: Sequence[Result]) -> str:
    """One section per case: steps and ratios, floors, exactness, solvers, memory, and what was not measured."""
    return "\n".join(_section(result) for result in results)


def _section(r: Result) -> str:
    names = {"f400": "F400", "f64c5": "F64C5", "alexnetf": "AlexNet-F", "cifarnetf": "CIFARNet-F"}
    where, software = r["machine"], r["versions"]
    parts = [
        f"## {names[r['case']]}, T = {r['time_steps']}, batch {r['batch']}\n",
        f"{where['processor']} ({', '.join(where['flags']) or 'flags unknown'}), device {software['device']}, "
        f"{r['threads']} threads, torch {software['torch']}, commit {str(software['git_commit'])[:9]}"
        f"{' with changes' if software['git_modified'] else ''}. "
        f"{_weights(r)}\n",
        _steps(r),
        _exactness(r),
        _floors(r),
        _solvers(r),
        _memory(r),
        "\n".join(f"- {note}" for note in r["notes"]) + ("\n" if r["notes"] else ""),
    ]
    return "\n".join(part for part in parts if part)


def _weights(r: Result) -> str:
    """What the networks of a result have learnt."""
    trained = r.get("checkpoint")  # results of before have none
    if trained is None:
        return f"Weights after {r['warm_steps']} steps on {r['data']}."
    others = f"; other networks after {r['warm_steps']}" if "original" in r["subjects"] else ""
    return (
        f"Weights of a run after {trained['epoch']} of {trained['config']['trainer']['epochs']} epochs "
        f"({trained['step']} steps) on {r['data']}{others}."
    )


def _steps(r: Result) -> str:
    original = r["subjects"].get("original", {}).get("step")
    rows = []
    for name, s in r["subjects"].items():
        if "step" not in s:
            continue
        floor = r["floors"].get(s.get("precision"))
        rows.append(
            [
                name,
                _ms(s["step"], "median_s"),
                _ms(s["step"], "minimum_s"),
                _ratio(original["median_s"] if original else None, s["step"]["median_s"]),
                _ratio(s["step"]["median_s"], floor["floor_s"]) + _mark(floor) if floor else "",
                _ms(s.get("evaluation"), "median_s"),
                _ms(s.get("solver_alone"), "median_s"),
                f"{s['solve']['tolerance']:g}" if "solve" in s else "",
                f"{s['solve'].get('whole_products', s['solve']['products']):g}" if "solve" in s else "",
                _outcomes(s["solve"]["outcomes"]) if "solve" in s else "",
                ", ".join(f"{rate:.3f}" for rate in s.get("firing_rates", [])),
                s.get("path", ""),
            ]
        )
    header = ["step of", "median, ms", "minimum, ms", "original / it", "it / floor", "evaluation, ms"]
    return markdown([*header, "solve alone, ms", "tol", "products", "solves", "firing rates", "path"], rows)


def _floors(r: Result) -> str:
    rows = []
    for precision, floor in r["floors"].items():
        state = floor["rejected"] or f"{100 * floor['efficiency']:.0f} % of the fastest single runs"
        head = f"**{1e3 * floor['floor_s']:.2f}**" if not floor["rejected"] else "rejected"
        rows.append([f"**{precision}**", "", str(floor["transposed_products"]), "", head, "", state])
        for p in floor["products"]:
            speed = "" if p["gflop_per_s"] is None else f"{p['gflop_per_s']:.0f}"
            way = f"{p['way']} ({p['format']})"
            fastest = f"{p['fastest_gflop_per_s']:.0f}"
            rows.append([p["role"], p["connection"], str(p["count"]), f"{p['gflop']:.4f}", speed, fastest, way])
    header = ["floor", "connection", "count", "GFLOP each", "ms in all; GFLOP/s", "fastest single, GFLOP/s", "way"]
    return markdown(header, rows)


def _exactness(r: Result) -> str:
    rows = []
    for name, s in r["subjects"].items():
        if "rates" in s:
            found = s["accuracy"]
            right = f"{100 * found['accuracy']:.2f} ({found['images']})" if found else "not measured"
            rows.append([name, f"{s['rates']['share_differing']:.2e}", f"{s['rates']['relative_l2']:.2e}", right])
    if "input_noise" in r:
        noise = r["input_noise"]
        yardstick = "float32, input changed by 1e-6 of itself"
        rows.append([yardstick, f"{noise['share_differing']:.2e}", f"{noise['relative_l2']:.2e}", ""])
    header = ["rates against float32", "share that differs", "relative L2", "test accuracy, % (images)"]
    return markdown(header, rows)


def _solvers(r: Result) -> str:
    rows = []
    for problem, cells in r["solvers"].items():
        for c in cells:
            if c["tolerance"] is None:
                rows.append([problem, c["solver"], "none reaches it", "", f"{c['error']:.1e}", ""])
            else:
                cost = [f"{c['tolerance']:g}", str(c["products"]), f"{c['error']:.1e}", _ms(c, "median_s")]
                rows.append([problem, c["solver"], *cost])
    return markdown(["problem", "solver", "tol", "products", "relative error", "median, ms"], rows)


def _memory(r: Result) -> str:
    rows = []
    for name, s in r["subjects"].items():
        cells = s.get("memory", [])
        lowest = min((c["peak_bytes"] for c in cells), default=0)
        for c in cells:
            ratio = _ratio(c["peak_bytes"], lowest) if len(cells) > 1 else ""
            rows.append([name, str(c["time_steps"]), f"{c['peak_bytes'] / 1e6:.1f}", ratio, _ms(c, "minimum_s")])
    return markdown(["peak memory of", "T", "MB above the start", "over the least", "fastest step, ms"], rows)


def _ms(times: dict[str, Any] | None, key: str) -> str:
    return f"{1e3 * times[key]:.2f}" if times and key in times else ""


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a is not None and b else ""


def _mark(floor: dict[str, Any]) -> str:
    return " (floor rejected)" if floor["rejected"] else ""


def _outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of the median step of every subject, with the floors as lines; one panel per case."""
    from matplotlib.figure import Figure

    shown = [r for r in results if any("step" in s for s in r["subjects"].values())]
    if not shown:
        return
    figure = Figure(figsize=(5 * len(shown), 3.8), layout="constrained")
    colors = {"ours": "tab:blue", "original": "tab:gray", "peer": "tab:orange"}
    for axes, r in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        subjects = {name: s for name, s in r["subjects"].items() if "step" in s}
        heights = [1e3 * s["step"]["median_s"] for s in subjects.values()]
        bars = axes.barh(list(subjects), heights, color=[colors[s["kind"]] for s in subjects.values()])
        numbers = [f"{h:,.0f}" if h >= 100 else f"{h:.3g}" for h in heights]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # lines of floors would go through the numbers
        axes.bar_label(bars, labels=numbers, padding=2, fontsize=8, bbox=paper, zorder=3)
        for (precision, floor), style in zip(r["floors"].items(), ("-", "--", ":", "-.") * 9, strict=False):
            if not floor["rejected"]:
                axes.axvline(1e3 * floor["floor_s"], color="black", linestyle=style, label=f"floor, {precision}")
        title = f"{r['case']}, T = {r['time_steps']}, batch {r['batch']}"
        axes.set(xlabel="ms per training step (median)", title=title)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
