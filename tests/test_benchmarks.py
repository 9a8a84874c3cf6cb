"""The benchmarks' own logic: what a floor counts and computes, tables, processes, a dry run. No timing is judged."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(PROJECT / "benchmarks"))

import _common
import floor
import original
import peers
import rounding
import steps
import tables
import ways
from cases import CASES, Batches, Network, Ours, Setting, Variant
from floor import Floor, Link, links_of, plan, product, race, rejection, transposed
from measure import TOLERANCES, adjoint_problem, against_float32, block_input, compare_solvers, difference, simulated

from ide_snn import Gmres
from ide_snn.config import load_config
from ide_snn.operators import Operator
from ide_snn.schemas import Config
from ide_snn.solvers import LinearProblem

CPU = torch.device("cpu")
SMALL = {
    "f400": ("model.hidden=16",),
    "f64c5": ("model.channels=4", "time_steps=3"),
    "alexnetf": ("model.channels=[4,6,8,6,5]", "time_steps=3"),
}
OPERATORS = {
    "linear": (Operator("linear", 5, 7), (5,)),
    "conv": (Operator("conv", 3, 4, (5, 5), (1, 1), (1, 2)), (3, 8, 8)),
    "strided": (Operator("conv", 3, 4, (3, 3), (2, 2), (1, 1)), (3, 8, 6)),
    "transposed": (Operator("conv_transposed", 4, 3, (3, 3), (2, 2), (1, 1), output_padding=(1, 1)), (4, 4, 3)),
}


def weight_of(operator: Operator) -> torch.Tensor:
    if operator.kind == "linear":
        return torch.randn(operator.out_channels, operator.in_channels)
    first = (operator.in_channels, operator.out_channels)
    return torch.randn(*(first if operator.kind == "conv_transposed" else first[::-1]), *operator.kernel_size)


def link(name: str) -> Link:
    operator, shape = OPERATORS[name]
    x = (torch.rand(6, *shape) < 0.4).float()
    y = torch.randn(6, *operator.output_shape(shape))
    return Link(name, operator, weight_of(operator), x, torch.rand(6, *shape), y)


@functools.cache
def config_of(case: str, *more: str) -> Config:
    return Setting(case, batch=6, overrides=(*SMALL[case], *more)).config()


def small(case: str, *more: str) -> Ours:
    torch.manual_seed(0)
    return Ours(config_of(case, *more))


def example(ours: Ours) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(Batches(ours.config)))


@pytest.mark.parametrize("case", SMALL)
def test_plan_counts_the_calls_of_the_issue(case: str) -> None:
    ours = small(case)
    x, y = example(ours)
    links = links_of(ours.model, x, ours.solved_gradient(x, y))
    connections = 1 + len(ours.model.block.layers)
    assert len(links) == 1 + connections
    calls = plan(links, time_steps=7, transposed_products=4)
    roles = [role for role, _ in calls]
    assert {role: roles.count(role) for role in roles} == {
        "input": 1,
        "recurrent": 7 * connections,
        "transposed": 4 * connections,
        "gradient": 1 + connections,
    }


@pytest.mark.parametrize("case", SMALL)
def test_floor_takes_the_tensors_of_the_step(case: str) -> None:
    ours = small(case)
    x, y = example(ours)
    gradient = ours.solved_gradient(x, y)
    before = {key: value.clone() for key, value in ours.model.state_dict().items()}
    stage, *links = links_of(ours.model, x, gradient)
    assert all(torch.equal(before[key], value) for key, value in ours.model.state_dict().items())
    torch.testing.assert_close(stage.x.flatten(), x.flatten())
    shapes = ours.model.population_shapes
    assert [tuple(a.x.shape[1:]) for a in links] == [shapes[-1], *shapes[:-1]]
    assert [tuple(a.y.shape[1:]) for a in links] == list(shapes)
    for a in links:
        assert set(a.x.unique().tolist()) <= {0.0, 1.0}
        assert float(a.mean_x.min()) >= 0
        assert float(a.mean_x.max()) <= 1.0001
        assert int((a.y == 0).sum()) > 0  # silent neurons and dropout
    assert torch.equal(links[-1].y == 0, (links[-1].y == 0) | (gradient == 0))
    # batch norm's gradient leaves no number 0, and sums to 0 over all of a channel
    assert (stage.y != 0).float().mean() > 0.99
    sums = stage.y.transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", SMALL)
def test_gflop_is_what_torch_counts(case: str) -> None:
    ours = small(case)
    x, y = example(ours)
    links = links_of(ours.model, x, ours.solved_gradient(x, y))
    for role in ("input", "recurrent", "transposed", "gradient"):
        for a in links:
            if (role == "input") == a.recurrent and role != "gradient":
                continue
            item = product((role, a.name), links)
            fitting = [w for w in ways.WAYS if w.format == "float32" and w.fits(item.operator, role, item.x, ())]
            call = fitting[0].prepare(item.operator, item.weight, item.x, item.y)
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == pytest.approx(1e9 * item.gflop)


@pytest.mark.parametrize("name", OPERATORS)
def test_transposed_is_the_adjoint(name: str) -> None:
    a = link(name)
    operator, weight = transposed(a.operator, a.weight, a.x.shape[1:])
    torch.testing.assert_close(
        operator.apply(a.y, weight), a.operator.adjoint(a.y, a.weight, tuple(a.x.shape[1:])), rtol=1e-4, atol=1e-5
    )


def test_transposed_refuses_groups() -> None:
    with pytest.raises(ValueError, match="groups=1"):
        transposed(Operator("conv", 4, 4, (3, 3), groups=2), torch.zeros(4, 2, 3, 3), (4, 8, 8))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("role", ["recurrent", "transposed", "gradient"])
def test_every_way_computes_the_product(name: str, role: str) -> None:
    a = link(name)
    item = product((role, name), [a])
    w = a.weight.clone().requires_grad_()
    a.operator.apply(a.mean_x, w).backward(a.y)
    expected = {
        "recurrent": a.operator.apply(a.x, a.weight),
        "transposed": a.operator.adjoint(a.y, a.weight, tuple(a.x.shape[1:])),
        "gradient": w.grad,
    }[role]
    assert expected is not None
    formats = (*floor.ALLOWED["fast"]["spikes" if item.spikes else "numbers"], *["int8x2"] * item.spikes)
    fitting = [
        w for w in ways.WAYS if w.format in formats and w.fits(item.operator, item.role, item.x, ["avx512_bf16"])
    ]
    runners, missing = race(item, fitting, rounds=1)
    assert len(runners) + len(missing) == len(fitting)
    wrong = {name for name, reason in missing.items() if reason.startswith("wrong")}
    assert wrong <= {"oneDNN (int8x2)"}  # its sums overflow on processors without VNNI
    assert ("torch", "float32") in [(r.way.name, r.way.format) for r in runners]
    for r in runners:
        result = r.call()
        result = result.dequantize() if result.is_quantized else result
        result = (result.to_dense() if result.is_mkldnn else result).float().reshape(expected.shape)
        error = float((result - expected).norm() / expected.norm())
        assert error <= floor.ERROR[r.way.format], (r.way, error)


@pytest.mark.parametrize("two", [False, True])
def test_integer_planes_carry_the_weight(two: bool) -> None:
    spikes, weight = (torch.rand(20, 9) < 0.5).float(), torch.randn(7, 9)
    planes, scale = ways._planes(weight, two)
    found = ways._bytes(spikes, two).double() @ planes.double().t() * scale.double()
    expected = spikes.double() @ weight.double().t()
    assert float((found - expected).norm() / expected.norm()) < (1e-4 if two else 2e-2)


def test_formats_of_real_numbers_have_no_integers() -> None:
    for precision, formats in floor.ALLOWED.items():
        assert not any(f.startswith("int8") for f in formats["numbers"]), precision
    assert floor.ALLOWED["float32"]["spikes"] == ("float32",)


def test_race_says_what_cannot_run() -> None:
    a = link("linear")
    item = product(("recurrent", "linear"), [a])

    def broken(*_: object) -> ways.Call:
        raise RuntimeError("no such instruction\nand a long trace")

    good = next(w for w in ways.WAYS if w.name == "torch" and w.format == "float32" and not w.gradient)
    wrong = ways.Way("wrong", "int8x2", lambda o, w, x, _: lambda: 1.01 * o.apply(x, w))
    runners, missing = race(item, [good, ways.Way("odd", "int8", broken), wrong], rounds=2)
    assert [r.way.name for r in runners] == ["torch"]
    assert len(runners[0].seconds) == 3
    assert missing["odd (int8)"] == "no such instruction"
    assert missing["wrong (int8x2)"] == "wrong on this processor: relative error 1.0e-02"


def test_floor_is_the_fastest_round_and_says_when_it_does_not_count() -> None:
    links = [dataclasses.replace(link("linear"), recurrent=False, name="input"), link("conv")]
    both = Floor(links, 3, "float32", ())
    with pytest.raises(ValueError, match="run the floor"):
        both.result()
    both.run(2)
    result = both.result()
    assert {(p["role"], p["connection"]): p["count"] for p in result["products"]} == {
        ("input", "input"): 1,
        ("recurrent", "conv"): 3,
        ("transposed", "conv"): 2,
        ("gradient", "input"): 1,
        ("gradient", "conv"): 1,
    }
    assert "5 are needed" in result["rejected"]
    parts = both.rounds[0][3]
    both.rounds = [(0.5, 2, 2.0, parts), (0.25, 2, 2.0, parts), (1.0, 2, 2.0, parts)]
    assert both.result()["floor_s"] == 0.25


def test_floor_counts_transposed_products_by_the_samples_they_were_for() -> None:
    floor = Floor([link("conv")], 1, "float32", ())
    for number in range(5):
        floor.run(4, whole=(0.5, 4)[number % 2])
    for total, count, whole, parts in floor.rounds:
        assert count == 4
        assert total >= 0.999 * sum(parts.values())
        assert whole in (0.5, 4)
    # the parts are the whole but for what happens between two looks at the clock
    assert min(total / sum(parts.values()) for total, _, whole, parts in floor.rounds if whole == 0.5) < 1.2
    fastest = min(floor.rounds, key=lambda r: r[0])
    result = floor.result()
    assert result["transposed_products"] == fastest[2]
    (row,) = [p for p in result["products"] if p["role"] == "transposed"]
    assert row["count"] == fastest[2]


def test_rejection() -> None:
    assert rejection(5, 0.7) is None
    assert rejection(4, 1.0) == "4 rounds, 5 are needed"
    assert "65 %" in (rejection(9, 0.65) or "")


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
    assert Variant.all_of(["fast"], ["precision=fast compile=true"]) == [
        Variant("fast", ("precision=fast",)),
        Variant("precision=fast compile=true", ("precision=fast", "compile=true")),
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


def test_absent_peer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "snntorch", "no_such_package_here")
    assert peers.why_missing("snntorch") == "not measured: no_such_package_here is not installed"


class FakeCell(nn.Module):
    def __init__(self, v_threshold: float, leak: float) -> None:
        super().__init__()
        self.v_threshold, self.leak, self.steps = v_threshold, leak, 0

    def reset(self) -> None:
        self.steps = 0

    def forward(self, current: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return torch.sigmoid(current)


@pytest.mark.parametrize("case", SMALL)
def test_step_by_step_peer_has_our_products(case: str) -> None:
    ours = small(case)
    x, y = example(ours)
    network = Network(peers.StepByStep(ours.model, FakeCell), ours.config)
    assert network.model(x).shape == (6, 10)
    assert [cell.steps for cell in network.model.populations] == [ours.config.time_steps] * len(
        ours.model.population_shapes
    )
    network.step(x, y)
    assert all(parameter.grad is not None for parameter in network.model.parameters())  # the feedback's too
    ops = {p.shape for p in network.model.parameters() if p.dim() > 1}
    block = ours.model.block
    assert {c.op.weight.shape for c in (block.input, *block.layers, block.feedback)} <= ops


@pytest.mark.skipif(peers.why_missing("spikingjelly") is not None, reason="spikingjelly is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SMALL)
def test_spikingjelly_runs(case: str) -> None:
    ours = small(case)
    for name in ("spikingjelly", "spikingjelly, feedback"):
        peers.build_peer(name, ours.model, ours.config).step(*example(ours))


@pytest.mark.skipif(peers.why_missing("snntorch") is not None, reason="snntorch is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SMALL)
def test_snntorch_runs(case: str) -> None:
    ours = small(case)
    network = peers.build_peer("snntorch", ours.model, ours.config)
    network.step(*example(ours))
    network.step(*example(ours))  # nothing of the first graph is left


STAND_IN = """
import torch
from modules.part import scale
from termcolor import colored
from torch import nn


class SNNIDEFCNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.linear = nn.Linear(cfg["MODEL"]["dim_in"], cfg["MODEL"]["num_classes"])

    def forward(self, x):
        return scale * self.linear(x.flatten(1))
"""


def test_original_is_built_from_its_clone(tmp_path: Path) -> None:
    config = load_config(["experiment=fashion_mnist_f400_if", "model.hidden=12"])
    with pytest.raises(FileNotFoundError, match="IDE-FSNN"):
        original.build_original(tmp_path, config)
    (tmp_path / "models").mkdir()
    (tmp_path / "modules").mkdir()
    (tmp_path / "models" / "snn_ide_fc.py").write_text(STAND_IN)
    (tmp_path / "modules" / "part.py").write_text("scale = 2.0\n")
    path = list(sys.path)
    network = original.build_original(tmp_path, config)
    assert network(torch.ones(2, 1, 28, 28)).shape == (2, 10)
    assert sys.path == path
    assert not {"models", "modules"} & set(sys.modules)
    assert network.cfg["MODEL"] == {
        "num_classes": 10,
        "threshold": 30,
        "time_step": 5,
        "vth": 2.0,
        "dropout": 0.2,
        "leaky": None,
        "dim_in": 784,
        "dim_hidden": 12,
    }


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("mnist_f64c5_lif", {"c_in": 1, "c_hidden": 64, "h_hidden": 14, "kernel_size_s": 5, "leaky": 0.95}),
        ("cifar10_alexnetf_lif", {"c_hidden": 96, "c_s1": 256, "c_s4": 256, "h_hidden": 8, "w_hidden": 8}),
        ("cifar10_cifarnetf_lif", {"c_hidden": 128, "c_s3": 1024, "c_s4": 512, "time_step": 30}),
    ],
)
def test_settings_of_the_original(experiment: str, expected: dict[str, object]) -> None:
    model = original.settings(load_config([f"experiment={experiment}"]))["MODEL"]
    assert {key: model[key] for key in expected} == expected


def test_original_refuses_other_chains() -> None:
    with pytest.raises(ValueError, match="five populations"):
        original.settings(load_config(["experiment=cifar10_alexnetf_lif", "model.strides=[2,1,1,1,1]"]))


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


@pytest.mark.parametrize("arguments", [["f500"], ["--rounds", "0"], ["--warm-steps", "-1"], ["--peers", "norse"]])
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
