"""Other libraries on the same work: BPTT in SpikingJelly and snnTorch, TorchDEQ's solvers on our equilibrium.

All are optional. BPTT learns by surrogate gradients (arctangent) with the case's sizes, T, threshold, leak, soft reset,
batch norm and optimizer; without dropout and without a constraint, whose cost it does not have to bear.

    spikingjelly            step mode m: the T products of a connection are one. That mode has no feedback, so the
                            chain is feed-forward: input stage, then every recurrent connection with its neurons.
                            On a GPU it selects triton; SJ_LIF_CUDA_IMPLEMENTATION=torch makes it take torch
    spikingjelly, feedback  step mode s: the feedback network itself, step by step
    snntorch                the feedback network itself; the library works step by step
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Network
from torch import Tensor, nn

from ide_snn.layers import Connection
from ide_snn.models import FeedbackClassifier
from ide_snn.operators import Operator
from ide_snn.schemas import Config

PACKAGES = {"spikingjelly": "spikingjelly", "snntorch": "snntorch", "torchdeq": "torchdeq"}
BPTT = {"spikingjelly": "spikingjelly", "spikingjelly, feedback": "spikingjelly", "snntorch": "snntorch"}


def why_missing(name: str) -> str | None:
    """Why a peer is not measured, None where it is installed."""
    package = PACKAGES[BPTT.get(name, name)]
    return None if importlib.util.find_spec(package) else f"not measured: {package} is not installed"


def build_peer(name: str, model: FeedbackClassifier, config: Config) -> Network:
    """The training step of a peer, with the geometry of `model`."""
    torch.manual_seed(config.seed)
    if name == "spikingjelly":
        return Network(MultiStep(model), config)
    kind = _spikingjelly_cell if name == "spikingjelly, feedback" else SnnTorchCell
    return Network(StepByStep(model, kind), config)


def _module(connection: Connection) -> nn.Module:
    """The connection's linear map, and its batch norm if it has one, with weights of their own."""
    o = connection.operator
    assert o is not None  # the benchmarked networks have known connections only
    linear = _linear(o, bias=connection.op.bias is not None)
    if connection.bn is None:
        return linear
    norm = nn.BatchNorm1d(o.out_channels) if o.kind == "linear" else nn.BatchNorm2d(o.out_channels)
    return nn.Sequential(linear, norm)


def _linear(o: Operator, bias: bool) -> nn.Module:
    if o.kind == "linear":
        return nn.Linear(o.in_channels, o.out_channels, bias)
    geometry = (o.in_channels, o.out_channels, o.kernel_size, o.stride, o.padding)
    if o.kind == "conv":
        return nn.Conv2d(*geometry, bias=bias)
    return nn.ConvTranspose2d(*geometry, o.output_padding, bias=bias)


class _Shape:
    """What both kinds of network take over from ours."""

    def __init__(self, model: FeedbackClassifier) -> None:
        block = model.block
        self.neuron, self.time_steps = block.neuron, block.time_steps
        self.flat = block.input.operator is not None and block.input.operator.kind == "linear"
        self.classes = model.classifier.out_features
        self.last, self.first = model.population_shapes[-1], model.population_shapes[0]
        self.layers = [layer for layer in block.layers if isinstance(layer, Connection)]
        self.input, self.feedback = block.input, block.feedback


class StepByStep(nn.Module):
    """The feedback network; `cell(v_threshold, leak)` makes neurons, currents [B, *] -> spikes [B, *], with reset()."""

    def __init__(self, model: FeedbackClassifier, cell: Callable[[float, float], nn.Module]) -> None:
        super().__init__()
        shape = _Shape(model)
        self.time_steps, self.flat = shape.time_steps, shape.flat
        neuron = shape.neuron
        self.populations = nn.ModuleList(cell(neuron.v_threshold, neuron.leak) for _ in model.population_shapes)
        self.input, self.feedback = _module(shape.input), _module(shape.feedback)
        self.layers = nn.ModuleList(_module(layer) for layer in shape.layers)
        self.classifier = nn.Linear(math.prod(shape.last), shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *] -> logits [B, classes] of the mean spikes of the last population."""
        drive = self.input(x.flatten(1) if self.flat else x)
        for population in self.populations:
            population.reset()  # type: ignore[operator]
        spikes: Tensor | None = None
        total: Tensor | None = None
        for _ in range(self.time_steps):
            spikes = self.populations[0](drive if spikes is None else drive + self.feedback(spikes))
            for layer, population in zip(self.layers, self.populations[1:], strict=True):
                spikes = population(layer(spikes))
            total = spikes if total is None else total + spikes
        assert total is not None
        return self.classifier((total / self.time_steps).flatten(1))


class MultiStep(nn.Module):
    """SpikingJelly in step mode m: the connections one behind the other, each for all T at once."""

    def __init__(self, model: FeedbackClassifier) -> None:
        super().__init__()
        layer = importlib.import_module("spikingjelly.activation_based.layer")
        shape = _Shape(model)
        self.time_steps, self.flat = shape.time_steps, shape.flat
        self._reset = importlib.import_module("spikingjelly.activation_based.functional").reset_net
        self.input = _module(shape.input)
        # population 1 feeds the layers; the feedback comes last (of one population: back to its own shape)
        parts: list[nn.Module] = [_spikingjelly_node(shape.neuron.v_threshold, shape.neuron.leak, "m")]
        for connection in (*shape.layers, shape.feedback):
            parts.append(layer.SeqToANNContainer(_module(connection)))
            parts.append(_spikingjelly_node(shape.neuron.v_threshold, shape.neuron.leak, "m"))
        self.chain = nn.Sequential(*parts)
        self.classifier = nn.Linear(math.prod(shape.first), shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *] -> logits [B, classes] of the mean spikes behind the last connection."""
        self._reset(self)
        drive = self.input(x.flatten(1) if self.flat else x)
        spikes = self.chain(drive.expand(self.time_steps, *drive.shape))
        return self.classifier(spikes.mean(0).flatten(1))


def _spikingjelly_node(v_threshold: float, leak: float, mode: str) -> nn.Module:
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    surrogate = importlib.import_module("spikingjelly.activation_based.surrogate")
    common = {"v_threshold": v_threshold, "v_reset": None, "surrogate_function": surrogate.ATan()}
    common |= {"detach_reset": True, "step_mode": mode}
    if leak == 1:
        node: nn.Module = neuron.IFNode(**common)
    else:
        node = neuron.LIFNode(tau=1 / (1 - leak), decay_input=False, **common)
    return node


def _spikingjelly_cell(v_threshold: float, leak: float) -> nn.Module:
    return _spikingjelly_node(v_threshold, leak, "s")


class SnnTorchCell(nn.Module):
    """snnTorch's leaky neuron with its membrane."""

    def __init__(self, v_threshold: float, leak: float) -> None:
        super().__init__()
        self.neuron = importlib.import_module("snntorch").Leaky(
            beta=leak, threshold=v_threshold, reset_mechanism="subtract"
        )
        self.membrane: Tensor | None = None

    def reset(self) -> None:
        self.membrane = None

    def forward(self, current: Tensor) -> Tensor:
        before = torch.zeros_like(current) if self.membrane is None else self.membrane
        spikes, self.membrane = self.neuron(current, before)
        return spikes


def torchdeq_solvers() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """(name, solve(f, start, tol, max_steps)) for z = f(z) by TorchDEQ's solvers; tol is of the relative residual."""
    for name in ("anderson", "broyden", "fixed_point_iter"):
        solver = importlib.import_module("torchdeq.solver").get_solver(name)

        def solve(f: Callable[[Tensor], Tensor], start: Tensor, tol: float, steps: int, solver: Any = solver) -> Tensor:
            result: Tensor = solver(f, start, max_iter=steps, tol=tol, stop_mode="rel")[0]
            return result

        yield name, solve
