"""scripts/analyze.py as a user calls it, the figures, and one clear error for every bad request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from networks import small_block, warmed_up
from torch import nn

from ide_snn.analysis import analyze_checkpoint, analyze_model, save_figures
from ide_snn.checkpoint import CheckpointError
from ide_snn.config import ConfigError, load_config
from ide_snn.run import evaluate_checkpoint, train
from ide_snn.schemas import AnalyzeConfig, EvaluateConfig

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best of two epochs of a tiny network on the digits."""
    folder = tmp_path_factory.mktemp("run")
    options = ["model.hidden=20", "neuron=if", "time_steps=4", "device=cpu", "trainer.epochs=2", "optimizer.lr=0.1"]
    train(load_config(options), folder)
    return folder / "checkpoints" / "best.pt"


def request_for(checkpoint: Path, **options: object) -> AnalyzeConfig:
    settings = {
        "time_steps": None,
        "data_dir": None,
        "samples": 20,
        "batch_size": None,
        "neurons": None,
        "trace_samples": [0],
        "thresholds": [0.5, 1.0],
        "spectrum_samples": 1,
        "device": "cpu",
        "output": None,
    }
    return AnalyzeConfig(str(checkpoint), **(settings | options))  # type: ignore[arg-type]


def test_data_with_other_classes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["data"]["class_names"].reverse()
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"trained on the classes 9, 8, .* but the data have 0, 1, "):
        analyze_checkpoint(request_for(tmp_path / "other.pt"))


def test_the_script_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    options = ["time_steps=7", "neurons=[0,19]", "thresholds=[0.4,0.9,1.0]", "trace_samples=[1,3]", "batch_size=100"]
    command = [sys.executable, str(PROJECT / "scripts" / "analyze.py"), f"checkpoint={checkpoint}", "device=cpu"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    folder = checkpoint.parent.parent / "analysis"
    assert str(folder) in done.stdout
    assert list(tmp_path.iterdir()) == []
    report = json.loads((folder / "analysis.json").read_text())
    assert set(report["figures"]) == {path.name for path in folder.glob("*.png")}
    assert len(report["figures"]) == 5 + 2 * 2 + 3
    assert all((folder / name).read_bytes().startswith(PNG) for name in report["figures"])
    assert (report["samples"], report["time_steps"], report["trained_time_steps"]) == (360, 7, 4)
    for t in (1, 4, 7):  # the whole test set
        evaluation = evaluate_checkpoint(EvaluateConfig(str(checkpoint), t, None, None, "cpu", None))
        assert report["accuracy_over_time"][t - 1] == evaluation["accuracy"]
    assert report["firing_rate"]["population_1"]["plain"] == pytest.approx(evaluation["firing_rate"]["population_1"])
    assert report["early_exit"][-1] == {"threshold": 1.0, "accuracy": evaluation["accuracy"], "mean_steps": 7.0}
    assert f"accuracy       {evaluation['accuracy']:.2%} at T" in done.stdout
    cost = report["cost"]
    assert cost["per_sample"]["macs"] == 64 * 20 + 20 * 10
    expected = 4.6 * cost["per_sample"]["macs"] + 0.9 * cost["per_sample"]["acs"]
    assert cost["per_sample"]["energy_pj"] == pytest.approx(expected)
    assert report["equilibrium"]["block"]["one_over_t"] is True
    assert 0 < report["spectrum"]["block"]["norm"][0] < 0.6
    assert [each["solver"] for each in report["solvers"]["block"] if each["configured"]] == ["gmres"]
    assert [each["sample"] for each in report["traces"]] == [1, 3]
    assert report["traces"][0]["neurons"] == [0, 19]


def test_fewer_samples_another_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ide_snn.analysis.checkpoint.save_figures", lambda *_, **__: [])  # drawn by other tests
    report = analyze_checkpoint(request_for(checkpoint, samples=37, output=str(tmp_path / "new" / "here")))
    assert report["samples"] == 37
    assert json.loads((tmp_path / "new" / "here" / "analysis.json").read_text()) == report
    assert "37 test samples, T = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 361}, "samples=361, but the test set has 360"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"spectrum_samples": 0}, "spectrum_samples must be at least 1"),
        ({"thresholds": [0.5, 1.5]}, r"thresholds must lie in \(0, 1\], got 1.5"),
        ({"thresholds": [0.0]}, r"thresholds must lie in \(0, 1\], got 0.0"),
        ({"thresholds": []}, "at least one entry"),
        ({"neurons": [3, 20]}, r"no neuron 20 in population 1, which has 20 \(0\.\.19\)"),
        ({"neurons": [-1]}, "no neuron -1"),
        ({"trace_samples": [20]}, r"no sample 20 in the first batch, which has 20"),
        ({"time_steps": 0}, "time_steps"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        analyze_checkpoint(request_for(checkpoint, output=str(tmp_path / "out"), **options))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.pt: no such file"):
        analyze_checkpoint(request_for(tmp_path / "none.pt"))


def test_without_matplotlib(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[viz\]'"):
        analyze_checkpoint(request_for(checkpoint))


def test_any_model_with_several_blocks_is_drawn(tmp_path: Path) -> None:
    first, second = warmed_up(small_block("multilayer")), warmed_up(small_block("fc"))
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(12, 6), second, nn.Linear(8, 5)).double()
    x, y = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    analysis = analyze_model(model, [(x[:4], y[:4]), (x[4:], y[4:])], neurons=[0, 7], spectrum_samples=2)
    content = json.loads(json.dumps(analysis.as_dict(), allow_nan=False))
    assert content["samples"] == 6
    populations = ["0_population_1", "0_population_2", "0_population_3", "3_population_1"]
    assert list(content["firing_rate"]) == populations
    assert list(content["spectrum"]) == list(content["solvers"]) == list(content["equilibrium"]) == ["0", "3"]
    assert "0_layer_3" in content["cost"]["connections"]
    names = {path.stem for path in save_figures(analysis, tmp_path, title="two blocks")}
    assert {f"membrane_{name}_sample_0" for name in populations} < names
    assert {"0_spectrum", "3_spectrum", "0_equilibrium", "3_solver_residual", "raster_sample_0", "energy"} < names
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in names)
    with pytest.raises(ValueError, match=r"no neuron 12 in 0_population_3"):
        analyze_model(model, [(x, y)], neurons=[12])
