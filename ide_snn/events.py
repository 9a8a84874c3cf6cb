"""Event files of neuromorphic cameras -> frames of spikes.

A file is a sequence of events of five bytes: x, y, then one polarity bit and 23 bits of time in microseconds,
big-endian. Source: Orchard et al. (2015), "Converting static image datasets to spiking neuromorphic datasets
using saccades", Frontiers in Neuroscience 9:437, which published N-MNIST in this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ide_snn.files import DataError

__all__ = ["FRAMES", "Binning", "Events", "read_events"]

BYTES_PER_EVENT = 5
# In recordings of the ATIS camera an event in this row is no pixel: the camera's clock of 13 bits has wrapped
# around. Published N-MNIST files have the true time already and no such event.
OVERFLOW_ROW = 240
OVERFLOW_MICROSECONDS = 1 << 13
FRAMES = ("binary", "counts")
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Events:
    """The events of one recording, in the file's order, as integer arrays [N].

    Attributes:
        x, y: column and row, from 0.
        polarity: 1 where the pixel became brighter, else 0.
        microseconds: time since the start of the recording.
    """

    x: Array
    y: Array
    polarity: Array
    microseconds: Array

    def __len__(self) -> int:
        return len(self.x)


def read_events(path: Path, sensor: tuple[int, int]) -> Events:
    """All events of a file; marks of clock overflows are applied to the times and are no events.

    Args:
        path: the file.
        sensor: (height, width); an event outside means that this is another kind of file.

    Raises:
        DataError: the file is missing, empty, cut off within an event, or has an event outside the sensor.
    """
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if len(raw) == 0 or len(raw) % BYTES_PER_EVENT:
        raise DataError(
            f"{path} is truncated or no event file: it has {len(raw)} bytes, expected a positive multiple of "
            f"{BYTES_PER_EVENT}; get the file again"
        )
    table = raw.reshape(-1, BYTES_PER_EVENT)
    x, y, third = table[:, 0], table[:, 1], table[:, 2]
    high, middle, low = (third & 0x7F).astype(np.int64), table[:, 3].astype(np.int64), table[:, 4]
    microseconds = (high << 16) | (middle << 8) | low
    polarity = third >> 7
    overflow = y == OVERFLOW_ROW
    if overflow.any():
        microseconds += np.cumsum(overflow) * OVERFLOW_MICROSECONDS
        x, y, polarity, microseconds = (values[~overflow] for values in (x, y, polarity, microseconds))
    _check_inside(path, x, y, sensor)
    return Events(x, y, polarity, microseconds)


def _check_inside(path: Path, x: Array, y: Array, sensor: tuple[int, int]) -> None:
    height, width = sensor
    outside = (x >= width) | (y >= height)
    if outside.any():
        first = int(outside.argmax())
        raise DataError(
            f"{path} is damaged or of another camera: event {first} lies at x={x[first]}, y={y[first]}, "
            f"outside {width} x {height} pixels"
        )


@dataclass(frozen=True)
class Binning:
    """The rule that makes frames from events: `time_steps` equal bins over [0, duration_ms); later events drop.

    Frame t, channel p, pixel (y, x) tells whether ("binary") or how often ("counts") that pixel had an event of
    polarity p with floor(microseconds * time_steps / duration) = t, in exact integer arithmetic.

    Args:
        time_steps: T, the number of frames.
        duration_ms: the part of the recording that is used, in milliseconds.
        frames: `binary` or `counts`.

    Raises:
        DataError: a number is not a positive integer, or there is no such kind of frames.
    """

    time_steps: int
    duration_ms: int = 300
    frames: str = "binary"

    def __post_init__(self) -> None:
        for name in ("time_steps", "duration_ms"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.frames not in FRAMES:
            raise DataError(f"frames: there is no {self.frames!r}; choose one of {', '.join(FRAMES)}")

    def apply(self, events: Events, sensor: tuple[int, int]) -> Array:
        """uint8 [T, 2, H, W] of one recording.

        Raises:
            DataError: a count does not fit into uint8.
        """
        height, width = sensor
        shape = (self.time_steps, 2, height, width)
        step = events.microseconds * self.time_steps // (self.duration_ms * 1000)
        used = step < self.time_steps
        x, y, polarity = (values[used].astype(np.int64) for values in (events.x, events.y, events.polarity))
        pixel = ((step[used] * 2 + polarity) * height + y) * width + x
        if self.frames == "binary":
            frames = np.zeros(shape, dtype=np.uint8)
            frames.reshape(-1)[pixel] = 1
            return frames
        counts = np.bincount(pixel, minlength=int(np.prod(shape)))
        if counts.max() > 255:
            raise DataError(
                f"a pixel has {counts.max()} events in one of {self.time_steps} frames, more than the 255 that are "
                "stored; use more time steps, a shorter duration_ms or frames=binary"
            )
        return counts.astype(np.uint8).reshape(shape)
