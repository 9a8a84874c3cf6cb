"""FeedbackSNN as an nn.Module: what a user does with it besides training it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, LIF, example_input, small_block, warmed_up
from torch import nn

from ide_snn import Bptt, Connection, FeedbackSNN, FixedPoint, Gmres, Implicit, NeuronParams, SNNIDEFCNet
from ide_snn.neurons import step
from ide_snn.optimizations import get_constraint
from ide_snn.record import Record


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def plain_simulation(block: FeedbackSNN, x: torch.Tensor) -> list[torch.Tensor]:
    """Spike trains by the modules themselves (evaluation mode), step by step, without the block's code."""

    def respond(connection: Connection, s: torch.Tensor) -> torch.Tensor:
        y = connection.op(s)
        y = y if connection.bn is None else connection.bn(y)
        return y if connection.pool == 1 else F.avg_pool2d(y, connection.pool)

    trains, u, back = [], None, None
    for t in range(block.time_steps):
        current = respond(block.input, x[t] if block.input_has_time else x)
        if back is None:
            back = respond(
                block.feedback, torch.zeros(len(current), *block.population_shapes(x.shape[-3:])[-1]).double()
            )
        current = current + back
        spikes = []
        u = u or [0.0] * (len(block.layers) + 1)
        for i in range(len(u)):
            s, u[i] = step(current, u[i] if t else torch.zeros_like(current), block.neuron)
            spikes.append(s)
            if i < len(block.layers):
                current = respond(block.layers[i], s)
        back = respond(block.feedback, spikes[-1])
        trains.append(spikes)
    return [torch.stack([spikes[i] for spikes in trains]) for i in range(len(u))]


@pytest.mark.parametrize("kind", ["conv", "multilayer", "pooled"])
@pytest.mark.parametrize("leak", [1.0, 0.9])
@pytest.mark.parametrize("with_time", [False, True])
def test_simulation_equals_a_plain_loop_over_the_modules(kind: str, leak: float, with_time: bool) -> None:
    block = warmed_up(small_block(kind, neuron=NeuronParams(2.0, leak), input_has_time=with_time)).eval()
    x = example_input(kind, time_steps=10 if with_time else None)
    rates = block.simulate(x, Record(all_rates=True, spike_fraction=True, spikes=True))
    weights = leak ** torch.arange(9, -1, -1, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_simulation(block, x)
    assert len(expected) == len(rates.spikes) == len(block.layers) + 1
    for train, spikes, rate, fraction in zip(expected, rates.spikes, rates.all, rates.spike_fraction, strict=True):
        assert torch.equal(spikes, train.bool())
        torch.testing.assert_close(rate, torch.tensordot(weights / weights.sum(), train, 1))
        torch.testing.assert_close(fraction, train.mean(0))
    torch.testing.assert_close(rates.last, rates.all[-1], rtol=0, atol=0)
    torch.testing.assert_close(rates.firing_rate, torch.stack([t.mean() for t in expected]))
    assert 0 < float(rates.firing_rate[-1]) < 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["fc", "conv"]))
def test_if_rates_converge_like_one_over_t(seed: int, kind: str) -> None:
    """IF, one population, constant input: T ||a - f(a)|| stays within twice its value at T = 8.

    Over a batch of some hundred neurons: of a handful, the value at T = 8 can be small by chance.
    """
    torch.manual_seed(seed)
    block = small_block(kind, neuron=NeuronParams(2.0, 1.0), batch_norm=False).eval()
    x = 2 * example_input(kind, batch=64 if kind == "fc" else 16)
    values = []
    for time_steps in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        block.time_steps = time_steps
        rates, f = block.linearisation_point(x)
        with torch.no_grad():
            values.append(time_steps * float((rates - f(rates, "running")).norm()))
    assert max(values) <= 2 * values[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_approach_the_solved_equilibrium(kind: str) -> None:
    block = warmed_up(small_block(kind, neuron=NeuronParams(2.0, 1.0))).eval()
    x = example_input(kind)
    equilibrium, solution = block.equilibrium(x)
    assert solution.outcome == "converged"
    block.time_steps = 2000
    assert (block(x) - equilibrium).abs().max().item() < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_time", [False, True])
def test_nothing_mutates_its_input(kind: str, with_time: bool) -> None:
    """The original's LIF overwrote the last frame of spike input."""
    block = small_block(kind, dropout=0.2, input_has_time=with_time)
    x = example_input(kind, time_steps=10 if with_time else None)
    before, g = x.clone(), torch.randn_like(block(x))
    kept = g.clone()
    block(x).backward(g)
    block.eval().simulate(x)
    block.equilibrium(x)
    assert torch.equal(x, before)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_idempotent(kind: str) -> None:
    """The original's power iteration also ran in evaluation, and its restored statistics were aliases."""
    block = small_block(kind, dropout=0.2)
    x = example_input(kind)
    block(x)
    block.eval()
    before = snapshot(block)
    first = block(x)
    block.simulate(x, Record(all_rates=True))
    assert torch.equal(first, block(x))
    block(x).sum().backward()
    assert_same(snapshot(block), before)


def test_training_forward_updates_running_statistics_exactly_once() -> None:
    """By f's response to the rates, and the input stage's by the response to the input."""
    block = warmed_up(small_block("multilayer")).train()
    x = example_input("multilayer")
    before = copy.deepcopy(block)
    rates = block(x).detach()
    a, expected = rates, []
    with torch.no_grad():
        z = before.input.op(x)
        expected.append(z)
        z = before.input.bn(z) + block.feedback.op(a)  # the constrained weight after its one update
        for layer in before.layers:
            response = layer.op((z / 2).clamp(0, 1))
            expected.append(response)
            z = layer.bn(response)
    for old, now, response in zip((before.input, *before.layers), (block.input, *block.layers), expected, strict=True):
        # `before`'s batch norms have seen exactly one forward, above; a momentum below 1 keeps part of the old value
        assert int(now.bn.num_batches_tracked) == int(old.bn.num_batches_tracked) == 1
        torch.testing.assert_close(old.bn.running_mean, now.bn.running_mean)
        torch.testing.assert_close(old.bn.running_var, now.bn.running_var)
        unbiased = response.transpose(0, 1).flatten(1).var(1)
        assert not torch.allclose(now.bn.running_var, unbiased)


def test_frozen_batch_norm_stays_frozen() -> None:
    block = warmed_up(small_block("multilayer")).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {k: v for k, v in snapshot(block).items() if "running" in k}
    block(example_input("multilayer")).sum().backward()
    assert_same({k: v for k, v in snapshot(block).items() if "running" in k}, before)


def test_dropout_is_drawn_once_per_forward_and_shared_by_all_steps() -> None:
    """With p = 0.5 and no feedback spikes possible, a dropped input neuron never fires and others fire as if p = 0."""
    torch.manual_seed(5)
    block = small_block("fc", dropout=0.5, time_steps=12).train()
    x = 5 * example_input("fc", batch=64)
    spikes = block.simulate(x, Record(spikes=True), generator=torch.Generator().manual_seed(1)).spikes[0]
    again = block.simulate(x, Record(spikes=True), generator=torch.Generator().manual_seed(1)).spikes[0]
    other = block.simulate(x, Record(spikes=True), generator=torch.Generator().manual_seed(2)).spikes[0]
    assert torch.equal(spikes, again)
    assert not torch.equal(spikes, other)
    gain = block.input.dropout.draw(torch.empty(64, 8, dtype=torch.float64), torch.Generator().manual_seed(1))
    assert not spikes[0][gain == 0].any()  # first step: input current alone


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_state_dict_and_pickle_free_reload(kind: str) -> None:
    block = warmed_up(small_block(kind, dropout=0.1))
    x = example_input(kind)
    block(x).sum().backward()
    twin = copy.deepcopy(block).eval()
    other = small_block(kind, dropout=0.1).eval()
    other.load_state_dict(block.state_dict())
    expected = block.eval()(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(block(x), expected)


def test_saved_memory_does_not_grow_with_time_steps() -> None:
    saved = {}
    for time_steps in (3, 60):
        block, total = small_block("conv", time_steps=time_steps), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(example_input("conv"))
        saved[time_steps] = total
    assert saved[3] == saved[60] > 0


def test_autocast_trains() -> None:
    torch.manual_seed(0)
    net = SNNIDEFCNet((6,), 3, hidden=16, time_steps=8, dropout=0.0)
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_block_composes_with_other_modules_and_itself() -> None:
    """Two blocks and a convolution between them: the gradient reaches the first parameter."""
    first = small_block("conv", neuron=LIF)
    second = small_block("conv")
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), first, nn.ConvTranspose2d(3, 2, 2, 2), second, nn.Flatten(), nn.Linear(48, 3)
    ).double()
    F.cross_entropy(net(3 * example_input("conv")), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    assert net[0].weight.grad.abs().sum() > 0


def test_values_are_simulated_whatever_the_solver() -> None:
    x = example_input("conv")
    block = warmed_up(small_block("conv")).eval()
    expected = block(x)
    for solver in (FixedPoint(), Gmres(tol=0.5)):
        block.solver = solver
        assert torch.equal(block(x), expected)
        with torch.no_grad():
            assert torch.equal(block(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_constrained_weight_is_computed_once_per_forward(training: bool) -> None:
    """And its norm's estimate advances once per training forward, not at all in evaluation."""
    block = small_block("multilayer").train(training)
    constraint = get_constraint(block.feedback.op)
    calls, updates = [], []
    constraint.register_forward_hook(lambda *_: calls.append(1))
    update = constraint.update
    constraint.update = lambda weight, **options: (updates.append(1), update(weight, **options))
    block(example_input("multilayer")).sum().backward()
    assert len(calls) == 1
    assert len(updates) == int(training)


@pytest.mark.parametrize("kind", ["fc", "multilayer"])
def test_nan_in_any_connection_shows_in_the_rates(kind: str) -> None:
    """A NaN membrane never reaches the threshold: without care it looks like a silent neuron."""
    x = example_input(kind)
    for name, _ in small_block(kind).named_parameters():
        block = warmed_up(small_block(kind)).eval()
        with torch.no_grad():
            dict(block.named_parameters())[name].view(-1)[0] = torch.nan
            assert block(x).isnan().any(), name
    x[1] = torch.nan  # one sample: that one alone
    block = warmed_up(small_block(kind)).eval()
    block.check_input = False
    with torch.no_grad():
        rates = block(x)
    assert rates[1].isnan().all()
    assert rates[[0, 2, 3]].isfinite().all()


def test_in_place_modules_may_follow() -> None:
    for module in (nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)):
        block = small_block("fc")
        nn.Sequential(block, module)(example_input("fc")).sum().backward()
        assert block.input.op.weight.grad is not None


def test_a_connection_is_a_module_by_itself() -> None:
    connection = warmed_up(small_block("pooled")).layers[0]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    twin = copy.deepcopy(connection)
    torch.testing.assert_close(connection(x), F.avg_pool2d(twin.bn(twin.op(x)), 2))
    assert_same(snapshot(connection), snapshot(twin))


@pytest.mark.parametrize("precision", ["float32", "exact"])
@pytest.mark.parametrize("where", ["input", "feedback"])
def test_a_forward_of_somebodys_own_on_a_layer_is_called(where: str, precision: str) -> None:
    rates = []
    for share in (1.0, 0.5):
        torch.manual_seed(0)
        block = small_block("conv", dropout=0.0, precision=precision, solver=Gmres(1e-4)).float().eval()
        op = getattr(block, where).op
        op.forward = lambda x, forward=op.forward, share=share: share * forward(x)
        rates.append(block(example_input("conv").float()))
        assert not getattr(block, where).is_known
    torch.manual_seed(0)
    plain = small_block("conv", dropout=0.0, solver=Gmres(1e-4)).float().eval()
    torch.testing.assert_close(rates[0], plain(example_input("conv").float()))
    assert not torch.equal(*rates)


def test_a_layer_that_computes_in_another_way_is_a_module_of_its_own() -> None:
    class Half(nn.Conv2d):
        def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return 0.5 * super()._conv_forward(x, weight, bias)

    class Named(nn.Conv2d):
        """Nothing but another name."""

    assert not Connection(Half(2, 3, 3)).is_known
    assert Connection(Named(2, 3, 3)).is_known
    assert Connection(nn.Linear(2, 3)).is_known


@pytest.mark.parametrize("where", ["input", "feedback"])
def test_a_backward_hook_of_a_layer_is_called(where: str) -> None:
    block, called = small_block("conv", dropout=0.0, solver=Gmres(1e-4)), []
    getattr(block, where).op.register_full_backward_hook(lambda *_: called.append(1))
    block(example_input("conv").requires_grad_()).sum().backward()
    assert called


@pytest.mark.parametrize("gradient", [Implicit(), Bptt(bn="per_step")])
def test_what_a_module_has_returned_stays_what_it_was(gradient: Implicit | Bptt) -> None:
    """A hook may have kept it."""
    kept, feedback = [], Connection(nn.Linear(6, 6), batch_norm=True)
    if isinstance(gradient, Implicit):
        feedback = Connection(nn.Sequential(nn.Linear(6, 6)))
    (feedback.op if feedback.bn is None else feedback.bn).register_forward_hook(
        lambda _m, _x, y: kept.append((y, y.detach().clone()))
    )
    net = FeedbackSNN(input=nn.Linear(4, 6), feedback=feedback, time_steps=4, gradient=gradient)
    net(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert len(kept) >= 3
    assert all(torch.equal(y.detach(), then) for y, then in kept)
