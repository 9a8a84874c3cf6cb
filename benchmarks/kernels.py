"""The fused kernels on a GPU, beside the same in torch operations and beside the memory's bandwidth.

    python benchmarks/kernels.py                       all sizes
    python benchmarks/kernels.py f64c5 --rounds 100

Times are microseconds per call, medians over interleaved rounds. "called" is one call after the other from Python, as
without CUDA graphs; "graphed" replays the calls from a graph, which is what the device itself needs. The floor is a
graphed copy that moves as many bytes as the kernel reads and writes, so small sizes, which fit into the cache, get a
floor from the cache too. GB/s is those bytes over the kernel's graphed time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ide_snn import NeuronParams, SNNIDEConvMultiLayerNet
from ide_snn.graphs import GraphedCall
from ide_snn.kernels import apply_slope, available, masked_update_, neuron_step_, residual
from ide_snn.kernels.krylov import arnoldi_step_, combine

Call = Callable[[str], object]  # of the backend
LIF = NeuronParams(2.0, 0.95)
SIZES = ("f400", "f64c5", "alexnetf", "large")
REPEATS = 20  # calls per measured interval


@dataclass(frozen=True)
class Work:
    """One kernel: bytes read and written per neuron, and the call."""

    name: str
    bytes: int
    call: Call


def shape_of(name: str) -> tuple[int, ...]:
    """The paper's batch of 128 of a population; AlexNet-F's largest; and 2^26 neurons, far beyond any cache."""
    if name == "alexnetf":
        net = SNNIDEConvMultiLayerNet((3, 32, 32), 10, neuron=LIF, time_steps=30)
        return (128, *max(net.population_shapes, key=lambda shape: torch.Size(shape).numel()))
    return {"f400": (128, 400), "f64c5": (128, 64, 14, 14), "large": (256, 64, 64, 64)}[name]


def works(shape: tuple[int, ...]) -> list[Work]:
    """Every kernel on tensors of one population."""

    def made(dtype: torch.dtype) -> torch.Tensor:
        x = torch.rand(shape, device="cuda").mul_(2)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x.to(dtype)

    f32, bf16 = torch.float32, torch.bfloat16
    u, c, c16, x, rate, s, s16, s8 = (made(t) for t in (f32, f32, bf16, f32, f32, f32, bf16, torch.int8))
    mask = made(f32) > 0.4
    rows = [made(f32).flatten().view(shape[0], -1) for _ in range(4)]
    active = torch.arange(shape[0], device="cuda") % 2 == 0
    basis, columns = torch.stack([*rows, rows[0]]), torch.zeros(4, 5, shape[0], device="cuda")
    coefficients, used = torch.rand(5, shape[0], device="cuda"), torch.tensor([4, 0], dtype=torch.int32, device="cuda")
    options = {"gain": mask, "gain_scale": 1.25, "drive": x, "rate": rate}
    return [
        Work("step, float32", 16, lambda b: neuron_step_(c, u, s, LIF, backend=b)),
        Work("step, bf16, all options", 25, lambda b: neuron_step_(c16, u, s16, LIF, **options, backend=b)),
        Work("step, bf16 to int8 spikes", 11, lambda b: neuron_step_(c16, u, s8, LIF, backend=b)),
        Work("slope, float32 to bf16", 7, lambda b: apply_slope(c, mask, 0.6, s16, backend=b)),
        Work("residual and norms", 16, lambda b: residual(rows[0], rows[1], rows[2], rows[3], backend=b)),
        Work("masked update, half active", 6, lambda b: masked_update_(rows[0], rows[1], active, 0.5, backend=b)),
        Work(
            "Arnoldi step 3, one pass",
            24,
            lambda b: arnoldi_step_(basis, rows[1], columns, 3, passes=1, noise=1e-6, backend=b),
        ),
        Work("combination of 4", 28, lambda b: combine(basis, coefficients[:4], coefficients, used, backend=b)),
    ]


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """REPEATS calls as one replay."""
    token = torch.zeros(1, device="cuda")

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(REPEATS):
            call()
        return x

    replay = GraphedCall(run)
    return lambda: replay(token)


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(REPEATS):
            call()

    return run


def time_interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds per single call of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / REPEATS)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(name: str, rounds: int) -> None:
    shape = shape_of(name)
    neurons = torch.Size(shape).numel()
    print(f"\n{name}: {list(shape)}, {neurons:,} neurons\n")
    columns = ["torch called", "triton called", "torch graphed", "triton graphed", "floor"]
    print(f"| kernel | B/neuron | {' | '.join(columns)} | / floor | GB/s |")
    print("| --- " * (len(columns) + 4) + "|")
    for work in works(shape):
        moved = work.bytes * neurons
        source = torch.zeros(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        by_torch, by_triton = (partial(work.call, backend) for backend in ("torch", "triton"))
        copy = partial(target.copy_, source)
        timed = [repeated(by_torch), repeated(by_triton), graphed(by_torch), graphed(by_triton), graphed(copy)]
        times = time_interleaved(dict(zip(columns, timed, strict=True)), rounds)
        cells = " | ".join(f"{t:.1f}" for t in times.values())
        best = times["triton graphed"]
        print(f"| {work.name} | {work.bytes} | {cells} | {best / times['floor']:.2f} | {moved / best / 1e3:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    unknown = set(options.sizes) - set(SIZES)
    if unknown:
        parser.error(f"unknown size {', '.join(sorted(unknown))}; valid are {', '.join(SIZES)}")
    found = available("cuda")
    if found.backend != "triton":
        raise SystemExit(f"benchmarks/kernels.py needs a CUDA device and triton; here: {found}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {found}")
    for name in options.sizes:
        measure(name, options.rounds)


if __name__ == "__main__":
    main()
