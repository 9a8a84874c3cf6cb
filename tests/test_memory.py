"""Memory of large tensors: never shared by two that live, handed on when one ends, bounded, the same in every step."""

from __future__ import annotations

import errno
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
from ide_snn.config import load_config
from ide_snn.models import SNNIDEConvMultiLayerNet, SNNIDEConvNet
from ide_snn.neurons import NeuronParams
from ide_snn.run import train

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
    both = [large(), large()]  # the block of those in between is free, too
    assert place in [y.data_ptr() for y in both]


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


def test_the_bound_is_of_the_most_that_was_in_use() -> None:
    places = [large(size).data_ptr() for size in (4 * LARGE, LARGE, 4 * LARGE)]
    assert places[0] == places[2]


def test_sizes_not_asked_for_the_longest_go_first(monkeypatch) -> None:
    mapped, map_block = [], memory._map
    monkeypatch.setattr(memory, "_map", lambda size: mapped.append(size) or map_block(size))
    del [large(size) for size in (4 * LARGE, 3 * LARGE, 2 * LARGE)][:]
    large(4 * LARGE)
    large(6 * LARGE)  # 15 in all, and 13.5 are allowed
    del mapped[:]
    for size in (4 * LARGE, 2 * LARGE, 6 * LARGE):
        large(size)
    assert mapped == []
    large(3 * LARGE)
    assert mapped == [3 * LARGE]


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


def test_where_the_system_has_no_memory_idle_blocks_go_and_torch_is_asked(blocks, monkeypatch) -> None:
    large(4 * LARGE)
    assert blocks.held == 4 * LARGE

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(memory.mmap, "mmap", fail)
        x = memory.empty((32, 8, 80, 80), torch.float32, CPU, torch.channels_last)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert blocks.held == blocks.used == blocks.most == len(blocks._idle) == 0
    with pytest.raises(RuntimeError, match="allocate memory"):
        large(1 << 60)


def test_an_error_of_a_signals_handler_is_not_taken_for_a_lack_of_memory(monkeypatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(memory.mmap, "mmap", late)
    with pytest.raises(TimeoutError):
        large()


def test_an_interrupt_while_a_block_is_taken_spoils_nothing(blocks, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    large()
    for size in (LARGE, 2 * LARGE):
        with monkeypatch.context() as patch:
            patch.setattr(memory.np, "frombuffer", interrupt)
            with pytest.raises(KeyboardInterrupt):
                large(size)
    assert blocks.held == 0
    first, second = large().fill_(1), large().fill_(2)
    assert (first == 1).all()
    assert blocks.held == blocks.used == len(first) + len(second)


@pytest.mark.parametrize("turn", range(3))
def test_an_interrupt_while_ended_arrays_are_looked_for_spoils_nothing(blocks, monkeypatch, turn) -> None:
    some = [large() for _ in range(3)]
    del some
    turns = iter(range(10))

    class Idle(dict):
        def setdefault(self, *arguments: object) -> object:
            if next(turns) == turn:
                raise KeyboardInterrupt
            return super().setdefault(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_idle", Idle())
        with pytest.raises(KeyboardInterrupt):
            large()
        assert blocks.used == 0
        assert blocks.held == 2 * LARGE  # that of the interrupted turn is given back
    memory.release()
    large()
    assert blocks.held <= LARGE


def test_a_block_can_be_taken_while_another_is(blocks, monkeypatch) -> None:
    """As by a signal's handler, or by a destructor that a garbage collection calls."""
    inner, mapped = [], memory._map

    def within(size: int) -> object:
        if not inner:
            inner.append(None)
            inner[0] = large().fill_(1)
        return mapped(size)

    monkeypatch.setattr(memory, "_map", within)
    outer = large().fill_(2)
    assert (inner[0] == 1).all()
    assert (outer == 2).all()
    assert blocks.held == blocks.used == 2 * LARGE


def test_no_python_code_runs_when_a_tensor_ends() -> None:
    """It could swallow the KeyboardInterrupt of a Ctrl-C that comes just then."""
    x, calls = large(), []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del x
    finally:
        sys.setprofile(None)
    assert calls == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_writes_to_memory_of_its_own() -> None:
    script = """
import os, threading, torch
from ide_snn import memory
torch.set_num_threads(1)  # threads are not forked
x = memory.empty((memory.LEAST,), torch.uint8, torch.device("cpu")).fill_(1)
inside, forked = threading.Event(), threading.Event()
map_block = memory._map

def slow(size):
    inside.set()
    forked.wait()
    return map_block(size)

memory._map = slow
other = threading.Thread(target=memory.empty, args=((memory.LEAST,), torch.uint8, torch.device("cpu")))
other.start()
inside.wait()  # it has the lock
child = os.fork()
if child == 0:
    x[:] = 2
    memory._map = map_block
    memory.empty((memory.LEAST,), torch.uint8, torch.device("cpu"))
    os._exit(0)
forked.set()
other.join()
assert os.waitpid(child, 0)[1] == 0
assert (x == 1).all()
"""
    # Python 3.12 warns of a fork beside threads
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


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
    mapped, map_block, case, held = [], memory._map, CASES[name], {}
    monkeypatch.setattr(memory, "LEAST", 1 << 12)
    monkeypatch.setattr(memory, "_map", lambda size: mapped.append(size) or map_block(size))
    x, labels = torch.rand(32, *case.shape, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10
    for time_steps in (5, 20):
        memory.release()
        net = case.net(
            input_shape=case.shape,
            num_classes=10,
            neuron=NeuronParams(v_threshold=0.5, leak=0.95),
            time_steps=time_steps,
            precision=precision,
            dropout=0.2,
            generator=torch.Generator().manual_seed(2),
            **case.options,
        )
        for _ in range(4):
            del mapped[:]
            torch.nn.functional.cross_entropy(net(x), labels).backward()
        assert mapped == []
        held[time_steps] = blocks.held
        with torch.no_grad():
            assert net.block(x).mean() > 0.01  # silence would take few of them
        del net
        gc.collect()
    assert held[5] == held[20]
    state = 4 * x.shape[0] * 64 * 14 * 14
    assert name != "one population" or blocks.most > 8 * state


@NEEDS_KERNELS
def test_a_training_run_leaves_no_idle_blocks(blocks, monkeypatch, tmp_path) -> None:
    mapped, map_block = [], memory._map
    monkeypatch.setattr(memory, "LEAST", 1 << 12)
    monkeypatch.setattr(memory, "_map", lambda size: mapped.append(size) or map_block(size))
    options = ["dataset=digits", "model=f64c5", "model.channels=8", "precision=exact", "time_steps=3"]
    sizes = ["dataset.train_limit=64", "dataset.test_limit=32", "trainer.epochs=1", "trainer.batch_size=32"]
    train(load_config([*options, *sizes]), tmp_path / "run")
    assert mapped
    assert blocks.held == blocks.used
