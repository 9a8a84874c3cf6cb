"""Image files: decoding, and one file as input of a trained network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ide_snn.files import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB"}

# a closed list: Pillow starts external programs for some others, such as EPS
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


class LoadedImage(NamedTuple):
    """An image as a data set would store it.

    Attributes:
        image: uint8 [1, C, H, W].
        resized: whether the file's image had another size than H x W.
        original_size: (height, width) of the file's image, in pixels.
    """

    image: Tensor
    resized: bool
    original_size: tuple[int, int]


def load_image(
    path: str | Path, dataset_shape: tuple[int, int, int], *, input_scale: float, invert: bool = False
) -> LoadedImage:
    """Read a PNG, JPEG, GIF, BMP, TIFF, WebP or PPM file in the form of a data set's images.

    Turned upright as its EXIF data say, converted to grey (C = 1) or RGB (C = 3), resized (bilinear, without
    keeping the aspect ratio) when its size differs, inverted if asked for, and rescaled from 0..255 to
    0..input_scale.

    Args:
        path: the file.
        dataset_shape: `dataset.input_shape`, (C, H, W).
        input_scale: `dataset.normalization.input_scale`; at most 255.
        invert: swap dark and bright; the digits of MNIST are bright on dark, scans are mostly dark on bright.

    Raises:
        DataError: the file is missing, damaged, not an image or of a kind that has no unique meaning here
            (transparent, more than 8 bits); or the shape or scale is not one of a data set.
        ImportError: Pillow is not installed.
    """
    channels, height, width = dataset_shape
    if not (math.isfinite(input_scale) and 0 < input_scale <= 255):
        raise DataError(f"input_scale must lie in (0, 255], got {input_scale}")
    picture = read_picture(Path(path), str(path), channels)
    original_size = (picture.height, picture.width)
    resized = original_size != (height, width)
    pixels = fit_pixels(picture, height, width).astype(np.float64)
    if invert:
        pixels = 255 - pixels
    scaled = np.rint(pixels * (input_scale / 255)).astype(np.uint8)
    return LoadedImage(torch.from_numpy(scaled)[None], resized, original_size)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install -e '.[images]'") from error
    return Image


def read_picture(file: Path | BinaryIO, name: str, channels: int) -> Image:
    """Decode a whole image, upright, in grey (1 channel) or RGB (3); `name` is for messages.

    Raises:
        DataError, ImportError: as `load_image`.
    """
    if channels not in _MODES:
        raise DataError(f"an image file can be read for 1 or 3 channels, not for {channels}")
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(file, formats=_FORMATS) as picture:
            _refuse_ambiguous(name, picture)
            return ImageOps.exif_transpose(picture).convert(_MODES[channels])
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no image file {name}") from error
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image file of a known kind ({', '.join(_FORMATS)})") from error
    # for damaged files Pillow's decoders raise nearly anything: KeyError, TypeError, struct.error have been seen
    except Exception as error:
        raise DataError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error


def fit_pixels(picture: Image, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [C, H, W], resized (bilinear, without keeping the aspect ratio) where the size differs."""
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), resample=_pillow().Resampling.BILINEAR)
    return np.asarray(picture).reshape(height, width, -1).transpose(2, 0, 1)


def _refuse_ambiguous(name: str, file: Image) -> None:
    if file.mode.startswith(("I", "F")):
        raise DataError(f"{name} has more than 8 bits per channel (mode {file.mode}); save it with 8 bits")
    has_alpha = "A" in file.getbands() or "transparency" in file.info
    if has_alpha and np.asarray(file.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(f"{name} has transparent pixels; flatten it onto a background colour first")
