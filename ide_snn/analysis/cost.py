"""What a network costs: synaptic operations, counted exactly, and the energy estimate that SNN papers print.

A spike costs one accumulation (AC) per synapse it reaches: per weight whose product lands inside the map, so fewer at
borders and under strides. A real number costs one multiplication-accumulation (MAC) per synapse.

    E = 4.6 pJ * MACs + 0.9 pJ * ACs          32-bit floating point, 45 nm

Source of the energies: M. Horowitz, "Computing's energy problem", ISSCC 2014 (multiplication 3.7 pJ, addition 0.9 pJ).

| connection                              | per sample                                                             |
| --------------------------------------- | ---------------------------------------------------------------------- |
| input stage, constant input             | MACs, once                                                             |
| input stage, spikes (0 and 1 only)      | ACs, every spike                                                       |
| input stage, other frames               | MACs, in each of the T steps                                           |
| between populations                     | ACs, every spike of steps 1..T                                         |
| feedback                                | ACs, every spike of steps 1..T-1: those of step T arrive nowhere       |
| linear and conv modules outside blocks  | MACs, as often as they are called: they see rates, not spikes          |

The equivalent ANN has the same feed-forward connections, input stage, layers and what is outside the blocks, each
computed once with MACs; it has no feedback. Not counted on either side: biases, batch norm (folded into the weights),
the additions of average pooling, activations, membrane updates. Outputs of a convolution that pooling drops are not
counted either. Weights that happen to be zero count as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ide_snn.analysis.observe import Observation, RestCall, Site, rest_modules, runs_as_known
from ide_snn.layers import Connection
from ide_snn.operators import Operator

__all__ = ["AC_PJ", "MAC_PJ", "Cost", "Operations", "SynapticCost", "UncountableError", "energy_pj", "fan_out"]

MAC_PJ = 4.6
AC_PJ = 0.9
# their parameters scale and shift single values; everything else with a matrix inside is refused
ELEMENTWISE = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


class UncountableError(ValueError):
    """The operations of a module cannot be counted exactly; the message names it."""


def energy_pj(macs: float, acs: float) -> float:
    """4.6 pJ * MACs + 0.9 pJ * ACs, in picojoules."""
    return MAC_PJ * macs + AC_PJ * acs


def fan_out(operator: Operator, input_shape: tuple[int, ...], pool: int = 1) -> Tensor:
    """Number of synapses that each input neuron reaches: float64 of `input_shape` [C, H, W] ([C] for linear).

    This is K^T 1 for a K of ones, of a single channel since all channels are alike.

    Args:
        operator: geometry of the connection.
        input_shape: without the batch.
        pool: of the average pooling behind it; outputs that it drops are reached by nobody.
    """
    output = operator.output_shape(input_shape)
    channels = operator.out_channels // operator.groups
    if operator.kind == "linear":
        return torch.full(input_shape, float(channels), dtype=torch.float64)
    single = replace(operator, in_channels=1, out_channels=1, groups=1)
    reached = torch.zeros(1, 1, *output[1:], dtype=torch.float64)
    reached[..., : output[1] // pool * pool, : output[2] // pool * pool] = 1
    ones = torch.ones(1, 1, *operator.kernel_size, dtype=torch.float64)
    count = single.adjoint(reached, ones, (1, *input_shape[1:]))[0]
    return (count.round() * channels).expand(input_shape)


@dataclass(frozen=True)
class Operations:
    """Operations of one connection, mean per sample; `ann_macs` are the equivalent ANN's."""

    name: str
    macs: float
    acs: float
    ann_macs: float


@dataclass(frozen=True)
class Cost:
    """Operations of every connection, and their energy, per sample."""

    parts: tuple[Operations, ...]

    @property
    def macs(self) -> float:
        return math.fsum(part.macs for part in self.parts)

    @property
    def acs(self) -> float:
        """Synaptic operations: spikes times synapses."""
        return math.fsum(part.acs for part in self.parts)

    @property
    def ann_macs(self) -> float:
        return math.fsum(part.ann_macs for part in self.parts)

    @property
    def energy_pj(self) -> float:
        return energy_pj(self.macs, self.acs)

    @property
    def ann_energy_pj(self) -> float:
        return energy_pj(self.ann_macs, 0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "per_sample": {"macs": self.macs, "acs": self.acs, "energy_pj": self.energy_pj},
            "equivalent_ann_per_sample": {"macs": self.ann_macs, "energy_pj": self.ann_energy_pj},
            "energy_ratio": self.energy_pj / self.ann_energy_pj if self.ann_energy_pj else None,
            "formula": f"{MAC_PJ} pJ per MAC + {AC_PJ} pJ per AC (32-bit float, 45 nm; Horowitz, ISSCC 2014)",
            "connections": {p.name: {"macs": p.macs, "acs": p.acs, "ann_macs": p.ann_macs} for p in self.parts},
        }


class SynapticCost:
    """Counts the operations of everything in the model; a `Meter`.

    Raises:
        UncountableError: in `add`, for a connection that is an own module, or a module outside the blocks with a
            weight matrix that is not linear, conv or transposed conv. Products of tensors that a model computes by
            itself, without a module, cannot be seen.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, observation: Observation, labels: Tensor) -> None:  # noqa: ARG002
        _refuse_uncountable(observation.model)
        self._samples += observation.samples
        for site in observation.sites:
            self._add_block(site)
        for call in observation.rest:
            macs = _rest_macs(call)
            self._count(call.name, macs=macs, ann_macs=macs)

    def result(self) -> Cost:
        parts = []
        for name, total in self._totals.items():
            macs, acs, ann_macs = (total / self._samples).tolist()
            parts.append(Operations(name, macs, acs, ann_macs))
        return Cost(tuple(parts))

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """(MACs, ACs, the equivalent ANN's MACs) of every connection, summed over all samples."""
        return {name: tuple(map(round, total.tolist())) for name, total in self._totals.items()}

    def as_dict(self) -> dict[str, Any]:
        return self.result().as_dict()

    def _count(self, name: str, *, macs: float = 0, acs: float = 0, ann_macs: float = 0) -> None:
        # float64 holds whole numbers exactly up to 9e15
        amount = torch.tensor([macs, acs, ann_macs], dtype=torch.float64)
        self._totals[name] = self._totals.get(name, 0) + amount

    def _add_block(self, site: Site) -> None:
        block, steps = site.block, site.rates.time_steps
        shape = tuple(site.x.shape[2 if block.input_has_time else 1 :])
        shapes = block.population_shapes(shape)
        fan = _fan_of(f"{site.prefix}input", block.input, shape)
        dense = site.batch * float(fan.sum())
        if not block.input_has_time:
            self._count(f"{site.prefix}input", macs=dense, ann_macs=dense)
        elif _is_spikes(site.x):
            arriving = site.x.double().sum(dim=(0, 1)).cpu()
            self._count(f"{site.prefix}input", acs=float((arriving * fan).sum()), ann_macs=dense)
        else:
            self._count(f"{site.prefix}input", macs=steps * dense, ann_macs=dense)
        # whole numbers again: a fraction is a count divided by T
        spikes = [(fraction.double() * steps).round().sum(0).cpu() for fraction in site.rates.spike_fraction]
        for i, layer in enumerate(block.layers):
            name = f"{site.prefix}layer_{i + 2}"
            fan = _fan_of(name, layer, shapes[i])
            self._count(name, acs=float((spikes[i] * fan).sum()), ann_macs=site.batch * float(fan.sum()))
        fed_back = spikes[-1] - site.last_spikes.double().sum(0).cpu()
        fan = _fan_of(f"{site.prefix}feedback", block.feedback, shapes[-1])
        self._count(f"{site.prefix}feedback", acs=float((fed_back * fan).sum()))


def _fan_of(name: str, connection: nn.Module, shape: tuple[int, ...]) -> Tensor:
    assert isinstance(connection, Connection)  # FeedbackSNN wraps everything else into one
    if connection.operator is None:
        raise UncountableError(
            f"cannot count the synaptic operations of {name}: {type(connection.op).__name__} is an own module, whose "
            "synapses are not known; counted are nn.Linear, nn.Conv2d and nn.ConvTranspose2d"
        )
    return fan_out(connection.operator, shape, connection.pool)


def _is_spikes(x: Tensor) -> bool:
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())


def _rest_macs(call: RestCall) -> float:
    try:
        operator = Operator.of(call.module)
    except ValueError as error:
        raise UncountableError(f"cannot count the operations of {call.name}: {error}") from error
    if operator.kind == "linear":
        return math.prod(call.input_shape[:-1]) * operator.in_channels * operator.out_channels
    return math.prod(call.input_shape[:-3]) * float(fan_out(operator, call.input_shape[-3:]).sum())


def _refuse_uncountable(model: nn.Module) -> None:
    for name, module in rest_modules(model):
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if matrices and not runs_as_known(module) and not isinstance(module, ELEMENTWISE):
            raise UncountableError(
                f"cannot count the operations of {name or 'the model'} ({type(module).__name__}): outside the blocks "
                "only nn.Linear, nn.Conv2d and nn.ConvTranspose2d are counted"
            )
