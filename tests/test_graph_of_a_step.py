"""What may happen to the graph of a training step before its backward pass, compiled or not."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from compiled_blocks import REASON, assert_close, block, images
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ide_snn import FeedbackSNN

pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}"),
    pytest.mark.parametrize("precision", ["exact", "fast"]),
    pytest.mark.parametrize("compile", [False, True]),
]


def value(net: FeedbackSNN) -> Tensor:
    rates = net(images(12), generator=torch.Generator().manual_seed(0))
    return (rates * torch.linspace(-1, 2, rates.numel()).view_as(rates)).sum()


def gradients(net: FeedbackSNN, of: Tensor, **options: Any) -> dict[str, Tensor]:
    parameters = dict(net.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(of, list(parameters.values()), **options), strict=True))


def test_saved_tensors_may_come_back_in_another_layout(precision: str, compile: bool) -> None:
    """As hooks may give them that keep them elsewhere: kernels have their addresses."""
    nets = [block(precision=precision, compile=compile) for _ in range(2)]
    expected = gradients(nets[0], value(nets[0]))

    def pack(tensor: Tensor) -> Tensor:
        """With gaps, and matrices turned."""
        return torch.stack([tensor.t() if tensor.dim() == 2 else tensor, torch.full_like(tensor.t(), torch.nan)], -1)

    def unpack(pair: Tensor) -> Tensor:
        return pair[..., 0].t()

    with saved_tensors_hooks(pack, unpack):
        found = value(nets[1])
    assert_close(gradients(nets[1], found), expected, precision)


def test_two_threads_go_back_through_one_graph(precision: str, compile: bool) -> None:
    net = block(90, 60, precision=precision, compile=compile)
    rates = net(images(40, 60), generator=torch.Generator().manual_seed(0))
    cotangents = [torch.randn_like(rates) for _ in range(2)]
    sums = [(rates * cotangent).sum() for cotangent in cotangents]
    expected, wrong = [gradients(net, of, retain_graph=True) for of in sums], []

    def go_back(number: int) -> None:
        for _ in range(20):
            try:
                assert_close(gradients(net, sums[number], retain_graph=True), expected[number], precision)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=go_back, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_parameter_whose_memory_moves_is_followed_or_refused(precision: str, compile: bool) -> None:
    """As wrappers do that free what they have gathered: no kernel reads what is freed."""
    net = block(precision=precision, compile=compile)
    expected = gradients(net, value(net))
    net = block(precision=precision, compile=compile)
    of, weight = value(net), net.get_parameter("feedback.op.parametrizations.weight.original")
    copy, size, place = weight.detach().clone(), weight.untyped_storage().nbytes(), weight.data_ptr()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.untyped_storage().resize_(0)
        others = [torch.full_like(copy, torch.nan) for _ in range(8)]  # one of them takes its place
        weight.untyped_storage().resize_(size)
        weight.copy_(copy)
    del others
    if compile and weight.data_ptr() != place:
        with pytest.raises(RuntimeError, match=r"resized between forward and backward.* set compile=False"):
            gradients(net, of)
    else:
        assert_close(gradients(net, of), expected, precision)


def test_a_graph_of_a_gradient_goes_with_it(precision: str, compile: bool) -> None:
    """The cotangent of a loss that is not linear has one, which leads back to the step."""
    net, graphs = block(precision=precision, compile=compile), []
    for _ in range(3):
        y = net(images(12))
        found = torch.autograd.grad(y.square().sum(), list(net.parameters()), create_graph=True)
        graphs.append(weakref.ref(y.grad_fn))
        del y, found
    gc.collect()
    assert [graph() for graph in graphs] == [None] * 3


def test_functions_of_users_in_front_may_have_any_attributes(precision: str, compile: bool) -> None:
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.name, ctx.variable = "mine", "something"
            return 2 * x

        @staticmethod
        def backward(_ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    net, x = block(precision=precision, compile=compile), images(12).requires_grad_()
    (g,) = torch.autograd.grad(net(Named.apply(x)).sum(), x, create_graph=True)
    assert g.requires_grad
