"""The paper's networks on the one block, each followed by a linear classifier of the last rates.

| name       | network                                                                          |
| ---------- | -------------------------------------------------------------------------------- |
| F400       | `SNNIDEFCNet`: 784-400, feedback 400-400                                         |
| F64C5      | `SNNIDEConvNet`: 5x5 conv, 64 channels, stride 2; feedback 5x5 conv              |
| AlexNet-F  | `SNNIDEConvMultiLayerNet`: 96-256-384-384-256, feedback 3x3 transposed conv      |
| CIFARNet-F | `SNNIDEConvMultiLayerNet`: 128-256-512-1024-512, feedback 3x3 transposed conv    |

Initial weights: every output channel drawn from U(-1, 1) and scaled to norm 1, biases 0, batch norm 1 and 0,
alpha = the feedback weight's norm. Source: Xiao et al., NeurIPS 2021, section 5 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ide_snn.block import FeedbackSNN
from ide_snn.bptt import Bptt
from ide_snn.implicit import Gradient, Implicit
from ide_snn.layers import Connection
from ide_snn.neurons import NeuronParams, time_average
from ide_snn.operators import KNOWN_MODULES, Operator
from ide_snn.precision import Precision
from ide_snn.record import Rates, Record
from ide_snn.simulation import Step
from ide_snn.solvers import Gmres, Solver
from ide_snn.spiking import apply_to_spikes
from ide_snn.torch_modules import runs_as_torch_wrote_it


@dataclass(frozen=True)
class NetworkOptions:
    """Keyword arguments that all three networks take.

    Args:
        neuron: threshold and leak of every population.
        time_steps: T.
        solver: for the implicit linear system.
        gradient: `Implicit`, `Unrolled` or `Bptt`.
        dropout: variational dropout behind every connection, input and feedback included.
        constraint: constraint on the feedback weight, see `ide_snn.optimizations`.
        gamma: its bound in units of the threshold, c = gamma V_th.
        batch_norm: batch norm behind the input stage and every connection of the chain (never the feedback).
        input_has_time: inputs are [T, B, C, H, W].
        check_input: refuse NaN and infinity in the input; None: on a CPU.
        precision: of the simulation and the products of J, see `ide_snn.precision`.
        compile: prepare the training step once, see `ide_snn.compiled`. None: on a CPU, where that can be done.
        generator: draws the initial weights.
    """

    neuron: NeuronParams = field(default_factory=NeuronParams)
    time_steps: int = 30
    solver: Solver = field(default_factory=Gmres)
    gradient: Gradient | Bptt = field(default_factory=Implicit)
    dropout: float = 0.2
    constraint: str = "spectral_matrix"
    gamma: float = 0.5
    batch_norm: bool = True
    input_has_time: bool = False
    check_input: bool | None = None
    precision: Precision = "float32"
    compile: bool | None = None
    generator: torch.Generator | None = None

    def connection(self, op: nn.Module) -> Connection:
        """A forward connection with freshly drawn weights."""
        initialise(op, self.generator)
        return Connection(op, batch_norm=self.batch_norm, dropout=self.dropout)

    def feedback(self, op: nn.Module, input_size: tuple[int, ...]) -> Connection:
        """The constrained feedback connection with freshly drawn weights; `input_size` is (H, W) or ()."""
        initialise(op, self.generator)
        return Connection(
            op,
            dropout=self.dropout,
            constraint=self.constraint,
            bound=self.gamma * self.neuron.v_threshold,
            input_size=input_size,
            generator=self.generator,
        )

    def block(self, input_stage: Connection, layers: Sequence[Connection], feedback: Connection) -> FeedbackSNN:
        return FeedbackSNN(
            input=input_stage,
            layers=layers,
            feedback=feedback,
            neuron=self.neuron,
            time_steps=self.time_steps,
            solver=self.solver,
            gradient=self.gradient,
            input_has_time=self.input_has_time,
            check_input=self.check_input,
            precision=self.precision,
            compile=self.compile,
        )


class FeedbackClassifier(nn.Module):
    """A feedback block and a linear classifier of its rates.

    Args:
        block: the spiking part.
        input_shape: of one input without time and batch, [C, H, W] or [C].
        num_classes: of the classifier.
        generator: draws the classifier's initial weights.

    Shapes: x [B, *input_shape] ([T, B, *input_shape] for inputs with time) -> logits [B, num_classes]. A block with
    `Bptt(output="spikes")` gives logits [T, B, num_classes] in training, those of the weighted rates in evaluation.
    """

    def __init__(
        self,
        block: FeedbackSNN,
        input_shape: Sequence[int],
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.input_shape = tuple(input_shape)
        self.block = block
        self.population_shapes = block.population_shapes(self._block_input_shape())
        self.classifier = nn.Linear(math.prod(self.population_shapes[-1]), num_classes)
        initialise(self.classifier, generator)

    @property
    def num_neurons(self) -> int:
        """Neurons as the paper counts them: input, populations and classes."""
        inside = sum(math.prod(shape) for shape in self.population_shapes)
        return math.prod(self.input_shape) + inside + self.classifier.out_features

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        x = self._as_block_input(x)
        logits = self.block.read_out(self.classifier, x, generator)
        if logits is not None:
            return logits
        y = self.block(x, generator=generator)
        gradient = self.block.gradient
        if not (isinstance(gradient, Bptt) and gradient.output == "spikes"):
            return self._classify(y)
        if not self.training:
            return self._classify(time_average(y, self.block.neuron.leak, y.dtype))
        linear = self.classifier
        logits = apply_to_spikes(Operator.of(linear), y.flatten(0, 1).flatten(1), linear.weight, linear.bias)
        return logits.unflatten(0, y.shape[:2])

    def exit_early(self, x: Tensor, confidence: float) -> tuple[Tensor, Rates]:
        """(logits [B, classes], rates) of simulations that end for each sample as soon as the network is sure of it.

        That is at the first step t < T where the largest softmax probability of the logits of a_n[t] exceeds
        `confidence`, or at T; `rates.steps` [B] has the steps, and logits and rates are those of a network with so many
        time steps. Waits for the device once per step.

        Raises:
            ValueError: in training mode, and for a confidence outside (0, 1].
        """
        if self.training:
            raise ValueError("early exit is for evaluation: call eval() first")
        if not 0 < confidence <= 1:
            raise ValueError(f"confidence must lie in (0, 1], got {confidence}")

        def is_sure(step: Step) -> Tensor:
            return self._classify(step.last_rate()).double().softmax(1).amax(1) > confidence

        record = Record(spike_fraction=True, stop=is_sure)
        with torch.no_grad():
            rates = self.block.simulate(self._as_block_input(x), record)
            self.block.tell(rates)
            return self._classify(rates.last), rates

    def _as_block_input(self, x: Tensor) -> Tensor:
        lead = 2 if self.block.input_has_time else 1
        if tuple(x.shape[lead:]) != self.input_shape:
            expected = ["T", "B", *self.input_shape][2 - lead :]
            raise ValueError(f"input must have shape {expected}, got {list(x.shape)}")
        return x.reshape(*x.shape[:lead], *self._block_input_shape())

    def _classify(self, rates: Tensor) -> Tensor:
        """Logits of rates [B, *]; channels-last ones are read as they lie, with the weight's columns in that order."""
        linear, as_it_lies = self.classifier, torch.channels_last
        is_last = rates.dim() == 4 and not rates.is_contiguous() and rates.is_contiguous(memory_format=as_it_lies)
        if not (is_last and runs_as_torch_wrote_it(linear)):
            return self.classifier(rates.flatten(1))
        weight = linear.weight.unflatten(1, rates.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return F.linear(rates.permute(0, 2, 3, 1).flatten(1), weight, linear.bias)

    def _block_input_shape(self) -> tuple[int, ...]:
        return self.input_shape


class SNNIDEFCNet(FeedbackClassifier):
    """Fully connected: one population of `hidden` neurons with feedback among all of them.

    Args:
        input_shape: of one input; flattened.
        num_classes: of the classifier.
        hidden: neurons of the population.
        options: see `NetworkOptions`; an unknown one raises TypeError.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, hidden: int = 400, **options: Any) -> None:
        _require_positive(hidden=hidden, input_shape=input_shape)
        opts = NetworkOptions(**options)
        features = math.prod(input_shape)
        stage = opts.connection(nn.Linear(features, hidden))
        feedback = opts.feedback(nn.Linear(hidden, hidden, bias=False), ())
        super().__init__(opts.block(stage, (), feedback), input_shape, num_classes, opts.generator)

    def _block_input_shape(self) -> tuple[int, ...]:
        return (math.prod(self.input_shape),)


class SNNIDEConvNet(FeedbackClassifier):
    """Convolutional: one population of `channels` maps with convolutional feedback.

    Args:
        input_shape: [C, H, W].
        num_classes: of the classifier.
        channels: maps of the population.
        kernel_size: of the input stage.
        feedback_kernel_size: odd, of the feedback, which keeps the maps' size; None: as the input stage.
        stride, padding: of the input stage.
        options: see `NetworkOptions`; an unknown one raises TypeError.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 64,
        kernel_size: int = 5,
        feedback_kernel_size: int | None = None,
        stride: int = 2,
        padding: int = 2,
        **options: Any,
    ) -> None:
        back = kernel_size if feedback_kernel_size is None else feedback_kernel_size
        _require_positive(channels=channels, kernel_size=kernel_size, feedback_kernel_size=back, stride=stride)
        if back % 2 == 0:
            name = "kernel_size" if feedback_kernel_size is None else "feedback_kernel_size"
            raise ValueError(f"{name} must be odd for the feedback to keep the map's size, got {back}")
        opts = NetworkOptions(**options)
        stage = opts.connection(_conv(input_shape, channels, kernel_size, stride, padding))
        feedback = opts.feedback(
            nn.Conv2d(channels, channels, back, padding=back // 2, bias=False),
            stage.output_shape(tuple(input_shape))[1:],
        )
        super().__init__(opts.block(stage, (), feedback), input_shape, num_classes, opts.generator)


class SNNIDEConvMultiLayerNet(FeedbackClassifier):
    """Convolutional with several populations: 3x3 convolutions forward, a 3x3 transposed convolution back.

    Args:
        input_shape: [C, H, W]; H and W divisible by the product of the strides.
        num_classes: of the classifier.
        channels: maps of each population; at least two populations.
        strides: of the input stage and of every connection of the chain, one per population.
        options: see `NetworkOptions`; an unknown one raises TypeError.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (96, 256, 384, 384, 256),
        strides: Sequence[int] = (2, 1, 2, 1, 1),
        **options: Any,
    ) -> None:
        if len(channels) != len(strides) or len(channels) < 2:
            raise ValueError(
                f"channels {list(channels)} and strides {list(strides)} must have the same length, at least 2; "
                "for one population use SNNIDEConvNet"
            )
        _require_positive(channels=channels, strides=strides)
        opts = NetworkOptions(**options)
        stage = opts.connection(_conv(input_shape, channels[0], 3, strides[0], 1))
        shape = stage.output_shape(tuple(input_shape))
        layers = []
        for width, stride in zip(channels[1:], strides[1:], strict=True):
            layers.append(opts.connection(_conv(shape, width, 3, stride, 1)))
            shape = layers[-1].output_shape(shape)
        up = math.prod(strides[1:])
        feedback = opts.feedback(
            nn.ConvTranspose2d(channels[-1], channels[0], 3, up, 1, output_padding=up - 1, bias=False),
            shape[1:],
        )
        super().__init__(opts.block(stage, layers, feedback), input_shape, num_classes, opts.generator)


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Every output channel from U(-1, 1), scaled to norm 1; bias 0. Returns the module.

    Raises:
        TypeError: for a module that is not linear, conv or transposed conv.
    """
    if not isinstance(module, KNOWN_MODULES):
        raise TypeError(f"cannot initialise {type(module).__name__}")
    channel = Operator.of(module).output_dim_of_weight
    with torch.no_grad():
        weight = module.weight.uniform_(-1, 1, generator=generator)
        rest = [d for d in range(weight.dim()) if d != channel]
        weight.div_(torch.linalg.vector_norm(weight, dim=rest, keepdim=True))
        if module.bias is not None:
            module.bias.zero_()
    return module


def _require_positive(**sizes: int | Sequence[int]) -> None:
    for name, value in sizes.items():
        if min(value if isinstance(value, Sequence) else (value,)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _conv(input_shape: Sequence[int], channels: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
    if len(input_shape) != 3:
        raise ValueError(f"a convolutional network needs input_shape [C, H, W], got {list(input_shape)}")
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    return nn.Conv2d(input_shape[0], channels, kernel, stride, padding)
