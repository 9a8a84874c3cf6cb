"""Evaluation that ends the simulation of each sample as soon as the network is sure of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from torch import Tensor, nn

from ide_snn import Bptt, Connection, FeedbackSNN, NeuronParams, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.analysis import early_exit, logits_over_time
from ide_snn.record import Record
from ide_snn.training import evaluate

T = 9
NETWORKS: dict[str, Any] = {
    "fc": (SNNIDEFCNet, {"hidden": 30}),
    "conv": (SNNIDEConvNet, {"channels": 6, "kernel_size": 3}),
    "multilayer": (SNNIDEConvMultiLayerNet, {"channels": (4, 6, 5), "strides": (1, 2, 1)}),
}


def network(kind: str, precision: str, leak: float, **options: Any) -> nn.Module:
    make, sizes = NETWORKS[kind]
    neuron = NeuronParams(1.0, leak)
    generator = torch.Generator().manual_seed(4)
    net = make((1, 8, 8), 5, time_steps=T, neuron=neuron, precision=precision, generator=generator, **sizes, **options)
    net.classifier.weight.data *= (
        12 if kind == "multilayer" else 5
    )  # sure of some samples early, of others late or never
    for _ in range(3):  # statistics that let the populations fire
        net(torch.randn(64, 1, 8, 8) if not options.get("input_has_time") else torch.rand(T, 64, 1, 8, 8))
    return net.eval()


def batch(time: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (T, 40, 1, 8, 8) if time else (40, 1, 8, 8)
    return torch.randn(shape, generator=generator), torch.randint(5, (40,), generator=generator)


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_each_sample_is_that_of_a_network_with_its_steps(kind: str, precision: str, leak: float) -> None:
    """The same as looking at all T steps afterwards."""
    net, (x, y) = network(kind, precision, leak), batch()
    every, _ = logits_over_time(net, [(x, y)])
    confidence = 0.6
    logits, rates = net.exit_early(x, confidence)
    sure = every.double().softmax(2).amax(2) > confidence
    sure[-1] = True
    steps = sure.int().argmax(0) + 1
    assert len(set(steps.tolist())) > 2, "samples end at different steps"
    assert torch.equal(rates.steps, steps)
    chosen = every[steps - 1, torch.arange(len(x))]
    torch.testing.assert_close(logits, chosen, rtol=1e-5, atol=1e-5)
    evaluated = evaluate(net, [(x, y)], early_exit=confidence)
    (expected,) = early_exit(every, y, [confidence])
    assert evaluated.accuracy == pytest.approx(expected.accuracy)
    assert evaluated.mean_steps == pytest.approx(expected.mean_steps)


@pytest.mark.parametrize("leak", [1.0, 0.9])
@pytest.mark.parametrize("precision", ["float32", "exact"])
def test_firing_rates_are_of_the_steps_that_were_simulated(precision: str, leak: float) -> None:
    net, (x, y) = network("multilayer", precision, leak), batch()
    _, rates = net.exit_early(x, 0.6)
    trains = net.block.simulate(x, Record(spikes=True)).spikes
    expected = []
    for train in trains:
        parts = [train[:steps, index].float().mean(0) for index, steps in enumerate(rates.steps.tolist())]
        expected.append(torch.stack(parts))
    for found, wanted in zip(rates.spike_fraction, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    monitored = evaluate(net, [(x[:25], y[:25]), (x[25:], y[25:])], early_exit=0.6).firing_rate
    assert list(monitored.values()) == pytest.approx([float(part.mean()) for part in expected])


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_inputs_over_time(kind: str) -> None:
    net, (x, y) = network(kind, "exact", 1.0, input_has_time=True), batch(time=True)
    every, _ = logits_over_time(net, [(x, y)])
    (expected,) = early_exit(every, y, [0.6])
    found = evaluate(net, [(x, y)], early_exit=0.6)
    assert (found.accuracy, found.mean_steps) == pytest.approx((expected.accuracy, expected.mean_steps))
    assert 1 < expected.mean_steps < T


def test_steps_that_nobody_needs_are_not_simulated() -> None:
    net, (x, _) = network("fc", "float32", 1.0), batch()
    seen: list[int] = []
    net.block.feedback.op.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    _, rates = net.exit_early(x, 0.6)
    expected = [int((rates.steps > t).sum()) for t in range(T)]
    assert expected[0] == len(x)
    assert expected[-1] > 1
    assert [samples for samples in seen if samples > 1] == expected  # looks at the module itself have one sample
    net.classifier.bias.data[0] = 1e4
    seen.clear()
    _, rates = net.exit_early(x, 0.6)
    assert rates.steps.tolist() == [1] * len(x)
    assert rates.time_steps == T
    assert [samples for samples in seen if samples > 1] == [len(x)]


def test_a_network_that_is_never_sure_takes_all_steps() -> None:
    net, (x, y) = network("conv", "fast", 0.9), batch()
    full, found = evaluate(net, [(x, y)]), evaluate(net, [(x, y)], early_exit=1.0)
    assert found.mean_steps == T
    assert full.mean_steps is None
    assert (found.accuracy, found.loss) == pytest.approx((full.accuracy, full.loss))
    assert found.firing_rate == pytest.approx(full.firing_rate)
    logits, rates = net.exit_early(x[:0], 0.9)
    assert logits.shape == (0, 5)
    assert rates.steps.shape == (0,)


def test_bptt_networks_exit_early_too() -> None:
    net = SNNIDEFCNet((16,), 3, time_steps=T, gradient=Bptt()).eval()
    x = torch.randn(20, 16)
    every, _ = logits_over_time(net, [(x, torch.zeros(20, dtype=torch.long))])
    logits, rates = net.exit_early(x, 0.35)
    torch.testing.assert_close(logits, every[rates.steps - 1, torch.arange(20)], rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    net, (x, y) = network("fc", "exact", 1.0), batch()
    for confidence in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\]"):
            net.exit_early(x, confidence)
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        net.train().exit_early(x, 0.5)
    with pytest.raises(ValueError, match="a Sequential has no early exit"):
        evaluate(nn.Sequential(net), [(x, y)], early_exit=0.5)
    net.eval().block.feedback.dropout.train()  # as for Monte Carlo dropout, with masks of single samples
    with pytest.raises(ValueError, match=r"stop= is for simulations without dropout: call eval\(\) first"):
        net.exit_early(x, 0.5)
    for series in ("spikes", "membranes", "mean_response"):
        with pytest.raises(ValueError, match="which stop= ends for some"):
            Record(**{series: True}, stop=lambda _step: torch.ones(1, dtype=torch.bool))
    own = Connection(nn.Sequential(nn.Linear(6, 6, bias=False)), dropout=0.5)
    block = FeedbackSNN(input=nn.Linear(4, 6), feedback=own, time_steps=3)
    with pytest.raises(ValueError, match=r"stop= is for simulations without dropout: call eval\(\) first"):
        block.simulate(torch.randn(5, 4), Record(stop=lambda step: step.last_rate()[:, 0] > 0))


def test_the_script(tmp_path: Path) -> None:
    def call(script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    options = ["trainer.epochs=2", "model.hidden=30", "optimizer.lr=0.1", "hydra.run.dir=run", "device=cpu"]
    assert call("train", *options).returncode == 0
    done = call("evaluate", "checkpoint=run/checkpoints/last.pt", "early_exit=0.5", "output=found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert 1 <= found["mean_steps"] < found["time_steps"] == 10
    refused = call("evaluate", "checkpoint=run/checkpoints/last.pt", "early_exit=2")
    assert refused.returncode == 1
    assert "error: confidence must lie in (0, 1], got 2.0" in refused.stderr
