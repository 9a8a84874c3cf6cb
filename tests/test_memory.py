"""Memory of large tensors: never shared by two that live, handed on when one ends, bounded, the same in every step."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ide_snn import event_driven, memory
from ide_snn.models import SNNIDEConvMultiLayerNet, SNNIDEConvNet
from ide_snn.neurons import NeuronParams

CPU = torch.device("cpu")
LARGE = memory.LEAST  # bytes
REASON = next((reason for reason in map(event_driven.native.why_unavailable, event_driven.KERNELS) if reason), None)
NEEDS_KERNELS = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


@pytest.fixture(autouse=True)
def blocks(monkeypatch) -> memory.Blocks:
    own = memory.Blocks()
    monkeypatch.setattr(memory, "_blocks", own)
    return own


def large(size: int = LARGE) -> Tensor:
    return memory.empty((size,), torch.uint8, CPU)


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(300, 1000),
        torch.empty(300, 1000, dtype=torch.float64),
        torch.empty(1024, 1024, dtype=torch.uint8),
        torch.empty(64, 8, 30, 40, dtype=torch.bfloat16, memory_format=torch.channels_last),
        torch.empty(64, 8, 30, 40).permute(2, 0, 3, 1),
        torch.empty(5, 7),
        torch.empty(0, 7),
        torch.empty(700, 1).expand(700, 900),
        torch.empty(1000, 1000, device="meta"),
    ],
    ids=lambda like: f"{like.dtype}-{list(like.shape)}",
)
def test_tensors_are_as_torch_makes_them(blocks, like) -> None:
    made, torchs = memory.empty_like(like), torch.empty_like(like)
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        torchs.shape,
        torchs.stride(),
        torchs.dtype,
        torchs.device,
    )
    assert not made._is_view()
    assert type(made) is Tensor
    assert (blocks.held > 0) == (like.device == CPU and like.numel() * like.itemsize >= LARGE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_those_of_torch(layout) -> None:
    shape = (16, 24, 40, 41)
    made = memory.empty(shape, torch.float32, CPU, layout)
    assert made.stride() == torch.empty(shape, memory_format=layout).stride()
    x = torch.randn(shape).contiguous(memory_format=layout)
    y = torch.randn(shape)
    for value, expected in ((memory.clone(x), x), (memory.multiply(x, y), x * y)):
        assert torch.equal(value, expected)
        assert value.stride() == x.stride()
        assert value.data_ptr() not in (x.data_ptr(), y.data_ptr())


def test_a_block_goes_to_the_next_tensor_of_its_size(blocks) -> None:
    first, _beside = large(), large(4 * LARGE)
    place = first.data_ptr()
    del first
    other = large(LARGE + 1)
    again = large()
    assert other.data_ptr() != place
    assert again.data_ptr() == place
    assert blocks.held == 6 * LARGE + 1


def test_what_refers_to_a_tensor_keeps_its_block() -> None:
    x = memory.empty((LARGE // 4,), torch.float32, CPU).fill_(2).requires_grad_()
    views = {"view": x[5:6].detach(), "array": x.detach().numpy(), "graph": (x * x).sum()}
    place = x.data_ptr()
    del x
    while views:
        gc.collect()
        assert memory.empty((LARGE // 4,), torch.float32, CPU).fill_(0).data_ptr() != place
        views.popitem()
    assert memory.empty((LARGE // 4,), torch.float32, CPU).data_ptr() == place


def test_a_tensor_in_a_reference_cycle_ends_when_it_is_collected() -> None:
    cycle = [large()]
    place = cycle[0].data_ptr()
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert large().data_ptr() == place


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_tensors_that_live_never_share_memory_and_blocks_are_bounded(moves) -> None:
    own = memory.Blocks()
    alive: dict[int, tuple[int, Tensor]] = {}
    for number, (kind, slot) in enumerate(moves):
        alive.pop(slot, None)
        if kind:
            alive[slot] = number, torch.from_numpy(own.take(4096 * kind)).fill_(number)
            used = sum(len(x) for _, x in alive.values())
            assert own.used == used
            assert used <= own.held <= memory.SPARE * own.most
        assert all((x == number).all() for number, x in alive.values())
    alive.clear()
    own.release()
    assert own.held == own.used == own.most == 0


def test_other_sizes_every_time_do_not_pile_up(blocks) -> None:
    for size in range(40):
        large(LARGE + 4096 * size)
    assert blocks.held <= memory.SPARE * blocks.most


def test_sizes_of_one_step_stay() -> None:
    def step() -> set[int]:
        sizes = [LARGE, 3 * LARGE, LARGE, 2 * LARGE]
        return {x.data_ptr() for x in [large(size) for size in sizes]}

    first = step()
    assert all(step() == first for _ in range(5))


def test_release_gives_idle_blocks_back_and_no_others(blocks) -> None:
    kept, ended = large().fill_(3), large(2 * LARGE)
    del ended
    memory.release()
    assert blocks.held == LARGE
    assert (kept == 3).all()


def test_threads_do_not_get_each_others_blocks(blocks) -> None:
    wrong = []

    def work(number: int) -> None:
        for turn in range(60):
            x, y = (large(LARGE * (1 + (turn + i) % 2)).fill_(number) for i in range(2))
            if (x != number).any() or (y != number).any():
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    memory.release()
    assert blocks.held == blocks.used == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_writes_to_memory_of_its_own() -> None:
    script = """
import os, torch
from ide_snn import memory
torch.set_num_threads(1)  # threads are not forked
x = memory.empty((memory.LEAST,), torch.uint8, torch.device("cpu")).fill_(1)
child = os.fork()
if child == 0:
    x[:] = 2
    os._exit(0)
os.waitpid(child, 0)
assert (x == 1).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@dataclass(frozen=True)
class Case:
    net: type
    options: dict[str, object]
    shape: tuple[int, ...]


CASES = {
    "one population": Case(SNNIDEConvNet, {"channels": 64, "kernel_size": 5}, (1, 28, 28)),
    "five populations": Case(SNNIDEConvMultiLayerNet, {"channels": (16, 24, 32, 32, 24)}, (3, 32, 32)),
}


@NEEDS_KERNELS
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_training_takes_the_same_blocks_in_every_step_at_any_t(blocks, name, precision, monkeypatch) -> None:
    monkeypatch.setattr(memory, "LEAST", 1 << 12)
    case, held = CASES[name], {}
    x, labels = torch.rand(32, *case.shape, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10
    for time_steps in (2, 20):
        memory.release()
        net = case.net(
            input_shape=case.shape,
            num_classes=10,
            neuron=NeuronParams(v_threshold=2.0, leak=0.95),
            time_steps=time_steps,
            precision=precision,
            dropout=0.2,
            **case.options,
        )
        for number in range(4):
            torch.nn.functional.cross_entropy(net(x), labels).backward()
            if number:
                assert blocks.held == held[time_steps]
            held[time_steps] = blocks.held
        del net
        gc.collect()
    assert held[2] == held[20] > 0
