"""The loader: every sample once, reproducible orders, exact resume, nothing copied."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ide_snn.data import DeviceLoader, Normalization, Split, load_dataset, to_input

NORMALIZATION = Normalization(255.0, (0.1307,), (0.3081,))


def numbered(n: int) -> Split:
    """Samples whose label is their index; the image carries the index as well."""
    images = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n) % 256
    images[:, 0, 0, 1] = torch.arange(n) // 256
    return Split(images, torch.arange(n))


def make(n: int = 23, batch_size: int = 5, **options) -> DeviceLoader:  # type: ignore[no-untyped-def]
    options = {"shuffle": True, "normalization": NORMALIZATION, **options}
    return DeviceLoader(numbered(n), batch_size=batch_size, **options)


def order(batches: Iterator[tuple[Tensor, Tensor]]) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    batch_size=st.integers(1, 80),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_an_epoch_serves_each_sample_once_and_can_start_anywhere(
    n: int, batch_size: int, shuffle: bool, seed: int, epoch: int, data: st.DataObject
) -> None:
    drop_last = data.draw(st.booleans()) if batch_size <= n else False
    loader = make(n, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader) == (n // batch_size if drop_last else -(-n // batch_size))
    assert all(len(labels) == batch_size for _, labels in batches[:-1])
    served = order(iter(batches))
    assert len(served) == loader.samples
    assert len(set(served)) == len(served)
    if not drop_last:
        assert sorted(served) == list(range(n))
    if not shuffle:
        assert served == list(range(len(served)))

    start = data.draw(st.integers(0, len(loader)))
    rest = list(loader.epoch(epoch, start=start))
    assert len(rest) == len(batches) - start
    for (inputs, labels), (same_inputs, same_labels) in zip(batches[start:], rest, strict=True):
        assert torch.equal(inputs, same_inputs)
        assert torch.equal(labels, same_labels)


def test_drop_last_leaves_out_the_short_batch_only() -> None:
    assert [len(labels) for _, labels in make(drop_last=True).epoch(0)] == [5, 5, 5, 5]
    assert [len(labels) for _, labels in make(drop_last=False).epoch(0)] == [5, 5, 5, 5, 3]
    assert len(make(n=20, drop_last=False)) == len(make(n=20, drop_last=True)) == 4


def test_order_depends_on_seed_and_epoch_only() -> None:
    loader = make(seed=3)
    later = order(loader.epoch(4))
    torch.manual_seed(123)
    list(loader.epoch(1))
    assert order(loader.epoch(4)) == later
    assert order(make(seed=3, batch_size=7).epoch(4)) == later
    others = [order(make(seed=seed).epoch(epoch)) for seed in range(4) for epoch in range(4)]
    assert len({tuple(other) for other in others}) == 16


def test_order_stays_what_it_was_so_that_old_runs_can_be_resumed() -> None:
    assert order(make(n=8, seed=1).epoch(2)) == [0, 1, 5, 4, 7, 2, 6, 3]


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    list(make().epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_can_be_interleaved() -> None:
    loader = make()
    first, second = loader.epoch(0), loader.epoch(1)
    mixed = list(zip(first, second, strict=True))
    assert order(a for a, _ in mixed) == order(loader.epoch(0))
    assert order(b for _, b in mixed) == order(loader.epoch(1))


def test_iteration_is_epoch_0() -> None:
    loader = make()
    assert order(iter(loader)) == order(loader.epoch(0)) == order(iter(loader))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_the_normalised_images_of_their_labels(dtype: torch.dtype) -> None:
    digits = load_dataset("digits")
    loader = DeviceLoader(digits.test, batch_size=50, normalization=digits.normalization, shuffle=False, dtype=dtype)
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    scale, mean, std = (
        torch.tensor(v, dtype=dtype) for v in (16.0, digits.normalization.mean[0], digits.normalization.std[0])
    )
    assert inputs.dtype == dtype
    assert torch.equal(inputs, (digits.test.images.to(dtype) / scale - mean) / std)
    assert torch.equal(labels, digits.test.labels)


def test_images_and_labels_stay_together_when_shuffled() -> None:
    split = numbered(600)
    loader = DeviceLoader(split, batch_size=64, normalization=NORMALIZATION, shuffle=True)
    for inputs, labels in loader.epoch(3):
        assert torch.equal(inputs, to_input(split.images[labels], NORMALIZATION))


class LargestResult(TorchDispatchMode):
    """Records the largest tensor, in bytes, that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_the_data_are_neither_copied_nor_converted_as_a_whole() -> None:
    split = Split(torch.zeros(2000, 1, 28, 28, dtype=torch.uint8), torch.zeros(2000, dtype=torch.int64))
    loader = DeviceLoader(split, batch_size=10, normalization=NORMALIZATION, shuffle=True)
    assert loader.split.images.data_ptr() == split.images.data_ptr()
    with LargestResult() as largest:
        list(loader.epoch(0))
    batch = 10 * 28 * 28 * 4
    assert largest.bytes == max(batch, 2000 * 8)  # a batch of float32, or the order


@pytest.mark.parametrize("shuffle", [False, True])
def test_changing_a_batch_in_place_does_not_change_the_data(shuffle: bool) -> None:
    loader = make(shuffle=shuffle)
    served = order(loader.epoch(0))
    for inputs, labels in loader.epoch(0):
        inputs.fill_(-1)
        labels.fill_(-1)
    assert order(loader.epoch(0)) == served
    assert int(loader.split.images.sum()) == sum(range(23))


def test_arguments_that_leave_nothing_to_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        make(seed=-1)
    with pytest.raises(ValueError, match="the split is empty"):
        make(n=0)
    with pytest.raises(ValueError, match="drop_last leaves no batch: batch_size is 24, the split has 23"):
        make(batch_size=24, drop_last=True)
    with pytest.raises(ValueError, match=r"images have 1 channel\(s\), the normalization 3"):
        make(normalization=Normalization(255.0, (0.0,) * 3, (1.0,) * 3))
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch.uint8"):
        make(dtype=torch.uint8)


def test_epoch_refuses_at_once_what_does_not_exist() -> None:
    loader = make()
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        loader.epoch(-1)
    with pytest.raises(ValueError, match=r"start must lie in 0..5.*got 6"):
        loader.epoch(0, start=6)
    with pytest.raises(ValueError, match=r"start must lie in 0..5.*got -1"):
        loader.epoch(0, start=-1)


@pytest.mark.gpu
def test_a_gpu_serves_the_same_bits_as_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    digits = load_dataset("digits")

    def serve(device: str, dtype: torch.dtype) -> DeviceLoader:
        return DeviceLoader(
            digits.train,
            batch_size=100,
            normalization=digits.normalization,
            device=device,
            shuffle=True,
            seed=5,
            dtype=dtype,
        )

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for (inputs, labels), (gpu_inputs, gpu_labels) in zip(
            serve("cpu", dtype).epoch(2), serve("cuda", dtype).epoch(2), strict=True
        ):
            assert gpu_inputs.is_cuda
            assert gpu_labels.is_cuda
            assert torch.equal(inputs, gpu_inputs.cpu())
            assert torch.equal(labels, gpu_labels.cpu())
