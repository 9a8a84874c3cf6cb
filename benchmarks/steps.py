"""The training step beside its floor, the original implementation and other libraries: time, memory, exactness.

    python benchmarks/steps.py f400 --data-dir DATA
    python benchmarks/steps.py f400 f64c5 --data-dir DATA --original path/to/IDE-FSNN --precision float32 exact fast \\
        --variant "precision=fast solver=anderson" --warm-steps 300 --rounds 20 --output results/benchmarks/cpu

A step is zero_grad, `F.cross_entropy(net(x), y).backward()`, `optimizer.step()` with network, optimizer and solver of
the experiment's configuration, LIF neurons and dropout on, on weights that --warm-steps steps have trained (every
variant starts from the same; the original trains its own as long) or, ours alone, on those of a run's --checkpoint.
Timed steps have the learning rate 0 and batch norms the momentum 0: the network stays that which the floor is of, and
with it the spikes. All steps and floors of a case take turns in one process and see the same batch in the same round;
medians and minima over the rounds are given. What a floor is: floor.py. Peers: peers.py. Peak memory is measured over
--memory-steps steps at every T of --memory-time-steps, each time in a process of its own; the median of --memory-runs
processes counts, since pages of libraries come and go.

Writes <case>.json after every stage, and steps.md and steps.png of all cases in --output. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import in_a_process, interleave, machine, processor_flags
from cases import CASES, Batches, Network, Ours, Setting, Variant
from floor import Floor, links_of
from measure import (
    accuracy,
    adjoint_problem,
    against_float32,
    build,
    compare_solvers,
    equilibrium_problem,
    firing_rates,
    peak_memory,
    solve_summary,
    timed_batches,
    warm,
)
from peers import BPTT, why_missing
from tables import draw, report

from ide_snn import Anderson, SolverWarning
from ide_snn.checkpoint import CheckpointError, load_checkpoint, load_weights
from ide_snn.config import ConfigError, config_to_dict, resolve_device
from ide_snn.precision import products_rounded, round_products
from ide_snn.reporting import versions, write_json
from ide_snn.solvers import solve

STAGES = ("steps", "evaluation", "rates", "solvers", "memory")
PEERS = (*BPTT, "torchdeq")


def rounded(ours: Ours, call: Callable[[int], object]) -> Callable[[int], object]:
    """The call with products rounded as in a step."""

    def scoped(number: int) -> object:
        with products_rounded(ours.rounding, next(ours.model.parameters()).device):
            return call(number)

    return scoped


class CaseRun:
    """The measurements of one case; `result` grows stage by stage."""

    def __init__(self, setting: Setting, variants: Sequence[Variant], options: argparse.Namespace) -> None:
        self.setting, self.variants, self.options = setting, variants, options
        self.device = torch.device(setting.device)
        config = setting.config(variants[0])
        self.batches = Batches(config)
        self.result: dict[str, Any] = {
            "case": setting.case,
            "batch": config.trainer.batch_size,
            "time_steps": config.time_steps,
            "data": self.batches.title,
            "warm_steps": options.warm_steps,
            "checkpoint": None,
            "machine": machine(),
            "versions": versions(self.device),
            "threads": setting.threads,
            "config": {**config_to_dict(config), "data_dir": None},  # where they lie says nothing
            "subjects": {},
            "floors": {},
            "solvers": {},
            "notes": [],
            "seconds": {},
        }
        self.ours: dict[str, Ours] = {}
        self.others: dict[str, Network] = {}
        self._prepare()

    def _prepare(self) -> None:
        state: dict[str, Any] | None = None
        for variant in self.variants:
            network = build(self.setting, variant)
            assert isinstance(network, Ours)  # build makes one of every variant
            if state is None:
                state = self._of_checkpoint(network) if self.options.checkpoint else self._warmed(network, "ours")
            network.load(state)
            self._add(variant.name, network, "ours")
            self.ours[variant.name] = network
        if self.setting.original is None:
            self._note("original", "not measured: give --original path/to/IDE-FSNN")
        else:
            original = build(self.setting, "original")
            original.load(self._warmed(original, "original"))
            self._add("original", original, "original")
        for name in self.options.peers:
            missing = why_missing(name)
            if missing is not None:
                self._note(name, missing)
            elif name in BPTT:
                self._add(name, build(self.setting, name), "peer")

    def _add(self, name: str, network: Network, kind: str) -> None:
        self.result["subjects"][name] = {"kind": kind}
        if isinstance(network, Ours):
            self.result["subjects"][name]["precision"] = precision_of(network)
        else:
            self.others[name] = network

    def _note(self, name: str, text: str) -> None:
        line = f"{name}: {text}"
        print(line, flush=True)
        self.result["notes"].append(line)

    def _rounds(self, name: str) -> int:
        peer = self.result["subjects"][name]["kind"] == "peer"
        return min(self.options.rounds, self.options.peer_rounds) if peer else int(self.options.rounds)

    def _warmed(self, network: Network, who: str) -> dict[str, Any]:
        """The state after the warm-up, kept in the folder of --weights if there is one."""
        folder, steps = self.options.weights, self.options.warm_steps
        path = folder / f"{self.setting.case}_{who}_{steps}_seed{self.setting.seed}.pt" if folder else None
        if path is not None and path.exists():
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            return state
        print(f"{self.setting.case}: {who}: {steps} steps on {self.batches.title}", flush=True)
        warm(network, self.batches, steps)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state(), path)
        return network.state()

    def _of_checkpoint(self, network: Network) -> dict[str, Any]:
        """The state with the weights of a run, and what is known of the run."""
        checkpoint = load_checkpoint(self.options.checkpoint)
        load_weights(network.model, checkpoint)
        self.result["checkpoint"] = {
            "config": {**checkpoint.config, "data_dir": None},
            **{name: checkpoint.progress[name] for name in ("epoch", "step")},
        }
        return network.state()

    def steps(self) -> None:
        """Training steps and floors, interleaved."""
        rounds, timed = self.options.rounds, timed_batches(self.batches, self.options.rounds)
        everyone: dict[str, Network] = {**self.ours, **self.others}
        for network in everyone.values():
            network.hold_weights()
            for _ in range(2):
                network.step(*timed[0])
        floors, leaders = self._floors(timed[0])
        calls: dict[str, Callable[[int], object]] = {}
        counts: dict[str, int] = {}
        for name, network in everyone.items():
            calls[name] = lambda number, network=network: network.step(*timed[number % len(timed)])  # type: ignore[misc]
            counts[name] = self._rounds(name)
        for precision, floor in floors.items():
            solves = self.ours[leaders[precision]].solves
            calls[f"floor {precision}"] = lambda _, floor=floor, solves=solves: floor.run(  # type: ignore[misc]
                solves[-1][1].products, solves[-1][1].whole_products
            )
            counts[f"floor {precision}"] = rounds
        for ours in self.ours.values():
            ours.solves.clear()
        times = interleave(calls, counts, self.device)
        for name in everyone:
            self.result["subjects"][name]["step"] = times[name].summary()
        for name, ours in self.ours.items():
            self.result["subjects"][name] |= {"solve": solve_summary(ours), "path": ours.path}
            self.result["subjects"][name]["firing_rates"] = firing_rates(ours, timed[0][0])
        self.result["floors"] = {precision: floor.result() for precision, floor in floors.items()}

    def _floors(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, Floor], dict[str, str]]:
        """The floor of every precision, and the variant whose solves count there: the first of that precision."""
        floors, leaders = {}, {}
        for name, ours in self.ours.items():
            precision = precision_of(ours)
            if precision not in floors:
                links = links_of(ours.model, batch[0], ours.solved_gradient(*batch))
                floors[precision] = Floor(links, ours.config.time_steps, precision, processor_flags())
                leaders[precision] = name
        return floors, leaders

    def evaluation(self) -> None:
        """Evaluation steps, interleaved; accuracy of each precision on the same weights."""
        timed = timed_batches(self.batches, self.options.rounds)
        everyone: dict[str, Network] = {**self.ours, **self.others}
        calls: dict[str, Callable[[int], object]] = {
            name: lambda number, network=network: network.evaluate(timed[number % len(timed)][0])  # type: ignore[misc]
            for name, network in everyone.items()
        }
        for call in calls.values():
            call(0)
        times = interleave(calls, {name: self._rounds(name) for name in calls}, self.device)
        for name in everyone:
            self.result["subjects"][name]["evaluation"] = times[name].summary()

    def rates(self) -> None:
        """Rates against float32 on the same weights, and the accuracy that goes with them."""
        first = next(iter(self.ours.values()))
        reference = next((ours for ours in self.ours.values() if precision_of(ours) == "float32"), None)
        if reference is None:
            self._note("rates", "not compared: no variant has precision float32")
            return
        x, _ = timed_batches(self.batches, 1)[0]
        found = against_float32(reference, self.ours, x)
        self.result["input_noise"] = found.pop("input noise")
        state = first.state()
        for name, ours in self.ours.items():
            ours.load(state)
            self.result["subjects"][name]["rates"] = found[name]
            self.result["subjects"][name]["accuracy"] = accuracy(ours, self.batches, self.options.accuracy_images)

    def solvers(self) -> None:
        """The solve alone in every variant, then our solvers and TorchDEQ's on the first variant's problems."""
        batch = timed_batches(self.batches, 1)[0]
        calls: dict[str, Callable[[int], object]] = {}
        for name, ours in self.ours.items():
            problem, solver = adjoint_problem(ours, *batch), ours.model.block.solver
            calls[name] = rounded(ours, lambda _, problem=problem, solver=solver: solve(problem, solver))  # type: ignore[misc]
            calls[name](0)
        times = interleave(calls, dict.fromkeys(calls, self.options.rounds), self.device)
        for name in self.ours:
            self.result["subjects"][name]["solver_alone"] = times[name].summary()
        first = next(iter(self.ours.values()))
        others = "torchdeq" in self.options.peers and why_missing("torchdeq") is None
        own = first.model.block.solver
        rounds = min(self.options.rounds, self.options.peer_rounds)
        with products_rounded(first.rounding, self.device):
            self.result["solvers"] = {
                "(I - J^T) v = g": compare_solvers(adjoint_problem(first, *batch), own, rounds, others, self.device),
                "a = f(a)": compare_solvers(
                    equilibrium_problem(first, batch[0]),
                    Anderson(tol=own.tol, max_steps=100),
                    rounds,
                    others,
                    self.device,
                ),
            }

    def memory(self) -> None:
        """Peak memory of every subject in processes of their own, at each T; peers at the case's T only."""
        subjects: list[tuple[str, Variant | str]] = [(v.name, v) for v in self.variants]
        subjects += [(name, name) for name in self.others]
        for name, subject in subjects:
            peer = self.result["subjects"][name]["kind"] == "peer"
            time_steps = [self.result["time_steps"]] if peer else self.options.memory_time_steps
            cells = []
            for t in time_steps:
                try:
                    runs = [
                        in_a_process(peak_memory, self.setting, subject, t, self.options.memory_steps)
                        for _ in range(self.options.memory_runs)
                    ]
                except RuntimeError as error:
                    self._note(f"{name}, T = {t}", f"memory not measured: {error}")
                else:
                    middle = sorted(runs, key=lambda run: run["peak_bytes"])[len(runs) // 2]
                    cells.append({**middle, "all_peak_bytes": [run["peak_bytes"] for run in runs]})
            self.result["subjects"][name]["memory"] = cells

    def run(self, write: Callable[[dict[str, Any]], None]) -> None:
        for stage in self.options.stages:
            start = time.perf_counter()
            print(f"{self.setting.case}: {stage}", flush=True)
            getattr(self, stage)()
            self.result["seconds"][stage] = round(time.perf_counter() - start, 1)
            write(self.result)


def precision_of(ours: Ours) -> str:
    """Which floor and which comparison a variant belongs to."""
    precision = getattr(ours.config, "precision", "float32")
    return str(getattr(precision, "name", precision))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", default=["f400"], metavar="CASE", help=f"of {', '.join(CASES)}; default f400")
    add("--precision", nargs="+", default=[], metavar="P", help="variants precision=P; default: as configured")
    add("--variant", nargs="+", default=[], metavar="OVERRIDES", help='more variants: "precision=fast compile=false"')
    add("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="for all variants: dataset=cifar10_jpeg …")
    add("--data-dir", help="without it images are random")
    add("--original", metavar="CLONE", help="a clone of github.com/pkuxmq/IDE-FSNN")
    add("--peers", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    add("--rounds", type=int, default=20)
    add("--peer-rounds", type=int, default=5)
    add("--warm-steps", type=int, default=20, help="training steps before measuring; exactness is claimed from 300 on")
    add("--weights", type=Path, metavar="FOLDER", help="keeps warmed-up weights there and takes them from there")
    add("--checkpoint", type=Path, metavar="FILE", help="of a run: its weights instead of the warm-up, for ours")
    add("--batch", type=int, help="default: the paper's 128, for CIFAR 32 on a CPU")
    add("--accuracy-images", type=int, default=1000, help="test images for the accuracy; 0: none")
    add("--memory-time-steps", nargs="+", type=int, default=[5, 100], metavar="T")
    add("--memory-steps", type=int, default=3)
    add("--memory-runs", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="auto")
    add("--output", type=Path, default=Path("outputs/steps"))
    options = parser.parse_args(arguments)
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}; choose from {', '.join(CASES)}")
    for name in ("rounds", "peer_rounds", "memory_steps", "memory_runs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.checkpoint is not None and len(options.cases) > 1:
        parser.error(f"--checkpoint is of one network, but there are the cases {', '.join(options.cases)}")
    if options.warm_steps < 0:
        parser.error("--warm-steps must not be negative")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    round_products("float32")
    variants = Variant.all_of(options.precision, options.variant)
    shared = Setting(
        case="",
        device=str(device),
        seed=options.seed,
        threads=options.threads,
        batch=options.batch,
        data_dir=options.data_dir,
        original=options.original,
        overrides=tuple(options.overrides),
    )
    options.output.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        write_json(options.output / f"{result['case']}.json", result)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)  # outcomes are counted
        for case in options.cases:
            try:
                run = CaseRun(dataclasses.replace(shared, case=case), variants, options)
            except (CheckpointError, ConfigError, FileNotFoundError) as error:
                raise SystemExit(f"error: {error}") from error
            run.run(write)
    results = [json.loads(file.read_text()) for case in CASES if (file := options.output / f"{case}.json").exists()]
    (options.output / "steps.md").write_text(report(results))
    try:
        draw(results, options.output / "steps.png")
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -e '.[viz]')")
    print(report(results))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
