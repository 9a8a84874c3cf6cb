"""Experiments x seeds: skipped, continued, failed, stopped; in this process and through Hydra's launchers."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT

from ide_snn import reproduce as module
from ide_snn import training_run
from ide_snn.config import load_config, quote
from ide_snn.hydra_tools import launch, read_config_file, require_launcher
from ide_snn.paper import ROWS
from ide_snn.reproduce import Outcome, State, attempt, choose_experiments, inspect, plan, reproduce
from ide_snn.run import train
from ide_snn.schemas import Config, ReproduceConfig

TINY = ["model.hidden=12", "time_steps=3", "dataset.train_limit=200", "dataset.test_limit=50", "trainer.epochs=1"]


def request(tmp_path: Path, **options: Any) -> ReproduceConfig:
    defaults: dict[str, Any] = {
        "experiments": ["digits_fc_lif"],
        "seeds": [0, 1],
        "overrides": TINY,
        "data_dir": None,
        "device": "cpu",
        "runs": str(tmp_path / "runs"),
        "launcher": "serial",
        "jobs": 2,
        "threads": None,
        "launcher_overrides": [],
        "dry_run": False,
        "report": None,
    }
    return ReproduceConfig(**{**defaults, **options})


def folder(tmp_path: Path, seed: int, experiment: str = "digits_fc_lif") -> Path:
    return tmp_path / "runs" / experiment / f"seed{seed}"


def states(asked: ReproduceConfig) -> list[State]:
    return [inspect(job)[0] for job in plan(asked)]


def test_two_seeds_then_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = request(tmp_path, report=str(tmp_path / "report"))
    assert states(asked) == [State.TO_DO, State.TO_DO]
    assert reproduce(asked) == 0
    for seed in (0, 1):
        result = json.loads((folder(tmp_path, seed) / "result.json").read_text())
        assert (result["seed"], result["epochs"], result["experiment"]) == (seed, 1, "digits_fc_lif")
        assert (result["train_samples"], result["test_samples"], result["dataset_title"]) == (200, 50, "digits")
        assert "everything goes to" in (folder(tmp_path, seed) / "train.log").read_text()
    assert "digits_fc_lif" in (tmp_path / "report" / "report.html").read_text()
    written = (folder(tmp_path, 0) / "checkpoints" / "last.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert reproduce(replace(asked, report=None)) == 0
    assert "2 finished before" in capsys.readouterr().out
    assert (folder(tmp_path, 0) / "checkpoints" / "last.pt").stat().st_mtime_ns == written


def test_a_seed_gives_what_it_gives_alone(tmp_path: Path) -> None:
    assert reproduce(request(tmp_path)) == 0
    config = load_config(["experiment=digits_fc_lif", *TINY, "seed=1", "device=cpu"])
    train(config, tmp_path / "alone")
    ours, alone = (
        torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]
        for path in (folder(tmp_path, 1), tmp_path / "alone")
    )
    assert all(torch.equal(value, alone[name]) for name, value in ours.items())


def stop_after_first_epoch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The first epoch to end sends this process the signal, as Ctrl-C or a queue would."""
    describe = training_run.describe

    def describe_and_stop(*args: Any) -> str:
        monkeypatch.setattr(training_run, "describe", describe)
        os.kill(os.getpid(), number)
        return describe(*args)

    monkeypatch.setattr(training_run, "describe", describe_and_stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_then_continued_is_as_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    longer = [*TINY[:-1], "trainer.epochs=3"]
    asked = request(tmp_path, overrides=longer)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop_after_first_epoch(monkeypatch, number)
    assert reproduce(asked) == 128 + number
    assert "the same command continues" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (folder(tmp_path, 0) / "result.json").exists()
    assert states(asked) == [State.CUT_OFF, State.TO_DO]
    assert reproduce(asked) == 0
    assert states(asked) == [State.FINISHED, State.FINISHED]
    whole = replace(asked, seeds=[0], runs=str(tmp_path / "whole"))
    assert reproduce(whole) == 0
    stopped, never = (
        torch.load(path / "checkpoints" / "last.pt", weights_only=True)["model"]
        for path in (folder(tmp_path, 0), tmp_path / "whole" / "digits_fc_lif" / "seed0")
    )
    assert all(torch.equal(value, never[name]) for name, value in stopped.items())


def test_a_signal_while_the_data_are_read_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "train", read_and_stop)
    assert reproduce(request(tmp_path)) == 128 + signal.SIGTERM


def test_one_failing_job_does_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(tmp_path, experiments=["mnist_f400_if", "digits_fc_lif"], report=str(tmp_path / "report"))
    assert reproduce(asked) == 1
    out = capsys.readouterr().out
    assert "2 done" in out
    assert "2 failed" in out
    assert out.count("failed: mnist_f400_if seed 0, mnist_f400_if seed 1: MNIST was not found") == 1
    failure = json.loads((folder(tmp_path, 0, "mnist_f400_if") / "failure.json").read_text())
    assert "MNIST was not found" in failure["error"]
    assert "MNIST was not found" in (tmp_path / "report" / "report.md").read_text()


def test_an_unexpected_error_is_logged_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_or_fail(config: Config, run_dir: Path) -> Any:
        if config.seed == 0:
            raise RuntimeError("out of memory")
        return train(config, run_dir)

    monkeypatch.setattr(module, "train", train_or_fail)
    assert reproduce(request(tmp_path)) == 1
    assert "Traceback" in (folder(tmp_path, 0) / "train.log").read_text()
    assert states(request(tmp_path)) == [State.TO_DO, State.FINISHED]
    monkeypatch.setattr(module, "train", train)
    assert reproduce(request(tmp_path)) == 0
    assert not (folder(tmp_path, 0) / "failure.json").exists()


def test_a_dry_run_only_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    capsys.readouterr()
    assert reproduce(request(tmp_path, dry_run=True, report=str(tmp_path / "report"))) == 0
    assert capsys.readouterr().out.splitlines() == [
        "finished  digits_fc_lif seed 0",
        "to do     digits_fc_lif seed 1",
    ]
    assert not (tmp_path / "report").exists()
    assert not folder(tmp_path, 1).exists()


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    before = (folder(tmp_path, 0) / "config.yaml").read_text()
    assert reproduce(request(tmp_path, seeds=[0], overrides=[*TINY, "solver.tol=1e-5"])) == 1
    out = capsys.readouterr().out
    assert "solver.tol: 0.001 -> 1e-05; there -> now" in out
    assert "runs=..." in out
    assert (folder(tmp_path, 0) / "config.yaml").read_text() == before
    shorter = request(tmp_path, seeds=[0], overrides=[*TINY[:-1], "trainer.epochs=0"])
    assert states(shorter) == [State.BLOCKED]


def test_what_does_not_bear_on_the_result_may_change(tmp_path: Path) -> None:
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    later = request(tmp_path, seeds=[0], overrides=[*TINY, "trainer.log_every=1"], threads=2, data_dir="/elsewhere")
    assert states(later) == [State.FINISHED]


def test_an_option_that_an_old_run_lacks_had_its_default(tmp_path: Path) -> None:
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    path = folder(tmp_path, 0) / "config.yaml"
    path.write_text(path.read_text().replace("  label_smoothing: 0.0\n", ""))
    assert states(request(tmp_path, seeds=[0])) == [State.FINISHED]
    smoothed = request(tmp_path, seeds=[0], overrides=[*TINY, "trainer.label_smoothing=0.1"])
    assert states(smoothed) == [State.BLOCKED]


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    (folder(tmp_path, 0) / "result.json").write_text("{")
    (job,) = plan(request(tmp_path, seeds=[0]))
    state, detail = inspect(job)
    assert state is State.BLOCKED
    assert "result.json is damaged" in detail
    (folder(tmp_path, 0) / "result.json").unlink()
    assert inspect(job)[0] is State.CUT_OFF
    assert reproduce(request(tmp_path, seeds=[0])) == 0
    assert inspect(job)[0] is State.FINISHED


def test_a_continued_run_keeps_its_threads(tmp_path: Path) -> None:
    assert reproduce(request(tmp_path, seeds=[0], threads=1)) == 0
    (folder(tmp_path, 0) / "result.json").unlink()
    assert reproduce(request(tmp_path, seeds=[0], threads=2)) == 0
    assert read_config_file(folder(tmp_path, 0) / "config.yaml")["trainer"]["threads"] == 1


def test_one_runs_threads_are_not_the_nexts(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    config = load_config(
        ["experiment=digits_fc_lif", *TINY, f"trainer.threads={before + 1}", "trainer.epochs=0", "device=cpu"]
    )
    assert attempt(config, tmp_path / "run") == Outcome()
    assert torch.get_num_threads() == before
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["threads"] == before + 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", [row.experiment for row in ROWS]),
        (["all", "digits_fc_lif"], [*(row.experiment for row in ROWS), "digits_fc_lif"]),
        ("nmnist_*", ["nmnist_f64c5_if", "nmnist_f64c5_lif"]),
        (
            ["fashion_mnist_f400_lif", "mnist_f64c5_*", "mnist_f64c5_if"],
            ["mnist_f64c5_if", "mnist_f64c5_lif", "fashion_mnist_f400_lif"],
        ),
        (["cifar100_alexnetf_*"], ["cifar100_alexnetf_if_t100"]),
    ],
)
def test_names_and_patterns(asked: Any, expected: list[str]) -> None:
    assert choose_experiments(asked) == expected


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"experiments": ["mnist_f400_iff"]}, ["mnist_f400_iff", "did you mean mnist_f400_if?", "digits_fc_lif"]),
        ({"experiments": []}, ["experiments is empty"]),
        ({"seeds": [1, 1]}, ["seeds", "[1, 1]"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [-1]}, ["seed", "-1"]),
        ({"overrides": ["trainer.epoch=1"]}, ["trainer.epoch", "trainer.epochs"]),
        ({"launcher": "slurm"}, ["slurm", "serial, joblib, submitit"]),
        ({"experiments": ["mnist_f400_*"]}, ["mnist_f400_if, mnist_f400_lif", "Set data_dir="]),
        ({"experiments": ["nmnist_f64c5_if"], "overrides": []}, ["need data: nmnist_f64c5_if", "Set data_dir="]),
    ],
)
def test_a_mistake_is_told_before_anything_runs(tmp_path: Path, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        reproduce(request(tmp_path, **options))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "runs").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = module.importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name.startswith(("hydra_plugins", "matplotlib")) else find(name)

    monkeypatch.setattr(module.importlib.util, "find_spec", without)
    for launcher in ("joblib", "submitit", "submitit_local"):
        with pytest.raises(ImportError, match=r"hydra-\w+-launcher.*\[sweep\]"):
            require_launcher(launcher)
    with pytest.raises(ImportError, match=r"\[viz\].*report=null"):
        reproduce(request(tmp_path, report="report"))


@pytest.mark.parametrize("value", ["/a b/c", "it's", "x\\", "a\\'b", "a=b,c[d]{e}", "\\\\", "%#é", "C:\\x", ""])
def test_any_text_can_be_an_override(value: str) -> None:
    assert load_config([quote("data_dir", value)]).data_dir == value


def test_a_configuration_crosses_to_another_process() -> None:
    config = load_config(["solver=anderson"])
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert type(copy.solver) is type(config.solver)


def fail_for_seed_one(config: Config, run_dir: Path) -> tuple[int, str]:
    if config.seed == 1:
        raise ValueError("seed 1")
    return config.seed, run_dir.name


def test_launch_gives_every_job_its_folder_and_its_outcome(tmp_path: Path) -> None:
    jobs = [[f"seed={seed}", f"hydra.sweep.subdir=number{seed}"] for seed in (0, 1, 2)]
    outcomes = launch("basic", jobs, fail_for_seed_one, folder=tmp_path / "it's here", at_once=1)
    assert (outcomes[0], outcomes[2]) == ((0, "number0"), (2, "number2"))
    assert isinstance(outcomes[1], ValueError)


LAUNCHED: dict[str, Callable[[], object]] = {
    "joblib": lambda: pytest.importorskip("hydra_plugins.hydra_joblib_launcher"),
    "submitit_local": lambda: pytest.importorskip("hydra_plugins.hydra_submitit_launcher"),
}


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_the_launchers(tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str) -> None:
    LAUNCHED[launcher]()
    serial = request(tmp_path, seeds=[0])
    assert reproduce(serial) == 0
    asked = request(tmp_path, experiments=["digits_fc_lif", "mnist_f400_if"], launcher=launcher)
    assert reproduce(asked) == 1
    out = capsys.readouterr().out
    assert "1 finished before" in out
    assert "failed: mnist_f400_if seed 0, mnist_f400_if seed 1: MNIST was not found" in out
    assert states(request(tmp_path)) == [State.FINISHED, State.FINISHED]


def test_the_script(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "scripts" / "reproduce.py"), "experiments=[digits_*]", "seeds=[0]"]
    quoted = ",".join(f'"{override}"' for override in TINY)
    options = [f"overrides=[{quoted}]", "runs=runs", "device=cpu"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "to do     digits_fc_lif seed 0" in done.stdout
    assert "epoch 1/1" in done.stdout
    assert "report: runs/report/report.html" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (folder(tmp_path, 0) / "result.json").exists()


def test_warnings_of_a_run_are_in_its_log_once(tmp_path: Path) -> None:
    """As those of train.py are."""
    short = ["trainer.epochs=1", "dataset.train_limit=64", "model.hidden=20"]
    overrides = [*short, "solver=fixed_point", "solver.max_steps=1"]
    options = ["experiments=[digits_fc_lif]", "seeds=[0]", f"overrides={json.dumps(overrides)}", "report=null"]
    command = [sys.executable, str(PROJECT / "scripts" / "reproduce.py"), *options, f"runs={tmp_path}", "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "digits_fc_lif" / "seed0" / "train.log").read_text()
    assert text.count("SolverWarning: FixedPoint ended") == 1
