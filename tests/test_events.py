"""Event files: written by hand and read back, damaged, binned, and the real recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.data import DataError
from ide_snn.events import Binning, Events, read_events

REAL = PROJECT.parent / "shared" / "data" / "NMNIST"
SENSOR = (34, 34)
Event = tuple[int, int, int, int]  # x, y, polarity, microseconds


def encode(events: list[Event]) -> bytes:
    """The five bytes of each event, put together bit by bit."""
    content = b""
    for x, y, polarity, time in events:
        bits = f"{x:08b}{y:08b}{polarity:01b}{time:023b}"
        content += int(bits, 2).to_bytes(5, "big")
    return content


def made(events: list[Event]) -> Events:
    x, y, polarity, time = (np.array(values) for values in zip(*events, strict=True))
    return Events(x, y, polarity, time)


def table(events: Events) -> list[Event]:
    columns = (events.x, events.y, events.polarity, events.microseconds)
    return [tuple(map(int, event)) for event in zip(*columns, strict=True)]  # type: ignore[misc]


events_strategy = st.lists(
    st.tuples(st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), st.integers(0, 2**23 - 1)),
    min_size=1,
    max_size=40,
)


# files


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes.fromhex("0b0c 800102  2100 7fffff"))
    assert table(read_events(path, SENSOR)) == [(11, 12, 1, 0x0102), (33, 0, 0, 0x7FFFFF)]


@settings(max_examples=60, deadline=None)
@given(events_strategy)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> None:
    path = tmp_path_factory.mktemp("events") / "a.bin"
    path.write_bytes(encode(events))
    assert table(read_events(path, SENSOR)) == events


def test_marks_of_a_clock_overflow_move_what_follows_and_are_no_events(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    mark = (7, 240, 0, 8191)
    path.write_bytes(encode([(1, 2, 1, 8000), mark, (3, 4, 0, 10), mark, mark, (5, 6, 1, 20)]))
    expected = [(1, 2, 1, 8000), (3, 4, 0, 10 + 8192), (5, 6, 1, 20 + 3 * 8192)]
    assert table(read_events(path, SENSOR)) == expected


@pytest.mark.parametrize("size", [0, 1, 4, 6, 99])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "00007.bin"
    path.write_bytes(encode([(1, 1, 1, 1)] * 20)[:size])
    with pytest.raises(DataError, match=rf"00007.bin is truncated.*{size} bytes.*multiple of 5"):
        read_events(path, SENSOR)


@pytest.mark.parametrize(("x", "y"), [(34, 0), (0, 34), (255, 3), (3, 239), (3, 241)])
def test_an_event_outside_the_sensor_is_named(tmp_path: Path, x: int, y: int) -> None:
    path = tmp_path / "00007.bin"
    path.write_bytes(encode([(1, 1, 1, 1), (x, y, 0, 2)]))
    with pytest.raises(DataError, match=rf"00007.bin .*event 1 lies at x={x}, y={y}, outside 34 x 34"):
        read_events(path, SENSOR)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(DataError, match=rf"{path}.*cannot be read"):
            read_events(path, SENSOR)


# frames


@settings(max_examples=60, deadline=None)
@given(events_strategy, st.integers(1, 40), st.integers(1, 400))
def test_frames_equal_a_loop_over_the_events(events: list[Event], time_steps: int, duration_ms: int) -> None:
    counts = np.zeros((time_steps, 2, 34, 34), dtype=int)
    for x, y, polarity, time in events:
        step = next((t for t in range(time_steps) if time * time_steps < (t + 1) * duration_ms * 1000), None)
        if step is not None:
            counts[step, polarity, y, x] += 1
    assert np.array_equal(Binning(time_steps, duration_ms, "counts").apply(made(events), SENSOR), counts)
    binary = Binning(time_steps, duration_ms).apply(made(events), SENSOR)
    assert binary.dtype == np.uint8
    assert np.array_equal(binary, counts > 0)


def test_the_default_is_thirty_frames_of_ten_milliseconds() -> None:
    times = [0, 9_999, 10_000, 299_999, 300_000, 5_000_000]
    frames = Binning(30).apply(made([(3, 4, 1, time) for time in times]), SENSOR)
    assert frames.shape == (30, 2, 34, 34)
    assert frames[:, 1, 4, 3].nonzero()[0].tolist() == [0, 1, 29]
    assert frames.sum() == 3


def test_counts_beyond_a_byte_are_refused() -> None:
    events = made([(3, 4, 1, 0)] * 256)
    assert Binning(1).apply(events, SENSOR).max() == 1
    with pytest.raises(DataError, match="256 events in one of 1 frames"):
        Binning(1, frames="counts").apply(events, SENSOR)
    assert Binning(1, frames="counts").apply(made([(3, 4, 1, 0)] * 255), SENSOR).max() == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_steps": 0}, "time_steps must be a whole number of at least 1, got 0"),
        ({"time_steps": 2.5}, "time_steps.*got 2.5"),
        ({"time_steps": 30, "duration_ms": 0}, "duration_ms.*got 0"),
        ({"time_steps": 30, "duration_ms": True}, "duration_ms.*got True"),
        ({"time_steps": 30, "frames": "count"}, "no 'count'; choose one of binary, counts"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Binning(**options)  # type: ignore[arg-type]


# the real recordings


def test_real_recordings_hold_the_published_events() -> None:
    if not REAL.is_dir():
        pytest.skip("needs the 1,000 + 100 N-MNIST recordings, which are not part of the project")
    assert len(read_events(REAL / "Train" / "0" / "00002.bin", SENSOR)) == 5_028
    for part, files, events in (("Train", 1_000, 4_133_231), ("Test", 100, 385_596)):
        paths = sorted((REAL / part).glob("?/*.bin"))
        assert len(paths) == files
        assert sum(len(read_events(path, SENSOR)) for path in paths) == events
