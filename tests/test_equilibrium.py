"""The map f and its Jacobian: analytic products, autograd products and a dense Jacobian agree."""

from __future__ import annotations

import pytest
import torch
from networks import KINDS, example_input, small_block, warmed_up
from torch import nn
from torch.nn.utils import prune

from ide_snn import Connection, FeedbackSNN, NeuronParams
from ide_snn.equilibrium import AnalyticLinearisation, dense_jacobian


class OwnAffine(nn.Module):
    """What a user might write: two affine maps in parallel and a fixed gain."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a = nn.Linear(features, features)
        self.b = nn.Linear(features, features, bias=False)

    def forward(self, x):
        return 0.3 * self.a(x) - 0.2 * self.b(x).flip(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_analytic_and_autograd_products_are_the_dense_jacobian(kind: str, training: bool) -> None:
    block = warmed_up(small_block(kind, dropout=0.3)).train(training)
    rates, f = block.linearisation_point(example_input(kind))
    analytic = f.linearise(rates, "running", "analytic")
    autograd = f.linearise(rates, "running", "autograd")
    dense = torch.autograd.functional.jacobian(lambda a: f(a, "running"), rates).reshape(rates.numel(), -1)
    assert dense.abs().sum() > 0
    assert isinstance(analytic, AnalyticLinearisation)
    for linearisation in (analytic, autograd):
        torch.testing.assert_close(dense_jacobian(linearisation.matvec, rates), dense)
        torch.testing.assert_close(dense_jacobian(linearisation.rmatvec, rates), dense.t())


def test_batch_statistics_couple_samples_and_running_ones_do_not() -> None:
    block = warmed_up(small_block("multilayer")).train()
    rates, f = block.linearisation_point(example_input("multilayer"))
    per_sample = rates[0].numel()

    def off_diagonal(statistics: str) -> float:
        dense = dense_jacobian(f.linearise(rates, statistics).rmatvec, rates)
        blocks = dense.reshape(len(rates), per_sample, len(rates), per_sample).transpose(1, 2).clone()
        blocks[range(len(rates)), range(len(rates))] = 0
        return float(blocks.abs().max())

    assert off_diagonal("running") == 0
    assert off_diagonal("batch") > 1e-6
    with pytest.raises(ValueError, match="running statistics"):
        f.linearise(rates, "batch", "analytic")


def test_jacobian_with_batch_statistics_is_that_of_f() -> None:
    block = warmed_up(small_block("multilayer")).train()
    rates, f = block.linearisation_point(example_input("multilayer"))
    dense = torch.autograd.functional.jacobian(lambda a: f(a, "batch"), rates).reshape(rates.numel(), -1)
    torch.testing.assert_close(dense_jacobian(f.linearise(rates, "batch").rmatvec, rates), dense.t())


def test_own_module_gives_the_same_numbers_as_the_known_connection() -> None:
    """The same linear map once as nn.Linear and once hidden in a user's module."""
    hidden = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Identity()).double()
    stage = nn.Linear(6, 8).double()
    own = FeedbackSNN(input=Connection(stage), feedback=hidden, time_steps=8)
    known = FeedbackSNN(input=Connection(stage), feedback=Connection(hidden[0]), time_steps=8)
    x = example_input("fc")
    results = []
    for block in (own, known):
        hidden.zero_grad()
        rates = block(x)
        rates.square().sum().backward()
        results.append((rates.detach(), hidden[0].weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-4)  # two solves to tol 1e-3
    rates, f = own.linearisation_point(x)
    _, g = known.linearisation_point(x)
    torch.testing.assert_close(
        dense_jacobian(f.linearise(rates, "running").rmatvec, rates),
        dense_jacobian(g.linearise(rates, "running").rmatvec, rates),
    )
    with pytest.raises(ValueError, match="known connections"):
        f.linearise(rates, "running", "analytic")


def test_affine_module_of_ones_own_is_accepted() -> None:
    block = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=OwnAffine(8).double(), time_steps=5)
    assert block(example_input("fc")).shape == (4, 8)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.LayerNorm(8)])
def test_module_that_is_not_affine_is_refused(activation: nn.Module) -> None:
    own = nn.Sequential(nn.Linear(8, 8), activation).double()
    block = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=own, time_steps=5)
    with pytest.raises(ValueError, match="not affine"):
        block(example_input("fc"))


def test_torch_dropout_inside_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Connection\(..., dropout=p\)"):
        Connection(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))


def test_batch_norm_inside_an_own_module_is_handled_like_the_connections_own() -> None:
    torch.manual_seed(1)
    block = warmed_up(small_block("multilayer", time_steps=6)).train()
    known = block.layers[0]
    wrapped = nn.Sequential(known.op, known.bn)
    own = FeedbackSNN(
        input=block.input,
        layers=[wrapped, block.layers[1]],
        feedback=block.feedback,
        neuron=block.neuron,
        time_steps=6,
        solver=block.solver,
    ).train()
    x = example_input("multilayer")
    start = {k: v.clone() for k, v in block.state_dict().items()}
    outcomes = []
    for net in (block, own):
        block.load_state_dict(start)
        net.zero_grad()
        rates = net(x)
        rates.square().sum().backward()
        outcomes.append((rates.detach(), known.op.weight.grad.clone(), known.bn.running_mean.clone()))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.equal(outcomes[0][2], start["layers.0.bn.running_mean"])
    assert wrapped[1].training
    assert wrapped[1].track_running_stats


def test_f_clamps_to_the_unit_interval_and_its_gradient_passes_at_equality() -> None:
    """Drive 0, 1, 2, 3 at V_th 2: sigma' is 1 at both ends, 0 beyond."""
    stage = nn.Linear(4, 4, bias=False).double()
    feedback = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        stage.weight.copy_(torch.eye(4))
        feedback.weight.copy_(torch.eye(4) * 0.1)
    block = FeedbackSNN(input=stage, feedback=feedback, neuron=NeuronParams(2.0), time_steps=4)
    rates, f = block.linearisation_point(torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64))
    a = torch.zeros_like(rates)
    assert f(a, "running").tolist() == [[0.0, 0.5, 1.0, 1.0]]
    slope = dense_jacobian(f.linearise(a, "running").matvec, a).diagonal()
    torch.testing.assert_close(slope, torch.tensor([0.05, 0.05, 0.05, 0.0], dtype=torch.float64))


class Masked(nn.Linear):
    """A subclass whose forward is not torch's."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.tril(), self.bias)


def test_subclasses_and_hooks_are_not_taken_for_the_plain_operator() -> None:
    x = example_input("fc")
    masked = Masked(8, 8).double()
    plain = nn.Linear(8, 8).double()
    plain.load_state_dict({"weight": masked.weight.tril(), "bias": masked.bias})
    hooked = nn.Linear(8, 8).double()
    hooked.load_state_dict(masked.state_dict())
    prune.custom_from_mask(hooked, "weight", torch.ones(8, 8).tril())
    stage = nn.Linear(6, 8).double()
    nets = [FeedbackSNN(input=stage, feedback=op, time_steps=6) for op in (plain, masked, hooked)]
    assert [net.feedback.is_known for net in nets] == [True, False, False]
    expected = nets[0](x)
    for net in nets[1:]:
        for _ in range(2):  # a second backward through the same graph would raise
            rates = net(x)
            assert torch.equal(rates, expected)
            rates.sum().backward()


def test_affinity_is_checked_in_full_precision_under_autocast() -> None:
    own = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    block = FeedbackSNN(input=nn.Linear(6, 8), feedback=own, time_steps=5)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="not affine"):
        block(torch.randn(4, 6))


def test_parametrizations_of_an_own_module_advance_once_per_training_forward() -> None:
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8, bias=False)).double()
    block = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=nn.Sequential(linear), time_steps=5)
    norm = linear.parametrizations.weight[0]
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(torch.linspace(1, 9, 8)[:, None])
    for _ in range(40):
        block(example_input("fc"))
    assert torch.linalg.matrix_norm(linear.eval().weight, 2) < 1.01
    before = norm._u.clone()
    block.eval()(example_input("fc"))
    assert torch.equal(norm._u, before)


def test_own_module_with_buffers_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filter", torch.eye(8) / 4)

        def forward(self, x):
            return x @ self.filter

    block = FeedbackSNN(input=nn.Linear(6, 8).double(), feedback=Fixed().double(), time_steps=5)
    assert block(example_input("fc")).shape == (4, 8)
