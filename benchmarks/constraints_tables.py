"""The tables of benchmarks/constraints.py."""

from __future__ import annotations

import statistics
from typing import Any

from _common import markdown

Cell = dict[str, Any]
TIMES = (5, 30, 100, 300)  # time steps at which convergence is looked at
TITLES = {
    "f400": "F400 (784-400-10), Fashion-MNIST, T = 5, 2 epochs",
    "conv": "16 maps of 14x14, 5x5 feedback, 10,000 + 2,000 images of Fashion-MNIST, T = 10, 2 epochs",
}


def report(content: Cell) -> str:
    cells, costs = content.get("cells", []), content.get("times", [])
    parts = []
    for case in dict.fromkeys(c["case"] for c in cells):
        own = [c for c in cells if c["case"] == case]
        groups = {v: [c for c in own if c["variant"] == v] for v in dict.fromkeys(c["variant"] for c in own)}
        parts += [f"### {TITLES[case]}", kept(groups), converged(groups)]
        rows = [row for c in own for row in c.get("scaled", [])]
        if rows:
            parts += ["The feedback weight trained with `none` (seed 0), scaled afterwards; IF:", norm_sweep(rows)]
    if costs:
        parts += ["### Cost of a training step", cost(costs)]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def kept(groups: dict[str, list[Cell]]) -> str:
    """Norms are the largest over the seeds."""
    head = ["constraint", "norm at the end", "norm, largest in training", "excess over c, largest"]
    head += ["matrix norm at the end", "test accuracy, %", "failed solves", "Krylov steps: mean, most"]
    rows = []
    for name, cells in groups.items():
        done = [c for c in cells if "failed" not in c]
        largest = max(c["norm_max"] for c in cells)
        bound = cells[0]["bound"]
        excess = "no bound" if bound is None else f"{100 * max(largest / bound - 1, 0):.1f} %"
        if not done:
            rows.append([name, "", f"{largest:.2f}", excess, "", "training diverged", "", ""])
            continue
        accuracy = [100 * c["test_accuracy"] for c in done]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        lost = f"; {len(cells) - len(done)} of {len(cells)} diverged" if len(done) < len(cells) else ""
        rows.append(
            [name, f"{max(c['norm_end'] for c in done):.3f}", f"{largest:.3f}", excess]
            + [f"{max(c['matrix_norm_end'] for c in done):.3f}", f"{statistics.fmean(accuracy):.2f}{spread}{lost}"]
            + [f"{sum(c['solver_failures'] for c in done)} of {sum(c['solves'] for c in done)}"]
            + [f"{statistics.fmean(c['krylov_steps'] for c in done):.1f}, {max(c['krylov_steps_max'] for c in done)}"]
        )
    return markdown(head, rows)


def converged(groups: dict[str, list[Cell]]) -> str:
    """Means over the seeds, except for the ends of the spectrum."""
    at = "/".join(map(str, TIMES))
    head = ["constraint", "norm of J, largest", "eigenvalue of J, largest", f"residual of LIF at t = {at}, %"]
    head += [f"residual of IF at t = {at}, %", f"distance of IF at t = {at}, %"]
    head += ["samples not converged, %", "elsewhere, %", "equilibrium unsolved, %"]
    rows = []
    for name, cells in groups.items():
        done = [c for c in cells if "failed" not in c]
        if done:
            rows.append(
                [name, f"{max(c['jacobian'] for c in done):.2f}", f"{max(c['eigenvalue'] for c in done):.2f}"]
                + [curve([c["trained"]["residual"] for c in done]), *approached([c["if"] for c in done])]
            )
    return markdown(head, rows)


def norm_sweep(rows: list[Cell]) -> str:
    at = "/".join(map(str, TIMES))
    head = ["norm / V_th", "norm of J, largest", "eigenvalue of J, largest", f"residual at t = {at}, %"]
    head += [f"distance at t = {at}, %", "samples not converged, %", "elsewhere, %", "equilibrium unsolved, %"]
    return markdown(
        head,
        [[f"{r['scale']:g}", f"{r['jacobian']:.2f}", f"{r['eigenvalue']:.2f}", *approached([r])] for r in rows],
    )


def approached(found: list[Cell]) -> list[str]:
    solved = [f["distance"] for f in found if f["distance"] is not None]
    shares = [
        f"{100 * statistics.fmean(f[key] for f in found):.1f}" for key in ("not_converged", "elsewhere", "unsolved")
    ]
    return [curve([f["residual"] for f in found]), curve(solved) if solved else "–", *shares]


def curve(curves: list[list[float]]) -> str:
    return " / ".join(f"{100 * statistics.fmean(values):.2g}" for values in zip(*curves, strict=True))


def cost(times: list[Cell]) -> str:
    head = ["case", "constraint", "step, ms", "of it the constraint, ms", "Krylov steps", "rounds"]
    rows = [
        [t["case"], t["constraint"], f"{1e3 * t['step_seconds']:.2f}", f"{1e3 * t['constraint_seconds']:.3f}"]
        + [f"{t['krylov_steps']:.1f}", str(t["rounds"])]
        for t in times
    ]
    return markdown(head, rows)
