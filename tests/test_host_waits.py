"""A training step on a GPU does not wait for the host, but once per solve.

On tensors without numbers (device "meta"), of which nothing can be copied to the host: whoever asks for a number fails.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import KINDS, example_input, small_block
from torch import nn

import ide_snn.kernels.neuron
from ide_snn import FeedbackSNN, Gmres
from ide_snn.solvers.ahead import Ahead
from ide_snn.solvers.runs import Run


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """Dimensions of each attempt of a solve whose numbers the host has asked for; they are made up."""
    found: list[int] = []

    def run(self: Ahead, matvec, layout, b, terms, dimensions):
        ahead = min(self.foresight.dimensions, dimensions)
        y, r, numbers = self.attempt(matvec, layout, b, terms, ahead)
        assert numbers.shape == (3 * len(b) + 2,)
        found.append(ahead)
        return Run(y, r, np.zeros(len(b)), 0.0, 0.0, ahead, ahead), np.ones(len(b))

    monkeypatch.setattr(Ahead, "run", run)
    monkeypatch.setattr(FeedbackSNN, "path_for", lambda *_: "fused")
    # what the device has not: a switch of autocast, and addresses
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(ide_snn.kernels.neuron, "require_distinct", lambda *_: None)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_once_per_solve(kind: str, waits: list[int]) -> None:
    block = small_block(kind, dropout=0.3, solver=Gmres(1e-2)).float()
    x = example_input(kind).float()
    features = block(x).flatten(1).shape[1]
    waits.clear()
    net = nn.Sequential(block, nn.Flatten(), nn.Linear(features, 10)).to("meta").train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    labels = torch.zeros(len(x), dtype=torch.int64, device="meta")
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x.to("meta")), labels).backward()
        optimizer.step()
        assert len(waits) == step + 1


def test_who_asks_for_a_number_fails(waits: list[int]) -> None:  # noqa: ARG001
    block = small_block("conv", solver=Gmres(1e-2), check_input=True).float().to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        block(example_input("conv").float().to("meta"))  # checks its input
    block.check_input, block._solves.ahead = False, lambda *_, **__: None
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        block(example_input("conv").float().to("meta")).sum().backward()  # decides after every product
