"""What a floor counts and computes; no timing is judged."""

from __future__ import annotations

import dataclasses

import floor
import pytest
import torch
import ways
from benchmark_cases import SMALL, example, small
from floor import Floor, Link, links_of, plan, product, race, rejection, transposed
from torch.utils.flop_counter import FlopCounterMode

from ide_snn.operators import Operator

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
