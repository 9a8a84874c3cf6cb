"""Time of one training step beside its bare products, on this machine.

    python benchmarks/train_step.py                      F400, F64C5 and AlexNet-F, as in the paper
    python benchmarks/train_step.py f400 --rounds 30

The step is forward, loss, backward (with the solve) and optimizer, dropout on. The bare products are what no
implementation of the method in this precision can avoid, on tensors of the same shapes: T recurrent products,
the J^T products that the solve used, the product of the input stage, and one product per weight gradient.
Both are timed in turn; medians and their ratio are printed. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ide_snn import Gmres, NeuronParams, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet, Solution
from ide_snn.layers import Affine

LIF = NeuronParams(2.0, 0.95)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "f400": (lambda: SNNIDEFCNet((1, 28, 28), 10, neuron=LIF, time_steps=5), (128, 1, 28, 28)),
    "f64c5": (lambda: SNNIDEConvNet((1, 28, 28), 10, neuron=LIF, time_steps=30), (128, 1, 28, 28)),
    "alexnetf": (lambda: SNNIDEConvMultiLayerNet((3, 32, 32), 10, neuron=LIF, time_steps=30), (32, 3, 32, 32)),
}


def weight_gradient(link: Affine, x: Tensor, y: Tensor) -> Tensor:
    """The product behind dL/dW of one connection, for input x and output gradient y."""
    operator = link.operator
    if operator.kind == "linear":
        return y.t() @ x
    if operator.kind == "conv_transposed":  # its weight gradient is that of the adjoint convolution
        x, y = y, x
    return conv2d_weight(x, link.weight.shape, y, operator.stride, operator.padding, operator.dilation)


def bare_products(net: nn.Module, x: Tensor) -> Callable[[int], None]:
    """A function of the number of J^T products, doing just the products of one step."""
    block = net.block
    x = x.flatten(1) if isinstance(net, SNNIDEFCNet) else x
    with torch.no_grad():
        _, f = block.linearisation_point(x)
        stage = block.input.prepare(tuple(x.shape[1:]), x[:, 0]).affine()
        links = [link.affine() for link in f.chain]
        shapes = [net.population_shapes[-1], *net.population_shapes[:-1]]
        inputs = [(torch.rand(len(x), *shape) < 0.2).float() for shape in shapes]
        outputs = [torch.rand(len(x), *shape) for shape in net.population_shapes]

    def run(solver_products: int) -> None:
        with torch.no_grad():
            stage.operator.apply(x, stage.weight)
            for _ in range(block.time_steps):
                for link, s in zip(links, inputs, strict=True):
                    link.operator.apply(s, link.weight)
            for _ in range(solver_products):
                for link, y in zip(links, outputs, strict=True):
                    link.operator.adjoint(y, link.weight, link.input_shape)
            for link, s, y in zip([stage, *links], [x, *inputs], [outputs[0], *outputs], strict=True):
                weight_gradient(link, s, y)

    return run


def measure(name: str, rounds: int, tol: float) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    net, x = make().train(), torch.randn(shape)
    net.block.solver = Gmres(tol=tol)
    y = torch.randint(0, 10, (shape[0],))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    solutions: list[Solution] = []
    net.block.register_solve_hook(solutions.append)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    products = bare_products(net, x)
    step()
    times: dict[str, list[float]] = {"step": [], "bare": []}
    for _ in range(rounds):
        for key, call in (("step", step), ("bare", lambda: products(solutions[-1].stats.products))):
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    full, bare = (1e3 * statistics.median(times[key]) for key in ("step", "bare"))
    last = solutions[-1]
    print(
        f"{name:10} batch {shape[0]:4} T {net.block.time_steps:3}  step {full:8.1f} ms  bare products {bare:8.1f} ms  "
        f"ratio {full / bare:.2f}  solve {last.outcome}, {last.stats.products} products, "
        f"residual {last.stats.max_residual:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=0, help="repetitions (default: 40, 5 and 3)")
    parser.add_argument("--tol", type=float, default=Gmres().tol, help="tolerance of the solve")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; valid are {', '.join(CASES)}")
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"float32, tol {options.tol:g}"
    )
    for name in options.cases:
        measure(name, options.rounds or {"f400": 40, "f64c5": 5, "alexnetf": 3}[name], options.tol)


if __name__ == "__main__":
    main()
