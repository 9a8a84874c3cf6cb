"""What `fit` says of the norms of gradients."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ide_snn import Bptt, Implicit, SNNIDEFCNet
from ide_snn.distributed import Ranks
from ide_snn.evaluation import Totals
from ide_snn.monitor import BlockMonitor, GradientNorms, gradient_figures, peak_of
from ide_snn.resuming import TrainingState, optimizer_options
from ide_snn.training import fit


class Noting(torch.optim.SGD):
    """Keeps the norm of the gradients that it is given."""

    norms: list[float]

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.norms.append(float(torch.cat(gradients).norm()))
        return super().step(closure)


def batches() -> DataLoader:
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.arange(48) % 3), batch_size=1, shuffle=True)


def network(**options: Any) -> SNNIDEFCNet:
    return SNNIDEFCNet((16,), 3, hidden=8, time_steps=3, generator=torch.Generator().manual_seed(0), **options)


def train(net: nn.Module, folder: Path, lr: float = 0.1, **options: Any) -> list[float]:
    optimizer = Noting(net.parameters(), lr)
    optimizer.norms = []
    fit(net, batches(), batches(), optimizer=optimizer, run_dir=folder, seed=1, progress=False, **options)
    return optimizer.norms


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_mean_and_largest_norm_of_each_epoch(tmp_path: Path, clip: float | None) -> None:
    """Before they are clipped."""
    net = network(batch_norm=False)
    norms = train(net, tmp_path / "run", epochs=2, gradient_clip=clip)
    first, second = rows(tmp_path / "run")
    if clip is None:
        for row, own in ((first, norms[:48]), (second, norms[48:])):
            assert float(row["gradient_norm_mean"]) == pytest.approx(sum(own) / 48, rel=1e-5)
            assert float(row["gradient_norm_max"]) == pytest.approx(max(own), rel=1e-5)
    else:
        assert max(norms) <= clip * 1.001
        assert float(first["gradient_norm_max"]) > float(first["gradient_norm_mean"]) > clip
    untrained = network(batch_norm=False)
    train(untrained, tmp_path / "0", epochs=0)
    assert "gradient_norm_max" not in rows(tmp_path / "0")[0]


@pytest.mark.parametrize(
    ("gradient", "factor", "clip", "told"),
    [
        (Implicit(), 21.0, None, True),
        (Implicit(), 19.0, None, False),
        (Implicit(), math.inf, None, True),
        (Implicit(), 1000.0, 1.0, False),
        (Bptt(), 1000.0, None, False),
    ],
)
def test_a_single_large_gradient_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gradient: Any, factor: float, clip: float | None, told: bool
) -> None:
    net, calls = network(batch_norm=False, gradient=gradient), itertools.count()

    def enlarge(grad: Tensor) -> Tensor:
        unit = 1e4 * grad / grad.norm()  # beside which the other gradients are nothing
        return (1e30 if factor == math.inf else factor) * unit if next(calls) % 48 == 20 else unit  # in both epochs

    net.classifier.bias.register_hook(enlarge)
    with caplog.at_level(logging.WARNING, logger="ide_snn"):
        train(net, tmp_path, lr=0.0, epochs=2, gradient_clip=clip)
    found = [record.getMessage() for record in caplog.records if "norm of the gradient" in record.getMessage()]
    assert len(found) == told
    if told:
        assert found[0].startswith("epoch 1: ")
        assert "trainer.gradient_clip=1.0" in found[0]
        assert f"{factor:.3g} times the mean of the others" in found[0]


def test_few_steps_hide_no_peak() -> None:
    """The mean of all steps of so short an epoch would be more than a twentieth of any peak."""
    counts = GradientNorms(torch.device("cpu"))
    for norm in (1.0, 1.0, 60.0):
        counts.add(torch.tensor(norm))
    assert peak_of(counts.state_dict()) == 60.0
    assert peak_of({"norm": 5.0, "max_norm": 5.0, "steps": 1}) == peak_of({"norm": 0, "max_norm": 0, "steps": 0}) == 0.0


def test_sparse_gradients(tmp_path: Path) -> None:
    data = TensorDataset(torch.tensor([[1, 1, 2], [3, 4, 1]]), torch.tensor([0, 2]))
    loader = DataLoader(data, 2)
    norms = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.EmbeddingBag(12, 3, mode="sum", sparse=sparse)
        folder = tmp_path / str(sparse)
        fit(net, loader, loader, optimizer=torch.optim.SGD(net.parameters(), 0.1), epochs=1, run_dir=folder)
        norms.append(float(rows(folder)[0]["gradient_norm_max"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0


def test_an_epoch_begun_by_a_version_that_counted_none(tmp_path: Path) -> None:
    """It has no figures rather than those of its last steps; the next one has."""
    stopping = network(batch_norm=False)
    steps = itertools.count()
    stopping.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGTERM) if next(steps) == 7 else None)
    train(stopping, tmp_path, epochs=2)
    path = tmp_path / "checkpoints" / "last.pt"
    saved = torch.load(path)
    assert saved["training"]["gradients"]["steps"] == 8
    del saved["training"]["gradients"]
    torch.save(saved, path)
    train(network(batch_norm=False), tmp_path, epochs=2, resume=True)
    first, second = rows(tmp_path)
    assert first["gradient_norm_mean"] == first["gradient_norm_max"] == ""
    assert float(second["gradient_norm_max"]) > 0
    (events,) = [EventAccumulator(str(file.parent)).Reload() for file in tmp_path.glob("tensorboard/*")][:1]
    assert "gradient/norm_max" in events.Tags()["scalars"]


def test_other_numbers_of_processes_go_on_with_the_same_norms() -> None:
    """They are those of the gradients of all ranks together, so they are not to be added up over ranks."""

    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    device, state = torch.device("cpu"), {}
    for ranks in (Two(rank=0, count=2), Ranks()):
        gradients = GradientNorms(device)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        model = nn.Linear(1, 1)
        own = TrainingState(
            optimizer,
            optimizer_options(optimizer),
            {},
            Totals(device),
            BlockMonitor(model),
            gradients,
            0,
            None,
            device,
            ranks,
        )
        if state:
            own.restore(state)
        for _ in range(10):
            gradients.add(torch.tensor(1.0 if ranks.count == 2 else 3.0))
        state = own.saved()
    assert gradient_figures(gradients.state_dict()) == {"gradient_norm_mean": 2.0, "gradient_norm_max": 3.0}
