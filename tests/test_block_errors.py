"""Bad input to the block and the networks: one clear error each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from networks import example_input, small_block
from torch import nn

from ide_snn import Connection, FeedbackSNN, Gmres, NeuronParams, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.solvers.base import Advance, Workspace


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5"])
def test_time_steps(value: object) -> None:
    with pytest.raises(ValueError, match="time_steps must be a whole number of at least 1"):
        small_block("fc", time_steps=value)
    block = small_block("fc")
    with pytest.raises(ValueError, match="time_steps"):
        block.time_steps = value
    assert block.time_steps == 10


@pytest.mark.parametrize("leak", [0.0, -0.1, 1.01, float("nan")])
def test_leak(leak: float) -> None:
    with pytest.raises(ValueError, match=r"leak must lie in \(0, 1\]"):
        NeuronParams(2.0, leak)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input(bad: float) -> None:
    x = example_input("conv")
    x[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        small_block("conv")(x)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"does not fit the network.*expects \[2, H, W\], got \[3, 8, 8\]"):
        small_block("conv")(torch.zeros(4, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"expects \[6\] features, got \[7\]"):
        small_block("fc")(torch.zeros(4, 7).double())
    with pytest.raises(ValueError, match=r"shape \[B, ...\]"):
        small_block("fc")(torch.zeros(6).double())
    with pytest.raises(ValueError, match="7 time steps but the network simulates 10"):
        small_block("fc", input_has_time=True)(example_input("fc", time_steps=7))
    with pytest.raises(ValueError, match=r"\['B', 1, 28, 28\], got \[2, 1, 8, 8\]"):
        SNNIDEFCNet((1, 28, 28), 10)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="floating point"):
        small_block("fc")(torch.zeros(4, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"input is torch.float32 but the parameters are torch.float64"):
        small_block("fc")(torch.zeros(4, 6))


def test_feedback_that_does_not_fit_population_one() -> None:
    block = FeedbackSNN(input=nn.Conv2d(1, 2, 3, 2, 1), feedback=nn.Conv2d(2, 2, 3), time_steps=2)
    with pytest.raises(
        ValueError, match=r"feedback's output \[2, 2, 2\] must have the shape of population 1, \[2, 4, 4\]"
    ):
        block(torch.zeros(1, 1, 8, 8))


def test_connection_options() -> None:
    with pytest.raises(ValueError, match=r"dropout probability must lie in \[0, 1\)"):
        Connection(nn.Linear(2, 2), dropout=1.0)
    with pytest.raises(ValueError, match="pool must be at least 1"):
        Connection(nn.Conv2d(2, 2, 3), pool=0)
    with pytest.raises(ValueError, match="unknown constraint 'spectral'; valid are spectral_matrix, spectral_operator"):
        Connection(nn.Linear(2, 2), constraint="spectral")
    with pytest.raises(ValueError, match="inside your Identity use torch's batch norm"):
        Connection(nn.Identity(), batch_norm=True)
    with pytest.raises(ValueError, match="padding_mode='circular' is not supported"):
        Connection(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))


def test_network_options() -> None:
    with pytest.raises(TypeError, match="thresold"):
        SNNIDEFCNet((4,), 2, thresold=1.0)
    with pytest.raises(ValueError, match="same length"):
        SNNIDEConvMultiLayerNet((3, 8, 8), 2, channels=(4, 4), strides=(2,))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SNNIDEConvNet((1, 8, 8), 2, kernel_size=4)
    with pytest.raises(ValueError, match=r"needs input_shape \[C, H, W\]"):
        SNNIDEConvNet((8,), 2)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        SNNIDEFCNet((4,), 2, hidden=0)
    with pytest.raises(ValueError, match="channels must be at least 1"):
        SNNIDEConvMultiLayerNet((3, 8, 8), 2, channels=(4, 0), strides=(2, 1))
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        SNNIDEFCNet((4,), 1)


def test_own_batch_norm_in_the_input_stage_with_time_is_refused_in_training() -> None:
    stage = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    block = FeedbackSNN(input=stage, feedback=nn.Linear(8, 8).double(), time_steps=5, input_has_time=True)
    with pytest.raises(ValueError, match="mean input"):
        block(example_input("fc", time_steps=5))
    assert block.eval()(example_input("fc", time_steps=5)).shape == (4, 8)


WRONG = {
    "solver": ("gmres", r"solver must be one of FixedPoint\(...\), .*got 'gmres'"),
    "gradient": ("unrolled", "gradient must be one of"),
    "neuron": (2.0, "neuron must be one of NeuronParams"),
    "input_has_time": ("no", "input_has_time must be one of False, True, got 'no'"),
    "check_input": (1, "check_input must be one of None, False, True, got 1"),
    "precision": ("exakt", "precision must be one of float32, exact, fast, got 'exakt'"),
}


@dataclass(frozen=True)
class Own:
    """Damped fixed-point steps: what `Solver` asks for."""

    tol: float = 1e-6
    max_steps: int = 500

    def begin(self, work: Workspace) -> Own:  # noqa: ARG002
        return self

    def advance(self, y: torch.Tensor, r: torch.Tensor, budget: int) -> Advance:  # noqa: ARG002
        return Advance(y + 0.7 * r)


@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
def test_a_solver_of_ones_own(precision: str) -> None:
    gradients = []
    for solver in (Own(), Gmres(1e-6)):
        torch.manual_seed(0)
        block = small_block("fc", precision=precision, solver=solver).float()
        x = example_input("fc").float()
        block(torch.linspace(-1, 3, x.numel()).view_as(x)).square().sum().backward()
        gradients.append(block.feedback.op.parametrizations.weight.original.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_what_a_solver_of_ones_own_lacks_is_said() -> None:
    block = small_block("fc")
    for wrong, message in (
        (Gmres, r"a custom one with begin, tol and max_steps .*, got <class"),
        (nn.Identity(), r"a custom one with begin, tol and max_steps .*, got Identity"),
        (Own(tol=-1), "tol must be a positive finite number"),
        (Own(tol="1e-3"), "tol must be a positive finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            block.solver = wrong


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kinds_of_options(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        small_block("fc", **{name: value})
    block = small_block("fc")
    before = getattr(block, name)
    with pytest.raises(ValueError, match=message):
        setattr(block, name, value)
    assert getattr(block, name) is before


def test_compile_is_set_by_its_own_name() -> None:
    block = small_block("fc")
    with pytest.raises(ValueError, match="compile must be one of None, False, True, got 'false'"):
        block.compile_ = "false"
    with pytest.raises(ValueError, match=r"block.compile_ = True"):
        block.compile = True


def test_layers_are_a_list() -> None:
    conv, norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
    for layers in (nn.Sequential(conv, norm), conv):
        with pytest.raises(ValueError, match=r"layers must be a list .* got \w+: give \[module\]"):
            FeedbackSNN(input=nn.Conv2d(1, 2, 3), feedback=nn.Conv2d(2, 2, 3, padding=1), layers=layers)
    block = FeedbackSNN(
        input=nn.Conv2d(1, 2, 3), feedback=nn.Conv2d(2, 2, 3, padding=1), layers=nn.ModuleList([conv]), time_steps=2
    )
    assert block.population_shapes((1, 6, 6)) == [(2, 4, 4)] * 2


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_a_forgotten_time_axis_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"does not fit the network.*set input_has_time=True"):
        small_block(kind)(example_input(kind, time_steps=10))
    with pytest.raises(ValueError) as caught:
        small_block("conv")(torch.zeros(4, 3, 8, 8).double())
    assert "input_has_time" not in str(caught.value)


def test_own_modules_are_not_asked_for_strange_shapes() -> None:
    """Flatten has no answer to fewer dimensions, and an input stage that fits is not what lacks time."""
    for width, layers in ((7, []), (5, [nn.Linear(12, 8)])):
        stage = nn.Sequential(nn.Flatten(), nn.Linear(5, 8))
        block = FeedbackSNN(input=stage, layers=layers, feedback=nn.Linear(8, 8), time_steps=2)
        with pytest.raises(ValueError, match="does not fit the network") as caught:
            block(torch.zeros(2, width))
        assert "input_has_time" not in str(caught.value)
    known = FeedbackSNN(input=nn.Linear(10, 10), layers=[nn.Linear(12, 5)], feedback=nn.Linear(5, 10), time_steps=2)
    with pytest.raises(ValueError, match=r"expects \[12\] features, got \[10\]$"):
        known(torch.zeros(2, 10))


def test_a_module_set_later_is_a_connection_too() -> None:
    block = small_block("fc")
    block.feedback = nn.Linear(8, 8).double()
    assert isinstance(block.feedback, Connection)
    assert block(example_input("fc")).shape == (4, 8)


def test_a_norm_for_inputs_of_one_size_refuses_others() -> None:
    feedback = Connection(nn.Conv2d(2, 2, 3, padding=1), constraint="spectral_operator", input_size=(4, 4))
    block = FeedbackSNN(input=nn.Conv2d(1, 2, 3, 2, 1), feedback=feedback, time_steps=2)
    assert block(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"made for inputs \[2, 4, 4\] .* \[2, 6, 6\]: give input_size=\(6, 6\)"):
        block(torch.zeros(1, 1, 12, 12))
    other = Connection(nn.Conv2d(3, 2, 3, padding=1), constraint="spectral_operator", input_size=(4, 4))
    with pytest.raises(ValueError, match=r"expects \[3, H, W\], got \[2, 4, 4\]"):
        FeedbackSNN(input=nn.Conv2d(1, 2, 3, 2, 1), feedback=other, time_steps=2)(torch.zeros(1, 1, 8, 8))


def test_coarse_parameters() -> None:
    with pytest.raises(ValueError, match="too coarse for membranes"):
        FeedbackSNN(input=nn.Linear(6, 8), feedback=nn.Linear(8, 8), time_steps=2).bfloat16()(
            torch.zeros(2, 6).bfloat16()
        )


def test_finite_inputs_whose_sum_overflows_are_accepted() -> None:
    block = small_block("fc", dropout=0.0).float().eval()
    block(torch.full_like(example_input("fc").float(), 3e38))
