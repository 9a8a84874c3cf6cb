"""Methods and settings of one's own in a block that is compiled by default (compile=None): they are called."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compiled_blocks import REASON, assert_close, block, images, is_compiled, step
from torch import Tensor

from ide_snn import Connection, FeedbackSNN, FixedPoint, Implicit
from ide_snn.optimizations import get_constraint
from ide_snn.solvers.base import Method, Workspace

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


class OwnConnection(Connection):
    def prepare(self, *arguments: Any, **options: Any) -> Any:
        fixed = super().prepare(*arguments, **options)
        return fixed if fixed.gain is None else dataclasses.replace(fixed, gain=2 * fixed.gain)


class OwnBlock(FeedbackSNN):
    def check(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        super().check(x, dtype)
        if float(x.detach().max()) > 1:
            raise ValueError("too bright")


def own_draw(net: FeedbackSNN) -> None:
    draw = net.feedback.dropout.draw
    net.feedback.dropout.draw = lambda *arguments, **options: 2 * draw(*arguments, **options)


def own_constraint(net: FeedbackSNN) -> None:
    constraint = get_constraint(net.feedback.op)
    forward = constraint.forward
    constraint.forward = lambda weight: 2 * forward(weight)


def own_update(net: FeedbackSNN) -> None:
    constraint = get_constraint(net.feedback.op)
    update = constraint.update
    constraint.update = lambda *given, **options: [update(*given, **options) for _ in range(3)][-1]


def own_gradient(net: FeedbackSNN) -> None:
    attach = net._attach
    net._attach = lambda *given: 2 * attach(*given)


def own_parametrizations(net: FeedbackSNN) -> None:
    inner = net.feedback.op.parametrizations["weight"]
    forward = inner.forward
    inner.forward = lambda: 2 * forward()


def own_gradient_for_a_note(net: FeedbackSNN) -> None:
    net.note = None
    step(net, images())
    del net.note
    own_gradient(net)


def own_connection(net: FeedbackSNN) -> None:
    net.feedback.__class__ = OwnConnection


OWN = [
    *(own_draw, own_constraint, own_update, own_gradient, own_parametrizations, own_gradient_for_a_note),
    own_connection,
]


@pytest.mark.parametrize("change", OWN)
@pytest.mark.parametrize("there_is_a_plan", [False, True])
def test_methods_of_ones_own_are_called(change: Any, there_is_a_plan: bool) -> None:
    nets = block(compile=None), block(compile=False)
    for net in nets:
        if there_is_a_plan:
            step(net, images())
        change(net)
    (rates, found), (expected, gradients) = (step(net, images()) for net in nets)
    torch.testing.assert_close(rates, expected, rtol=0, atol=1e-6)
    assert_close(found, gradients)
    assert "not compiled" in nets[0].path


def test_a_block_of_ones_own_is_compiled_where_that_is_asked_for() -> None:
    net = block(compile=None)
    net.__class__ = OwnBlock
    with pytest.raises(ValueError, match="too bright"):
        step(net, images())
    step(net, images().clamp(max=0.9))
    assert not is_compiled(net)
    net.compile_ = True
    step(net, images().clamp(max=0.9))
    assert is_compiled(net)


def test_a_check_of_ones_own_is_called_in_every_step() -> None:
    net, seen = block(compile=None), []
    for _ in range(2):
        step(net, images())
    assert is_compiled(net)
    net.check = lambda *given: seen.append(given)
    for _ in range(2):
        step(net, images())
    assert len(seen) == 2


def test_a_setting_that_cannot_be_hashed_is_no_error() -> None:
    class OwnGradient(Implicit):
        __hash__ = None  # type: ignore[assignment]

    net, plain = block(compile=None, gradient=OwnGradient()), block(compile=False)
    for _ in range(2):
        assert torch.equal(step(net, images())[0], step(plain, images())[0])
    assert net.path.endswith("is not compiled (a setting is of your own kind and cannot be hashed or compared)")


def test_a_solver_with_tensors_is_no_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own:
        weights: Tensor
        tol: float = 1e-4
        max_steps: int = 200

        def begin(self, work: Workspace) -> Method:
            return FixedPoint(self.tol, self.max_steps).begin(work)

    net = block(compile=None)
    for _ in range(2):
        net.solver = Own(torch.ones(3))
        step(net, images())
    assert "not compiled" in net.path
