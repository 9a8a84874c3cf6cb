"""The input stage by kernels against torch's operations, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compiled_blocks import assert_close, block, images, step
from torch import Tensor, nn

from ide_snn import Connection, Gmres, input_stage, integers, native
from ide_snn.layers import FixedConnection

REASON = integers.why_unavailable() or native.why_unavailable("features")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no kernels of the input stage: {REASON}")


def stage(batch_norm: bool, bias: bool, dropout: float, features: int = 37) -> Connection:
    generator = torch.Generator().manual_seed(0)
    connection = Connection(nn.Linear(21, features, bias=bias), batch_norm=batch_norm, dropout=dropout)
    with torch.no_grad():
        for p in connection.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return connection


def prepared(connection: Connection, samples: int = 50) -> tuple[FixedConnection, Tensor]:
    x = images(samples).requires_grad_()
    return connection.prepare((21,), torch.empty(samples), torch.Generator().manual_seed(1), native=True), x


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("features", [16, 37])
def test_drive_and_gradients_are_those_of_torch(batch_norm: bool, bias: bool, dropout: float, features: int) -> None:
    """But for whole numbers, which both have: the rest is float32."""
    mine = stage(batch_norm, bias, dropout, features)
    theirs = copy.deepcopy(mine)
    found = []
    for connection, is_mine in ((mine, True), (theirs, False)):
        first, x = prepared(connection)
        assert input_stage.suits(first, len(x))
        if is_mine:
            drive = input_stage.respond(first, x)
        else:
            drive = first.respond(x, "batch", update_running=True, apply=integers.apply)
        to_drive = torch.randn(drive.shape, generator=torch.Generator().manual_seed(2))
        (drive * to_drive).sum().backward()
        found.append([drive.detach(), x.grad, *(p.grad for p in connection.parameters())])
    for own, other in zip(*found, strict=True):
        largest = max(float(other.abs().max()), 1.0)  # a bias in front of batch norm has the gradient 0
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4 * largest)
    for own, other in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_block_takes_it_with_fast(monkeypatch) -> None:
    calls = []
    respond = input_stage.respond
    monkeypatch.setattr(input_stage, "respond", lambda *a: (calls.append(1), respond(*a))[1])
    for precision, expected in (("fast", 1), ("exact", 1), ("float32", 1)):
        step(block(compile=False, precision=precision, solver=Gmres(1e-3)), images())
        assert len(calls) == expected


def _frozen(net: nn.Module) -> None:
    net.input.bn.eval()


def _hooked(net: nn.Module) -> None:
    net.input.bn.register_forward_hook(lambda *_: None)


def _cumulative(net: nn.Module) -> None:
    net.input.bn.momentum = None


def _without_bias(net: nn.Module) -> None:
    net.input.bn.bias = None


def _without_weight(net: nn.Module) -> None:
    net.input.bn.weight = net.input.bn.bias = None


def _without_running(net: nn.Module) -> None:
    net.input.bn.running_mean = net.input.bn.running_var = None


def _expanded(net: nn.Module) -> None:
    net.input.bn.running_var = torch.ones(()).expand(37)


def _counted_in_float(net: nn.Module) -> None:
    net.input.bn.num_batches_tracked = torch.zeros(())


class _OfPixels(nn.Module):
    """One gain for all samples."""

    def draw(self, like: Tensor, *_: object, **__: object) -> Tensor:
        return torch.linspace(0.5, 1.5, like[0].numel())[None]


CHANGES = [_frozen, _hooked, _cumulative, _without_bias, _without_weight, _without_running]


def test_a_dropout_of_ones_own(monkeypatch) -> None:
    """Its gain is spread over the samples, by the kernels as by torch."""
    found = []
    for suits in (input_stage.suits, lambda *_: False):
        monkeypatch.setattr(input_stage, "suits", suits)
        net = block(compile=False, precision="fast", solver=Gmres(1e-3))
        net.input.dropout = _OfPixels()
        found.append(step(net, images()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert_close(found[0][1], found[1][1], "fast")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, _expanded, _counted_in_float])
def test_what_does_not_suit_is_torchs(change: Callable[[nn.Module], None], compile: bool, monkeypatch) -> None:
    monkeypatch.setattr(input_stage, "respond", lambda *_: pytest.fail("it does not suit"))
    monkeypatch.setattr(input_stage, "forward_stage", lambda *_: pytest.fail("it does not suit"))
    net = block(compile=compile, precision="fast", solver=Gmres(1e-3))
    change(net)
    _, gradients = step(net, images())
    assert float(gradients["input.op.weight"].norm()) > 0


def test_one_sample_is_refused_as_torch_does() -> None:
    net = block(compile=False, precision="fast", solver=Gmres(1e-3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(images(1))


def test_factors_changed_before_the_backward_are_noticed() -> None:
    for name in ("op.weight", "bn.weight"):
        connection = stage(True, True, 0.3)
        first, x = prepared(connection)
        drive = input_stage.respond(first, x)
        with torch.no_grad():
            dict(connection.named_parameters())[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            drive.sum().backward()


def test_it_is_differentiable_once_and_as_often_as_the_graph_is_kept() -> None:
    connection = stage(True, True, 0.3)
    first, x = prepared(connection)
    drive = input_stage.respond(first, x)
    weight = connection.op.weight
    both = [torch.autograd.grad(drive.square().sum(), weight, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*both)
    (once,) = torch.autograd.grad(drive.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        once.sum().backward()
