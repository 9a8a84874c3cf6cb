"""What `fit` saves can be read back, and what cannot be saved is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ide_snn.checkpoint import CheckpointError, load_checkpoint, plain
from ide_snn.training import fit


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def batches() -> DataLoader:
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.arange(40) % 3), batch_size=16)


def train(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 1, **options: Any) -> None:
    fit(net, batches(), batches(), optimizer=optimizer, epochs=epochs, run_dir=folder, progress=False, **options)


def test_numbers_of_numpy_and_paths(tmp_path: Path) -> None:
    config = {"lr": np.float64(0.1), "sizes": (np.int64(3), 4), "where": tmp_path, "deep": {"on": np.bool_(True)}}
    for epochs in (1, 2):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=np.float64(0.1), momentum=np.float32(0.5))
        train(tmp_path, net, optimizer, epochs, seed=np.int64(4), config=config, resume=True)
    last = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert last.progress["epoch"] == 2
    assert last.config == {"lr": 0.1, "sizes": (3, 4), "where": str(tmp_path), "deep": {"on": True}}
    assert torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)["config"] == last.config


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"when": np.datetime64("2026-01-01")}, r"config\.when is a date"),
        ({"long": np.longdouble(1)}, r"config\.long is a longdouble"),
        ({"a": [1, object()]}, r"config\.a\[1\] is a object"),
        ({"f": max}, r"config\.f is a builtin_function_or_method"),
    ],
)
def test_what_cannot_be_read_back_is_refused_before_training(tmp_path: Path, value: Any, name: str) -> None:
    net = network()
    with pytest.raises(CheckpointError, match=f"{name}.*which a checkpoint cannot hold"):
        train(tmp_path / "run", net, torch.optim.SGD(net.parameters(), 0.1), config=value)
    assert not (tmp_path / "run").exists()


def test_plain_keeps_what_is_plain() -> None:
    value = {"x": [1, 2.5, None, True, "s", b"b"], 3: (torch.ones(2), torch.float32), "size": torch.Size([2])}
    found = plain(value, "value")
    assert found == {**value, 3: found[3]}
    assert found[3][0] is value[3][0]
    assert type(found["size"]) is torch.Size


class Counting(nn.Linear):
    """With a state beside its tensors."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_modules_with_an_extra_state(tmp_path: Path) -> None:
    counts = []
    for epochs in (1, 2):
        net = nn.Sequential(nn.Flatten(), Counting(16, 3))
        train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1), epochs, resume=True)
        counts.append(net[1].calls)
    assert counts == [6, 12]  # three batches in training and three in evaluation, in each epoch


def test_tensors_and_nan_in_config_and_data(tmp_path: Path) -> None:
    def say(last: float) -> dict[str, Any]:
        return {"mean": torch.tensor([0.5, last]), "list": [torch.ones(2), {"x": float("nan")}], "y": float("nan")}

    for epochs in (1, 2):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        train(tmp_path, net, optimizer, epochs, resume=True, config=say(0.25), data=say(0.25))
    for name in ("config", "data"):
        other = {"config": say(0.25), "data": say(0.25), name: say(0.75)}
        with pytest.raises(CheckpointError, match="mean: tensor"):
            train(tmp_path, net, optimizer, 3, resume=True, **other)


@pytest.mark.parametrize("part", ["optimizer", "model"])
def test_states_that_cannot_be_saved_are_refused_before_training(tmp_path: Path, part: str) -> None:
    class WithObject(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"what": object()}

        def set_extra_state(self, state: Any) -> None: ...

    net = nn.Sequential(nn.Flatten(), (WithObject if part == "model" else nn.Linear)(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    if part == "optimizer":
        optimizer.param_groups[0]["mine"] = object()
    before = net[1].weight.clone()
    with pytest.raises(CheckpointError, match=f"the {part}'s state.*is a object, which a checkpoint cannot hold"):
        train(tmp_path, net, optimizer)
    assert torch.equal(net[1].weight, before)


def test_a_config_without_a_trainer_can_be_resumed(tmp_path: Path) -> None:
    for epochs in (1, 2):
        net = network()
        train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1), epochs, config={"width": 3}, resume=True)
    net = network()
    with pytest.raises(CheckpointError, match="width: 3 -> 4"):
        train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1), 3, config={"width": 4}, resume=True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.Adam, {}, "begun with the optimizer SGD, so it cannot be resumed with Adam"),
        (torch.optim.SGD, {"momentum": 0.5}, r"momentum: 0.9 -> 0.5 \(saved -> now\)"),
        (torch.optim.SGD, {"momentum": np.float32(0.5)}, r"momentum: 0.9 -> 0.5 \(saved -> now\)"),
    ],
)
def test_another_optimizer_is_refused(tmp_path: Path, kind: Any, options: dict[str, Any], message: str) -> None:
    net = network()
    train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    other = network()
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{message}"):
        train(tmp_path, other, kind(other.parameters(), lr=0.1, **options), 2, resume=True)
    assert all(map(torch.equal, other.parameters(), network().parameters())), "nothing was changed"
    groups = [{"params": [p]} for p in other.parameters()]
    with pytest.raises(CheckpointError, match=r"has 1 groups of parameters in its optimizer.* with 2"):
        train(tmp_path, other, torch.optim.SGD(groups, lr=0.1, momentum=0.9), 2, resume=True)
    with pytest.raises(CheckpointError, match=r"has 2 parameters in group 0 of its optimizer.* with 1"):
        train(tmp_path, other, torch.optim.SGD([other[1].weight], lr=0.1, momentum=0.9), 2, resume=True)
    assert all(map(torch.equal, other.parameters(), network().parameters())), "nothing was changed"


class Decaying(torch.optim.SGD):
    """Changes an option of its own in every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] *= 0.5
        return super().step(closure)


def test_optimizers_may_change_their_options(tmp_path: Path) -> None:
    for epochs in (1, 2):
        net = network()
        optimizer = Decaying(net.parameters(), 0.1, weight_decay=0.1)
        train(tmp_path, net, optimizer, epochs, resume=True)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 * 0.5**6)
    train(tmp_path, net, optimizer, 3, resume=True)  # with the same one, which has changed them
    again = Decaying(net.parameters(), 0.1, weight_decay=0.1)
    train(tmp_path, net, again, 4, resume=True)
    with pytest.raises(CheckpointError, match=r"weight_decay: 0\.1 -> 0\.2"):
        train(tmp_path, net, Decaying(net.parameters(), 0.1, weight_decay=0.2), 5, resume=True)


def test_states_of_versions_without_options_are_resumed(tmp_path: Path) -> None:
    net = network()
    train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    path = tmp_path / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    del content["training"]["optimizer_options"], content["training"]["optimizer_kind"]
    torch.save(content, path)
    net = network()
    train(tmp_path, net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.5), 2, resume=True)
    assert load_checkpoint(path).progress["epoch"] == 2


def test_the_optimizer_has_its_own_rate_after_a_run_that_was_finished(tmp_path: Path) -> None:
    from ide_snn.optim import StepSchedule

    for _ in range(2):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        train(tmp_path, net, optimizer, 2, schedule=StepSchedule(milestones=(1,), factor=0.01), resume=True)
        assert optimizer.param_groups[0]["lr"] == 0.1
