"""What `fit` says of the norms of gradients."""

from __future__ import annotations

import csv
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ide_snn import Bptt, Implicit, SNNIDEFCNet
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
        (Implicit(), 1000.0, None, True),
        (Implicit(), 2.0, None, False),
        (Implicit(), 1000.0, 1.0, False),
        (Bptt(), 1000.0, None, False),
    ],
)
def test_a_single_large_gradient_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gradient: Any, factor: float, clip: float | None, told: bool
) -> None:
    net, calls = network(batch_norm=False, gradient=gradient), itertools.count()

    def enlarge(grad: Tensor) -> Tensor:
        return torch.full_like(grad, factor) if next(calls) % 48 == 20 else grad  # in both epochs

    net.classifier.weight.register_hook(enlarge)
    with caplog.at_level(logging.WARNING, logger="ide_snn"):
        train(net, tmp_path, lr=0.0, epochs=2, gradient_clip=clip)
    found = [record.getMessage() for record in caplog.records if "norm of the gradient" in record.getMessage()]
    assert len(found) == told
    if told:
        assert found[0].startswith("epoch 1: ")
        assert "trainer.gradient_clip=1.0" in found[0]
