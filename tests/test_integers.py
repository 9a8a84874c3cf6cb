"""Products in whole numbers (`precision=fast`) against what they round, and against float64."""

from __future__ import annotations

import logging
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compiled_blocks import assert_close, block, images, step
from hypothesis import example, given, settings
from torch import Tensor, nn

from ide_snn import Anderson, Connection, FeedbackSNN, Gmres, Implicit, NeuronParams, Unrolled, integers, native
from ide_snn.integers import apply, multiply
from ide_snn.operators import Operator

REASON = integers.why_unavailable() or native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no products in whole numbers: {REASON}")
FAST = {"precision": "fast", "solver": Gmres(1e-3)}


def factors(samples: int, inputs: int, outputs: int, seed: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator)
    matrix = torch.randn(inputs, outputs, generator=generator)
    if kind == "heavy tails":
        return x**5, matrix**7
    return (x.abs(), matrix.abs()) if kind == "of one sign" else (x, matrix)


def rounding(x: Tensor, matrix: Tensor) -> Tensor:
    """Bound on |y - x M| from what the module says of its units, in float64."""
    x, matrix = x.double(), matrix.double()
    by_sum, by_largest = matrix.abs().sum(0) / (524_416 - len(matrix)), matrix.abs().amax(0) / 32_767
    unit, units = x.abs().amax(1, keepdim=True) / 4_095, torch.maximum(by_sum, by_largest)
    total = x.abs().sum(1, keepdim=True) * units + unit * matrix.abs().sum(0) + len(matrix) * unit * units / 2
    return total * (0.5 + 1e-4) + 1e-6 * (x.abs() @ matrix.abs())  # what float32 adds


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 70),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 100),
    seed=st.integers(0, 5),
    kind=st.sampled_from(["normal", "heavy tails", "of one sign"]),
    by_outputs=st.booleans(),
)
@example(samples=300, inputs=784, outputs=400, seed=0, kind="normal", by_outputs=True)
@example(samples=3, inputs=4_096, outputs=3, seed=0, kind="of one sign", by_outputs=True)
@example(samples=3, inputs=4_095, outputs=33, seed=0, kind="of one sign", by_outputs=False)
def test_a_product_is_that_of_float64_to_its_units(
    samples: int, inputs: int, outputs: int, seed: int, kind: str, by_outputs: bool
) -> None:
    x, matrix = factors(samples, inputs, outputs, seed, kind)
    y = multiply(x, matrix.t().contiguous() if by_outputs else matrix, by_outputs=by_outputs)
    error = (y.double() - x.double() @ matrix.double()).abs()
    assert bool((error <= rounding(x, matrix)).all())


@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 15, 16, 33, 784, 4_095, 4_096])
def test_the_largest_sums_do_not_overflow(inputs: int, by_outputs: bool) -> None:
    """All numbers the same: every level is the largest there is."""
    x, matrix = torch.full((3, inputs), 0.7), torch.full((inputs, 40), -1.3)
    with_one = matrix.clone()
    with_one[inputs // 2] = 1e4  # as large as 16 bits hold
    for m in (matrix, with_one):
        y = multiply(x, m.t().contiguous() if by_outputs else m, by_outputs=by_outputs)
        assert bool(((y.double() - x.double() @ m.double()).abs() <= rounding(x, m)).all())


def test_numbers_that_are_whole_have_exact_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-4_095, 4_096, (9, 50), generator=generator).float()
    matrix = torch.randint(-10_000, 10_001, (50, 70), generator=generator).float()
    x[:, 7], matrix[11] = 4_095, 32_767  # so that the units are 1
    found = multiply(x, matrix)
    torch.testing.assert_close(found, (x.double() @ matrix.double()).float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("by_outputs", [False, True])
def test_a_sample_does_not_depend_on_the_others_nor_on_threads(by_outputs: bool, monkeypatch) -> None:
    monkeypatch.setattr(native, "WORTH_THREADS", 0)
    x, matrix = factors(37, 51, 70, 2)
    given = matrix.t().contiguous() if by_outputs else matrix
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(multiply(x, given, by_outputs=by_outputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    alone = torch.cat([multiply(row[None], given, by_outputs=by_outputs) for row in x])
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("power", [-140, -100, 100])
def test_the_scale_of_a_sample_does_not_matter(power: int) -> None:
    x, matrix = factors(5, 33, 40, 3)
    found = multiply(x * 2.0**power, matrix).double() * 2.0**-power
    expected = multiply(x, matrix).double()
    coarse = 2.0 ** (-149 - power)  # what float32 resolves there
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=50 * coarse if power < -120 else 0)


@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_sample_and_its_output(value: float, by_outputs: bool) -> None:
    x, matrix = factors(5, 33, 40, 3)
    clean = multiply(x, matrix)
    x[2, 7], matrix[3, 9] = value, value
    found = multiply(x, matrix.t().contiguous() if by_outputs else matrix, by_outputs=by_outputs)
    others = [i for i in range(5) if i != 2]
    assert not bool(found[2].isfinite().any())
    assert not bool(found[:, 9].isfinite().any())
    kept = [j for j in range(40) if j != 9]
    assert torch.equal(found[others][:, kept], clean[others][:, kept])


def test_zeros_give_zeros() -> None:
    x, matrix = factors(5, 33, 40, 3)
    x[1], matrix[:, 4] = 0, 0
    found = multiply(x, matrix)
    assert bool((found[1] == 0).all())
    assert bool((found[:, 4] == 0).all())
    assert bool((found[0, :4] != 0).all())


def test_a_layer_has_the_gradients_of_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 60, generator=generator, requires_grad=True)
    weight, bias = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((30, 60), (30,)))
    to_y = torch.randn(40, 30, generator=generator)
    found = []
    for function in (apply, Operator.apply):
        y = function(Operator("linear", 60, 30), x, weight, bias)
        found.append((y.detach(), *torch.autograd.grad(y, (x, weight, bias), to_y)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max()))
    assert not torch.equal(found[0][0], found[1][0])  # it is another product


def test_factors_changed_before_the_backward_are_noticed() -> None:
    for changed in range(2):
        x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
        factors = x, weight * 1
        y = apply(Operator("linear", 6, 3), *factors, None)
        factors[changed].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("samples", [4_095, 4_096, 4_097, 9_000])
def test_the_gradient_of_a_large_batch(samples: int) -> None:
    """Its sums are over the samples."""
    generator = torch.Generator().manual_seed(6)
    x, to_y = torch.rand(samples, 5, generator=generator), torch.randn(samples, 8, generator=generator)
    weight = torch.randn(8, 5, generator=generator, requires_grad=True)
    (found,) = torch.autograd.grad(apply(Operator("linear", 5, 8), x, weight, None), weight, to_y)
    expected = to_y.t().double() @ x.double()
    assert float((found - expected).norm() / expected.norm()) < (4e-3 if samples <= integers.MOST_INPUTS else 1e-5)
    options = {"batch_norm": False, "dropout": 0.0, **FAST}
    both = [step(block(8, 5, compile=compile, **options), images(samples, 5))[1] for compile in (False, True)]
    assert_close(both[1], both[0], "fast")


@pytest.mark.parametrize("compile", [False, True])
def test_a_block_takes_them_with_fast_alone_and_says_so(compile: bool, monkeypatch, caplog) -> None:
    calls = []
    take = integers.IntegerProduct.take
    monkeypatch.setattr(integers.IntegerProduct, "take", lambda *a: (calls.append(1), take(*a))[1])
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        step(block(200, 90, compile=compile, **FAST), images(40, 90))
    assert len(calls) == 2  # forward, and the gradient of the weight
    assert "event-driven, 16-bit weights, input stage, gradients in whole numbers" in caplog.text
    for options in ({"precision": "exact"}, {"precision": "float32"}):
        step(block(200, 90, compile=compile, **options), images(40, 90))
    with_time = block(200, 90, compile=compile, input_has_time=True, **FAST)
    step(with_time, torch.stack([images(40, 90)] * 6))
    assert len(calls) == 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_block_has_the_rates_and_gradients_of_exact(compile: bool) -> None:
    """But for a spike here and there: gradients as vectors."""
    options = {"neuron": NeuronParams(1.0, 1.0), "dropout": 0.0, "compile": compile, "solver": Gmres(1e-5)}
    found = [step(block(200, 90, precision=p, **options), images(200, 90)) for p in ("fast", "exact")]
    (rates, mine), (expected, theirs) = found
    assert 0.1 < float((expected > 0).float().mean()) < 0.9
    assert float((rates != expected).float().mean()) < 0.02
    for name in ("input.op.weight", "input.bn.weight", "feedback.op.parametrizations.weight.original"):
        assert float(theirs[name].norm()) > 0
        assert float((mine[name] - theirs[name]).norm() / theirs[name].norm()) < 0.1, name


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_compiled_step_with_a_frozen_input_stage(frozen: str) -> None:
    found = []
    for compile in (True, False):
        net = block(70, 33, compile=compile, **FAST)
        getattr(net.input.op, frozen).requires_grad_(False)
        x = images(12, 33).requires_grad_()
        _, gradients = step(net, x)
        assert x.grad is not None
        found.append({**gradients, "x": x.grad})
    assert (f"input.op.{frozen}") not in found[0]
    assert_close(*found, "fast")


def test_without_the_instructions_the_products_are_float32(monkeypatch, caplog) -> None:
    monkeypatch.setattr(integers, "why_unavailable", lambda: "none here")
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        step(block(200, 90, compile=False, **FAST), images(40, 90))
    assert "16-bit weights, input stage, gradients in float32: none here" in caplog.text


def test_a_stage_that_does_not_suit_is_float32() -> None:
    assert not integers.suits(None)
    assert not integers.suits(Operator("conv", 3, 3))
    assert not integers.suits(Operator("linear", integers.MOST_INPUTS + 1, 3))
    assert integers.suits(Operator("linear", integers.MOST_INPUTS, 3))


def test_kernels_that_are_kept_are_few_and_small() -> None:
    def kept() -> list[int]:
        return [product.bytes for product, _ in integers._own.kept.values()]

    x = torch.randn(4, 6)
    for outputs in range(1, 9):
        multiply(x, torch.randn(6, outputs))
        assert len(kept()) <= integers.MOST_SIZES
    first = integers._kept(4, 6, 8, False)
    assert integers._kept(4, 6, 8, False) is first
    before = kept()
    multiply(torch.randn(2, 4_000), torch.randn(4_000, 3_000))  # too large, and no reason to forget the others
    assert kept() == before
    for outputs in range(3):
        multiply(torch.randn(2, 4_000), torch.randn(4_000, 1_000 + outputs))
    assert 0 < sum(kept()) <= integers.MOST_BYTES
    assert len(kept()) < 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver": Gmres(1e-2)}, "input stage, loose solves, gradients in whole numbers"),
        ({"solver": Gmres(1e-3)}, "input stage, gradients in whole numbers"),
        ({"solver": Anderson(1e-2)}, "input stage, gradients in whole numbers"),
        ({"solver": Gmres(1e-2), "gradient": Implicit(jacobian_at="f")}, "input stage, loose solves in whole numbers"),
        ({"solver": Gmres(1e-2), "gradient": Unrolled(2)}, "input stage in whole numbers"),
        ({"solver": Gmres(1e-2), "input_has_time": True}, "loose solves, gradients in whole numbers"),
    ],
)
def test_the_log_says_what_is_in_whole_numbers(options: dict[str, Any], expected: str, caplog) -> None:
    net = block(60, 30, compile=False, **{**FAST, **options})
    x = images(20, 30)
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        step(net, torch.stack([x] * net.time_steps) if net.input_has_time else x)
    assert f"16-bit weights, {expected}" in caplog.text


@pytest.mark.parametrize(("jacobian_bn", "is_loose"), [("running", True), ("batch", False)])
def test_loose_solves_are_of_samples_by_themselves(jacobian_bn: Any, is_loose: bool, caplog) -> None:
    layer = Connection(nn.Linear(20, 30), batch_norm=True)
    net = FeedbackSNN(
        input=Connection(nn.Linear(60, 20)),
        layers=[layer],
        feedback=Connection(nn.Linear(30, 20)),
        solver=Gmres(1e-2),
        gradient=Implicit(jacobian_bn, "f"),
        precision="fast",
        time_steps=3,
    )
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        net.train()(images(8, 60))
    assert ("loose solves" in caplog.text) is is_loose
