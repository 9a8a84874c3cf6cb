"""The single measurements of `steps.py`, each returning plain containers."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _common import Peak, Times, interleave, synchronize
from cases import Batches, Network, Ours, Setting, Variant, the_original
from peers import build_peer, torchdeq_solvers
from torch import Tensor

from ide_snn import Anderson, Gmres
from ide_snn.evaluation import evaluate
from ide_snn.kernels import in_layout_of
from ide_snn.record import Rates, Record
from ide_snn.solvers import FixedPointProblem, LinearProblem, Problem, Solver, solve

NOISE = 1e-6  # relative, on the input: what float32 rounding does to it
EXACT = Gmres(tol=1e-6, max_steps=200, restart=100)
TOLERANCES = tuple(c * 10.0**-k for k in range(1, 7) for c in (1, 0.3))
SOLVER_STEPS = 100


def build(setting: Setting, subject: Variant | str, *more: str) -> Network:
    """A subject: one of our variants, "original", or a peer by its name; `more` overrides its configuration."""
    if isinstance(subject, Variant):
        return Ours(setting.config(subject, *more))
    config = setting.config(Variant("as configured"), *more)
    if subject == "original":
        return the_original(setting, config)
    return build_peer(subject, Ours(config).model, config)


def solve_summary(ours: Ours) -> dict[str, Any]:
    """Tolerance, steps, products and outcomes of the solves since `ours.solves` was cleared."""
    stats = [stats for _, stats in ours.solves]
    return {
        "solver": str(ours.model.block.solver),
        "tolerance": ours.model.block.solver.tol,
        "steps": sorted(s.steps for s in stats)[len(stats) // 2],
        "products": sorted(s.products for s in stats)[len(stats) // 2],
        "whole_products": round(sorted(s.whole_products for s in stats)[len(stats) // 2], 2),
        "products_most": max(s.products for s in stats),
        "largest_residual": max(s.max_residual for s in stats),
        "outcomes": dict(Counter(str(outcome) for outcome, _ in ours.solves)),
    }


def block_input(ours: Ours, x: Tensor) -> Tensor:
    """What the feedback block of the model is given for images x."""
    seen: list[Tensor] = []
    handle = ours.model.block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        ours.evaluate(x)
    finally:
        handle.remove()
    return seen[0]


def simulated(ours: Ours, x: Tensor, record: Record = Record()) -> Rates:
    """What the block simulates for images x in evaluation mode."""
    inside = block_input(ours, x)
    ours.model.eval()
    found = ours.model.block.simulate(inside, record)
    ours.model.train()
    return found


def firing_rates(ours: Ours, x: Tensor) -> list[float]:
    """Spikes per neuron and time step of every population; event-driven products cost in proportion to them."""
    rates: list[float] = simulated(ours, x, Record(spike_fraction=True)).firing_rate.tolist()
    return rates


def difference(reference: Tensor, other: Tensor) -> dict[str, float]:
    """Share of the rates that differ by more than rounding, and the relative L2 distance."""
    one_spike = 1e-5  # rates are counts over T: a spike more or less is far above this
    a, b = reference.double(), other.double()
    return {
        "share_differing": float(((a - b).abs() > one_spike).double().mean()),
        "relative_l2": float((a - b).norm() / a.norm().clamp_min(1e-30)),
    }


def against_float32(reference: Ours, variants: Mapping[str, Ours], x: Tensor) -> dict[str, dict[str, float]]:
    """How far every variant's rates are from the reference's on the same weights, and what NOISE does to it."""
    state, plain = copy.deepcopy(reference.model.state_dict()), simulated(reference, x).last
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    found = {"input noise": difference(plain, simulated(reference, x * (1 + NOISE * noise)).last)}
    for name, ours in variants.items():
        own = copy.deepcopy(ours.model.state_dict())
        ours.model.load_state_dict(state)
        found[name] = difference(plain, simulated(ours, x).last)
        ours.model.load_state_dict(own)
    return found


def accuracy(ours: Ours, batches: Batches, images: int) -> dict[str, float] | None:
    """Share of the first test images that are right; None without data."""
    if batches.loaders is None or images == 0:
        return None
    test = batches.loaders.test
    number = -(-images // test.batch_size)
    result = evaluate(ours.model, list(itertools.islice(test.epoch(0), number)))
    return {"accuracy": result.accuracy, "images": result.samples}


def adjoint_problem(ours: Ours, x: Tensor, y: Tensor) -> Problem:
    """The linear system of a backward pass on this batch."""
    model = ours.model
    point, f = model.block.linearisation_point(block_input(ours, x))
    leaf = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.classifier(leaf.flatten(1)), y), leaf)
    return f.adjoint_problem(f.linearise(point.detach(), "running"), in_layout_of(point, gradient))


def equilibrium_problem(ours: Ours, x: Tensor) -> Problem:
    """The equilibrium of this batch, from rest."""
    point, f = ours.model.block.linearisation_point(block_input(ours, x))

    def step(a: Tensor) -> Tensor:
        with torch.no_grad():
            return f(a, "running")

    return FixedPointProblem(step, torch.zeros_like(point))


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, a: Tensor) -> Tensor:
        self.calls += 1
        return self.function(a)


def compare_solvers(
    problem: Problem, own: Solver, rounds: int, others: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Our solver and TorchDEQ's on one problem: times and products to the same distance from its solution.

    Each of TorchDEQ's runs at the loosest tolerance with which it comes as close as ours.
    """
    if isinstance(problem, LinearProblem):  # without what it would learn of how many steps a solve takes
        exact = solve(replace(problem, ahead=None), EXACT).value
    else:
        exact = solve(problem, Anderson(tol=1e-6, max_steps=300)).value
    found = solve(problem, own)
    target = float((found.value - exact).norm() / exact.norm())
    rows = [_row(f"ours, {type(own).__name__}", own.tol, found.stats.products, target)]
    calls: dict[str, Callable[[int], object]] = {rows[0]["solver"]: lambda _: solve(problem, own)}
    for name, solver in torchdeq_solvers() if others else ():
        row, call = _match(f"TorchDEQ, {name}", solver, problem, exact, target)
        rows.append(row)
        if call is not None:
            calls[row["solver"]] = call
    times = interleave(calls, dict.fromkeys(calls, rounds), device)
    for row in rows:
        row |= times[row["solver"]].summary() if row["solver"] in times else {}
    return rows


def _row(solver: str, tol: float | None, products: int | None, error: float | None) -> dict[str, Any]:
    return {"solver": solver, "tolerance": tol, "products": products, "error": error}


def _match(
    name: str, solver: Callable[..., Tensor], problem: Problem, exact: Tensor, target: float
) -> tuple[dict[str, Any], Callable[[int], object] | None]:
    error = float("inf")
    for tol in TOLERANCES:
        f = Counted(problem.image)
        value = solver(f, problem.start, tol, SOLVER_STEPS)
        error = float((value - exact).norm() / exact.norm())
        if error <= target:
            return _row(name, tol, f.calls, error), partial(_again, solver, problem, tol)
    return _row(name, None, None, error), None


def _again(solver: Callable[..., Tensor], problem: Problem, tol: float, _number: int) -> Tensor:
    return solver(problem.image, problem.start, tol, SOLVER_STEPS)


def peak_memory(setting: Setting, subject: Variant | str, time_steps: int, steps: int) -> dict[str, Any]:
    """Peak of a few steps above the level at which model, optimizer and data exist; for a process of its own."""
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    network = build(setting, subject, f"time_steps={time_steps}")
    x, y = next(iter(Batches(setting.config(Variant("as configured"), "data_dir=null"))))
    peak, seconds = Peak(device), []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        network.step(x, y)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"time_steps": time_steps, "peak_bytes": peak.read(), **Times(tuple(seconds)).summary()}


def timed_batches(batches: Batches, rounds: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of the rounds; every subject sees the same one in a round."""
    return list(itertools.islice(batches, max(1, min(rounds, Batches.RANDOM))))


def warm(network: Network, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> None:
    network.train(batches, steps)
