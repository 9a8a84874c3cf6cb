"""Time of one training step with one process and with several on this machine, each with one thread.

    python benchmarks/scaling.py                                    F400, F64C5 and AlexNet-F, 2 processes
    python benchmarks/scaling.py f400 --processes 4 --rounds 30 --output results/benchmarks/scaling.json

The step is forward, loss, backward with the solve, sum of the gradients, and optimizer, dropout on, of the networks of
the paper's experiments on random images; the batch is the same for one process and for all together. The two are timed
in turn in the same processes (while one works alone the others wait), and medians are printed. `messages` is the time
for the sum of the gradients alone. Run it on an otherwise idle machine with as many processors as processes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from ide_snn.config import build_model, build_optimizer, load_config
from ide_snn.distributed import Ranks, Share, process_group
from ide_snn.dropout import DropoutStream
from ide_snn.replicas import Replicas

CASES = {
    "f400": ("fashion_mnist_f400_lif", 128),
    "f64c5": ("fashion_mnist_f64c5_lif", 128),
    "alexnetf": ("cifar10_alexnetf_lif", 32),
}


class Trainer:
    """One model and what a step of it needs, as `ide_snn.training` has it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.model, self.optimizer, self.ranks = model.train(), optimizer, ranks
        self.replicas = Replicas(model, ranks, sync_bn=True)
        self.masks = DropoutStream(0)
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """`x`, `y`: the whole batch."""
        share: Share = self.ranks.share(len(y))
        own = slice(share.first, share.end)
        with self.replicas.synchronised(), self.masks.serving(self.model):
            self.optimizer.zero_grad(set_to_none=True)
            self.masks.begin(self.steps)
            self.masks.serve(share)
            loss = F.cross_entropy(self.model(x[own]), y[own])
            (loss * (share.size / share.total)).backward()
            self.replicas.sum_gradients(wants_to_stop=False)
            self.optimizer.step()
        self.steps += 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: str, overrides: list[str], rounds: int, ranks: Ranks) -> dict[str, Any]:
    """Median times; the same on all ranks but for their own clocks."""
    experiment, batch = CASES[case]
    config = load_config([f"experiment={experiment}", *overrides])
    model = build_model(config)
    alone = copy.deepcopy(model)
    together = Trainer(model, build_optimizer(config, model), ranks)
    single = Trainer(alone, build_optimizer(config, alone), Ranks())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *config.dataset.input_shape, generator=generator)
    y = torch.randint(config.dataset.num_classes, (batch,), generator=generator)
    times: dict[str, list[float]] = {"one": [], "all": [], "messages": []}
    for _ in range(rounds + 2):
        ranks.wait()
        if ranks.is_first:
            times["one"].append(seconds(lambda: single.step(x, y)))
        ranks.wait()
        times["all"].append(seconds(lambda: (together.step(x, y), ranks.wait())))
        times["messages"].append(seconds(lambda: together.replicas.sum_gradients(wants_to_stop=False)))
    medians = {name: 1e3 * statistics.median(values[2:]) for name, values in times.items() if values}
    parameters = sum(p.numel() for p in model.parameters())
    return {"case": case, "batch": batch, "rounds": rounds, "parameters": parameters, "milliseconds": medians}


def worker(rank: int, port: int, arguments: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(arguments.processes)
    torch.set_num_threads(1)
    results = []
    with process_group(torch.device("cpu")) as ranks:
        for case in arguments.cases:
            results.append(measure(case, arguments.overrides, arguments.rounds, ranks))
    if rank == 0:
        report(results, arguments)


def report(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {os.cpu_count()} processors, gloo, 1 thread for each process\n")
    print(f"| network | batch | 1 process, ms | {arguments.processes} processes, ms | ratio | messages, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for result in results:
        ms = result["milliseconds"]
        row = f"{ms['one']:.1f} | {ms['all']:.1f} | {ms['one'] / ms['all']:.2f} | {ms['messages']:.2f}"
        print(f"| {result['case']} | {result['batch']} | {row} |")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"processes": arguments.processes, "processors": os.cpu_count(), "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**content, "results": results}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--overrides", nargs="*", default=[], help="of configs/train.yaml, e.g. precision=fast")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.cases = arguments.cases or list(CASES)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, (port, arguments), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
