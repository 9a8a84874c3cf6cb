"""The floor of a training step: the least time that its bare linear products take.

It counts exactly these calls, on tensors of the step (spikes, rates, weights, the solve's result):

    1 product of the input stage             T products of every recurrent connection
    k transposed products of each of them    1 weight gradient of each connection, input stage included

with k the products J^T v that the solve used. The classifier is left out. Each runs in the fastest of the WAYS that
the precision allows, weights packed and inputs converted beforehand, warm. The floor is the minimum over rounds of the
whole sequence, timed between the steps it is compared with. GFLOP/s counts 2 operations per multiply-add, padding
included.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from _common import synchronize
from torch import Tensor
from ways import WAYS, Way

from ide_snn.equilibrium import AnalyticLinearisation
from ide_snn.layers import Connection
from ide_snn.models import FeedbackClassifier
from ide_snn.operators import Operator
from ide_snn.record import Record
from ide_snn.simulation import Step

LEAST_ROUNDS = 5
LEAST_EFFICIENCY = 0.7
Key = tuple[str, str]  # (role, name of the connection)

# Relative error that a format may have; a way that exceeds it computes something else
ERROR = {
    "float32": 1e-4,
    "events": 1e-4,
    "events16": 0.05,
    "tf32": 5e-3,
    "float16": 5e-3,
    "bfloat16": 5e-2,
    "int8x2": 1e-3,
    "whole numbers": 5e-3,
    "int8": 0.1,
    "int8 to 8 bits": 0.5,  # the rest of the step would choose its scale
}
# Formats by precision and by what is multiplied. Spikes are exact in every format; images, rates and gradients are not.
ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    "float32": {"spikes": ("float32",), "numbers": ("float32",)},
    "exact": {"spikes": ("float32", "events", "int8x2"), "numbers": ("float32", "events", "tf32", "bfloat16")},
    "fast": {
        "spikes": ("float32", "events", "events16", "tf32", "float16", "bfloat16", "int8", "int8 to 8 bits"),
        "numbers": ("float32", "events", "whole numbers", "tf32", "float16", "bfloat16"),
    },
}


@dataclass(frozen=True)
class Link:
    """A connection of the step with what runs through it; x are inputs [B, *], y are outputs [B, *]."""

    name: str
    operator: Operator
    weight: Tensor
    x: Tensor  # what the simulation puts in: spikes, or the image for the input stage
    mean_x: Tensor  # what the weight gradient takes: rates, or the image
    y: Tensor  # gradient of the output, zero where sigma' is
    recurrent: bool = True

    @property
    def gflop(self) -> float:
        """Of one product, of one transposed product, of one weight gradient: they are the same."""
        return 1e-9 * multiply_adds(self.operator, self.x, self.y) * 2


@dataclass(frozen=True)
class Product:
    """One call of the floor as a forward operator on given tensors, or as a weight gradient."""

    role: str  # input | recurrent | transposed | gradient
    operator: Operator
    weight: Tensor
    x: Tensor
    y: Tensor | None  # for gradients
    spikes: bool
    gflop: float


@dataclass
class Runner:
    """A product in one way, ready to be called."""

    way: Way
    call: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)


def multiply_adds(operator: Operator, x: Tensor, y: Tensor) -> int:
    if operator.kind == "linear":
        return x.shape[0] * operator.in_channels * operator.out_channels
    positions = (x if operator.kind == "conv_transposed" else y)[0, 0].numel()
    height, width = operator.kernel_size
    per_position = operator.in_channels * operator.out_channels * height * width // operator.groups
    return x.shape[0] * positions * per_position


def transposed(operator: Operator, weight: Tensor, input_shape: Sequence[int]) -> tuple[Operator, Tensor]:
    """K^T as an operator of its own: linear, convolution (stride 1, or of a transposed one) or transposed convolution.

    Raises:
        ValueError: for groups and dilation, which the benchmarked networks do not have.
    """
    if operator.groups != 1 or operator.dilation != (1, 1):
        raise ValueError(f"the floor is for groups=1 and dilation=1, got {operator}")
    swapped = (operator.out_channels, operator.in_channels)
    if operator.kind == "linear":
        return Operator("linear", *swapped), weight.t().contiguous()
    k, s, p = operator.kernel_size, operator.stride, operator.padding
    if operator.kind == "conv_transposed":
        return Operator("conv", *swapped, kernel_size=k, stride=s, padding=p), weight
    if s == (1, 1):
        around = (k[0] - 1 - p[0], k[1] - 1 - p[1])
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous()
        return Operator("conv", *swapped, kernel_size=k, padding=around), flipped
    sizes = operator.output_shape(tuple(input_shape))[1:]
    rest = [n - ((m - 1) * s[d] - 2 * p[d] + k[d]) for d, (n, m) in enumerate(zip(input_shape[1:], sizes, strict=True))]
    extra = (rest[0], rest[1])
    return Operator("conv_transposed", *swapped, kernel_size=k, stride=s, padding=p, output_padding=extra), weight


def plan(links: Sequence[Link], time_steps: int, transposed_products: int) -> list[Key]:
    """The calls of the floor, in the order of the step."""
    chain = [link.name for link in links if link.recurrent]
    first = [link.name for link in links if not link.recurrent]
    return [
        *(("input", name) for name in first),
        *(("recurrent", name) for _ in range(time_steps) for name in chain),
        *(("transposed", name) for _ in range(transposed_products) for name in reversed(chain)),
        *(("gradient", link.name) for link in links),
    ]


def product(key: Key, links: Sequence[Link]) -> Product:
    role, name = key
    link = next(link for link in links if link.name == name)
    if role == "gradient":
        return Product(role, link.operator, link.weight, link.mean_x, link.y, False, link.gflop)
    if role == "transposed":
        operator, weight = transposed(link.operator, link.weight, link.x.shape[1:])
        return Product(role, operator, weight, link.y, None, False, link.gflop)
    return Product(role, link.operator, link.weight, link.x, None, link.recurrent, link.gflop)


@torch.no_grad()
def links_of(model: FeedbackClassifier, x: Tensor, gradient: Tensor) -> list[Link]:
    """The connections of `model` with the tensors of a training step on images x, dropout included.

    `gradient` [B, *] is the solve's result. Leaves the model's parameters and buffers as they were.
    """
    block = model.block
    seen: dict[str, Any] = {}

    def keep(_module: object, arguments: tuple[Tensor, ...]) -> None:
        seen["x"] = arguments[0]

    def look(step: Step) -> None:
        seen["spikes"] = [s.float().clone() for s in step.spikes] if step.t == block.time_steps else []

    state, handle = copy.deepcopy(model.state_dict()), block.register_forward_pre_hook(keep)
    try:
        model(x)
        rates = block.simulate(seen["x"], Record(all_rates=True, on_step=look)).all
        _, f = block.linearisation_point(seen["x"])
        jacobian = f.linearise(rates[-1], "running", "analytic")
    finally:
        handle.remove()
        model.load_state_dict(state)
    assert isinstance(jacobian, AnalyticLinearisation)  # it was asked for
    spikes = seen["spikes"]
    gradients: list[Tensor] = []
    v = gradient.detach().float()
    for link, slope in zip(reversed(jacobian.maps), reversed(jacobian.slopes), strict=True):
        gradients.insert(0, v * slope)
        v = link.adjoint(gradients[0])
    links = []
    chain = [("feedback", block.feedback, -1, 0)]
    chain += [(f"layer {i}", layer, i - 1, i) for i, layer in enumerate(block.layers, 1)]  # type: ignore[misc]
    for name, connection, source, target in chain:
        links.append(Link(name, *_fixed(connection), spikes[source], rates[source], gradients[target]))
    image = seen["x"].contiguous()
    operator, weight = _fixed(block.input)
    y = _through_batch_norm(block.input, operator.apply(image, weight), gradients[0])
    return [Link("input", operator, weight, image, image, y, recurrent=False), *links]


def _through_batch_norm(connection: Connection, y: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of y = K x from that behind batch norm by the batch, which leaves no number 0."""
    if connection.bn is None:
        return gradient
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        normalised = F.batch_norm(leaf, None, None, connection.bn.weight.detach(), None, True)
    return torch.autograd.grad(normalised, leaf, gradient)[0]


def _fixed(connection: Connection) -> tuple[Operator, Tensor]:
    operator, weight = connection.operator, connection.op.weight
    assert operator is not None  # the benchmarked networks have known connections only
    assert isinstance(weight, Tensor)
    return operator, weight.detach().contiguous()


def race(item: Product, ways: Iterable[Way], rounds: int = LEAST_ROUNDS) -> tuple[list[Runner], dict[str, str]]:
    """(runners with their times, fastest first; why the others do not run). Rounds are interleaved.

    The first of `ways` that runs is the reference for the results of the others.
    """
    runners: list[Runner] = []
    missing, device = {}, item.x.device
    reference: Tensor | None = None
    for way in ways:
        try:
            call = way.prepare(item.operator, item.weight, item.x, item.y)
            result = _numbers(call())
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # torch builds and processors differ
            missing[f"{way.name} ({way.format})"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        if reference is None:
            reference = result
        distance = float((result.reshape(reference.shape) - reference).norm() / reference.norm().clamp_min(1e-30))
        if not distance <= ERROR[way.format]:
            missing[f"{way.name} ({way.format})"] = f"wrong on this processor: relative error {distance:.1e}"
            continue
        runners.append(Runner(way, call))
    for number in range(rounds + 1):
        for runner in runners:
            # one round tells the hopeless ones: emulated formats take a hundred times as long
            if number > 1 and runner.best > 3 * min(r.best for r in runners):
                continue
            synchronize(device)
            start = time.perf_counter()
            runner.call()
            synchronize(device)
            runner.seconds.append(time.perf_counter() - start)
    return sorted(runners, key=lambda r: r.best), missing


def _numbers(y: Tensor) -> Tensor:
    y = y.dequantize() if y.is_quantized else y
    return (y.to_dense() if y.is_mkldnn else y).float().clone()


class Floor:
    """The sequence of one step in the fastest ways of one precision.

    Args:
        links: the connections, see `links_of`.
        time_steps: T.
        precision: a key of ALLOWED.
        flags: of the processor, see `_common.processor_flags`.
    """

    def __init__(self, links: Sequence[Link], time_steps: int, precision: str, flags: Sequence[str]) -> None:
        self.links, self.time_steps, self.precision = links, time_steps, precision
        self.device = links[0].x.device
        self.products = {key: product(key, links) for key in dict.fromkeys(plan(links, 1, 1))}
        self.missing: dict[str, str] = {}
        self.field: dict[Key, list[Runner]] = {}
        for key, item in self.products.items():
            formats = ALLOWED[precision]["spikes" if item.spikes else "numbers"]
            ways = [way for way in WAYS if way.format in formats and way.fits(item.operator, item.role, item.x, flags)]
            self.field[key], missing = race(item, ways)
            self.missing |= missing
        self.chosen = {key: runners[0] for key, runners in self.field.items()}
        self.rounds: list[tuple[float, int, float, dict[Key, float]]] = []

    def run(self, transposed_products: int, whole: float | None = None) -> None:
        """One round: the whole sequence once, timed as a whole and by product.

        Args:
            whole: the transposed products, those for some samples counted by their share; the time of all of them is
                reduced in proportion. By default all were for all samples.
        """
        calls = [(key, self.chosen[key].call) for key in plan(self.links, self.time_steps, transposed_products)]
        parts = dict.fromkeys(self.products, 0.0)
        synchronize(self.device)
        start = last = time.perf_counter()
        for key, call in calls:
            call()
            now = time.perf_counter()
            parts[key] += now - last
            last = now
        synchronize(self.device)
        total = time.perf_counter() - start
        whole = transposed_products if whole is None else whole
        for key in parts:
            if key[0] == "transposed" and whole < transposed_products:
                total -= parts[key] * (1 - whole / transposed_products)
                parts[key] *= whole / transposed_products
        self.rounds.append((total, transposed_products, whole, parts))

    def result(self) -> dict[str, Any]:
        """The floor, its parts beside the fastest single product, and whether it can be believed."""
        if not self.rounds:
            raise ValueError("run the floor before reading its result")
        total, count, whole, parts = min(self.rounds, key=lambda r: r[0])
        counts: dict[Key, float] = dict.fromkeys(self.products, 0)
        for key in plan(self.links, self.time_steps, count):
            counts[key] += whole / count if key[0] == "transposed" else 1
        rows = [self._row(key, counts[key], parts[key]) for key in self.products if counts[key]]
        ideal = sum(counts[key] * self.chosen[key].best for key in counts)
        return {
            "precision": self.precision,
            "floor_s": total,
            "transposed_products": round(whole, 2),
            "rounds": len(self.rounds),
            "efficiency": ideal / total,
            "fastest_gflop_per_s": max(row["fastest_gflop_per_s"] for row in rows),
            "rejected": rejection(len(self.rounds), ideal / total),
            "products": rows,
            "unavailable": self.missing,
        }

    def _row(self, key: Key, count: float, seconds: float) -> dict[str, Any]:
        item, runner = self.products[key], self.chosen[key]
        on_cpu = self.device.type == "cpu"  # a GPU's calls return at once: only the whole is timed there
        return {
            "role": key[0],
            "connection": key[1],
            "count": round(count, 2),
            "gflop": item.gflop,
            "way": runner.way.name,
            "format": runner.way.format,
            "gflop_per_s": count * item.gflop / seconds if on_cpu else None,
            "fastest_gflop_per_s": item.gflop / runner.best,
            "fastest_s": {f"{r.way.name} ({r.way.format})": r.best for r in self.field[key]},
        }


def rejection(rounds: int, efficiency: float) -> str | None:
    """Why a floor does not count, None where it does."""
    if rounds < LEAST_ROUNDS:
        return f"{rounds} rounds, {LEAST_ROUNDS} are needed"
    if efficiency < LEAST_EFFICIENCY:
        return f"the products ran at {100 * efficiency:.0f} % of their fastest single runs: is the machine idle?"
    return None


def floors(
    links: Sequence[Link], time_steps: int, precisions: Iterable[str], flags: Sequence[str]
) -> Mapping[str, Floor]:
    return {precision: Floor(links, time_steps, precision, flags) for precision in dict.fromkeys(precisions)}
