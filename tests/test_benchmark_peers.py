"""Other libraries and the original in the benchmarks: the same products as ours, and what is said of absent ones."""

from __future__ import annotations

import sys
from pathlib import Path

import original
import peers
import pytest
import torch
from benchmark_cases import SMALL, example, small
from cases import Network
from torch import nn

from ide_snn.config import load_config


def test_absent_peer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "snntorch", "no_such_package_here")
    assert peers.why_missing("snntorch") == "not measured: no_such_package_here is not installed"


class FakeCell(nn.Module):
    def __init__(self, v_threshold: float, leak: float) -> None:
        super().__init__()
        self.v_threshold, self.leak, self.steps = v_threshold, leak, 0

    def reset(self) -> None:
        self.steps = 0

    def forward(self, current: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return torch.sigmoid(current)


@pytest.mark.parametrize("case", SMALL)
def test_step_by_step_peer_has_our_products(case: str) -> None:
    ours = small(case)
    x, y = example(ours)
    network = Network(peers.StepByStep(ours.model, FakeCell), ours.config)
    assert network.model(x).shape == (6, 10)
    assert [cell.steps for cell in network.model.populations] == [ours.config.time_steps] * len(
        ours.model.population_shapes
    )
    network.step(x, y)
    assert all(parameter.grad is not None for parameter in network.model.parameters())  # the feedback's too
    ops = {p.shape for p in network.model.parameters() if p.dim() > 1}
    block = ours.model.block
    assert {c.op.weight.shape for c in (block.input, *block.layers, block.feedback)} <= ops


@pytest.mark.skipif(peers.why_missing("spikingjelly") is not None, reason="spikingjelly is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SMALL)
def test_spikingjelly_runs(case: str) -> None:
    ours = small(case)
    for name in ("spikingjelly", "spikingjelly, feedback"):
        network = peers.build_peer(name, ours.model, ours.config)
        network.step(*example(ours))
        gradients = [p.grad for p in network.model.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.skipif(peers.why_missing("snntorch") is not None, reason="snntorch is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SMALL)
def test_snntorch_runs(case: str) -> None:
    ours = small(case)
    network = peers.build_peer("snntorch", ours.model, ours.config)
    network.step(*example(ours))
    network.step(*example(ours))  # nothing of the first graph is left
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.model.parameters())


STAND_IN = """
import torch
from modules.part import scale
from termcolor import colored
from torch import nn


class SNNIDEFCNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.linear = nn.Linear(cfg["MODEL"]["dim_in"], cfg["MODEL"]["num_classes"])

    def forward(self, x):
        return scale * self.linear(x.flatten(1))
"""


def test_original_is_built_from_its_clone(tmp_path: Path) -> None:
    config = load_config(["experiment=fashion_mnist_f400_if", "model.hidden=12"])
    with pytest.raises(FileNotFoundError, match="IDE-FSNN"):
        original.build_original(tmp_path, config)
    (tmp_path / "models").mkdir()
    (tmp_path / "modules").mkdir()
    (tmp_path / "models" / "snn_ide_fc.py").write_text(STAND_IN)
    (tmp_path / "modules" / "part.py").write_text("scale = 2.0\n")
    path = list(sys.path)
    network = original.build_original(tmp_path, config)
    assert network(torch.ones(2, 1, 28, 28)).shape == (2, 10)
    assert sys.path == path
    assert not {"models", "modules"} & set(sys.modules)
    assert network.cfg["MODEL"] == {
        "num_classes": 10,
        "threshold": 30,
        "time_step": 5,
        "vth": 2.0,
        "dropout": 0.2,
        "leaky": None,
        "dim_in": 784,
        "dim_hidden": 12,
    }


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("mnist_f64c5_lif", {"c_in": 1, "c_hidden": 64, "h_hidden": 14, "kernel_size_s": 5, "leaky": 0.95}),
        ("cifar10_alexnetf_lif", {"c_hidden": 96, "c_s1": 256, "c_s4": 256, "h_hidden": 8, "w_hidden": 8}),
        ("cifar10_cifarnetf_lif", {"c_hidden": 128, "c_s3": 1024, "c_s4": 512, "time_step": 30}),
    ],
)
def test_settings_of_the_original(experiment: str, expected: dict[str, object]) -> None:
    model = original.settings(load_config([f"experiment={experiment}"]))["MODEL"]
    assert {key: model[key] for key in expected} == expected


def test_original_refuses_other_chains() -> None:
    with pytest.raises(ValueError, match="five populations"):
        original.settings(load_config(["experiment=cifar10_alexnetf_lif", "model.strides=[2,1,1,1,1]"]))
