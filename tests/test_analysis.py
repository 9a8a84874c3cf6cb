"""Analysis of models: what one observed simulation shows equals separate evaluations, naive loops, closed forms."""

from __future__ import annotations

import pytest
import torch
from networks import KINDS, LIF, example_input, small_block, warmed_up
from torch import Tensor, nn

from ide_snn import Anderson, Connection, FeedbackSNN, NeuronParams
from ide_snn.analysis import (
    Convergence,
    FiringRates,
    Horizon,
    accuracy_over_time,
    early_exit,
    logits_over_time,
    measure,
    observe,
    trace,
)
from ide_snn.analysis.rates import telling_neurons
from ide_snn.neurons import rate_weights, step
from ide_snn.record import Record

IF = NeuronParams(2.0, 1.0)
FEATURES = {"fc": 8, "conv": 48, "multilayer": 12, "pooled": 16}


def classifier(block: FeedbackSNN, features: int, *, before: nn.Module | None = None) -> nn.Sequential:
    rest = [nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(features, 5)]
    return nn.Sequential(before or nn.Identity(), block, *rest).double()


def fc_block(neuron: NeuronParams, time_steps: int = 6, features: int = 8) -> FeedbackSNN:
    stage = nn.Linear(features, 8)
    nn.init.uniform_(stage.bias, 0.3, 1.0)
    return FeedbackSNN(
        input=stage,
        feedback=Connection(nn.Linear(8, 8, bias=False), constraint="spectral_matrix"),
        neuron=neuron,
        time_steps=time_steps,
    ).double()


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % 5


@pytest.mark.parametrize("spiking", [False, True], ids=["constant", "spikes"])
@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_over_time_are_those_of_separate_evaluations(kind: str, neuron: NeuronParams, spiking: bool) -> None:
    time_steps = 12
    block = warmed_up(small_block(kind, neuron=neuron, time_steps=time_steps, input_has_time=spiking))
    model = classifier(block, FEATURES[kind]).eval()
    x = example_input(kind, time_steps=time_steps if spiking else None)
    found, y = logits_over_time(model, [(x, labels(4)), (x.flip(-1), labels(4))])
    assert (found.shape, y.tolist()) == ((time_steps, 8, 5), [0, 1, 2, 3] * 2)
    assert len(set(found[:, 0, 0].tolist())) > 3  # it does change over time
    with torch.no_grad():
        for t in range(1, time_steps + 1):
            block.time_steps = t
            parts = [model(batch[:t] if spiking else batch) for batch in (x, x.flip(-1))]
            assert torch.equal(found[t - 1], torch.cat(parts)), f"t = {t}"


def test_blocks_in_a_row_and_called_twice_are_evaluated_at_every_t() -> None:
    """The second block's input changes with t, so that it has to be simulated again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = fc_block(LIF, 7), fc_block(IF, 5), nn.Linear(8, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.second(self.first(x)) - 0.5))

    model = Twice().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    assert [site.prefix for site in observe(model, x).sites] == ["first_", "second_", "second_call_2_"]
    found, _ = logits_over_time(model, [(x, labels(4))])
    assert len(found) == 7
    with torch.no_grad():
        for t in range(1, 8):
            model.first.time_steps, model.second.time_steps = t, min(t, 5)
            assert torch.equal(found[t - 1], model(x)), f"t = {t}"


def test_what_stands_before_the_block_and_changes_its_input_afterwards() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.block, self.out = nn.Linear(8, 8), fc_block(LIF), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            rates = self.block(x)
            x += rates.sub_(0.25)
            return self.out(x.relu_())

    model = Residual().double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    observation = observe(model, x)
    assert torch.equal(observation.sites[0].x, model.before(x))
    assert torch.equal(observation.output, model(x))
    model.block.time_steps = 3
    expected = model(x)
    model.block.time_steps = 6
    for _ in range(2):  # what the model does to its tensors must not reach the record
        assert torch.equal(observation.output_at(3), expected)
    with pytest.raises(ValueError, match=r"t must lie in 1\.\.6, got 7"):
        observation.output_at(7)


def test_a_model_is_left_as_it_was() -> None:
    block = warmed_up(small_block("pooled"))
    model = classifier(block, FEATURES["pooled"], before=nn.BatchNorm2d(2)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    horizon, convergence = Horizon(), Convergence()
    measure(model, [(example_input("pooled"), labels(4))], horizon, convergence)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in block.__dict__
    assert block.time_steps == 10
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="does not fit the network"):
        observe(model, torch.randn(4, 2, 3, 3, dtype=torch.float64))
    assert "forward" not in block.__dict__


def test_models_that_cannot_be_analysed() -> None:
    x = example_input("fc")
    with pytest.raises(ValueError, match="Linear contains no FeedbackSNN block"):
        observe(nn.Linear(6, 2).double(), x)
    with pytest.raises(ValueError, match="no batch"):
        measure(classifier(small_block("fc"), 8), [])
    with pytest.raises(ValueError, match=r"logits \[B, classes\].*\[4, 3, 4, 4\]"):
        logits_over_time(small_block("conv"), [(example_input("conv"), labels(4))])
    block = small_block("fc")
    block.feedback.op.parametrizations["weight"].original.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the block became NaN"):
        observe(block, 10 + x)


@pytest.mark.parametrize("kind", KINDS)
def test_firing_rates_are_means_of_the_spike_trains(kind: str) -> None:
    block = warmed_up(small_block(kind, time_steps=9)).eval()
    batches = [(example_input(kind, 3), labels(3)), (example_input(kind, 1), labels(1))]
    meter = FiringRates()
    measure(block, batches, meter)
    trains = [block.simulate(x, Record(spikes=True)).spikes for x, _ in batches]
    assert len(meter.result()) == len(block.layers) + 1
    for i in range(len(block.layers) + 1):
        spikes = torch.cat([train[i] for train in trains], dim=1).double().flatten(2)
        rate = meter.result()[f"population_{i + 1}"]
        weights = rate_weights(9, block.neuron.leak)
        assert rate.plain == pytest.approx(float(spikes.mean()), rel=1e-12)
        assert rate.weighted == pytest.approx(float(torch.tensordot(weights, spikes, 1).mean()), rel=1e-12)
        assert rate.silent == pytest.approx(float((spikes.sum(0) == 0).double().mean()))
        assert rate.neurons == spikes.shape[2]
        assert rate.plain > 0


@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
def test_traces_are_those_of_a_naive_loop(neuron: NeuronParams) -> None:
    block = fc_block(neuron, 20).eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    rates = block.simulate(x, Record(spikes=True, membranes=True))
    (one, other) = trace(observe(block, x).sites[0], [2, 0])
    assert (one.sample, one.population, one.v_threshold) == (2, "population_1", 2.0)
    u = s = torch.zeros(3, 8, dtype=torch.float64)
    for t in range(20):
        current = block.input.op(x) + block.feedback.op(s)
        before = u + current
        s, u = step(current, u, neuron)
        torch.testing.assert_close(rates.membranes[0][t], u)
        assert torch.equal(rates.spikes[0][t], s.bool())
        torch.testing.assert_close(one.membranes[t], before[2])
        torch.testing.assert_close(other.membranes[t], before[0])
        assert torch.equal(one.spikes[t], s[2].bool())
    assert one.spikes.any()
    chosen = telling_neurons(one.spikes)
    content = one.as_dict(chosen)
    assert content["spike_times"][0] == [t + 1 for t in range(20) if one.spikes[t, chosen[0]]]
    with pytest.raises(ValueError, match=r"no neuron 8 in population_1, which has 8 \(0\.\.7\)"):
        one.as_dict([0, 8])
    with pytest.raises(ValueError, match=r"no sample 3: the batch has 3"):
        trace(observe(block, x).sites[0], [3])


def test_early_exit_by_hand() -> None:
    """Three samples of two classes; confidences 0.5, then 0.73, 0.88, 0.95 at logit differences 1, 2, 3."""
    gaps = torch.tensor([[1.0, 0.0, -3.0], [2.0, -1.0, -3.0], [3.0, 2.0, 3.0]])
    logits = torch.stack([gaps, torch.zeros(3, 3)], dim=2)
    truth = torch.tensor([0, 0, 0])
    assert accuracy_over_time(logits, truth) == pytest.approx([2 / 3, 1 / 3, 1])
    low, middle, high, never = early_exit(logits, truth, [0.6, 0.87, 0.94, 1.0])
    assert (low.mean_steps, low.accuracy) == pytest.approx(((1 + 2 + 1) / 3, 1 / 3))
    assert (middle.mean_steps, middle.accuracy) == pytest.approx(((2 + 3 + 1) / 3, 2 / 3))
    assert (high.mean_steps, high.accuracy) == pytest.approx(((3 + 3 + 1) / 3, 2 / 3))
    assert (never.mean_steps, never.accuracy) == (3, 1)
    for wrong in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"thresholds must lie in \(0, 1\]"):
            early_exit(logits, truth, [0.5, wrong])


def test_a_threshold_of_one_uses_every_step_however_confident_the_model_is() -> None:
    model = classifier(fc_block(IF), 8)
    with torch.no_grad():
        model[-1].weight.mul_(1e6)
    x = torch.randn(10, 8, dtype=torch.float64)
    logits, y = logits_over_time(model, [(x, labels(10))])
    (point,) = early_exit(logits, y, [1.0])
    assert point.mean_steps == 6
    assert point.accuracy == accuracy_over_time(logits, y)[-1]


def test_distances_of_a_contractive_if_network_fall_like_one_over_t() -> None:
    block = fc_block(IF, 1000).eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    meter = Convergence(Anderson(tol=1e-10, max_steps=500))
    measure(block, [(x[:3], labels(3)), (x[3:], labels(1))], meter)
    curve = meter.result()[""]
    assert (curve.samples, curve.unsolved, curve.silent, curve.one_over_t) == (4, 0, 0, True)
    assert curve.largest_solver_residual <= 1e-10
    for distance in (curve.to_equilibrium, curve.residual):
        assert distance[-1] < 1e-2
        scaled = [t * distance[t - 1] for t in (100, 300, 1000)]
        assert max(scaled) < 3 * min(scaled)
    star, _ = block.equilibrium(x, Anderson(tol=1e-12, max_steps=500))
    rates, f = block.linearisation_point(x)
    relative = [(d.norm(dim=1) / star.norm(dim=1)).mean().item() for d in (rates - star, rates - f(rates, "running"))]
    assert curve.to_equilibrium[-1] == pytest.approx(relative[0], rel=1e-4)
    assert curve.residual[-1] == pytest.approx(relative[1], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "neuron", "spiking", "expected"),
    [("fc", IF, False, True), ("fc", LIF, False, False), ("fc", IF, True, False), ("multilayer", IF, False, False)],
)
def test_where_one_over_t_is_promised(kind: str, neuron: NeuronParams, spiking: bool, expected: bool) -> None:
    block = warmed_up(small_block(kind, neuron=neuron, input_has_time=spiking))
    meter = Convergence()
    measure(block, [(example_input(kind, time_steps=10 if spiking else None), labels(4))], meter)
    assert meter.result()[""].one_over_t is expected
    assert len(meter.result()[""].residual) == 10


def test_silent_and_unsolved_samples_are_left_out_and_counted() -> None:
    block = fc_block(IF).eval()
    with torch.no_grad():
        block.input.op.weight.copy_(torch.eye(8))
        block.input.op.bias.zero_()
    x = torch.stack([torch.full((8,), -1.0), torch.ones(8)]).double()  # no current at all, and enough
    meter = Convergence()
    measure(block, [(x, labels(2))], meter)
    curve = meter.result()[""]
    assert (curve.samples, curve.silent, curve.unsolved) == (1, 1, 0)
    assert curve.to_equilibrium[-1] < 1
    meter = Convergence(Anderson(tol=1e-14, max_steps=1))
    measure(block, [(x, labels(2))], meter)
    curve = meter.result()[""]
    assert (curve.samples, curve.unsolved, curve.to_equilibrium) == (0, 1, [])
