"""Draw every surrogate with its default options: `python scripts/plot_surrogates.py [surrogates.png]`.

One panel each: the step (what the neuron does), the primitive and the derivative (what the gradient uses), over
x = u - V_th. The suffix of the file chooses the format (png, pdf, svg). Needs `pip install -e '.[viz]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ide_snn.surrogate import SURROGATES, Surrogate, heaviside

LIMIT = 4.0  # of x


def has_primitive(surrogate: Surrogate) -> bool:
    return type(surrogate).primitive is not Surrogate.primitive


def draw(axes: Any, name: str, surrogate: Surrogate) -> None:
    """One panel."""
    # half a step off the origin, so that no point sits on the jump
    x = torch.linspace(-LIMIT, LIMIT, 1000, dtype=torch.float64)
    axes.plot(x, heaviside(x), color="0.6", linewidth=1.2, label="step")
    if has_primitive(surrogate):
        axes.plot(x, surrogate.primitive(x), color="tab:blue", linewidth=1.6, label="primitive")
    axes.plot(x, surrogate.derivative(x), color="tab:orange", linewidth=1.6, linestyle="--", label="derivative")
    note = "" if has_primitive(surrogate) else ", no primitive"
    axes.set_title(f"{name}\n{surrogate.extra_repr()}{note}", fontsize=9)
    axes.set_xlim(-LIMIT, LIMIT)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)


def figure() -> Any:
    """The figure of all surrogates, a grid of four columns.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install -e '.[viz]'") from error
    rows = -(-len(SURROGATES) // 4)
    figure = Figure(figsize=(11, 2.5 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 4, sharex=True).flatten()
    for axes, (name, surrogate) in zip(grid, SURROGATES.items(), strict=False):
        draw(axes, name, surrogate())
    for axes in grid[len(SURROGATES) :]:
        axes.set_axis_off()
    figure.supxlabel("x = membrane potential - threshold", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw all surrogate functions")
    parser.add_argument("output", nargs="?", default="surrogates.png", help="file to write (default: surrogates.png)")
    output = parser.parse_args(arguments).output
    figure().savefig(output, dpi=150)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
