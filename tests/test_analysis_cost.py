"""Synaptic operations against loops over every spike and every weight; energies in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from networks import KINDS, example_input, small_block, warmed_up
from test_operators import modules
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, NeuronParams
from ide_snn.analysis import Cost, Operations, SynapticCost, UncountableError, energy_pj, fan_out, measure
from ide_snn.operators import Operator
from ide_snn.record import Record


def reached(connection: Connection, neuron: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Weights of `connection` that a spike of `neuron` (c, y, x) reaches, tap by tap; `shape` is the response's."""
    op = connection.op
    if isinstance(op, nn.Linear):
        return op.out_features
    count, (_, *position) = 0, neuron
    for tap in itertools.product(*map(range, op.kernel_size)):
        inside = True
        for d in range(2):
            offset = tap[d] * op.dilation[d]
            if isinstance(op, nn.ConvTranspose2d):
                place, rest = position[d] * op.stride[d] - op.padding[d] + offset, 0
            else:
                place, rest = divmod(position[d] + op.padding[d] - offset, op.stride[d])
            used = shape[d + 1] // connection.pool * connection.pool
            inside = inside and rest == 0 and 0 <= place < used
        count += inside
    return count * (op.out_channels // op.groups)


def brute_force(connection: Connection, spikes: Tensor) -> int:
    """Synaptic operations of the spike train [T, B, *], spike by spike."""
    shape = connection.operator.output_shape(tuple(spikes.shape[2:]))
    total = 0
    for _, _, *neuron in spikes.nonzero().tolist():
        total += reached(connection, tuple(neuron), shape)
    return total


def grouped_block(**options) -> FeedbackSNN:
    """Grouped and dilated convolutions, uneven strides and paddings; a transposed one forward and back."""
    stage = nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 2), groups=2)  # 8x8 -> 4x11
    layers = [
        nn.Conv2d(4, 6, 3, (1, 3), 1, dilation=(2, 1), groups=2),  # 4x11 -> 2x4
        nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2),  # 2x4 -> 4x8
    ]
    feedback = nn.ConvTranspose2d(4, 4, (1, 4), 1, 0, bias=False)  # 4x8 -> 4x11
    block = FeedbackSNN(
        input=stage,
        layers=layers,
        feedback=feedback,
        neuron=NeuronParams(0.5, 0.9),
        time_steps=6,
        **options,
    )
    return warmed_up(block.double())


def block_of(kind: str, **options) -> FeedbackSNN:
    if kind == "grouped":
        return grouped_block(**options)
    return warmed_up(small_block(kind, time_steps=6, **options))


@pytest.mark.parametrize("spiking", [False, True], ids=["constant", "spikes"])
@pytest.mark.parametrize("kind", [*KINDS, "grouped"])
def test_operations_equal_a_count_by_loops(kind: str, spiking: bool) -> None:
    block = block_of(kind, input_has_time=spiking).eval()
    x = example_input("conv" if kind == "grouped" else kind, 2, 6 if spiking else None)
    meter = SynapticCost()
    measure(block, [(x, torch.zeros(2)), (x, torch.zeros(2))], meter)
    spikes = block.simulate(x, Record(spikes=True)).spikes
    ones = torch.ones(1, *x.shape[1 if spiking else 0 :], dtype=torch.bool)
    dense = 2 * brute_force(block.input, ones)
    arriving = 2 * brute_force(block.input, x) if spiking else 0
    expected = {"input": (0 if spiking else dense, arriving, dense)}
    for i, layer in enumerate(block.layers):
        dense = 2 * brute_force(layer, torch.ones_like(spikes[i][:1]))
        expected[f"layer_{i + 2}"] = (0, 2 * brute_force(layer, spikes[i]), dense)
    expected["feedback"] = (0, 2 * brute_force(block.feedback, spikes[-1][:-1]), 0)
    assert meter.totals() == expected
    assert expected["feedback"][1] > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(modules(bias=False))
def test_fan_out_counts_the_entries_of_the_matrix(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    nn.init.ones_(module.weight)  # an input reaches an output of its group by one weight at most
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(module, zero).reshape(-1, zero.numel())
    assert set(matrix.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(fan_out(Operator.of(module), shape), matrix.sum(0).view(shape))


def test_frames_of_real_numbers_are_macs_in_every_step() -> None:
    block = block_of("conv", input_has_time=True)
    x = example_input("conv", 3, 6)
    once, frames = SynapticCost(), SynapticCost()
    measure(block, [(x.bool(), torch.zeros(3))], once)
    measure(block, [(2 * x, torch.zeros(3))], frames)
    (macs, acs, ann), (frame_macs, frame_acs, frame_ann) = once.totals()["input"], frames.totals()["input"]
    assert (macs, frame_acs) == (0, 0)
    assert acs < frame_macs == 6 * ann == 6 * frame_ann


def test_a_network_that_always_fires_in_closed_form() -> None:
    """B samples, N neurons that fire in all T steps: N^2 (T - 1) ACs of feedback and the MACs of both ends."""
    stage, feedback = nn.Linear(3, 7), nn.Linear(7, 7, bias=False)
    nn.init.zeros_(feedback.weight)
    nn.init.zeros_(stage.weight)
    nn.init.constant_(stage.bias, 2.0)
    block = FeedbackSNN(input=stage, feedback=feedback, time_steps=9)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), block, nn.LayerNorm(7), nn.Linear(7, 4))
    meter = SynapticCost()
    measure(model, [(torch.randn(5, 3), torch.zeros(5)), (torch.randn(2, 3), torch.zeros(2))], meter)
    cost = meter.result()
    macs, acs = 9 + 21 + 28, 49 * 8
    assert (cost.macs, cost.acs, cost.ann_macs) == (macs, acs, macs)
    assert cost.energy_pj == pytest.approx(4.6 * macs + 0.9 * acs, rel=1e-12)
    assert cost.ann_energy_pj == pytest.approx(4.6 * macs, rel=1e-12)
    assert [part.name for part in cost.parts] == ["input", "feedback", "1", "4"]
    assert cost.as_dict()["energy_ratio"] == pytest.approx(1 + 0.9 * acs / (4.6 * macs))


def test_energy_formula() -> None:
    assert energy_pj(1, 0) == 4.6
    assert energy_pj(0, 1) == 0.9
    cost = Cost((Operations("input", 10, 0, 10), Operations("layer_2", 0, 100, 20)))
    assert cost.energy_pj == pytest.approx(46 + 90)
    assert cost.ann_energy_pj == pytest.approx(138)


def test_convolutions_outside_the_block_count_their_borders() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), small_block("conv").float(), nn.ConvTranspose2d(3, 1, 2, 2))
    meter = SynapticCost()
    measure(model, [(torch.randn(2, 1, 8, 8), torch.zeros(2))], meter)
    parts = {part.name: part for part in meter.result().parts}
    assert parts["0"].macs == 2 * (3 * 8 - 2) ** 2  # 9 taps per output, 8 rows and columns less a border each
    assert parts["2"].macs == 3 * 16 * 4


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SquaredLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


@pytest.mark.parametrize(
    ("rest", "feedback", "message"),
    [
        (Own(), nn.Linear(8, 8), r"operations of 1 \(Own\)"),
        (SquaredLinear(8, 8), nn.Linear(8, 8), r"operations of 1 \(SquaredLinear\)"),
        (nn.LSTM(8, 8), nn.Linear(8, 8), r"operations of 1 \(LSTM\)"),
        (nn.Identity(), Own(), "operations of feedback: Own is an own module"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(rest: nn.Module, feedback: nn.Module, message: str) -> None:
    class Forgiving(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if isinstance(y, Tensor) else y[0]

    model = Forgiving(FeedbackSNN(input=nn.Linear(3, 8), feedback=feedback), rest)
    with pytest.raises(UncountableError, match=message):
        measure(model, [(torch.randn(2, 3), torch.zeros(2))], SynapticCost())
