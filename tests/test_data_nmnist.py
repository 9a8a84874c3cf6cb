"""N-MNIST: folders of recordings, frames packed in memory, batches of spikes, and a run on them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_events import SENSOR, encode

from ide_snn.checkpoint import CheckpointError
from ide_snn.config import ConfigError, build_dataset, build_loaders, build_model, load_config
from ide_snn.data import Augmentation, DataError, Dataset, DeviceLoader, EventSplit, Normalization, load_dataset
from ide_snn.events import Binning, read_events
from ide_snn.run import evaluate_checkpoint, predict_image, train
from ide_snn.schemas import EvaluateConfig, PredictConfig

REAL = PROJECT.parent / "shared" / "data"
CPU = torch.device("cpu")
NORMALIZATION = Normalization(255.0, (0.0, 0.0), (1.0, 1.0))


def fill(data_dir: Path, *, n_train: int = 3, n_test: int = 1) -> Path:
    """Random recordings of every digit; a digit's events lie in rows of its own, so that it can be learnt."""
    rng = np.random.default_rng(0)
    root = data_dir / "NMNIST"
    for part, count in (("Train", n_train), ("Test", n_test)):
        for digit in range(10):
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            for number in range(count):
                x, time = rng.integers(0, 34, 300).tolist(), np.sort(rng.integers(0, 310_000, 300)).tolist()
                y, polarity = rng.integers(3 * digit, 3 * digit + 3, 300).tolist(), rng.integers(0, 2, 300).tolist()
                events = list(zip(x, y, polarity, time, strict=True))
                (folder / f"{number:05}.bin").write_bytes(encode(events))
    return root


def load(data_dir: Path, **options: object) -> Dataset:
    return load_dataset("nmnist", data_dir=data_dir, **{"time_steps": 6, "cache": "none", **options})


def overrides(data_dir: Path, *more: str) -> list[str]:
    return ["dataset=nmnist", f"data_dir={data_dir}", "dataset.cache=none", "time_steps=6", *more]


# frames in memory


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    n=st.integers(1, 5),
    time_steps=st.integers(1, 4),
    binary=st.booleans(),
    data=st.data(),
)
def test_batches_are_the_frames_that_were_packed(
    shape: tuple[int, int, int], n: int, time_steps: int, binary: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    frames = torch.randint(0, 2 if binary else 256, (n, time_steps, *shape), generator=generator).to(torch.uint8)
    flat = frames.flatten(2)
    stored = torch.from_numpy(np.packbits(flat.numpy(), axis=2, bitorder="little")) if binary else flat
    split = EventSplit(stored, torch.zeros(n, dtype=torch.int64), shape, binary)
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
    steps = data.draw(st.integers(1, time_steps))
    batch = split.batch(index, steps)
    assert batch.dtype == (torch.bool if binary else torch.uint8)
    assert batch.shape == (steps, len(index), *shape)
    assert torch.equal(batch.to(torch.uint8), frames[index, :steps].transpose(0, 1))


def test_a_split_of_events_checks_its_tensors() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    packed = torch.zeros(2, 3, 289, dtype=torch.uint8)
    assert EventSplit(packed, labels, (2, 34, 34)).time_steps == 3
    for frames in (packed.float(), packed[:, :, :-1], packed[0]):
        with pytest.raises(DataError, match=r"frames must be uint8 \[N, T, 289\]"):
            EventSplit(frames, labels, (2, 34, 34))
    with pytest.raises(DataError, match=r"frames must be uint8 \[N, T, 2312\]"):
        EventSplit(packed, labels, (2, 34, 34), binary=False)
    with pytest.raises(DataError, match="2 recordings but 1 labels"):
        EventSplit(packed, labels[:1], (2, 34, 34))
    part = EventSplit(packed, torch.tensor([4, 5]), (2, 34, 34)).subset([1, 1, 0])
    assert part.labels.tolist() == [5, 5, 4]


# the folders


@pytest.mark.parametrize("frames", ["binary", "counts"])
def test_recordings_become_the_binned_frames_of_their_digit(tmp_path: Path, frames: str) -> None:
    root = fill(tmp_path)
    dataset = load(tmp_path, frames=frames)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == ("nmnist", 10, (2, 34, 34))
    assert dataset.normalization is None
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (30, 10, None)
    loader = DeviceLoader(dataset.train, batch_size=30, normalization=None, shuffle=False)
    ((inputs, labels),) = list(loader)
    assert inputs.shape == (6, 30, 2, 34, 34)
    assert inputs.dtype == (torch.bool if frames == "binary" else torch.uint8)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(3)]
    rule = Binning(6, 300, frames)
    for row, path in enumerate(sorted((root / "Train").glob("?/*.bin"))):
        expected = rule.apply(read_events(path, SENSOR), SENSOR)
        assert np.array_equal(inputs[:, row].numpy().astype(np.uint8), expected)


def test_a_part_of_the_recordings_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    with caplog.at_level(logging.INFO, logger="ide_snn.data"):
        assert load(tmp_path).title == "N-MNIST (subset: 30 + 10 recordings)"
    assert "is not the whole of N-MNIST: it holds 30 + 10 recordings" in caplog.text


def test_validation_and_limits(tmp_path: Path) -> None:
    fill(tmp_path)
    dataset = load(tmp_path, validation_size=10, train_limit=10, test_limit=10)
    assert dataset.validation is not None
    for split in (dataset.train, dataset.validation, dataset.test):
        assert sorted(split.labels.tolist()) == list(range(10))
    with pytest.raises(DataError, match="takes no mean and std"):
        load(tmp_path, mean=[0.0, 0.0])
    with pytest.raises(DataError, match="nmnist has no option 'download'; its own are: time_steps, duration_ms"):
        load(tmp_path, download=True)
    with pytest.raises(DataError, match="nmnist needs time_steps"):
        load_dataset("nmnist", data_dir=tmp_path)


def test_missing_folders_say_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no folder {tmp_path}/NMNIST/Train and no folder .*Test.*Train.zip"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"no data_dir was given.*<data_dir>/NMNIST"):
        load_dataset("nmnist", time_steps=6)
    root = fill(tmp_path)
    (root / "Test" / "7" / "00000.bin").unlink()
    with pytest.raises(DataError, match=rf"{root}/Test/7 is missing or holds no .bin file"):
        load(tmp_path)


def test_damaged_recordings_are_named(tmp_path: Path) -> None:
    root = fill(tmp_path)
    path = root / "Train" / "4" / "00001.bin"
    content = path.read_bytes()
    for damaged in (b"", content[:1], content[: len(content) // 2 + 1], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path} is truncated"):
            load(tmp_path)
    path.write_bytes(b"\xff" + content[1:])
    with pytest.raises(DataError, match=rf"{path} is damaged.*x=255"):
        load(tmp_path)
    path.write_bytes(encode([(0, 0, 0, 0)] * 300))
    with pytest.raises(DataError, match=rf"{path}: a pixel has 300 events"):
        load(tmp_path, frames="counts")


# batches


def test_the_loader_cuts_in_time_and_does_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path)
    split = load(tmp_path).train

    def serve(**options: object) -> DeviceLoader:
        return DeviceLoader(split, **{"batch_size": 8, "normalization": None, "shuffle": True, "seed": 3, **options})

    for (whole, labels), (cut, same_labels) in zip(serve(), serve(time_steps=4), strict=True):
        assert torch.equal(cut, whole[:4])
        assert torch.equal(labels, same_labels)
    (rest, *_), (_, expected, *_) = list(serve().epoch(1, start=1)), list(serve().epoch(1))
    assert torch.equal(rest[0], expected[0])
    for wrong in ({"normalization": NORMALIZATION}, {"augmentation": Augmentation(1)}):
        with pytest.raises(ValueError, match="events are served as they are"):
            serve(**wrong)
    for time_steps in (0, 7):
        with pytest.raises(ValueError, match=rf"6 frames, so time_steps must lie in 1..6; got {time_steps}"):
            serve(time_steps=time_steps)
    digits = load_dataset("digits").test
    with pytest.raises(ValueError, match="images need a normalization"):
        DeviceLoader(digits, batch_size=2, normalization=None, shuffle=False)
    with pytest.raises(ValueError, match="have none without"):
        DeviceLoader(digits, batch_size=2, normalization=NORMALIZATION, shuffle=False, time_steps=3)


# configured runs


def test_the_configuration_has_one_number_of_time_steps(tmp_path: Path) -> None:
    fill(tmp_path)
    config = load_config(overrides(tmp_path, "model=f64c5", "model.channels=4"))
    dataset = build_dataset(config)
    loaders = build_loaders(config, dataset, CPU)
    inputs, _ = next(iter(loaders.train.epoch(0)))
    assert inputs.shape[0] == config.time_steps == 6
    net = build_model(config)
    assert net.block.input_has_time
    assert net(inputs).shape == (inputs.shape[1], 10)
    for wrong in ("dataset.mean=[0.1]", "dataset.crop_padding=4", "dataset.flip=true", "dataset.download=true"):
        with pytest.raises(ConfigError, match=r"unknown option dataset\..*dataset.duration_ms"):
            load_config(overrides(tmp_path, wrong))


def test_the_papers_network_has_the_papers_size() -> None:
    net = build_model(load_config(["dataset=nmnist", "model=f64c5", "time_steps=30"]))
    assert net.population_shapes == [(64, 17, 17)]
    assert sum(parameter.numel() for parameter in net.parameters()) == 290_763


def test_a_run_evaluates_the_first_frames_and_refuses_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    options = ["model=fc", "model.hidden=30", "model.dropout=0", "trainer.epochs=8", "trainer.batch_size=10"]
    config = load_config(overrides(tmp_path, *options, "device=cpu", "trainer.progress=false"))
    result = train(config, tmp_path / "run")
    assert result.test_accuracy_last is not None
    assert result.test_accuracy_last > 0.5
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.pt")
    data = torch.load(checkpoint, weights_only=True)["data"]
    assert data["title"] == "N-MNIST (subset: 30 + 10 recordings)"

    reports = {}
    for steps in (None, 6, 2):
        reports[steps] = evaluate_checkpoint(EvaluateConfig(checkpoint, steps, None, None, "cpu", None))
    json.loads(capsys.readouterr().out.split("}\n{")[0] + "}")
    assert reports[None]["accuracy"] == reports[6]["accuracy"] == result.test_accuracy_last
    loaders = build_loaders(config, build_dataset(config), CPU)
    from ide_snn.run import model_from_checkpoint

    net, _, _ = model_from_checkpoint(checkpoint, time_steps=2, device="cpu")
    correct = sum((net(x[:2]).argmax(1) == y).sum().item() for x, y in loaders.test)
    assert math.isclose(reports[2]["accuracy"], correct / 10)
    with pytest.raises(ConfigError, match="6 frames"):
        evaluate_checkpoint(EvaluateConfig(checkpoint, 7, None, None, "cpu", None))
    with pytest.raises(CheckpointError, match=r"last.pt was trained on event recordings \(nmnist\)"):
        predict_image(PredictConfig(checkpoint, "a.png", None, False, "cpu"))


# the real recordings


def test_the_real_subset_loads(tmp_path: Path) -> None:
    if not (REAL / "NMNIST").is_dir():
        pytest.skip("needs the 1,000 + 100 N-MNIST recordings, which are not part of the project")
    dataset = load_dataset("nmnist", data_dir=REAL, time_steps=30, cache=str(tmp_path))
    assert dataset.title == "N-MNIST (subset: 1,000 + 100 recordings)"
    assert dataset.train.labels.bincount().tolist() == [97, 116, 99, 93, 105, 92, 94, 117, 87, 100]
    assert dataset.test.labels.bincount().tolist() == [8, 14, 8, 11, 14, 7, 10, 15, 2, 11]
    assert isinstance(dataset.train, EventSplit)
    assert dataset.train.frames.shape == (1000, 30, 289)
    path = sorted((REAL / "NMNIST" / "Train" / "0").glob("*.bin"))[0]
    expected = Binning(30).apply(read_events(path, SENSOR), SENSOR)
    assert np.array_equal(dataset.train.batch(torch.tensor([0]))[:, 0].numpy(), expected)
    again = load_dataset("nmnist", data_dir=REAL, time_steps=30, cache=str(tmp_path))
    assert isinstance(again.train, EventSplit)
    assert torch.equal(again.train.frames, dataset.train.frames)
