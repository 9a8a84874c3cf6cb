"""The linear layer behind a compiled population, which is part of its step."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from compiled_blocks import REASON, assert_close
from hypothesis import given, settings
from networks import LIF
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ide_snn import FeedbackSNN, Gmres, SNNIDEFCNet, native
from ide_snn.models import FeedbackClassifier
from ide_snn.native import Stages
from ide_snn.readout import MOST_OUTPUTS, Readout, is_plain, suits

REASON = REASON or native.why_unavailable("readout")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 40),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, MOST_OUTPUTS),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_products_are_those_of_float64(samples: int, inputs: int, outputs: int, has_bias: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    rates, weight, bias, cotangent = (
        torch.randn(*sizes, generator=generator)
        for sizes in ((samples, inputs), (outputs, inputs), (outputs,), (samples, outputs))
    )
    logits, to_weight, to_bias = torch.empty_like(cotangent), torch.empty_like(weight), torch.empty_like(bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        readout = Readout(rates, weight, bias if has_bias else None)
        readout.take(logits)
        readout.pull(cotangent, to_weight, to_bias if has_bias else None)
        for _ in range(2):
            Stages([readout.forward_stage, *readout.backward_stages]).run()
    finally:
        torch.set_num_threads(before)
    a, w, b, d = (tensor.double() for tensor in (rates, weight, bias, cotangent))
    pairs = [(logits, a @ w.t() + (b if has_bias else 0)), (readout.to_rates, d @ w), (to_weight, d.t() @ a)]
    for found, expected in [*pairs, *([(to_bias, d.sum(0))] if has_bias else [])]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def network(compile: bool | None = True, classes: int = 10, **options: Any) -> SNNIDEFCNet:
    generator = torch.Generator().manual_seed(5)
    chosen = {"neuron": LIF, "time_steps": 5, "solver": Gmres(1e-3), "precision": "exact", **options}
    return SNNIDEFCNet((1, 6, 6), classes, hidden=40, compile=compile, generator=generator, **chosen)


def step(net: SNNIDEFCNet, samples: int = 12) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients by name) of a training step."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    net.zero_grad()
    logits = net(x, generator=generator)
    F.cross_entropy(logits, torch.arange(samples) % logits.shape[1]).backward()
    return logits.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def is_one_step(net: SNNIDEFCNet) -> bool:
    """Whether a classifier is part of a plan, and the block's own plan was never needed."""
    plans = [plan for plan, *_ in net.block._compiled._plans.values()]
    return [getattr(plan, "parts", None) is not None and plan.parts.readout is not None for plan in plans] == [True]


def own_forward(x: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return F.pad(x, (0, 4))


def replace_classifier(net: SNNIDEFCNet) -> None:
    net.classifier = nn.Linear(40, 10, bias=False)
    with torch.no_grad():
        net.classifier.weight.copy_(torch.linspace(-1, 1, 400).view(10, 40))


def replace_bias(net: SNNIDEFCNet) -> None:
    net.classifier.bias = nn.Parameter(torch.ones(1))


CHANGES: dict[str, tuple[Any, bool]] = {
    "nothing": (lambda _: None, True),
    "weights in place": (lambda net: net.classifier.weight.data.mul_(-1), True),
    "other data": (lambda net: setattr(net.classifier.weight, "data", -net.classifier.weight.data), True),
    "no bias": (lambda net: setattr(net.classifier, "bias", None), True),
    "one bias for all": (replace_bias, False),
    "one number as a bias": (lambda net: setattr(net.classifier, "bias", nn.Parameter(torch.tensor(0.1))), False),
    "frozen block": (lambda net: net.block.requires_grad_(False), False),
    "frozen classifier": (lambda net: net.classifier.requires_grad_(False), True),
    "another": (replace_classifier, False),
    "hook": (lambda net: net.classifier.register_forward_hook(lambda _m, _i, y: 2 * y), False),
    "hook of the block": (lambda net: net.block.register_forward_hook(lambda _m, _i, y: 2 * y), False),
    "function of one's own": (lambda net: setattr(net.block, "forward", own_forward), False),
    "backward hook": (
        lambda net: net.classifier.register_full_backward_hook(lambda _m, given, _: (3 * given[0],)),
        False,
    ),
    "backward pre-hook": (
        lambda net: net.classifier.register_full_backward_pre_hook(lambda _m, given: (3 * given[0],)),
        False,
    ),
    "the classifier's function": (lambda net: setattr(net.classifier, "forward", lambda a: a[:, :10] + 1), False),
    "parametrized": (lambda net: parametrizations.weight_norm(net.classifier), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_step_is_that_of_block_and_classifier(change: str) -> None:
    make, is_still_one = CHANGES[change]
    found = []
    for on in (False, True):
        net = network(on)
        step(net)
        assert is_one_step(net) == on
        make(net)
        found.append(step(net))
        assert not (on and is_still_one) or is_one_step(net)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    assert_close(found[1][1], found[0][1])


def test_many_classes_are_left_to_torch_and_the_block_is_compiled() -> None:
    few, many = network(classes=MOST_OUTPUTS), network(classes=MOST_OUTPUTS + 1)
    for net in (few, many):
        step(net)
    assert is_one_step(few)
    plans = [plan for plan, *_ in many.block._compiled._plans.values()]
    assert [plan.parts.readout for plan in plans] == [None]


@pytest.mark.parametrize("features", [4, 60])
def test_a_classifier_of_another_size_is_torchs_own_error(features: int) -> None:
    for on in (False, True):
        net = network(on)
        net.classifier = nn.Linear(features, 10)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            step(net)


class Elsewhere(Tensor):
    """A tensor whose memory is not where its type says, as of quantised or distributed weights."""


def test_kernels_are_given_tensors_of_torchs_own_types_only() -> None:
    assert is_plain(torch.ones(3))
    assert is_plain(nn.Parameter(torch.ones(3)))
    assert not is_plain(torch.ones(3).as_subclass(Elsewhere))
    assert not is_plain(torch.ones(3, device="meta"))
    assert not is_plain(torch.ones(3, 2).t())
    net = network()
    net.classifier.weight = nn.Parameter(torch.ones(10, 40).as_subclass(Elsewhere))
    assert not suits(net.classifier, 40)


def test_plans_of_three_sizes_of_batches_are_kept_also_where_the_classifier_is_torchs() -> None:
    net = network(classes=MOST_OUTPUTS + 1)
    for samples in (6, 7, 8):
        step(net, samples)
    plans = list(net.block._compiled._plans.values())
    for samples in (6, 7, 8):
        step(net, samples)
    assert list(net.block._compiled._plans.values()) == plans


def test_a_frozen_block_needs_no_solve() -> None:
    net, solves = network(), []
    net.block.requires_grad_(False)
    net.block.register_solve_hook(solves.append)
    step(net)
    assert solves == []
    net.block.requires_grad_(True)
    step(net)
    assert len(solves) == 1


def test_the_gradient_of_the_input_passes_through() -> None:
    found = []
    for on in (False, True):
        net, generator = network(on), torch.Generator().manual_seed(6)
        x = torch.randn(4, 1, 6, 6, generator=generator).requires_grad_()
        weights = torch.linspace(-1, 1, 40).view(4, 10)
        (net(x, generator=generator) * weights).t().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_feedback_of_ones_own_has_no_weight_to_look_at() -> None:
    feedback = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    block = FeedbackSNN(input=nn.Linear(4, 6), feedback=feedback, precision="exact", compile=True)
    net = FeedbackClassifier(block, (4,), 3)
    net(torch.randn(5, 4)).sum().backward()
    assert not any(plan for plan in block._compiled._plans.values() if not isinstance(plan[0], str))


def test_what_the_classifier_alone_could_do_is_an_error_and_not_0() -> None:
    """Second derivatives would be 0 where torch takes what it does not find for that, as `hessian` does."""
    net = network()
    x = torch.randn(12, 1, 6, 6)
    bias = net.classifier.bias
    assert bias is not None  # it has one

    def refused(what: str) -> Any:
        return pytest.raises(RuntimeError, match=rf"{what}.* set compile=False")

    logits = net(x)
    with refused("takes one cotangent at a time"):
        torch.autograd.grad(logits, bias, torch.ones(3, *logits.shape), is_grads_batched=True)
    (gradient,) = torch.autograd.grad(logits.square().sum(), bias, create_graph=True)  # once is no error
    for parameter in (bias, net.classifier.weight, net.get_parameter("block.input.op.weight")):
        with refused("cannot be differentiated again"):
            torch.autograd.grad(gradient.sum(), parameter, allow_unused=True, retain_graph=True)
    net.block.compile_ = False
    (expected,) = torch.autograd.grad(net(x).square().sum(), bias, create_graph=True)
    assert torch.autograd.grad(expected.sum(), bias)[0] is not None


def test_second_derivatives_in_a_classifier_that_is_given_are_those_of_its_own() -> None:
    x, found = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(7)), []
    for compile in (True, False):
        net = network(compile)

        def loss(bias: Tensor, net: SNNIDEFCNet = net) -> Tensor:
            given = {"generator": torch.Generator().manual_seed(8)}
            logits = torch.func.functional_call(net, {"classifier.bias": bias}, (x,), given)
            return F.cross_entropy(logits, torch.arange(12) % 10)

        bias = net.classifier.bias
        assert bias is not None  # it has one
        found.append(torch.autograd.functional.hessian(loss, bias.detach()))
        assert ("is compiled" in net.block.path) is compile
    assert float(found[1].abs().max()) > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
