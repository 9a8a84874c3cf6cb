"""Constraints on the feedback weight: do they keep ||W_fb|| <= c, what do they cost and give, do the rates converge?

    python benchmarks/constraints.py f400 --data-dir path/to/data       trains and measures, seeds 0 to 2
    python benchmarks/constraints.py conv --data-dir path/to/data
    python benchmarks/constraints.py --time-only --data-dir path/to/data     costs alone, on an idle machine
    python benchmarks/constraints.py --report                           writes constraints.md from what is there

||W_fb|| is the operator norm at the real map size of the weight in use: of every 10th training forward, and of the
trained network as it is evaluated. Convergence is measured on test images with the trained weights, for the trained
neuron and for IF (leak 1), which has the same equilibrium map but no floor:

    residual  ||f(a[t]) - a[t]|| / ||a[t]||        distance  ||a[t] - a*|| / ||a*||,   a* = f(a*) solved

A sample's rates "do not converge" where the residual of the IF simulation still exceeds 5 % at t = 300; they went
"elsewhere" where a* was found but the distance then exceeds 10 %. Writes constraints.json after every run; what it has
is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleave, machine
from constraints_tables import TIMES, Cell, report
from torch import Tensor, nn

from ide_snn import Anderson, NeuronParams, Solution
from ide_snn.analysis import BlockSpectra, Observation, measure
from ide_snn.analysis.observe import evaluation_mode
from ide_snn.block import FeedbackSNN
from ide_snn.config import (
    Loaders,
    build_dataset,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    load_config,
    resolve_device,
)
from ide_snn.hydra_tools import quote
from ide_snn.models import FeedbackClassifier
from ide_snn.operators import Operator
from ide_snn.optimizations import SpectralOperator, get_constraint, raw_weight, update_constraints
from ide_snn.precision import round_products
from ide_snn.reporting import versions, write_json
from ide_snn.schemas import Config
from ide_snn.training import NonFiniteLossError, fit

CASES = {
    "f400": ["experiment=fashion_mnist_f400_lif", "trainer.epochs=2", "schedule.milestones=[1]"],
    "conv": [
        "experiment=fashion_mnist_f64c5_lif",
        "model.channels=16",
        "time_steps=10",
        "dataset.train_limit=10000",
        "dataset.test_limit=2000",
        "trainer.epochs=2",
        "schedule.milestones=[1]",
    ],
}
CONSTRAINTS = {
    name: [f"model.constraint={name}"]
    for name in ("spectral_matrix", "spectral_operator", "frobenius", "weight_norm", "none")
}
LOOSE = {  # where the norm is free to grow; with the first seed only
    "none, learning rate 0.2": ["model.constraint=none", "optimizer.lr=0.2"],
    "spectral_operator, gamma 2": ["model.constraint=spectral_operator", "model.gamma=2"],
}
SAMPLES = {"f400": 500, "conv": 64}
NOT_CONVERGED, ELSEWHERE = 0.05, 0.10
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)  # of ||W_fb|| / V_th, for trained weights that are scaled
SOLVER = Anderson(tol=1e-5, max_steps=500)
EVERY, WARM_UP = 10, 3


class NormWatch:
    """||W_fb|| of the weight in use in every `EVERY`-th training forward of a block."""

    def __init__(self, block: FeedbackSNN, map_shape: tuple[int, ...]) -> None:
        self.op: Any = block.feedback.op
        self.probe = SpectralOperator(
            Operator.of(self.op), raw_weight(self.op), 1.0, input_size=map_shape[1:], generator=torch.Generator()
        )  # a generator of its own: dropout is the same with and without the watch
        self.norms: list[float] = []
        self.forwards = 0
        block.register_forward_hook(self)

    def __call__(self, block: nn.Module, _inputs: object, _output: object) -> None:
        if block.training:
            if self.forwards % EVERY == 0:
                self.norms.append(float(self.probe.exact_norm(self.op.weight)))
            self.forwards += 1


class Approach:
    """Residual and distance of every sample at TIMES; a `Meter`.

    `analysis.Convergence` has the means over samples with a solved equilibrium; here the others are what matters.
    """

    def __init__(self) -> None:
        self.residual: list[Tensor] = []  # [times, B]
        self.distance: list[Tensor] = []
        self.solved: list[Tensor] = []
        self.outcomes: list[str] = []

    def add(self, observation: Observation, labels: Tensor) -> None:  # noqa: ARG002
        (site,) = observation.sites
        with evaluation_mode(site.block), torch.no_grad():
            equilibrium, solution = site.block.equilibrium(site.x, SOLVER)
            _, f = site.block.linearisation_point(site.x)
            rates = [site.over_time[t - 1] for t in TIMES]
            self.residual.append(torch.stack([_norms(a - f(a, "running")) / _norms(a) for a in rates]))
            self.distance.append(torch.stack([_norms(a - equilibrium) / _norms(equilibrium) for a in rates]))
        self.solved.append(solution.stats.residual <= SOLVER.tol)
        self.outcomes.append(str(solution.outcome))

    def as_dict(self) -> Cell:
        residual, distance, solved = torch.cat(self.residual, 1), torch.cat(self.distance, 1), torch.cat(self.solved)
        last = distance[-1][solved]
        return {
            "residual": residual.mean(1).tolist(),
            "not_converged": float((residual[-1] > NOT_CONVERGED).double().mean()),
            "distance": distance[:, solved].mean(1).tolist() if solved.any() else None,
            "elsewhere": float((last > ELSEWHERE).sum()) / len(solved),
            "unsolved": 1 - float(solved.double().mean()),
            "outcomes": self.outcomes,
        }


def _norms(a: Tensor) -> Tensor:
    return a.flatten(1).double().norm(dim=1)


def approach(model: FeedbackClassifier, x: Tensor, y: Tensor, leak: float) -> Cell:
    """How the rates of the trained network approach the equilibrium if its neurons had this leak."""
    block, meter = model.block, Approach()
    neuron, steps = block.neuron, block.time_steps
    try:
        block.neuron, block.time_steps = NeuronParams(neuron.v_threshold, leak), max(TIMES)
        measure(model, list(zip(x.split(100), y.split(100), strict=True)), meter)
    finally:
        block.neuron, block.time_steps = neuron, steps
    return meter.as_dict()


def scaled(model: FeedbackClassifier, x: Tensor, y: Tensor) -> list[Cell]:
    """The same with IF neurons for the trained feedback weight scaled to a norm; for `none` only."""
    op: Any = model.block.feedback.op
    weight, v_threshold, rows = op.weight, model.block.neuron.v_threshold, []
    trained = weight.detach().clone()
    norm = spectrum(model, x, y)["norm_end"]
    with torch.no_grad():
        for scale in SCALES:
            weight.copy_(trained * (scale * v_threshold / norm))
            rows.append({"scale": scale, **approach(model, x, y, 1.0), **spectrum(model, x, y)})
        weight.copy_(trained)
    return rows


def spectrum(model: FeedbackClassifier, x: Tensor, y: Tensor) -> Cell:
    """Norms of W_fb; largest |eigenvalue| and ||J||_2 over 8 samples, at the rates of the trained T.

    NaN where ARPACK found no eigenvalue.
    """
    meter = BlockSpectra()
    measure(model, [(x[:8], y[:8])], meter)
    (found,) = meter.result.values()
    known = [value for value in found.eigenvalue if not math.isnan(value)]
    return {
        "norm_end": found.feedback.operator,
        "matrix_norm_end": found.feedback.matrix,
        "eigenvalue": max(known, default=math.nan),
        "jacobian": max(found.norm),
    }


def prepare(
    case: str, overrides: list[str], seed: int, options: argparse.Namespace
) -> tuple[Config, FeedbackClassifier, Loaders]:
    where = [quote("data_dir", options.data_dir), f"device={options.device}", f"seed={seed}"]
    config = load_config([*CASES[case], *overrides, *where, *options.overrides])
    device = resolve_device(config.device)
    torch.manual_seed(seed)
    model = build_model(config).to(device)
    if not isinstance(model, FeedbackClassifier):
        raise SystemExit("error: only networks with a feedback have a constraint on it: leave method as it is")
    return config, model, build_loaders(config, build_dataset(config), device)


def run(case: str, variant: str, seed: int, options: argparse.Namespace) -> Cell:
    """Trains one network and measures it."""
    round_products("float32")
    config, model, loaders = prepare(case, (CONSTRAINTS | LOOSE)[variant], seed, options)
    watch = NormWatch(model.block, model.population_shapes[-1])
    krylov_steps: list[int] = []
    handle = model.block.register_solve_hook(functools.partial(note_steps, krylov_steps))
    constraint = get_constraint(model.block.feedback.op)
    cell: Cell = {"case": case, "variant": variant, "seed": seed, "bound": constraint.bound if constraint else None}
    try:
        result = fit(
            model,
            loaders.train,
            loaders.test,
            optimizer=build_optimizer(config, model),
            schedule=build_schedule(config),
            epochs=config.trainer.epochs,
            progress=False,
        )
    except NonFiniteLossError as error:
        return cell | {"failed": str(error), "norm_max": max(watch.norms)}
    handle.remove()
    batches = list(loaders.test)
    x, y = (torch.cat(parts)[: SAMPLES[case]] for parts in zip(*batches, strict=True))
    trained = spectrum(model, x, y)
    cell |= {
        "norm_start": watch.norms[0],
        "norm_max": max(*watch.norms, trained["norm_end"]),
        **trained,
        "test_accuracy": result.test_accuracy_last,
        "test_loss": result.test_loss,
        "seconds": result.seconds,
        "solves": result.solves,
        "solver_failures": result.solver_failures,
        "krylov_steps": statistics.fmean(krylov_steps),
        "krylov_steps_max": max(krylov_steps),
        "trained": approach(model, x, y, model.block.neuron.leak),
        "if": approach(model, x, y, 1.0),
    }
    if variant == "none" and seed == 0:
        cell["scaled"] = scaled(model, x, y)
    return cell


def times(case: str, rounds: int, options: argparse.Namespace) -> list[Cell]:
    """Medians of a training step and of the constraint's share of it, the constraints taking turns."""
    calls: dict[str, Callable[[int], object]] = {}
    krylov_steps: dict[str, list[int]] = {name: [] for name in CONSTRAINTS}
    for name, overrides in CONSTRAINTS.items():
        config, model, loaders = prepare(case, overrides, 0, options)
        x, y = next(loaders.train.epoch(0))  # the same for all
        model.block.register_solve_hook(functools.partial(note_steps, krylov_steps[name]))
        calls[name] = functools.partial(step, model.train(), build_optimizer(config, model), x, y)
        if get_constraint(model.block.feedback.op) is not None:
            calls[f"{name}, constraint"] = functools.partial(constraint_alone, model.block.feedback.op)
    device = resolve_device(options.device)
    interleave(calls, dict.fromkeys(calls, WARM_UP), device)
    for seen in krylov_steps.values():
        seen.clear()
    found = interleave(calls, dict.fromkeys(calls, rounds), device)
    return [
        {
            "case": case,
            "constraint": name,
            "batch": len(y),
            "step_seconds": found[name].median,
            "constraint_seconds": found[f"{name}, constraint"].median if f"{name}, constraint" in found else 0.0,
            "krylov_steps": statistics.fmean(krylov_steps[name]),
            "rounds": rounds,
        }
        for name in CONSTRAINTS
    ]


def note_steps(seen: list[int], solution: Solution) -> None:
    seen.append(solution.stats.steps)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, _round: int) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def constraint_alone(op: Any, _round: int) -> None:
    """The estimate's update, W_fb, and the gradient from W_fb back to W and alpha."""
    update_constraints(op)
    weight = op.weight
    torch.autograd.grad(weight, list(op.parameters()), torch.ones_like(weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; both if none is named")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="+", default=[], help="of the configuration, e.g. trainer.epochs=1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/constraints"))
    options = parser.parse_args()
    cases = options.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "constraints.json"
    content: Cell = json.loads(file.read_text()) if file.exists() else {}
    where = {**versions(resolve_device(options.device)), **machine(), "overrides": options.overrides}
    if options.time_only:
        rounds = {"f400": 100, "conv": 20}
        content["times"] = [cell for case in cases for cell in times(case, rounds[case], options)]
        content["times_machine"] = where
    elif not options.report:
        train_all(cases, content, where, file, options)
    write_json(file, content)
    (options.output / "constraints.md").write_text(report(content))
    print(report(content))


def train_all(cases: list[str], content: Cell, where: Cell, file: Path, options: argparse.Namespace) -> None:
    cells = content.setdefault("cells", [])
    content["machine"] = where
    done = {(c["case"], c["variant"], c["seed"]) for c in cells}
    for seed in options.seeds:  # the slow index, so that what is done so far can be compared
        for case in cases:
            for variant in CONSTRAINTS | (LOOSE if seed == options.seeds[0] else {}):
                if (case, variant, seed) not in done:
                    cells.append(run(case, variant, seed, options))
                    print(json.dumps({k: v for k, v in cells[-1].items() if k != "scaled"}), flush=True)
                    write_json(file, content)


if __name__ == "__main__":
    main()
