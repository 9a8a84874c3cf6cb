"""Blocks of their own in several threads: what a simulation of one does is nothing to the others."""

from __future__ import annotations

import pytest
import torch
from networks import example_input, small_block
from torch import nn
from torch.nn.utils import parametrize

from ide_snn import Connection, FeedbackSNN, Record


@pytest.mark.parametrize("precision", ["float32", "exact"])
@pytest.mark.parametrize("is_own", [False, True])
def test_torchs_cache_of_parametrized_weights_is_for_own_modules(precision: str, is_own: bool) -> None:
    """It is one for all threads: weights that another thread computes for its gradient would get into it."""
    block, x = small_block("fc", precision=precision).float(), example_input("fc").float()
    if is_own:
        features = block.population_shapes(tuple(x.shape[1:]))[-1][0]
        block = FeedbackSNN(input=block.input, feedback=Connection(nn.Sequential(nn.Linear(features, features))))
    seen = []
    block.simulate(x, Record(on_step=lambda _: seen.append(parametrize._cache_enabled)))
    assert set(seen) == {1 if is_own else 0}
    assert parametrize._cache_enabled == 0
    with torch.no_grad():
        block(x)
