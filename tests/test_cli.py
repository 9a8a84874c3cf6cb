"""The scripts, as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

from ide_snn.checkpoint import CheckpointError, load_checkpoint
from ide_snn.config import ConfigError, quote
from ide_snn.data import DataError
from ide_snn.run import evaluate_checkpoint, model_from_checkpoint, predict_image
from ide_snn.schemas import EvaluateConfig, PredictConfig

TINY = ["model.hidden=20", "time_steps=3", "device=cpu", "optimizer.lr=0.1"]


def command(script: str, *overrides: str) -> list[str]:
    return [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), *overrides]


def call(script: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *overrides), cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six epochs in the default place."""
    cwd = tmp_path_factory.mktemp("work")
    done = call("train", *TINY, "trainer.epochs=6", cwd=cwd)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (cwd / "outputs" / "digits_fc_lif").iterdir()
    assert str(run_dir) in done.stdout
    assert "test accuracy" in done.stdout
    return run_dir


def test_what_a_run_leaves_behind(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    expected = {"result.json", "metrics.csv", "config.yaml", "versions.json", "train.log"}
    assert expected | {"checkpoints/last.pt", "checkpoints/best.pt", ".hydra/overrides.yaml"} <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    assert not any(name.endswith(".tmp") for name in files)
    result = json.loads((trained / "result.json").read_text())
    assert 0.5 < result["test_accuracy_last"] <= result["test_accuracy_best"] <= 1
    assert result["best_selected_on"] == "test"
    assert (result["epochs"], result["seed"], result["experiment"]) == (6, 0, "digits_fc_lif")
    assert result["parameters"] == 64 * 20 + 20 + 20 * 20 + 1 + 2 * 20 + 20 * 10 + 10
    assert result["neurons"] == 64 + 20 + 10
    assert result["seconds"] > 0
    assert result["solver_failures"] == 0
    with (trained / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["test_accuracy"]) == result["test_accuracy_last"]
    versions = json.loads((trained / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert versions["threads"] >= 1
    assert "hidden: 20" in (trained / "config.yaml").read_text()
    content = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    assert content["config"]["model"]["hidden"] == 20


def wait_for_epoch(run_dir: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the first epoch that this process trains is in metrics.csv."""
    metrics = run_dir / "metrics.csv"
    before = metrics.read_bytes() if metrics.exists() else b""
    deadline = time.monotonic() + 150
    while not metrics.exists() or metrics.read_bytes() == before:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_then_stopped_then_finished_is_as_never_stopped(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    resuming = command(
        "train", *TINY, "trainer.epochs=6", "resume=auto", f"hydra.run.dir={run_dir}", "trainer.log_every=7"
    )
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        with subprocess.Popen(resuming, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            wait_for_epoch(run_dir, process)
            os.kill(process.pid, number)
            output, _ = process.communicate(timeout=100)
        assert process.returncode == code, output.decode()
        assert not (run_dir / "result.json").exists()
    assert f"resume=auto hydra.run.dir={run_dir}" in output.decode()
    done = subprocess.run(resuming, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = load_checkpoint(trained / "checkpoints" / "last.pt")
    found = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    assert all(torch.equal(value, found.model[name]) for name, value in expected.model.items())
    with (run_dir / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("script", "override", "parts"),
    [
        ("train", "neuron.leak=1.5", ["leak", "(0, 1]", "1.5"]),
        ("evaluate", "device=cpu", ["required", "checkpoint=..."]),
        ("evaluate", "dataset=mnist", ["unknown option dataset", "--help"]),
        ("train", "trainer.batch_size=1", ["trainer.batch_size=1 leaves batch norm nothing to normalise by"]),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(
    tmp_path: Path, script: str, override: str, parts: list[str]
) -> None:
    done = call(script, override, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert all(part in errors[0] for part in parts), errors


def test_a_diverging_run_exits_with_an_error(tmp_path: Path) -> None:
    done = call("train", *TINY, "optimizer.lr=1e30", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: the training loss became nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    assert "NonFiniteLossError: the training loss became nan" in (tmp_path / "run" / "train.log").read_text()


def test_warnings_of_a_run_are_in_its_log(tmp_path: Path) -> None:
    options = ["solver=fixed_point", "solver.max_steps=1", "trainer.epochs=1", "dataset.train_limit=64"]
    done = call("train", *TINY, *options, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SolverWarning") == 1
    assert (tmp_path / "run" / "train.log").read_text().count("SolverWarning: FixedPoint ended with outcome") == 1


def test_a_sweep_that_was_stopped_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "my sweep, tol=0.1 (it's new)"
    sweep = command("train", *TINY, "trainer.epochs=5", "-m", "seed=0,1")
    begun = [*sweep, quote("hydra.sweep.dir", str(folder))]
    with subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for_epoch(folder / "0", process)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    _, _, remedy = output.decode().partition("repeat the command with: ")
    overrides = shlex.split(remedy.splitlines()[0])
    assert overrides[0] == "resume=auto"
    done = subprocess.run([*sweep, *overrides], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for job in ("0", "1"):
        with (folder / job / "metrics.csv").open(newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]


def test_a_sweep_over_seeds(tmp_path: Path) -> None:
    limits = ["dataset.train_limit=100", "dataset.test_limit=50"]
    options = ["neuron=if", "solver=broyden", "trainer.epochs=1", "seed=0,1", "hydra.sweep.dir=sweep"]
    done = call("train", *TINY, *limits, "-m", *options, cwd=tmp_path)  # overrides on both sides of the flag
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "sweep" / job / "result.json").read_text()) for job in ("0", "1")]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["test_loss"] != results[1]["test_loss"]
    assert results[0]["experiment"] == "digits_fc_if"


def test_evaluate_prints_what_training_measured(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "last.pt"
    done = call("evaluate", f"checkpoint={checkpoint}", "device=cpu", "output=figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    result = json.loads((trained / "result.json").read_text())
    assert report["accuracy"] == result["test_accuracy_last"]
    assert report["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    assert (report["time_steps"], report["samples"]) == (3, 360)
    written = json.loads((tmp_path / "figures.json").read_text())
    confusion = torch.tensor(written.pop("confusion"))
    assert written.pop("class_accuracy") == pytest.approx((confusion.diag() / confusion.sum(1)).tolist())
    assert int(confusion.sum()) == 360
    assert int(confusion.diag().sum()) == round(report["accuracy"] * 360)
    assert written == report
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_sweep_does_not_overwrite_its_output(trained: Path, tmp_path: Path) -> None:
    options = [f"checkpoint={trained / 'checkpoints' / 'last.pt'}", "device=cpu", "time_steps=2,3", "-m"]
    refused = call("evaluate", *options, "output=figures.json", cwd=tmp_path)
    assert refused.returncode == 1
    assert "output=figures.json would hold the last job" in refused.stderr
    refused = call("analyze", *options, "samples=4", cwd=tmp_path)  # whose default is one folder
    assert refused.returncode == 1
    assert "give each its own, 'output=analysis_${hydra:job.num}'" in refused.stderr
    assert not (trained / "analysis").exists()
    done = call("evaluate", *options, "output=figures_${hydra:job.num}.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [json.loads((tmp_path / f"figures_{job}.json").read_text()) for job in (0, 1)]
    assert [figures["time_steps"] for figures in written] == [2, 3]


@pytest.mark.parametrize("where", [0, 1, 3])
def test_flags_between_overrides(tmp_path: Path, where: int) -> None:
    """Wherever Hydra's own flags stand, with their values."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text("# @package _global_\ntime_steps: 4\n")
    overrides = ["seed=7", "experiment=small", "trainer.epochs=2"]
    arguments = [*overrides[:where], "--config-dir", "mine", "--cfg", "job", *overrides[where:]]
    shown = call("train", *arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert {"time_steps: 4", "seed: 7", "  epochs: 2"} <= set(shown.stdout.splitlines())


def evaluation(checkpoint: Path, **options: object) -> EvaluateConfig:
    settings = {"time_steps": None, "data_dir": None, "batch_size": None, "device": "cpu", "output": None}
    return EvaluateConfig(str(checkpoint), **(settings | options))  # type: ignore[arg-type]


def test_evaluate_with_another_number_of_time_steps(trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "best.pt"
    longer = evaluate_checkpoint(evaluation(checkpoint, time_steps=9, batch_size=7))
    assert longer["time_steps"] == 9
    assert longer["loss"] != evaluate_checkpoint(evaluation(checkpoint))["loss"]
    with pytest.raises(ConfigError, match="time_steps"):
        evaluate_checkpoint(evaluation(checkpoint, time_steps=0))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_checkpoint(evaluation(checkpoint, batch_size=0))


def test_evaluate_refuses_what_is_not_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate_checkpoint(evaluation(tmp_path / "none.pt"))
    content = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    path = tmp_path / "other.pt"
    content["config"]["model"]["hidden"] = 21
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other.pt.*another model.*\(20, .*\(21, "):
        model_from_checkpoint(path, device="cpu")
    content["config"]["solver"]["tool"] = 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other.pt.*solver.tool"):
        model_from_checkpoint(path, device="cpu")


@pytest.fixture
def digit(tmp_path: Path) -> tuple[Path, int]:
    """A test digit as an 8-bit grey image file, and its class."""
    image = pytest.importorskip("PIL.Image")
    from ide_snn.data import load_dataset

    test = load_dataset("digits").test
    pixels = (test.images[0, 0].double() * (255 / 16)).round().to(torch.uint8)
    path = tmp_path / "digit.png"
    image.fromarray(pixels.numpy()).save(path)
    return path, int(test.labels[0])


def test_predict_classifies_an_image(trained: Path, digit: tuple[Path, int], tmp_path: Path) -> None:
    path, label = digit
    checkpoint = trained / "checkpoints" / "best.pt"
    done = call("predict", f"checkpoint={checkpoint}", f"image={path}", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["class"] == str(label)
    assert sum(report["probabilities"].values()) == pytest.approx(1)
    assert report["resized"] is False
    assert "resized" not in done.stderr


def test_predict_says_that_it_resized(
    trained: Path, digit: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    large = tmp_path / "large.png"
    Image.open(digit[0]).resize((40, 24)).save(large)
    checkpoint = str(trained / "checkpoints" / "best.pt")
    report = predict_image(PredictConfig(checkpoint, str(large), 5, False, "cpu"))
    assert report["resized"]
    assert "resized from 24 x 40 to 8 x 8" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"none.png"):
        predict_image(PredictConfig(checkpoint, "none.png", None, False, "cpu"))
