"""`fit` on a torch `DataLoader`, and what it cannot be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

from ide_snn import SNNIDEFCNet
from ide_snn.checkpoint import CheckpointError
from ide_snn.data import TorchLoader
from ide_snn.run import model_from_checkpoint
from ide_snn.training import fit


def network() -> SNNIDEFCNet:
    return SNNIDEFCNet((1, 4, 4), 3, hidden=8, time_steps=3, generator=torch.Generator().manual_seed(0))


def pairs(samples: int = 60) -> DataLoader:
    x = torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.arange(samples) % 3), batch_size=16, shuffle=True)


def trained(net: SNNIDEFCNet, epochs: int, folder: Path) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    options = {"run_dir": folder, "resume": True, "seed": 5, "progress": False}
    fit(net, pairs(), pairs(20), optimizer=optimizer, epochs=epochs, **options)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    batches = TorchLoader(pairs(), seed=1)
    first, again = ([y for _, y in batches.epoch(2)] for _ in range(2))
    rest, other = [y for _, y in batches.epoch(2, start=3)], [y for _, y in batches.epoch(3)]
    assert len(batches) == len(first) == 4
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert torch.equal(torch.cat(first[3:]), torch.cat(rest))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert not torch.equal(torch.cat(first), torch.cat([y for _, y in TorchLoader(pairs(), seed=2).epoch(2)]))


def test_a_resumed_run_has_the_same_weights(tmp_path: Path) -> None:
    states = []
    for parts in ([4], [1, 4]):
        net = network()
        for epochs in parts:
            trained(net, epochs, tmp_path / str(len(parts)))
        states.append(net.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_its_checkpoint_is_no_networks_of_the_scripts(tmp_path: Path) -> None:
    trained(network(), 1, tmp_path)
    with pytest.raises(CheckpointError, match=r"was written by fit\(\) without a config.*torch.load"):
        model_from_checkpoint(tmp_path / "checkpoints" / "last.pt")


def test_what_cannot_be_trained_on_leaves_nothing_behind(tmp_path: Path) -> None:
    net, folder = network(), tmp_path / "run"
    with pytest.raises(TypeError, match="a list cannot be trained on: give a torch DataLoader"):
        fit(net, [], pairs(20), optimizer=torch.optim.SGD(net.parameters(), 0.05), epochs=1, run_dir=folder)
    assert not folder.exists()

    class Own(Sampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    with pytest.raises(ValueError, match="the order of Own cannot be repeated"):
        TorchLoader(DataLoader(TensorDataset(torch.zeros(4, 1)), sampler=Own()))
