"""compile=true on a GPU: graphs of the time steps. Here a stand-in replays by calling the function again."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from networks import KINDS, LIF, example_input, small_block, warmed_up
from torch import Tensor

from ide_snn import FeedbackSNN, Gmres, NeuronParams, graphs
from ide_snn.record import Record


class Replayed:
    """What `GraphedCall` promises, on a CPU: fn sees nothing but copies, whose results the next call overwrites."""

    made: ClassVar[list[Replayed]] = []

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]], *, max_graphs: int) -> None:
        assert max_graphs == 1
        self.fn, self.inputs, self.outputs, self.calls = fn, None, None, 0
        self.made.append(self)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.inputs is None:
            self.inputs = tuple(torch.full_like(t, torch.nan) for t in tensors)
            self.outputs = tuple(t.clone() for t in self.fn(*(t.clone() for t in tensors)))
        for static, t in zip(self.inputs, tensors, strict=True):
            assert static.shape == t.shape
            assert static.stride() == t.stride()
            static.copy_(t.detach())
        for output, found in zip(self.outputs, self.fn(*self.inputs), strict=True):
            output.copy_(found)
        self.calls += 1
        return self.outputs

    def release(self) -> None:
        for output in self.outputs:
            output.fill_(torch.nan)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> list[Replayed]:
    monkeypatch.setattr(graphs, "GraphedCall", Replayed)
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(FeedbackSNN, "path_for", lambda *_: "fused")
    return Replayed.made


def pair(kind: str, **options: Any) -> tuple[FeedbackSNN, FeedbackSNN]:
    """The same block without and with compile."""
    plain = warmed_up(small_block(kind, dropout=0.3, solver=Gmres(1e-4), **options)).float().train()
    graphed = copy.deepcopy(plain)
    graphed.compile_ = True
    return plain, graphed


def rates(block: FeedbackSNN, x: Tensor, seed: int = 0) -> Tensor:
    return block(x, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neuron", [LIF, NeuronParams(0.8, 1.0)], ids=str)
def test_training_is_the_same_while_weights_masks_and_inputs_change(kind: str, neuron, stand_in) -> None:
    plain, graphed = pair(kind, neuron=neuron)
    optimizers = [torch.optim.SGD(block.parameters(), 0.05) for block in (plain, graphed)]
    x, kept = example_input(kind).float(), []
    for seed in range(3):
        found = []
        for block, optimizer in zip((plain, graphed), optimizers, strict=True):
            optimizer.zero_grad()
            value = rates(block, x + seed, seed)
            value.square().sum().backward()
            found.append((value.detach(), *(p.grad.clone() for p in block.parameters())))
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        kept.append((found[1][0], found[1][0].clone()))
    assert all(torch.equal(value, then) for value, then in kept)  # later replays have not overwritten them
    assert len(graphed._graphed.graphs) == 1
    assert stand_in[0].calls == 3
    assert sum(graph.calls for graph in stand_in[1:]) >= 3  # of the solve, as often as dimensions had to be doubled
    assert len(graphed._solves.graphs) == len(stand_in) - 1


def test_recorded_rates_and_fractions_are_the_same(stand_in) -> None:
    plain, graphed = pair("multilayer")
    x, record = example_input("multilayer").float(), Record(all_rates=True, spike_fraction=True)
    a, b = (block.eval().simulate(x, record) for block in (plain, graphed))
    assert a.path == b.path == "fused"
    assert a.time_steps == b.time_steps
    for name in ("all", "spike_fraction"):
        assert len(getattr(a, name)) == len(getattr(b, name)) == 1 + len(plain.layers)
        assert all(torch.equal(p, q) for p, q in zip(getattr(a, name), getattr(b, name), strict=True))
    graphed.simulate(3 * x + 1, record)  # overwrites the graph's memory
    assert torch.equal(a.last, b.last)
    assert len(stand_in) == 1


def test_what_it_was_captured_for_is_looked_at(stand_in) -> None:
    plain, graphed = pair("conv")
    x = example_input("conv", batch=6).float()
    changes = [
        lambda block: block.train(),
        lambda block: setattr(block, "time_steps", block.time_steps + 2),
        lambda block: setattr(block, "neuron", NeuronParams(0.5, 0.7)),
        lambda block: block.eval(),  # no gains
    ]
    for number, change in enumerate(changes):
        for block in (plain, graphed):
            change(block)
        assert torch.equal(rates(plain, x), rates(graphed, x))
        assert len(stand_in) == number + 1
    for batch in (1, 2, 3, 4, 5):
        assert torch.equal(rates(plain, x[:batch]), rates(graphed, x[:batch]))
    assert len(graphed._graphed.graphs) == graphed._graphed.graphs.most
    assert bool(stand_in[0].outputs[0].isnan().all())  # the oldest was released
    assert torch.equal(rates(plain, x), rates(graphed, x))


def test_single_steps_and_inputs_with_time_are_not_captured_and_say_so(caplog, stand_in) -> None:
    _, graphed = pair("conv")
    x = example_input("conv").float()
    with caplog.at_level(logging.INFO, "ide_snn.graphed_simulation"):
        graphed.eval().simulate(x)
        assert "the time steps are a CUDA graph" in caplog.text
        assert len(graphed.simulate(x, Record(spikes=True)).spikes) == 1
        assert "no effect (single time steps are recorded)" in caplog.text
        with_time = small_block("conv", input_has_time=True).float().eval()
        with_time.compile_ = True
        with_time(x.expand(with_time.time_steps, *x.shape))
        assert "no effect (the input has time)" in caplog.text
    assert len(stand_in) == 1


def test_copies_start_without_graphs() -> None:
    _, graphed = pair("conv")
    x = example_input("conv").float()
    expected = rates(graphed.eval(), x)
    other = copy.deepcopy(graphed)
    assert graphed._graphed.graphs
    assert not other._graphed.graphs
    assert not pickle.loads(pickle.dumps(graphed._graphed)).graphs
    assert torch.equal(rates(other, x), expected)


def test_a_cotangent_with_gaps_in_another_order_is_read_in_its_own(stand_in) -> None:
    """As of rates that are put beside others in front of a channels-last layer."""
    plain, graphed = pair("conv")
    x = example_input("conv").float()
    gradients = []
    for block in (plain, graphed):
        value = rates(block, x)
        both = torch.cat([value, torch.ones_like(value)], 1).contiguous(memory_format=torch.channels_last)
        weights = torch.linspace(-1, 2, both.numel()).view(both.shape).contiguous(memory_format=torch.channels_last)
        (both * weights).sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    assert len(stand_in) > 1
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_of_too_many_graphs_the_one_that_was_not_used_longest_leaves(stand_in) -> None:
    held = graphs.Graphs("sums", most=2)
    for size in (1, 2, 1, 3, 1, 2):
        held(size, lambda t: (t.sum(),), torch.ones(size))
    assert [graph.inputs[0].numel() for graph in stand_in] == [1, 2, 3, 2]
    assert len(held) == 2
