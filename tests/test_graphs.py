"""Captured CUDA graphs: what they refuse, failures, copies; and replays on a GPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ide_snn import NeuronParams, graphs
from ide_snn.graphs import GraphedCall
from ide_snn.kernels import neuron_step_

LIF = NeuronParams(2.0, 0.95)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def test_graphs_need_a_gpu(monkeypatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"need a CUDA device.*call the function itself"):
            GraphedCall(torch.relu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = GraphedCall(torch.relu)
    with pytest.raises(ValueError, match="one CUDA device, got cpu"):
        call(torch.zeros(3))
    with pytest.raises(ValueError, match="no tensors"):
        call()
    with pytest.raises(ValueError, match="at least 1"):
        GraphedCall(torch.relu, warm_up=0)


class StandIn:
    """A stream or a graph, without a GPU."""

    current: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Capture(StandIn):
    fails: type[RuntimeError] | None = None

    def __exit__(self, *_: Any) -> None:
        if self.fails is not None:
            StandIn.current = "the side stream"  # torch's own capture leaves it so where its end fails
            raise self.fails("operation failed due to a previous error during capture")


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    start = StandIn()
    for name in ("Stream", "CUDAGraph", "stream"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(StandIn, "current", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: StandIn.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(StandIn, "current", stream))
    monkeypatch.setattr(graphs, "_own", threading.local())
    yield
    assert StandIn.current is start


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("error", "message"), [(RuntimeError, "cannot be captured"), (torch.OutOfMemoryError, "^operation failed")]
)
def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch, error, message) -> None:
    monkeypatch.setattr(Capture, "fails", error)
    with pytest.raises(error, match=message):
        GraphedCall(torch.relu)._record((torch.ones(3),))


@pytest.mark.usefixtures("without_gpu")
def test_what_is_captured_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        captured = GraphedCall(torch.relu)._record((torch.ones(3),))
    captured.inputs[0].copy_(torch.zeros(3))


def test_copies_of_a_graphed_call_start_empty_and_call_the_copied_owner(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Owner:
        def __init__(self) -> None:
            self.graphed = GraphedCall(self.work)

        def work(self, x: Tensor) -> Tensor:
            return x

    owner = Owner()
    owner.graphed._captured[("shape",)] = None  # type: ignore[assignment]
    twin = copy.deepcopy(owner)
    assert owner.graphed.graphs == 1
    assert twin.graphed.graphs == 0
    assert twin.graphed.fn.__self__ is twin


def loop(drive: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A small simulation with the kernel: what the graphs are for."""
    u, spikes, rate = torch.zeros_like(drive), torch.zeros_like(drive), torch.zeros_like(drive)
    for _ in range(10):
        neuron_step_(spikes @ weight, u, spikes, LIF, drive=drive, rate=rate)
    return rate, u


@pytest.mark.gpu
@needs_cuda
class TestOnCuda:
    def test_replayed_simulation_equals_the_eager_one(self) -> None:
        weight = torch.randn(64, 64, device="cuda") / 8
        graphed = GraphedCall(loop)
        for batch in (8, 8, 16, 8):
            drive = torch.rand(batch, 64, device="cuda") * 2
            for found, expected in zip(graphed(drive, weight), loop(drive, weight), strict=True):
                assert torch.equal(found, expected)
        assert graphed.graphs == 2

    def test_weights_changed_in_place_are_seen_and_memory_is_released(self) -> None:
        weight = torch.ones(3, 3, device="cuda")
        graphed = GraphedCall(lambda x: x @ weight)
        x = torch.ones(2, 3, device="cuda", requires_grad=True)
        assert float(graphed(x).sum()) == 18
        weight.mul_(2)
        result = graphed(x)
        assert float(result.sum()) == 36
        assert not result.requires_grad
        graphed.release()
        assert graphed.graphs == 0
        assert float(graphed(x).sum()) == 36

    def test_result_is_overwritten_by_the_next_call_and_shapes_are_limited(self) -> None:
        graphed = GraphedCall(torch.neg, max_graphs=1)
        first = graphed(torch.ones(3, device="cuda"))
        graphed(torch.zeros(3, device="cuda"))
        assert float(first.sum()) == 0
        with pytest.raises(RuntimeError, match="keep shapes fixed"):
            graphed(torch.zeros(4, device="cuda"))

    def test_synchronisation_inside_is_an_error(self) -> None:
        with pytest.raises(RuntimeError, match="must not synchronise"):
            GraphedCall(lambda x: x * x.sum().item())(torch.ones(3, device="cuda"))

    def test_more_than_2_to_the_31_elements(self) -> None:
        n = 2**31 + 4100
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB of GPU memory")
        u = torch.zeros(n, device="cuda")
        current = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
        spikes = torch.ones(n, device="cuda", dtype=torch.int8)
        marked = torch.tensor([0, 5, 2**31 - 1, 2**31, n - 1], device="cuda")
        current[marked] = 3
        neuron_step_(current, u, spikes, LIF, backend="triton")
        assert torch.equal(spikes.nonzero().flatten(), marked)
        assert torch.equal(u.nonzero().flatten(), marked)
