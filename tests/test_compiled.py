"""compile=True: a fully connected block has the same training step when it is compiled."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from compiled_blocks import REASON, assert_close, block, images, is_compiled, step
from hypothesis import given, settings
from torch import nn

from ide_snn import FeedbackSNN, Gmres, NeuronParams, integers
from ide_snn.optimizations import get_constraint
from ide_snn.solvers import Outcome, SolverWarning

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


VARIANTS: dict[str, dict[str, Any]] = {
    "as the paper": {},
    "fast": {"precision": "fast", "solver": Gmres(1e-2)},
    "without batch norm": {"batch_norm": False},
    "without dropout": {"dropout": 0.0},
    "unconstrained": {"constraint": "none"},
    "biases": {"feedback_bias": True},
    "no bias": {"bias": False, "batch_norm": False, "constraint": "none", "dropout": 0.0},
    "IF": {"neuron": NeuronParams(1.5, 1.0)},
    "first dimension": {"constraint": "spectral_matrix_first_dim"},
    "restarts": {"solver": Gmres(1e-5, restart=2, max_steps=60)},
    "tight": {"solver": Gmres(1e-6)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_steps_are_those_that_are_not_compiled(variant: str) -> None:
    plain, compiled = (block(compile=on, **VARIANTS[variant]) for on in (False, True))
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9) for net in (plain, compiled)]
    for seed in range(3):
        (expected, gradients), (rates, found) = (step(net, images(), seed) for net in (plain, compiled))
        torch.testing.assert_close(rates, expected, rtol=0, atol=1e-6)
        assert_close(found, gradients, compiled.precision)
        for optimizer in optimizers:
            optimizer.step()
    assert is_compiled(compiled)
    assert not is_compiled(plain)
    assert compiled.path == f"{plain.path}; the training step is compiled"
    for (name, buffer), (_, expected) in zip(compiled.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_word_it_is_compiled_where_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    """compile=None, the default: there is nothing to choose, so nothing to warn about."""
    caplog.set_level(logging.INFO, "ide_snn")
    net, plain = (block(compile=on) for on in (None, False))
    assert FeedbackSNN(input=nn.Linear(3, 4), feedback=nn.Linear(4, 4)).compile_ is None
    for with_time, precision, said in [
        (False, "exact", "; the training step is compiled"),
        (False, "fast", "; the training step is compiled"),
        (False, "float32", ""),
        (True, "exact", "; the training step is not compiled (the input has time)"),
    ]:
        for one in (net, plain):
            one.input_has_time, one.precision = with_time, precision
            step(one, torch.stack([images()] * one.time_steps) if with_time else images())
        assert net.path == plain.path + said
    assert is_compiled(net)
    assert not is_compiled(plain)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    net.compile_ = True  # asked for, it is
    step(net, torch.stack([images()] * net.time_steps))
    assert caplog.records[-1].levelno == logging.WARNING
    assert net.path.endswith("; compile=True: no effect (the input has time)")


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(4, 140),  # batch norm of two leaves digits only
    features=st.integers(1, 70),
    inputs=st.integers(1, 40),
    precision=st.sampled_from(["exact", "fast"]),
    batch_norm=st.booleans(),
)
def test_sizes_of_all_kinds(samples: int, features: int, inputs: int, precision: str, batch_norm: bool) -> None:
    found = []
    for on in (False, True):
        net = block(features, inputs, precision=precision, batch_norm=batch_norm, compile=on, time_steps=3)
        found.append(step(net, images(samples, inputs)))
    (expected, gradients), (rates, compiled) = found
    # a membrane that stands at the threshold to the last bit may fire or not
    same = (rates - expected).abs().amax(1) < 1e-6
    assert same.float().mean() > 0.9
    if same.all():
        assert_close(compiled, gradients, precision)


def test_alpha_inside_its_bound_has_its_gradient() -> None:
    found = []
    for on in (False, True):
        net = block(compile=on)
        with torch.no_grad():
            get_constraint(net.feedback.op).alpha.fill_(-0.6)
        found.append(step(net, images())[1])
    assert found[0]["feedback.op.parametrizations.weight.0.alpha"].abs() > 1e-3
    assert_close(found[1], found[0])


def test_the_input_has_its_gradient() -> None:
    found = []
    for on in (False, True):
        x = images().requires_grad_()
        step(block(compile=on), x)
        found.append({"x": x.grad})
    assert_close(found[1], found[0])


def test_forwards_before_a_backward_keep_what_they_need() -> None:
    def unconverged() -> FeedbackSNN:
        made = block()
        constraint = get_constraint(made.feedback.op)
        for vector in (constraint.u, constraint.v):  # so that every forward moves them far
            vector.copy_(F.normalize(torch.linspace(-1, 2, 37), dim=0))
        return made

    net, inputs = unconverged(), [images(), images().flip(0) / 2]
    apart = []
    for number, x in enumerate(inputs):
        twin = unconverged()
        for earlier in range(number):  # the constraint and batch norm have moved on
            twin(inputs[earlier], generator=torch.Generator().manual_seed(0))
        apart.append(step(twin, x)[1])
    both = [net(x, generator=torch.Generator().manual_seed(0)) for x in inputs]
    weights = torch.linspace(-1, 2, both[0].numel()).view_as(both[0])
    for number in (1, 0):
        net.zero_grad()
        (both[number] * weights).sum().backward()
        assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, apart[number])


def test_a_second_backward_through_a_kept_graph_gives_the_same() -> None:
    net = block()
    loss = net(images()).square().sum()
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, first[name]) for name, p in net.named_parameters())


def test_rates_are_the_users_own() -> None:
    found = []
    for on in (False, True):
        net = block(compile=on)
        rates = net(images(), generator=torch.Generator().manual_seed(0))
        rates.mul_(2)
        rates.sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert_close(found[1], found[0])


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    for on in (False, True):
        net = block(compile=on)
        rates = net(images())
        with torch.no_grad():
            net.get_parameter("feedback.op.parametrizations.weight.original").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rates.sum().backward()


@pytest.mark.filterwarnings("ignore::ide_snn.solvers.SolverWarning")
def test_a_solve_that_fails_is_said_and_is_the_same() -> None:
    found, outcomes = [], []
    for on in (False, True):
        net = block(compile=on, solver=Gmres(1e-6, max_steps=2), constraint="none")
        net.register_solve_hook(lambda solution: outcomes.append(solution.outcome))
        with pytest.warns(SolverWarning):
            found.append(step(net, images())[1])
    assert outcomes == [Outcome.max_steps] * 2
    assert_close(found[1], found[0])


@pytest.mark.parametrize("tol", [1e-3, 1e-5])  # the verdict on the second is on one more product
def test_hooks_are_told_of_solves(tol: float) -> None:
    told: list[list[Any]] = [[], []]
    for on in (False, True):
        net = block(compile=on, solver=Gmres(tol))
        net.register_solve_hook(told[on].append)
        step(net, images())
    (plain,), (compiled,) = told
    assert compiled.outcome is plain.outcome is Outcome.converged
    assert compiled.stats.products == plain.stats.products
    assert compiled.stats.whole_products == plain.stats.whole_products
    torch.testing.assert_close(compiled.value, plain.value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled.stats.residual, plain.stats.residual, rtol=1e-2, atol=1e-7)


def test_few_plans_are_kept() -> None:
    net = block()
    for samples in range(2, 12):
        step(net, images(samples))
    assert len(net._compiled._plans) == 4
    plan, *_ = list(net._compiled._plans.values())[-1]
    assert len(plan.free) == 1  # buffers come back, and there are no more than were needed at a time
    graphs = [net(images(11)) for _ in range(5)]
    del graphs
    assert len(plan.free) == 2  # nor any more for ever


def test_evaluation_and_no_grad_are_not_compiled() -> None:
    net, plain = block(), block(compile=False)
    for other in (net, plain):
        other.eval()
    assert torch.equal(net(images()), plain(images()))
    for other in (net, plain):
        other.train()
    with torch.no_grad():
        found = [other(images(), generator=torch.Generator().manual_seed(1)) for other in (net, plain)]
    assert torch.equal(*found)
    assert not is_compiled(net)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_threads_do_not_change_the_numbers(precision: str) -> None:
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(block(200, 90, precision=precision), images(150, 90)))
    finally:
        torch.set_num_threads(1)
    for rates, gradients in found[1:]:
        if precision == "fast" and integers.why_unavailable() is None:
            assert torch.equal(rates, found[0][0])
            assert all(torch.equal(gradients[name], tensor) for name, tensor in found[0][1].items())
        # but for torch's product of the input stage the order of sums is the same
        torch.testing.assert_close(rates, found[0][0], rtol=0, atol=1e-6)
        assert_close(gradients, found[0][1], precision)


def test_copies_work_on_their_own() -> None:
    net = block()
    step(net, images())
    expected = step(block_at(net), images())
    other = copy.deepcopy(net)
    assert not is_compiled(other)
    rates, gradients = step(other, images())
    assert is_compiled(other)
    assert torch.equal(rates, expected[0])
    assert_close(gradients, expected[1])
    unconstrained = block(constraint="none")  # torch pickles no parametrized module
    step(unconstrained, images())
    file = io.BytesIO()
    torch.save(unconstrained, file)
    file.seek(0)
    assert_close(step(torch.load(file, weights_only=False), images(), 5)[1], step(unconstrained, images(), 5)[1])


def block_at(net: FeedbackSNN) -> FeedbackSNN:
    """A new block, not compiled, with the state of another."""
    other = block(compile=False)
    other.load_state_dict(net.state_dict())
    return other


def test_input_that_is_not_finite_is_one_error_and_changes_nothing() -> None:
    net = block()
    step(net, images())
    before = copy.deepcopy(net.state_dict())
    x = images()
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        net(x)
    with pytest.raises(ValueError, match=r"input must have shape \[B, ...\]"):
        net(x[0])
    with pytest.raises(ValueError, match="does not fit the network"):
        net(images()[:, :5].contiguous())
    with pytest.raises(ValueError, match=r"convert with x.to\(torch.float32\)"):
        net(images().double())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    unchecked = block(check_input=False)
    rates = unchecked(x)  # batch norm spreads it over the batch
    assert rates.isnan().all()
