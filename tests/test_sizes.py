"""Tensors that a user has put in place of others: other sizes are refused, since kernels have addresses only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled_blocks import REASON, block, images, is_compiled, step
from torch import nn

from ide_snn import Connection, FeedbackSNN

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


def put(module: str, name: str, shape: tuple[int, ...]) -> Callable[[FeedbackSNN], None]:
    return lambda net: setattr(net.get_submodule(module), name, nn.Parameter(torch.ones(shape)))


def other_norm(features: int) -> Callable[[FeedbackSNN], None]:
    return lambda net: setattr(net.input, "bn", nn.BatchNorm1d(features))


WRONG: dict[str, tuple[Callable[[FeedbackSNN], None], str]] = {
    "one bias for all neurons": (put("input.op", "bias", (1,)), r"bias has the shape \[1\], its module says \[37\]"),
    "too few biases": (put("feedback.op", "bias", (36,)), r"bias has the shape \[36\], its module says \[37\]"),
    "one bias of the feedback": (put("feedback.op", "bias", (1,)), r"bias has the shape \[1\], its module says \[37\]"),
    "fewer inputs": (
        put("input.op", "weight", (37, 12)),
        r"weight has the shape \[37, 12\], its module says \[37, 21\]",
    ),
    "a small batch norm": (other_norm(16), r"weight has the shape \[16\], its connection has 37"),
    "a large batch norm": (other_norm(80), r"weight has the shape \[80\], its connection has 37"),
    "vectors of the constraint": (
        lambda net: setattr(net.feedback.op.parametrizations.weight[0], "u", torch.ones(2)),
        r"matrix \[37, 37\] has vectors \[2\] of torch.float32 and \[37\]|size mismatch|inconsistent tensor size",
    ),
    "vectors of another type": (
        lambda net: setattr(
            net.feedback.op.parametrizations.weight[0], "u", torch.ones(37, dtype=torch.float64) / 37**0.5
        ),
        r"vectors \[37\] of torch.float64|same dtype|expected scalar type",
    ),
    "a weight of batch norm": (put("input.bn", "weight", (1,)), r"batch norm's weight has the shape \[1\]"),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:.*no effect")
def test_other_sizes_are_refused(wrong: str, precision: str, compile: bool) -> None:
    change, message = WRONG[wrong]
    net = block(precision=precision, compile=compile, feedback_bias=True)
    step(net, images())
    change(net)
    with pytest.raises((ValueError, RuntimeError), match=message):
        step(net, images())


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["input.bn.running_mean", "input.op.bias", "input.op.weight"])
def test_a_tensor_that_was_cut_where_it_lies_is_refused(name: str, compile: bool) -> None:
    net = block(compile=compile)
    step(net, images())
    tensor = dict([*net.named_parameters(), *net.named_buffers()])[name]
    tensor.data = tensor.data[:5]
    with pytest.raises(ValueError, match=r"has the shape \[5"):
        step(net, images())


class Remembering(nn.BatchNorm1d):
    """A batch norm with a buffer of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("history", torch.zeros(3))


@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
def test_buffers_of_ones_own_may_be_of_any_size(precision: str) -> None:
    net = block(precision=precision, compile=False)
    net.input.bn = Remembering(37)
    assert step(net, images())[0].isfinite().all()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Linear(3, 5, bias=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_sizes_of_torchs_own_modules_are_right(module: nn.Module) -> None:
    operator = Connection(module).operator
    assert operator is not None
    operator.require_sizes(module.weight, module.bias)
    with pytest.raises(ValueError, match="weight has the shape"):
        operator.require_sizes(module.weight.transpose(0, 1), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
@pytest.mark.filterwarnings("ignore::ide_snn.solvers.SolverWarning")
def test_a_bias_that_is_no_number_is_seen_behind_batch_norm(precision: str, compile: bool, value: float) -> None:
    net = block(precision=precision, compile=compile)
    with torch.no_grad():
        net.get_parameter("input.op.bias")[3] = value
    rates, _ = step(net, images())
    assert is_compiled(net) == (compile and precision != "float32")
    assert bool(rates[:, 3].isnan().all())
