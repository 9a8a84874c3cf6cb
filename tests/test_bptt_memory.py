"""What training through time keeps: everything autograd saves in the whole block, counted; and users' modules."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import KINDS, LIF, example_input, warmed_up
from plain_bptt import T, block_of, plain_bptt, saved_bytes, seeded
from torch import nn

from ide_snn import Connection, FeedbackSNN
from ide_snn.bptt import Bptt


def per_step_bytes(kind: str, gradient: Bptt, batch: int = 4) -> tuple[float, int]:
    """(bytes that autograd keeps per time step in the whole block, neurons of the batch), in float32."""
    block = block_of(kind, gradient).float()
    x, kept = example_input(kind, batch=batch).float(), []
    for steps in (12, 36):
        block.time_steps = steps
        kept.append(saved_bytes(lambda: block(x, generator=seeded())))
    neurons = sum(torch.Size(shape).numel() for shape in block.population_shapes(tuple(x.shape[1:])))
    return (kept[1] - kept[0]) / 24, batch * neurons


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_kept_per_step(kind: str) -> None:
    """Connections included: a float32 membrane and a bit per neuron and step; recompute=k: 1/k of the membranes."""
    plain = block_of(kind, Bptt(bn="frozen")).float()
    x, kept = example_input(kind).float(), []
    for plain.time_steps in (12, 36):
        kept.append(saved_bytes(lambda: plain_bptt(plain, x, seeded())))
    populations = len(plain.layers) + 1
    packed, neurons = per_step_bytes(kind, Bptt(bn="frozen"))
    unpacked, _ = per_step_bytes(kind, Bptt(bn="frozen", pack=False))
    recomputed, _ = per_step_bytes(kind, Bptt(bn="frozen", recompute=6))
    assert unpacked == 8 * neurons
    assert neurons / 8 <= packed - 4 * neurons <= neurons / 8 + populations  # bits, padded to whole bytes
    assert packed - 4 * neurons <= (4 * neurons) / 32 + populations
    assert recomputed == pytest.approx(packed - 4 * neurons * 5 / 6)
    assert (kept[1] - kept[0]) / 24 >= 2 * 4 * neurons  # what plain autograd keeps


@pytest.mark.parametrize("bn", ["per_step", "time_batch"])
def test_batch_statistics_keep_next_to_nothing_more(bn: str) -> None:
    """Their responses are computed again; the statistics so far are two numbers per channel."""
    frozen, _ = per_step_bytes("multilayer", Bptt(bn="frozen"))
    other, _ = per_step_bytes("multilayer", Bptt(bn=bn))
    assert other - frozen == (0 if bn == "per_step" else 2 * 4 * (4 + 3))


class Mixing(nn.Module):
    """A user's affine module with batch norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.BatchNorm2d(3)
        self.shift = nn.Parameter(torch.rand(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x) + self.conv(x.flip(-1))) + self.shift + x


def own_block(gradient: Bptt) -> FeedbackSNN:
    torch.manual_seed(0)
    block = FeedbackSNN(
        input=nn.Conv2d(2, 3, 3, 2, 1),
        layers=[Connection(Mixing(), dropout=0.2)],
        feedback=nn.Conv2d(3, 3, 3, padding=1, bias=False),
        neuron=LIF,
        time_steps=T,
        gradient=gradient,
    )
    return warmed_up(block.double())


@pytest.mark.parametrize("recompute", [None, 4])
def test_own_modules_are_differentiated_and_keep_their_bits_only(recompute: int | None) -> None:
    block = own_block(Bptt(bn="frozen", recompute=recompute)).train()
    twin = copy.deepcopy(block)
    x = 2 * example_input("conv")
    found, expected = block(x, generator=seeded()), plain_bptt(twin, x, seeded())
    assert torch.equal(found, expected)
    assert (block.layers[0].op.bn.running_var != twin.layers[0].op.bn.running_var).all()  # updated by f, once
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)
    kept = []
    for block.time_steps in (8, 16):
        kept.append(saved_bytes(lambda: block(x, generator=seeded())))
    neurons, k = 2 * 4 * 48, recompute or 1
    assert (kept[1] - kept[0]) / 8 == neurons * 8 / k + neurons / 8  # float64 membranes


@pytest.mark.parametrize("bn", ["per_step", "time_batch"])
def test_batch_statistics_of_own_modules_are_refused(bn: str) -> None:
    block = own_block(Bptt(bn=bn))
    with pytest.raises(ValueError, match=r"Mixing brings its own.*bn='frozen'"):
        block.train()(example_input("conv"))
    block.eval()(example_input("conv"))
