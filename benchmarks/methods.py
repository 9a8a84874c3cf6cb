"""Training methods against T: peak memory, time per step, accuracy after the same number of steps.

    python benchmarks/methods.py --data-dir path/to/data                      F400, T = 5, 10, 30, 100
    python benchmarks/methods.py f64c5 --data-dir path/to/data --limit 240

Every cell is a process of its own that trains the experiment's network with the same data order, recipe and seed, so
nothing of one method's memory remains for the next. Peak memory is counted above the level at which model, optimizer
and data exist, over the same number of steps for all: the resident set on a CPU, torch's allocator on a GPU. "Kept for
backward" is what autograd saves in one forward of the whole model, counted by `saved_tensors_hooks`. Times are medians
over the steps; run it on an otherwise idle machine. A cell that would train for longer than --limit seconds stops
there: it has its memory and time, and its accuracy is stated as not run.

--complete trains the cells that stopped early again, to the end and for their accuracy alone: their memory and time
stay, so this needs no idle machine.

Writes methods.json after every cell, methods.md and, with matplotlib, methods.png to --output; cells that the folder's
methods.json has already are not run again; every cell says which version, machine and thread count it is of.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import Peak, in_a_process, markdown

from ide_snn.config import (
    build_dataset,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    load_config,
    resolve_device,
)
from ide_snn.evaluation import evaluate
from ide_snn.hydra_tools import quote
from ide_snn.optim import set_learning_rate
from ide_snn.precision import round_products
from ide_snn.reporting import versions

MIN_STEPS = 10  # of a cell that stops early: enough for a median
EXPERIMENTS = {"f400": "fashion_mnist_f400_lif", "f64c5": "mnist_f64c5_lif"}
METHODS = {
    "ide": ["method=ide"],
    "bptt": ["method=bptt"],
    "bptt, spikes as numbers": ["method=bptt", "method.pack=false"],
    "bptt, recompute 5": ["method=bptt", "method.recompute=5"],
    "dsr": ["method=dsr"],
}


def kept_for_backward(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of all that autograd saves in one forward, each storage once, parameters and the input left out."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive: addresses stay unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


def measure(network: str, method: str, time_steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """One cell, in the present process."""
    config = load_config(
        [f"experiment={EXPERIMENTS[network]}", *METHODS[method], f"time_steps={time_steps}", f"seed={options.seed}"]
        + [quote("data_dir", options.data_dir), f"device={options.device}"]
    )
    torch.set_num_threads(options.threads)
    device = resolve_device(config.device)
    round_products("float32")
    torch.manual_seed(config.seed)
    model = build_model(config).to(device).train()
    optimizer, schedule = build_optimizer(config, model), build_schedule(config)
    loaders = build_loaders(config, build_dataset(config), device)
    rates = [group["lr"] for group in optimizer.param_groups]
    peak, memory, times, losses, step, began = Peak(device), 0, [], [], 0, time.perf_counter()
    for epoch in range(1 + options.steps // len(loaders.train)):
        for x, y in loaders.train.epoch(epoch):
            out_of_time = step >= MIN_STEPS and time.perf_counter() - began > options.limit
            if step == options.steps or out_of_time:
                break
            start = time.perf_counter()
            set_learning_rate(optimizer, rates, schedule(step, epoch))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for a GPU
            times.append(time.perf_counter() - start)
            step += 1
            if step == MIN_STEPS:
                memory = peak.read()
    kept, complete = kept_for_backward(model, x), step == options.steps and not options.memory_only
    result = evaluate(model, loaders.test) if complete else None
    return {
        "network": network,
        "method": method,
        "time_steps": time_steps,
        "seed": options.seed,
        "steps": step,
        "peak_bytes": memory,
        "kept_bytes": kept,
        "seconds_per_step": statistics.median(times),
        "test_accuracy": result.accuracy if result else None,
        "accuracy_steps": step if complete else None,
        "firing_rate": result.firing_rate if result else None,
        "train_loss": statistics.fmean(losses[-20:]) if complete else None,
    }


def table(cells: list[dict[str, Any]]) -> str:
    rows = []
    for c in cells:
        rows.append([c["network"], c["method"], str(c["time_steps"]), f"{c['peak_bytes'] / 1e6:.1f}"])
        rows[-1] += [f"{c['kept_bytes'] / 1e6:.2f}", f"{1e3 * c['seconds_per_step']:.1f}", str(c["steps"])]
        is_known = c["test_accuracy"] is not None
        rows[-1] += [f"{100 * c['test_accuracy']:.2f}", str(c["accuracy_steps"])] if is_known else ["not run", "–"]
    header = ["network", "method", "T", "peak memory, MB", "kept for backward, MB"]
    return markdown([*header, "ms per step", "of steps", "test accuracy, %", "after steps"], rows)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    values = (
        ("peak memory, MB", lambda c: c["peak_bytes"] / 1e6),
        ("time per step, ms", lambda c: 1e3 * c["seconds_per_step"]),
        (
            "test accuracy after the steps, %",
            lambda c: math.nan if c["test_accuracy"] is None else 100 * c["test_accuracy"],
        ),
    )
    for axes, (label, value) in zip(figure.subplots(1, 3), values, strict=True):
        for method in dict.fromkeys(c["method"] for c in cells):
            own = [c for c in cells if c["method"] == method]
            axes.plot([c["time_steps"] for c in own], [value(c) for c in own], marker="o", label=method)
        axes.set(xscale="log", xlabel="time steps T", ylabel=label)
        axes.grid(alpha=0.3)
        if "accuracy" not in label:
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{cells[0]['network']}: training methods against T")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="f400", choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--time-steps", nargs="+", type=int, default=[5, 10, 30, 100])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of training per cell")
    parser.add_argument("--complete", action="store_true", help="also train cells that stopped early, for the accuracy")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes whose median peak memory counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"))
    parser.set_defaults(memory_only=False)
    options = parser.parse_args()
    if options.steps < MIN_STEPS:
        parser.error(f"--steps must be at least {MIN_STEPS}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "methods.json"
    where = {**versions(resolve_device(options.device)), "threads": options.threads}
    cells: list[dict[str, Any]] = json.loads(file.read_text())["cells"] if file.exists() else []
    done = {(c["network"], c["method"], c["time_steps"], c["seed"]): c for c in cells}
    for time_steps in options.time_steps:
        for method in options.methods:
            cell = done.get((options.network, method, time_steps, options.seed))
            if cell is not None and not (options.complete and cell["test_accuracy"] is None):
                continue
            try:
                found = in_a_process(measure, options.network, method, time_steps, options)
                if cell is None:  # pages of libraries come and go
                    few = argparse.Namespace(**{**vars(options), "steps": MIN_STEPS, "memory_only": True})
                    more = [
                        in_a_process(measure, options.network, method, time_steps, few)
                        for _ in range(options.memory_runs - 1)
                    ]
                    found["peak_bytes"] = statistics.median(run["peak_bytes"] for run in (found, *more))
                    found["memory_runs"] = options.memory_runs
            except RuntimeError as error:
                raise SystemExit(f"error: {method}, T = {time_steps}: {error}") from None
            if cell is None:
                cells.append(cell := {**found, "measured": where})
            else:
                cell.update(
                    {key: found[key] for key in ("test_accuracy", "accuracy_steps", "firing_rate", "train_loss")}
                )
                cell["completed"] = where
            print(table([cell]).splitlines()[-1], flush=True)
            cells.sort(key=lambda c: (c["time_steps"], list(METHODS).index(c["method"]), c["seed"]))
            file.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
    (options.output / "methods.md").write_text(table(cells))
    try:
        draw(cells, options.output / "methods.png")
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -e '.[viz]')")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
