"""Random crops and flips: equal to slicing each image by hand, reproducible, off by default."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import Augmentation, DataError, DeviceLoader, Normalization, Split

IDENTITY = Normalization(1.0, (0.0, 0.0), (1.0, 1.0))


def some_split(n: int = 11) -> Split:
    images = torch.randint(0, 256, (n, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Split(images, torch.arange(n))


@settings(max_examples=40, deadline=None)
@given(padding=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 99), channels=st.integers(1, 3))
def test_equals_padding_slicing_and_mirroring_each_image(padding: int, flip: bool, seed: int, channels: int) -> None:
    augmentation = Augmentation(padding, flip)
    images = torch.randint(0, 256, (6, channels, 5, 7), dtype=torch.uint8)
    choices = augmentation.draw(6, seed, epoch=2)
    changed = augmentation.apply(images, choices)
    assert changed.dtype == torch.uint8
    for image, result, (row, column, mirrored) in zip(images, changed, choices.tolist(), strict=True):
        padded = torch.zeros(channels, 5 + 2 * padding, 7 + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + 5, padding : padding + 7] = image
        window = padded[:, row : row + 5, column : column + 7]
        assert torch.equal(result, window.flip(-1) if mirrored else window)


def test_every_offset_and_both_directions_occur_equally_often() -> None:
    choices = Augmentation(2, True).draw(50_000, seed=0, epoch=0)
    for column, values in ((0, 5), (1, 5), (2, 2)):
        share = torch.bincount(choices[:, column], minlength=values) / 50_000
        assert torch.allclose(share, torch.full((values,), 1 / values), atol=0.01)


def test_draws_depend_on_seed_and_epoch_only() -> None:
    draw = Augmentation(4, True).draw
    assert torch.equal(draw(100, 1, 5), draw(100, 1, 5))
    assert not torch.equal(draw(100, 1, 5), draw(100, 1, 6))
    assert not torch.equal(draw(100, 1, 5), draw(100, 2, 5))


def test_loader_applies_it_and_resumes_with_the_same_images() -> None:
    loader = DeviceLoader(
        some_split(), batch_size=4, normalization=IDENTITY, augmentation=Augmentation(1, True), shuffle=True, seed=5
    )
    whole = list(loader.epoch(3))
    again = list(loader.epoch(3, start=1))
    for (x, y), (expected_x, expected_y) in zip(again, whole[1:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    plain = DeviceLoader(some_split(), batch_size=4, normalization=IDENTITY, shuffle=True, seed=5)
    assert any(not torch.equal(x, y) for (x, _), (y, _) in zip(whole, plain.epoch(3), strict=True))
    first = next(iter(loader.epoch(3)))[0]
    other = next(iter(loader.epoch(4)))[0]
    assert not torch.equal(first, other)


def test_nothing_changes_by_default_and_the_split_never_does() -> None:
    split = some_split()
    before = split.images.clone()
    loader = DeviceLoader(split, batch_size=11, normalization=IDENTITY, shuffle=False)
    assert torch.equal(next(iter(loader))[0], before.float())
    list(DeviceLoader(split, batch_size=3, normalization=IDENTITY, shuffle=True, augmentation=Augmentation(2, True)))
    assert torch.equal(split.images, before)


@pytest.mark.parametrize("padding", [-1, 1.5, True])
def test_wrong_padding_is_refused(padding: object) -> None:
    with pytest.raises(DataError, match="crop_padding"):
        Augmentation(padding)  # type: ignore[arg-type]
