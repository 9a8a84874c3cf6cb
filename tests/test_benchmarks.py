"""The benchmarks' own logic: cases, measurements, processes, tables, a dry run. No timing is judged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import _common
import pytest
import rounding
import steps
import tables
import torch
from benchmark_cases import CPU, SMALL, example, small
from cases import CASES, Setting, Variant
from measure import TOLERANCES, adjoint_problem, against_float32, block_input, compare_solvers, difference, simulated

from ide_snn import Gmres
from ide_snn.checkpoint import save_checkpoint
from ide_snn.config import config_to_dict, load_config
from ide_snn.solvers import LinearProblem


def test_interleave_takes_turns() -> None:
    order: list[tuple[str, int]] = []
    calls = {name: lambda n, name=name: order.append((name, n)) for name in "ab"}
    times = _common.interleave(calls, {"a": 3, "b": 1}, CPU)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]
    assert [len(times[name].seconds) for name in "ab"] == [3, 1]
    summary = _common.Times((3.0, 1.0, 2.0, 9.0)).summary()
    assert summary == {"median_s": 2.5, "minimum_s": 1.0, "rounds": 4}


def test_in_a_process() -> None:
    assert _common.in_a_process(max, 3, 5) == 5
    with pytest.raises(RuntimeError, match="exit code 7"):
        _common.in_a_process(os._exit, 7)


@pytest.mark.skipif(not _common.STATUS.exists(), reason="peak memory of a CPU process is read from /proc")
def test_peak_sees_what_was_freed() -> None:
    peak = _common.Peak(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert peak.read() > 60 * 2**20


def test_machine_names_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\ncpu family\t: 25\nflags\t\t: fpu avx2 fma nonsense\n")
    monkeypatch.setattr(_common, "CPUINFO", info)
    found = _common.machine()
    assert (found["processor"], found["cpu_family"], found["flags"]) == ("Some CPU", "25", ["avx2", "fma"])
    monkeypatch.setattr(_common, "CPUINFO", tmp_path / "none")
    assert _common.machine()["flags"] == []


def test_variants() -> None:
    assert Variant.all_of([], []) == [Variant("as configured")]
    assert Variant.all_of(["fast"], ["precision=fast compile=false"]) == [
        Variant("fast", ("precision=fast",)),
        Variant("precision=fast compile=false", ("precision=fast", "compile=false")),
    ]


@pytest.mark.parametrize("case", CASES)
def test_cases_are_the_paper_s(case: str) -> None:
    config = Setting(case, data_dir="some folder's").config()
    assert config.data_dir == "some folder's"
    assert config.neuron.name == "lif"
    assert config.time_steps == (5 if case == "f400" else 30)
    assert config.trainer.batch_size == (128 if case in ("f400", "f64c5") else 32)
    assert config.model.dropout == 0.2
    if case == "alexnetf":
        assert Setting(case, device="cuda").config().trainer.batch_size == 128
        assert Setting(case, batch=3).config().trainer.batch_size == 3


def test_warm_up_is_the_experiment_s_training() -> None:
    ours, other = small("alexnetf"), small("alexnetf")
    batches = [example(ours)] * 2
    ours.train(batches, 2)
    for number, (x, y) in enumerate(batches):
        for group in other.optimizer.param_groups:
            group["lr"] = 0.05 * (number + 1) / 400  # the recipe's warm-up
        torch.manual_seed(number)  # dropout only moves the gradient
        other.step(x, y)
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 2 / 400)
    assert len(ours.solves) == 2


def test_state_is_copied_and_loaded() -> None:
    ours, other = small("f400"), small("f400", "seed=3")
    batch = example(ours)
    ours.step(*batch)
    state = ours.state()
    ours.step(*batch)
    other.load(state)
    for key, value in other.model.state_dict().items():
        assert torch.equal(value, state["model"][key])
    momenta = [value["momentum_buffer"] for value in other.optimizer.state.values()]
    assert len(momenta) == len(state["optimizer"]["state"]) > 0
    for momentum, kept in zip(momenta, state["optimizer"]["state"].values(), strict=True):
        assert torch.equal(momentum, kept["momentum_buffer"])
    assert any(not torch.equal(v, ours.model.state_dict()[k]) for k, v in state["model"].items())


def test_difference() -> None:
    a = torch.tensor([0.0, 0.5, 0.5, 1.0])
    b = torch.tensor([0.0, 0.5 + 1e-7, 0.75, 1.0])
    assert difference(a, a) == {"share_differing": 0.0, "relative_l2": 0.0}
    found = difference(a, b)
    assert found["share_differing"] == 0.25
    assert found["relative_l2"] == pytest.approx(0.25 / 1.5**0.5, rel=1e-4)


def test_rates_are_compared_on_the_reference_s_weights() -> None:
    reference, other = small("f64c5"), small("f64c5", "seed=5")
    x, _ = example(reference)
    kept = {key: value.clone() for key, value in other.model.state_dict().items()}
    found = against_float32(reference, {"other": other}, x)
    assert found["other"] == {"share_differing": 0.0, "relative_l2": 0.0}
    assert all(torch.equal(kept[key], value) for key, value in other.model.state_dict().items())
    assert set(found) == {"input noise", "other"}


def test_block_input_is_flat_for_fully_connected_networks() -> None:
    ours = small("f400")
    x, _ = example(ours)
    assert block_input(ours, x).shape == (6, 784)
    assert ours.model.training


def test_solvers_are_compared_to_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = small("f400")
    problem = adjoint_problem(ours, *example(ours))
    assert isinstance(problem, LinearProblem)

    def iterate(f, start, tol, max_steps):
        z = start
        for _ in range(max_steps):
            image = f(z)
            if float((image - z).norm() / image.norm()) < tol:
                return image
            z = image
        return z

    def useless(_f, start, _tol, _max_steps):
        return start

    monkeypatch.setattr("measure.torchdeq_solvers", lambda: [("plain", iterate), ("none", useless)])
    own, plain, none = compare_solvers(problem, Gmres(tol=1e-3), 1, True, CPU)
    assert own["solver"] == "ours, Gmres"
    assert plain["error"] <= own["error"] < 1e-2
    assert plain["tolerance"] in TOLERANCES
    assert plain["products"] > 1
    assert plain["rounds"] == own["rounds"] == 1
    assert none["tolerance"] is None
    assert "rounds" not in none


@pytest.fixture
def dry_run(tmp_path: Path) -> dict:
    arguments = ["f400", "--rounds", "2", "--warm-steps", "1", "--batch", "8", "--threads", "1", "--peers"]
    arguments += [
        "--overrides",
        "model.hidden=16",
        "precision=float32",
        "--memory-time-steps",
        "2",
        "--memory-steps",
        "1",
        "--memory-runs",
        "1",
    ]
    steps.main([*arguments, "--weights", str(tmp_path / "weights"), "--output", str(tmp_path / "out")])
    return {"folder": tmp_path, "result": json.loads((tmp_path / "out" / "f400.json").read_text())}


def test_dry_run(dry_run: dict, capsys: pytest.CaptureFixture[str]) -> None:
    result = dry_run["result"]
    subject = result["subjects"]["as configured"]
    assert set(result["seconds"]) == set(steps.STAGES)
    assert subject["step"]["rounds"] == 2
    assert subject["solve"]["outcomes"] == {"converged": 2}
    assert subject["solve"]["tolerance"] == pytest.approx(load_config().solver.tol)
    assert subject["rates"] == {"share_differing": 0.0, "relative_l2": 0.0}
    assert 0 <= subject["firing_rates"][0] <= 1
    assert subject["memory"][0]["time_steps"] == 2
    assert result["floors"]["float32"]["transposed_products"] >= 1
    assert "original: not measured: give --original" in result["notes"][0]
    assert result["config"]["model"]["hidden"] == 16
    assert len(list((dry_run["folder"] / "weights").iterdir())) == 1
    text = (dry_run["folder"] / "out" / "steps.md").read_text()
    assert "## F400, T = 5, batch 8" in text
    assert "rejected" in text
    assert "random images" in text
    out = capsys.readouterr().out
    assert "written to" in out or out == ""


def test_variants_start_from_the_same_weights(tmp_path: Path) -> None:
    arguments = ["--warm-steps", "1", "--peers", "--variant", "seed=0", "seed=1", "--output", str(tmp_path)]
    variants = Variant.all_of([], ["seed=0", "seed=1"])
    run = steps.CaseRun(Setting("f400", batch=8, overrides=SMALL["f400"]), variants, steps.parse(arguments))
    one, two = (ours.model.state_dict() for ours in run.ours.values())
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_report_has_ratios_and_marks_rejected_floors() -> None:
    step = {"median_s": 0.002, "minimum_s": 0.001, "rounds": 5}
    ours = {
        "kind": "ours",
        "precision": "fast",
        "step": step,
        "solve": {"tolerance": 1e-2, "products": 4, "outcomes": {"converged": 5}},
        "path": "event-driven",
        "firing_rates": [0.25, 0.1],
        "rates": {"share_differing": 0.01, "relative_l2": 0.002},
        "accuracy": {"accuracy": 0.875, "images": 1000},
        "memory": [{"time_steps": 5, "peak_bytes": 10e6}, {"time_steps": 100, "peak_bytes": 10.2e6}],
    }
    original_row = {"kind": "original", "step": {**step, "median_s": 0.02}}
    fast = {"floor_s": 0.00125, "efficiency": 0.9, "rejected": None, "transposed_products": 4, "products": []}
    result = {
        "case": "alexnetf",
        "batch": 32,
        "time_steps": 30,
        "data": "noise",
        "warm_steps": 300,
        "machine": {"processor": "CPU", "flags": ["avx2"]},
        "versions": {"device": "x", "torch": "2", "git_commit": "abc", "git_modified": False},
        "threads": 2,
        "subjects": {"fast": ours, "original": original_row},
        "floors": {"fast": fast},
        "solvers": {"a = f(a)": [{"solver": "s", "tolerance": None, "products": None, "error": 0.5}]},
        "input_noise": {"share_differing": 0.02, "relative_l2": 0.004},
        "notes": ["snntorch: not measured"],
    }
    text = tables.report([result])
    cells = [c.strip() for c in next(row for row in text.splitlines() if row.startswith("| fast |")).split("|")]
    assert cells[2:6] == ["2.00", "1.00", "10.00", "1.60"]
    assert cells[-3:-1] == ["0.250, 0.100", "event-driven"]
    assert "| fast | 1.00e-02 | 2.00e-03 | 87.50 (1000) |" in text
    assert "| fast | 100 | 10.2 | 1.02 |" in text
    assert "none reaches it" in text
    assert "- snntorch: not measured" in text
    fast["rejected"] = "2 rounds, 5 are needed"
    assert "1.60 (floor rejected)" in tables.report([result])


def test_wrong_options_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"unknown option model\.hiden"):
        steps.main(["--overrides", "model.hiden=3", "--threads", "1", "--output", str(tmp_path)])


def test_weights_of_a_run(tmp_path: Path) -> None:
    trained = small("f400", "seed=5")
    progress = {"epoch": 2, "step": 90}
    file = tmp_path / "last.pt"
    save_checkpoint(file, trained.model, config=config_to_dict(trained.config), data={}, progress=progress)
    shared = ["--overrides", *SMALL["f400"], "--batch", "6", "--threads", "1", "--peers", "--rounds", "5"]
    shared += ["--accuracy-images", "0", "--stages", "steps", "--checkpoint", str(file), "--output", str(tmp_path)]
    options = steps.parse(shared)
    run = steps.CaseRun(
        Setting("f400", batch=6, overrides=SMALL["f400"]), Variant.all_of(["exact", "fast"], []), options
    )
    expected = trained.model.state_dict()
    for ours in run.ours.values():
        assert all(torch.equal(expected[key], value) for key, value in ours.model.state_dict().items())
    steps.main(shared)
    found = json.loads((tmp_path / "f400.json").read_text())
    assert found["checkpoint"] == {"config": {**config_to_dict(trained.config), "data_dir": None}, **progress}
    assert "Weights of a run after 2 of" in (tmp_path / "steps.md").read_text()
    with pytest.raises(SystemExit, match="checkpoint of another model"):
        steps.main(["--overrides", "model.hidden=17", *shared[2:]])


@pytest.mark.parametrize(
    "arguments",
    [
        ["f500"],
        ["--rounds", "0"],
        ["--warm-steps", "-1"],
        ["--peers", "norse"],
        ["f400", "f64c5", "--checkpoint", "last.pt"],
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        steps.main(arguments)
    assert "error" in capsys.readouterr().err


def test_11_bits_are_rounded_to_nearest() -> None:
    x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 3 + 2**-8, -0.1, 0.0])
    assert rounding.to_11_bits(x).tolist() == [1.0, 1 + 2**-9, 3 + 2**-8, -819 * 2**-13, 0.0]


@pytest.mark.parametrize("case", ["f400", "f64c5"])
def test_rates_without_rounding_are_those_of_the_network(case: str) -> None:
    ours = small(case)
    x, _ = example(ours)
    expected = simulated(ours, x).last
    torch.testing.assert_close(rounding.rates(ours, x), expected, rtol=0, atol=1e-6)
    for coarse in ((torch.round, rounding.plain), (rounding.plain, torch.round)):  # weights are far below 0.5
        assert difference(expected, rounding.rates(ours, x, "dense", *coarse))["share_differing"] > 0
