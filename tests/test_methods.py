"""`method=`, `surrogate=` and `encoder=`: what the configuration builds, trains and reads back."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose
from torch import Tensor

from ide_snn import Bptt
from ide_snn.analysis.checkpoint import analyze_checkpoint
from ide_snn.checkpoint import load_checkpoint
from ide_snn.config import (
    ConfigError,
    build_dataset,
    build_loaders,
    build_model,
    config_from_dict,
    config_to_dict,
    hydra_on_configs,
    load_config,
    to_config,
)
from ide_snn.data import DeviceLoader, Normalization, Split
from ide_snn.dsr import DSRIFNode, DSRLIFNode
from ide_snn.encoding import Bernoulli
from ide_snn.evaluation import evaluate
from ide_snn.run import model_from_checkpoint, train
from ide_snn.schemas import AnalyzeConfig, Config
from ide_snn.surrogate import SURROGATES
from ide_snn.training import fit

TINY = ("model.hidden=16", "dataset.train_limit=64", "dataset.test_limit=32", "trainer.epochs=1", "time_steps=4")
METHODS = ("method=ide", "method=bptt", "method=bptt method.output=spikes", "method=dsr", "method=dsr neuron=if")


def tiny(*overrides: str) -> Config:
    return load_config([*TINY, *(word for override in overrides for word in override.split())])


@pytest.mark.parametrize("encoder", ["direct", "bernoulli", "poisson", "latency", "population"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_every_encoder_and_is_read_back(method: str, encoder: str, tmp_path: Path) -> None:
    config = tiny(method, f"encoder={encoder}")
    result = train(config, tmp_path)
    assert result.test_loss is not None
    assert math.isfinite(result.test_loss)
    model, saved, _ = model_from_checkpoint(tmp_path / "checkpoints" / "last.pt", device="cpu")
    loaders = build_loaders(saved, build_dataset(saved), torch.device("cpu"))
    again = evaluate(model, loaders.test)
    assert again.loss == pytest.approx(result.test_loss, rel=1e-6)
    assert 0 <= again.firing_rate["population_1"] <= 1


def test_ide_and_bptt_have_the_same_parameters_and_values() -> None:
    ide, bptt = build_model(tiny("method=ide")).eval(), build_model(tiny("method=bptt")).eval()
    assert list(ide.state_dict()) == list(bptt.state_dict())
    x = torch.randn(5, *ide.input_shape)
    assert torch.equal(ide(x), bptt(x))
    ide.train(), bptt.train()
    first, second = (net(x, generator=torch.Generator().manual_seed(1)) for net in (ide, bptt))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_every_surrogate_can_be_chosen(name: str) -> None:
    gradient = build_model(tiny("method=bptt", f"surrogate={name}")).block.gradient
    assert gradient == Bptt(surrogate=SURROGATES[name]())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("method=bptt surrogate.alpha=-1", "surrogate: .*alpha"),
        ("method=bptt method.bn=live", "method: .*frozen"),
        ("method=bptt method.truncate=0", "method: .*truncate"),
        ("method=dsr method.alpha=2", "method: alpha"),
        ("method=dsr method.compat=peer", "method: compat"),
        ("encoder=bernoulli encoder.rate=0", "encoder: .*rate"),
    ],
)
def test_a_wrong_option_is_an_error_of_its_group(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(tiny(overrides))


def test_the_loss_of_every_step_is_averaged(tmp_path: Path) -> None:
    def fresh() -> torch.nn.Module:
        return build_model(tiny("method=bptt method.output=spikes model.dropout=0")).double().train()

    net = fresh()
    x, y = torch.randn(16, *net.input_shape, dtype=torch.float64), torch.arange(16) % 10
    logits = net(x)
    assert logits.shape == (4, 16, 10)
    expected = torch.stack([F.cross_entropy(step, y) for step in logits]).mean().item()
    assert net.eval()(x).shape == (16, 10)

    class OneBatch:
        def __len__(self) -> int:
            return 1

        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: ARG002
            return iter([(x, y)])

    net = fresh()
    frozen = torch.optim.SGD(net.parameters(), lr=0.0)
    fit(net, OneBatch(), [(x, y)], optimizer=frozen, epochs=1, run_dir=tmp_path, progress=False)
    with open(tmp_path / "metrics.csv") as file:
        assert float(next(csv.DictReader(file))["train_loss"]) == pytest.approx(expected, rel=1e-12)


def test_dsr_nodes_take_the_neurons_settings() -> None:
    node = build_model(tiny("method=dsr neuron=if neuron.v_threshold=3")).stages[0].node
    assert isinstance(node, DSRIFNode)
    assert node.v_threshold.item() == 3
    node = build_model(tiny("method=dsr neuron=lif neuron.leak=0.8 neuron.v_threshold=3 method.tau=2")).stages[0].node
    assert isinstance(node, DSRLIFNode)
    assert node.model.leak == pytest.approx(0.8)
    assert node.v_threshold.item() == pytest.approx(0.2 * 3)
    assert node.grad_scaling == pytest.approx(0.04)


def test_configurations_from_before_these_groups_mean_what_they_meant() -> None:
    content = config_to_dict(tiny("seed=3"))
    old = {key: value for key, value in content.items() if key not in ("method", "surrogate", "encoder")}
    assert config_to_dict(config_from_dict(old)) == content


def test_encoded_batches_are_drawn_from_seed_epoch_and_batch() -> None:
    images = torch.full((10, 1, 3, 3), 100, dtype=torch.uint8)
    split, unit = Split(images, torch.arange(10)), Normalization(255.0, (0.0,), (1.0,))

    def loader(seed: int) -> DeviceLoader:
        return DeviceLoader(
            split, batch_size=4, normalization=unit, encoder=Bernoulli(), time_steps=20, shuffle=False, seed=seed
        )

    whole = [x for x, _ in loader(0).epoch(2)]
    assert whole[0].shape == (20, 4, 1, 3, 3)
    assert whole[0].dtype == torch.bool
    assert torch.cat(whole, 1).float().mean().item() == pytest.approx(100 / 255, abs=0.05)
    for first, second in zip(whole[1:], [x for x, _ in loader(0).epoch(2, start=1)], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], next(loader(0).epoch(3))[0])
    assert not torch.equal(whole[0], next(loader(1).epoch(2))[0])
    with pytest.raises(ValueError, match="time_steps"):
        DeviceLoader(split, batch_size=4, normalization=unit, encoder=Bernoulli(), shuffle=False)


def test_analysis_refuses_a_network_without_feedback(tmp_path: Path) -> None:
    train(tiny("method=dsr"), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    assert load_checkpoint(path).config["method"]["name"] == "dsr"
    with hydra_on_configs():
        request = to_config(compose("analyze", overrides=[f"checkpoint={path}"]), AnalyzeConfig)
    with pytest.raises(ConfigError, match="method=dsr"):
        analyze_checkpoint(request)


def test_a_network_trained_on_every_step_is_analysed_by_its_rates(tmp_path: Path) -> None:
    result = train(tiny("method=bptt method.output=spikes"), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    with hydra_on_configs():
        request = to_config(compose("analyze", overrides=[f"checkpoint={path}", "samples=32"]), AnalyzeConfig)
    report = analyze_checkpoint(request)
    assert report["accuracy_over_time"][-1] == pytest.approx(result.test_accuracy_last)


def test_analysis_refuses_the_hard_reset(tmp_path: Path) -> None:
    train(tiny("method=bptt method.reset=hard"), tmp_path)
    with hydra_on_configs():
        name = f"checkpoint={tmp_path / 'checkpoints' / 'last.pt'}"
        request = to_config(compose("analyze", overrides=[name]), AnalyzeConfig)
    with pytest.raises(ConfigError, match=r"method\.reset=hard"):
        analyze_checkpoint(request)


@pytest.mark.parametrize(
    ("overrides", "group"),
    [("surrogate=sigmoid", "surrogate"), ("method=bptt solver=anderson", "solver"), ("method=bptt surrogate=erf", "")],
)
def test_options_without_effect_are_said(
    overrides: str, group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        train(tiny(overrides), tmp_path)
    assert (f"the options of {group} have no effect" in caplog.text) if group else ("no effect" not in caplog.text)


def test_a_factor_on_a_gradient_has_no_effect_with_adam(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = {
        "optimizer=sgd": False,
        "optimizer=adam optimizer.weight_decay=0": True,
        "optimizer=adam optimizer.weight_decay=0.1": False,  # is added to the gradient
        "optimizer=adam optimizer.weight_decay=0 trainer.gradient_clip=1": False,  # of all gradients together
    }
    for number, (options, said) in enumerate(cases.items()):
        caplog.clear()
        train(tiny(f"method=dsr method.v_threshold_grad_scaling=2 {options}"), tmp_path / str(number))
        assert ("method.v_threshold_grad_scaling has no effect with optimizer=adam" in caplog.text) is said


def test_dsr_refuses_a_padding_it_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"method=dsr needs model\.padding=2"):
        build_model(load_config(["method=dsr", "model=f64c5", "model.padding=0"]))
