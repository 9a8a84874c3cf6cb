"""`fit` on a torch `DataLoader`, and what it cannot be trained on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from ide_snn import SNNIDEFCNet
from ide_snn.checkpoint import CheckpointError, load_checkpoint
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


class WithSetEpoch(BatchSampler):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[k : k + 16] for k in range(0, 60, 16)])


def test_batch_samplers_of_your_own() -> None:
    data = pairs().dataset
    inner = SequentialSampler(data)
    batches = TorchLoader(DataLoader(data, batch_sampler=WithSetEpoch(inner, 16, False)))
    first, second = (torch.cat([x for x, _ in batches.epoch(number)]) for number in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([x for x, _ in batches.epoch(0)]))

    class Random(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter(torch.randperm(60).split(16))

    with pytest.raises(ValueError, match="the order of Random cannot be repeated"):
        TorchLoader(DataLoader(data, batch_sampler=Random(inner, 16, False)))


def test_torchs_batch_sampler_around_a_random_one() -> None:
    data = pairs().dataset
    batches = TorchLoader(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 16, False)), seed=4)
    first, again, other = (torch.cat([x for x, _ in batches.epoch(number)]) for number in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batches_read", [1, 4])
def test_the_loaders_own_generators_are_put_back(batches_read: int) -> None:
    loader, own = pairs(), torch.Generator()
    loader.generator = loader.sampler.generator = own
    reader = TorchLoader(loader).epoch(0)
    for _ in range(batches_read):
        next(reader)
    assert loader.generator is not own
    del reader
    assert loader.generator is own
    assert loader.sampler.generator is own
    assert loader.worker_init_fn is None


def test_without_a_seed_each_run_has_an_order_of_its_own(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Recording(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            seen[-1].append(index)
            return super().__getitem__(index)

    data = Recording(*pairs().dataset.tensors)
    for number, global_seed in enumerate([1, 2, 1, 9]):
        torch.manual_seed(global_seed)
        seen.append([])
        net = network()
        folder = tmp_path / str(number % 3)  # the last goes on with that of the first
        loader = DataLoader(data, 16, shuffle=True)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        options: dict[str, Any] = {"run_dir": folder, "resume": True, "progress": False}
        fit(net, loader, pairs(20), optimizer=optimizer, epochs=1 + number // 3, **options)
    first, second, third, continued = seen
    assert first == third
    assert first != second
    assert sorted(first) == sorted(continued) == list(range(60))
    mine = TorchLoader(
        DataLoader(data, 16, shuffle=True), torch.load(tmp_path / "0/checkpoints/last.pt")["training"]["seed"]
    )
    seen.append([])
    list(mine.epoch(1))
    assert seen[-1] == continued


def test_a_resumed_run_keeps_the_order_of_its_own_seed(tmp_path: Path) -> None:
    states = []
    for seeds in ([5, 5], [5, 6]):
        net = network()
        for epochs, seed in enumerate(seeds, start=1):
            options: dict[str, Any] = {"run_dir": tmp_path / str(seeds[-1]), "resume": True, "progress": False}
            optimizer = torch.optim.SGD(net.parameters(), 0.05)
            fit(net, pairs(), pairs(20), optimizer=optimizer, epochs=epochs, seed=seed, **options)
        states.append(net.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_stopped_in_an_evaluation_of_a_loader(tmp_path: Path) -> None:
    """torch's loaders draw from the global generator, and so does torch's dropout."""
    states = []
    for stop in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        asked = 0

        class Stopping(TensorDataset):
            def __getitem__(self, index: int) -> tuple[Tensor, ...]:
                nonlocal asked
                asked += 1
                if asked == 3 and stop:  # noqa: B023
                    signal.raise_signal(signal.SIGTERM)
                return super().__getitem__(index)

        test = DataLoader(Stopping(*pairs(20).dataset.tensors), 4)
        interrupted = 0
        for _ in range(1 + stop):
            options: dict[str, Any] = {"run_dir": tmp_path / str(stop), "resume": True, "progress": False, "seed": 1}
            optimizer = torch.optim.SGD(net.parameters(), 0.05)
            interrupted += fit(net, pairs(), test, optimizer=optimizer, epochs=3, **options).interrupted is not None
        assert interrupted == stop
        states.append(net.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, EOFError])
@pytest.mark.parametrize("part", ["train", "test"])
def test_workers_that_a_signal_ended(tmp_path: Path, part: str, error: type[Exception]) -> None:
    """As where every process of a job gets it: what was trained until then is saved."""
    signalled = True

    class Ending(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            if index == 30:
                if signalled:
                    signal.raise_signal(signal.SIGTERM)
                raise error("of a worker that has ended")
            return super().__getitem__(index)

    data = pairs().dataset.tensors
    ending, usual = DataLoader(Ending(*data), 4), DataLoader(TensorDataset(*data), 4)
    train, test = (ending, usual) if part == "train" else (usual, ending)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    result = fit(net, train, test, optimizer=optimizer, epochs=2, progress=False, run_dir=tmp_path)
    assert result.interrupted == signal.SIGTERM
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt").progress["step"] == (7 if part == "train" else 15)
    signalled = False
    with pytest.raises(error, match="of a worker that has ended"):
        fit(net, train, test, optimizer=optimizer, epochs=2, progress=False)
    signalled, error = True, KeyError  # not what the end of a worker is
    with pytest.raises(KeyError):
        fit(net, train, test, optimizer=optimizer, epochs=2, progress=False)


def test_an_error_that_is_kept_keeps_nothing_of_the_loader() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
            raise KeyError("of the model")

    data = TensorDataset(torch.zeros(4, 1), torch.zeros(4).long())
    net, loader = Failing(1, 3), DataLoader(data, 2, worker_init_fn=print)
    with pytest.raises(KeyError, match="of the model") as kept:
        fit(net, loader, pairs(20), optimizer=torch.optim.SGD(net.parameters(), 0.05), epochs=1, progress=False)
    assert kept.tb is not None
    assert (loader.generator, loader.worker_init_fn) == (None, print)


def test_batches_come_in_the_order_of_the_sampler() -> None:
    """Otherwise it is that of the fastest worker."""
    loader = pairs()
    loader.in_order = False
    reader = TorchLoader(loader).epoch(0)
    next(reader)
    assert loader.in_order
    reader.close()
    assert not loader.in_order
    with pytest.raises(ValueError, match="use in_order=True"):  # theirs was fixed when they began
        TorchLoader(DataLoader(loader.dataset, 4, num_workers=1, persistent_workers=True, in_order=False))


def test_a_seed_of_its_own_stays() -> None:
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x)
            return self.linear(x.flatten(1))

    net, loader = Seeing(), TorchLoader(pairs(), seed=3)
    fit(net, loader, pairs(20), optimizer=torch.optim.SGD(net.parameters(), 0.05), epochs=1, seed=5, progress=False)
    assert torch.equal(torch.cat(seen), torch.cat([x for x, _ in TorchLoader(pairs(), seed=3).epoch(0)]))


def test_another_order_is_refused_when_a_run_is_resumed(tmp_path: Path) -> None:
    net = network()
    weight = next(net.parameters())
    for number, (seed, refused) in enumerate([(3, False), (4, True), (None, True), (3, False)], start=1):
        before, optimizer = weight.detach().clone(), torch.optim.SGD(net.parameters(), 0.05)
        loader = TorchLoader(pairs(), seed=seed)
        options: dict[str, Any] = {"run_dir": tmp_path, "resume": True, "progress": False}
        if refused:
            with pytest.raises(CheckpointError, match=r"begun with TorchLoader\(seed=3\)"):
                fit(net, loader, pairs(20), optimizer=optimizer, epochs=number, **options)
            assert torch.equal(weight, before)
        else:
            fit(net, loader, pairs(20), optimizer=optimizer, epochs=number, **options)
        assert loader.seed == seed


def test_loaders_of_a_kind_of_your_own() -> None:
    class Doubled(TorchLoader):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in super().epoch(epoch, start):
                read.append(epoch)
                yield 2 * x, y

    read: list[int] = []
    net = network()
    fit(net, Doubled(pairs()), pairs(20), optimizer=torch.optim.SGD(net.parameters(), 0.05), epochs=2, progress=False)
    assert read == [0, 0, 0, 0, 1, 1, 1, 1]


def test_generators_that_cannot_be_replaced() -> None:
    class Fixed(RandomOrder):
        @property
        def generator(self) -> None:
            return None

    class Lists(list):
        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(60).tolist())

    for sampler in (Fixed(), Lists(range(60))):
        with pytest.raises(ValueError, match=f"the order of {type(sampler).__name__} cannot be repeated"):
            TorchLoader(DataLoader(pairs().dataset, 8, sampler=sampler))


class RandomOrder(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(60).tolist())

    def __len__(self) -> int:
        return 60


def test_orders_that_are_given() -> None:
    data = pairs().dataset
    for order in ([3, 1, 2], range(5)):
        (batch,) = TorchLoader(DataLoader(data, 8, sampler=order)).epoch(1)
        assert torch.equal(batch[0], data.tensors[0][list(order)])


def test_workers_begin_with_the_function_that_was_given() -> None:
    class Named(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return (torch.tensor(int(os.environ["NUMBER_OF_THIS_WORKER"])),)

    def name(worker: int) -> None:
        os.environ["NUMBER_OF_THIS_WORKER"] = str(worker)

    loader = DataLoader(Named(torch.arange(8.0)), 2, num_workers=2, worker_init_fn=name)
    assert sorted({int(number) for (batch,) in TorchLoader(loader).epoch(0) for number in batch}) == [0, 1]


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
    own = Own()
    own.generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"the order of Own cannot be repeated.*torch's, or None"):
        TorchLoader(DataLoader(TensorDataset(torch.zeros(4, 1)), sampler=own))
    with pytest.raises(ValueError, match="no batches: use a smaller batch_size"):
        TorchLoader(DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=8, drop_last=True))

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    with pytest.raises(ValueError, match=r"order of an IterableDataset cannot be repeated.*__getitem__"):
        TorchLoader(DataLoader(Stream()))
