"""Image files as network input: conversion, scale, size, and files that cannot be used."""

import contextlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DataError, LoadedImage, load_dataset, load_image

Image = pytest.importorskip("PIL.Image", reason="needs Pillow (the extra 'images')")

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:  # type: ignore[no-untyped-def]
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def load(path: Path, shape: tuple[int, int, int] = (1, 8, 8), **options) -> LoadedImage:  # type: ignore[no-untyped-def]
    return load_image(path, shape, **{"input_scale": 255.0, **options})


def test_a_grey_image_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    image, resized, original_size = load(save(tmp_path / "a.png", GREY))
    assert image.dtype == torch.uint8
    assert image.shape == (1, 1, 8, 8)
    assert np.array_equal(image[0, 0].numpy(), GREY)
    assert not resized
    assert original_size == (8, 8)


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path: Path) -> None:
    colour = np.zeros((8, 8, 3), dtype=np.uint8)
    colour[..., 0], colour[:4, :, 1], colour[..., 2] = 200, 100, np.arange(8) * 10
    path = save(tmp_path / "colour.png", colour)
    assert np.array_equal(load(path, (3, 8, 8)).image[0].permute(1, 2, 0).numpy(), colour)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load(path).image[0, 0].numpy() - luma).max() <= 1
    grey = load(save(tmp_path / "grey.png", GREY), (3, 8, 8)).image
    assert grey.shape == (1, 3, 8, 8)
    assert all(np.array_equal(grey[0, c].numpy(), GREY) for c in range(3))


def test_bilevel_palette_and_opaque_alpha(tmp_path: Path) -> None:
    half = np.where(GREY > 100, 255, 0).astype(np.uint8)
    assert np.array_equal(load(save(tmp_path / "1.png", half, "1")).image[0, 0].numpy(), half)
    assert np.array_equal(load(save(tmp_path / "p.png", GREY, "P")).image[0, 0].numpy(), GREY)
    assert np.array_equal(load(save(tmp_path / "la.png", GREY, "LA")).image[0, 0].numpy(), GREY)
    assert np.array_equal(load(save(tmp_path / "rgba.png", GREY, "RGBA")).image[0, 0].numpy(), GREY)


def test_another_size_is_resized_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "wide.png", np.full((30, 50), 77, dtype=np.uint8))
    image, resized, original_size = load(path, (1, 28, 20))
    assert image.shape == (1, 1, 28, 20)
    assert resized
    assert original_size == (30, 50)
    assert image.unique().tolist() == [77]


def test_shrinking_averages_instead_of_skipping(tmp_path: Path) -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = load(save(tmp_path / "board.png", checkerboard)).image
    assert 120 <= int(image.min()) <= int(image.max()) <= 135


def test_invert(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY)
    assert np.array_equal(load(path, invert=True).image[0, 0].numpy(), 255 - GREY)
    assert load(path, invert=True, input_scale=16.0).image.max() == 16


def test_digits_survive_the_way_through_an_8_bit_image(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    for i in range(5):
        stored = digits.test.images[i]
        array = np.rint(stored[0].numpy() * 255.0 / 16).astype(np.uint8)
        path = save(tmp_path / "digit.png", array)
        loaded = load(path, digits.input_shape, input_scale=digits.normalization.input_scale)
        assert torch.equal(loaded.image[0], stored)


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    tall = np.zeros((20, 10), dtype=np.uint8)
    tall[:10] = 255
    path = save(tmp_path / "photo.png", tall, exif=exif)
    image, resized, original_size = load(path, (1, 10, 20))
    assert original_size == (10, 20)
    assert not resized
    assert np.array_equal(image[0, 0].numpy(), np.rot90(tall, -1))


def test_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", np.full((8, 8), 100, dtype=np.uint8), quality=95)
    assert (load(path).image.int() - 100).abs().max() <= 2


# what cannot be used


def error(path: Path, **options) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file_folder_and_non_image(tmp_path: Path) -> None:
    assert "there is no image file" in error(tmp_path / "none.png")
    assert "cannot be read as an image" in error(tmp_path)
    for content in (b"", b"just some text", b"\x89PNG\r\n\x1a\n"):
        path = tmp_path / "bad.png"
        path.write_bytes(content)
        assert "is not an image file of a known kind (PNG, JPEG, " in error(path)


def test_formats_for_which_pillow_would_start_a_program_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.eps", GREY)
    assert "is not an image file of a known kind" in error(path)


def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyError("odd tag")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    assert "cannot be read as an image (KeyError: 'odd tag')" in error(save(tmp_path / "a.png", GREY))


def test_truncated_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp"):
        path = save(tmp_path / name, noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "cannot be read as an image" in error(path)


def test_images_of_ambiguous_meaning_are_refused(tmp_path: Path) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 256)
    deep.save(tmp_path / "deep.png")
    assert error(tmp_path / "deep.png").startswith(f"{tmp_path / 'deep.png'} has more than 8 bits")
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[..., 3] = GREY
    assert "transparent pixels; flatten" in error(save(tmp_path / "clear.png", clear))
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=0)
    assert "transparent pixels; flatten" in error(tmp_path / "palette.png")


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "decompression bomb" in error(save(tmp_path / "big.png", GREY))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, kind)
    return buffer.getvalue()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([encoded("PNG"), encoded("JPEG"), encoded("GIF"), encoded("TIFF")]), st.data())
def test_damaged_files_give_an_image_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("image") / "file"
    path.write_bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    with warnings.catch_warnings(), contextlib.suppress(DataError):
        warnings.simplefilter("ignore")  # Pillow's own about odd metadata
        assert load(path).image.shape == (1, 1, 8, 8)


def test_shapes_and_scales_that_are_not_those_of_a_data_set(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY)
    with pytest.raises(DataError, match="1 or 3 channels, not for 2"):
        load(path, (2, 8, 8))
    for scale in (0.0, -1.0, 256.0, float("nan")):
        with pytest.raises(DataError, match=r"input_scale must lie in \(0, 255\]"):
            load(path, input_scale=scale)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", GREY)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[images\]'"):
        load(path)
