"""Feed-forward spiking networks of DSR nodes with a linear classifier: `DSRFCNet` and `DSRConvNet`.

    x[t] -> connection -> node -> connection -> node -> ... -> o = sum_t w_t y[t] -> linear classifier

A connection is linear or conv, batch norm over time and batch together, average pooling, and variational dropout whose
mask is shared by all time steps. The input is encoded directly: an input [B, *] is a constant current, whose
connection is computed once. The classifier sees the spike representation o of the last node, so the logits need no
average over time. Spikes travel between nodes with their height V_th / delta_t. The gradient is that of `ide_snn.dsr`.

Initial weights as in `ide_snn.models`; source: Meng et al., CVPR 2022 (arXiv 2205.00459).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ide_snn.dropout import VariationalDropout
from ide_snn.dsr import DSRIFNode, DSRNode
from ide_snn.layers import Connection
from ide_snn.models import initialise

__all__ = ["DSRClassifier", "DSRConvNet", "DSRFCNet", "DSROptions", "DSRStage"]


@dataclass(frozen=True)
class DSROptions:
    """Keyword arguments that both networks take.

    Args:
        node: makes one node, e.g. `DSRIFNode` or `functools.partial(DSRLIFNode, tau=2.0, delta_t=0.5)`.
        time_steps: T for inputs without time; inputs with time bring their own.
        dropout: variational dropout behind every connection.
        batch_norm: batch norm behind every connection.
        input_has_time: inputs are [T, B, *] instead of [B, *].
        generator: draws the initial weights.
    """

    node: Callable[[], DSRNode] = DSRIFNode
    time_steps: int = 20
    dropout: float = 0.0
    batch_norm: bool = True
    input_has_time: bool = False
    generator: torch.Generator | None = None

    def stage(self, op: nn.Module, pool: int = 1) -> DSRStage:
        """A connection with freshly drawn weights and the node behind it."""
        initialise(op, self.generator)
        return DSRStage(Connection(op, batch_norm=self.batch_norm, pool=pool), self.node(), self.dropout)


class DSRStage(nn.Module):
    """A connection applied to every time step, and the node that it drives.

    Args:
        connection: without dropout of its own.
        node: of this population.
        dropout: variational, one mask for all time steps.

    Raises:
        ValueError: the connection has dropout, whose mask would change in every step.
    """

    def __init__(self, connection: Connection, node: DSRNode, dropout: float = 0.0) -> None:
        super().__init__()
        if connection.dropout.p > 0:
            raise ValueError(
                "the connection's own dropout would change its mask in every time step; "
                "use Connection(..., dropout=0) and DSRStage(..., dropout=p)"
            )
        self.connection = connection
        self.dropout = VariationalDropout(dropout)
        self.node = node

    def forward(self, x: Tensor, *, repeat: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """y [T, B, *] for x [T, B, *], or for a constant input [B, *] that is repeated `repeat` times."""
        if repeat is None:
            # one batch norm statistic over time and batch
            current = self.connection(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            current = self.connection(x).unsqueeze(0)
        gain = self.dropout.draw(current[0], generator)
        if gain is not None:
            current = current * gain
        return self.node(current if repeat is None else current.expand(repeat, *current.shape[1:]))


class DSRClassifier(nn.Module):
    """Stages of DSR nodes and a linear classifier of the last one's spike representation.

    Args:
        stages: at least one.
        input_shape: of one input without time and batch, [C, H, W] or [C].
        num_classes: of the classifier.
        options: its `time_steps`, `input_has_time` and `generator` are used.

    Shapes: x [B, *input_shape] ([T, B, *input_shape] for inputs with time) -> logits [B, num_classes].

    Raises:
        ValueError: for sizes that do not fit, here and in forward.
    """

    def __init__(
        self, stages: Sequence[DSRStage], input_shape: Sequence[int], num_classes: int, options: DSROptions
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if options.time_steps < 1:
            raise ValueError(f"time_steps must be at least 1, got {options.time_steps}")
        if not stages:
            raise ValueError("a network needs at least one stage of spiking neurons")
        self.input_shape = tuple(input_shape)
        self.time_steps = options.time_steps
        self.input_has_time = options.input_has_time
        self.stages = nn.ModuleList(stages)
        shape = self._first_shape()
        shapes = []
        for stage in stages:
            shape = stage.connection.output_shape(shape)
            shapes.append(shape)
        self.population_shapes = tuple(shapes)
        self.classifier = nn.Linear(math.prod(shape), num_classes)
        initialise(self.classifier, options.generator)

    @property
    def num_neurons(self) -> int:
        """Neurons counted as in `ide_snn.models`: input, populations and classes."""
        inside = sum(math.prod(shape) for shape in self.population_shapes)
        return math.prod(self.input_shape) + inside + self.classifier.out_features

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        lead = 2 if self.input_has_time else 1
        if tuple(x.shape[lead:]) != self.input_shape or (self.input_has_time and not len(x)):
            expected = ["T", "B", *self.input_shape][2 - lead :]
            raise ValueError(f"input must have shape {expected}, got {list(x.shape)}")
        y = x.reshape(*x.shape[:lead], *self._first_shape())
        if not y.is_floating_point():  # spikes
            y = y.to(self.classifier.weight.dtype)
        repeat = None if self.input_has_time else self.time_steps
        for stage in self.stages:
            y = stage(y, repeat=repeat, generator=generator)
            repeat = None
        last = self.stages[-1].node
        return self.classifier(last.average(y).flatten(1))  # type: ignore[operator, union-attr]

    def _first_shape(self) -> tuple[int, ...]:
        """Shape of one input as the first connection takes it."""
        return self.input_shape


class DSRFCNet(DSRClassifier):
    """Fully connected.

    Args:
        input_shape: of one input; flattened.
        num_classes: of the classifier.
        hidden: neurons of each population.
        options: see `DSROptions`; an unknown one raises TypeError.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, hidden: int | Sequence[int] = 400, **options: Any
    ) -> None:
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        _require_positive(hidden=widths, input_shape=input_shape)
        opts = DSROptions(**options)
        sizes = (math.prod(input_shape), *widths)
        stages = [opts.stage(nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)]
        super().__init__(stages, input_shape, num_classes, opts)

    def _first_shape(self) -> tuple[int, ...]:
        return (math.prod(self.input_shape),)


class DSRConvNet(DSRClassifier):
    """Convolutional, with "same" padding before the stride.

    Args:
        input_shape: [C, H, W].
        num_classes: of the classifier.
        channels: maps of each population.
        strides: of each convolution, one per population.
        pools: kernel size and stride of the average pooling behind each convolution; None is no pooling.
        kernel_size: odd, of every convolution.
        options: see `DSROptions`; an unknown one raises TypeError.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (64,),
        strides: Sequence[int] = (2,),
        pools: Sequence[int] | None = None,
        kernel_size: int = 5,
        **options: Any,
    ) -> None:
        pools = (1,) * len(channels) if pools is None else tuple(pools)
        if len(input_shape) != 3:
            raise ValueError(f"a convolutional network needs input_shape [C, H, W], got {list(input_shape)}")
        if not len(channels) == len(strides) == len(pools):
            raise ValueError(
                f"channels {list(channels)}, strides {list(strides)} and pools {list(pools)} must have the same length"
            )
        _require_positive(channels=channels, strides=strides, pools=pools, input_shape=input_shape)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        opts = DSROptions(**options)
        stages, before = [], input_shape[0]
        for width, stride, pool in zip(channels, strides, pools, strict=True):
            stages.append(opts.stage(nn.Conv2d(before, width, kernel_size, stride, kernel_size // 2), pool))
            before = width
        super().__init__(stages, input_shape, num_classes, opts)


def _require_positive(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be one or more sizes of at least 1, got {list(values)}")
