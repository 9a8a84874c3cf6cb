"""Backpropagation through time: equal to plain autograd over an unpacked loop, with little of its memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import KINDS, example_input, small_block
from plain_bptt import T, block_of, plain_bptt, saved_bytes, seeded

from ide_snn import (
    Implicit,
    NeuronParams,
    SNNIDEConvMultiLayerNet,
    SNNIDEConvNet,
    SNNIDEFCNet,
)
from ide_snn.bptt import Bptt
from ide_snn.record import Record
from ide_snn.surrogate import SURROGATES, ATan, Sigmoid

NETWORKS = {
    "fc": (SNNIDEFCNet, (6,), {"hidden": 16}),
    "conv": (SNNIDEConvNet, (1, 10, 10), {"channels": 4}),
    "multilayer": (SNNIDEConvMultiLayerNet, (1, 8, 8), {"channels": (4, 6, 5), "strides": (2, 1, 2)}),
}


def compare(kind: str, gradient: Bptt, *, leak: float = 0.9, with_time: bool = False, training: bool = True):
    """((value, input's gradient, parameters' gradients) of the block, the same in plain autograd)."""
    block = block_of(kind, gradient, leak=leak, with_time=with_time).train(training)
    twin = copy.deepcopy(block)
    x = 2 * example_input(kind, time_steps=T if with_time else None)
    results = []
    for owner, forward in ((block, block), (twin, lambda *a, generator: plain_bptt(twin, *a, generator))):
        leaf = x.clone().requires_grad_()
        value = forward(leaf, generator=seeded())
        weight = torch.randn(value.shape, dtype=value.dtype, generator=seeded(2))
        grads = torch.autograd.grad((value * weight).sum(), (leaf, *owner.parameters()))
        results.append((value, *grads))
    rate = float(results[0][0].detach().mean())
    assert 0.05 < rate < 0.95
    return results


def assert_equal(results) -> None:
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "leak", "reset"), list(itertools.product(KINDS, [1.0, 0.9], ["soft", "hard"])))
@pytest.mark.parametrize(("pack", "recompute"), [(True, None), (True, 1), (True, 4), (False, None), (False, 4)])
@pytest.mark.parametrize("bn", ["frozen", "per_step"])
def test_gradient_equals_plain_autograd_bit_for_bit(kind, leak, reset, pack, recompute, bn) -> None:
    assert_equal(compare(kind, Bptt(bn=bn, reset=reset, pack=pack, recompute=recompute), leak=leak))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"detach_reset": True},
        {"detach_reset": True, "reset": "hard", "recompute": 3},
        {"truncate": 1},
        {"truncate": 4, "recompute": 3},
        {"output": "spikes"},
        {"output": "spikes", "truncate": 3, "recompute": 20},
        {"recompute": 3, "truncate": 4, "output": "spikes"},
        {"bn": "frozen", "recompute": 3, "truncate": 4, "output": "spikes"},
        {"surrogate": Sigmoid(alpha=1.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_time", [False, True])
def test_every_option_equals_plain_autograd_bit_for_bit(kind: str, options: dict, with_time: bool) -> None:
    assert_equal(compare(kind, Bptt(**options), with_time=with_time))


@pytest.mark.parametrize("kind", ["multilayer", "pooled"])
@pytest.mark.parametrize("options", [{}, {"recompute": 3}, {"truncate": 4, "output": "spikes"}], ids=str)
@pytest.mark.parametrize("with_time", [False, True])
def test_time_batch_equals_autograd_through_all_steps_so_far(kind: str, options: dict, with_time: bool) -> None:
    """The oracle takes mean and variance of the concatenated responses: another order of summation."""
    for found, expected in zip(*compare(kind, Bptt(bn="time_batch", **options), with_time=with_time), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode_has_a_gradient_too(kind: str) -> None:
    assert_equal(compare(kind, Bptt(bn="time_batch"), training=False))


def test_surrogates_change_the_gradient_only() -> None:
    block = block_of("multilayer", Bptt()).eval()
    x, values, grads = 2 * example_input("multilayer"), [], []
    for kind in SURROGATES.values():
        block.gradient = Bptt(surrogate=kind())
        values.append(block(x))
        grads.append(torch.autograd.grad(values[-1].square().sum(), block.input.op.weight)[0])
    assert all(torch.equal(value, values[0]) for value in values)
    assert all(grad.isfinite().all() for grad in grads)
    assert len({float(grad.norm()) for grad in grads}) > len(SURROGATES) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_rates_statistics_and_state_dict_are_those_of_ide(kind: str, with_time: bool, training: bool) -> None:
    """Frozen statistics: same masks, same rates, then the same running statistics, all bit for bit."""
    block = block_of(kind, Bptt(bn="frozen"), with_time=with_time).train(training)
    ide = copy.deepcopy(block)
    ide.gradient = Implicit()
    x = 2 * example_input(kind, time_steps=T if with_time else None)
    for _ in range(2):
        assert torch.equal(block(x, generator=seeded()), ide(x, generator=seeded()))
    mine, theirs = block.state_dict(), ide.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("leak", [1.0, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cores_networks_have_equal_rates(name: str, leak: float, dtype: torch.dtype) -> None:
    kind, shape, options = NETWORKS[name]
    nets, x = [], 2 * torch.randn(16, *shape, dtype=dtype)
    for gradient in (Implicit(), Bptt(bn="frozen", recompute=3)):
        neuron = NeuronParams(2.0, leak)
        net = kind(shape, 3, neuron=neuron, time_steps=12, gradient=gradient, generator=seeded(), **options).to(dtype)
        nets.append(net)
    nets[1].load_state_dict(nets[0].state_dict())
    for training in (True, False, True):
        a, b = (net.train(training)(x, generator=seeded(3)) for net in nets)
        assert torch.equal(a, b)
        assert a.detach().std() > 0
        b.sum().backward()


def test_plain_training_loop_learns() -> None:
    torch.manual_seed(0)
    net = SNNIDEFCNet((6,), 3, hidden=16, time_steps=8, dropout=0.0, gradient=Bptt(recompute=3))
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("bn", ["per_step", "time_batch"])
def test_running_statistics_of_batch_modes(bn: str) -> None:
    """per_step: as torch's batch norm called in every step; time_batch: once, by all T * B samples."""
    block = block_of("multilayer", Bptt(bn=bn)).train()
    twin, chains, x = copy.deepcopy(block), [], 2 * example_input("multilayer")
    with torch.no_grad():
        assert torch.equal(block(x, generator=seeded()), plain_bptt(twin, x, seeded(), chains))
    for layer, old, chain in zip(block.layers, twin.layers, chains, strict=True):
        assert len(chain.responses) == T
        for response in chain.responses if bn == "per_step" else [torch.cat(chain.responses)]:
            old.bn(response)
        torch.testing.assert_close(layer.bn.state_dict(), old.bn.state_dict())


def test_simulation_hooks_fire_and_nothing_is_kept_without_gradient() -> None:
    block = block_of("multilayer", Bptt(), dropout=0.0)
    x, seen = 2 * example_input("multilayer"), []
    block.register_simulation_hook(seen.append)
    block(x)
    assert seen[0].firing_rate.shape == (3,)
    assert 0 < float(seen[0].firing_rate[-1]) < 1
    block.eval()
    with torch.no_grad():
        assert saved_bytes(lambda: block(x)) == 0
        assert not block(x).requires_grad
        for reset in ("soft", "hard"):
            block.gradient = Bptt(reset=reset)
            rates = block.simulate(x, Record(spikes=True))
            assert torch.equal(rates.last, block(x))
            block.gradient = Bptt(reset=reset, output="spikes")
            assert torch.equal(rates.spikes[-1], block(x).bool())
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(lambda: block(x)) == 0


def test_nothing_is_recorded_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary simulation runs, whose memory does not grow with T."""
    block, x = block_of("conv", Bptt()), 2 * example_input("conv")
    monkeypatch.setattr("ide_snn.bptt._Tape", None)
    with torch.no_grad():
        block(x)
    with pytest.raises(TypeError, match="not callable"):
        block(x)


def test_frozen_parameters_get_no_gradient_and_others_do() -> None:
    block = block_of("multilayer", Bptt())
    twin = copy.deepcopy(block)
    block.layers[0].requires_grad_(False)
    x = 2 * example_input("multilayer")
    for owner in (block, twin):
        owner(x, generator=seeded()).square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is None if name.startswith("layers.0") else torch.equal(p.grad, q.grad), name


def test_loss_per_step() -> None:
    """The rate's gradient is that of the weighted spikes."""
    grads = []
    for output in ("rate", "spikes"):
        block = block_of("conv", Bptt(output=output))
        value = block(2 * example_input("conv"), generator=seeded())
        if output == "spikes":
            assert value.shape == (T, 4, 3, 4, 4)
            weights = 0.9 ** torch.arange(T - 1, -1, -1, dtype=torch.float64)
            value = torch.tensordot(weights / weights.sum(), value, 1)
        grads.append(torch.autograd.grad(value.square().sum(), block.input.op.weight)[0])
    torch.testing.assert_close(*grads)


def test_truncation_at_the_end_changes_nothing_and_earlier_ones_do() -> None:
    grads = []
    for truncate in (None, T, 2):
        block = block_of("conv", Bptt(truncate=truncate))
        value = block(2 * example_input("conv"), generator=seeded())
        grads.append(torch.autograd.grad(value.sum(), block.input.op.weight)[0])
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2], rtol=0.01)


def test_deepcopy_second_backward_and_double_backward() -> None:
    block = copy.deepcopy(block_of("conv", Bptt(surrogate=Sigmoid(alpha=3.0), recompute=4)))
    assert block.gradient.surrogate == Sigmoid(alpha=3.0)
    x = 2 * example_input("conv").requires_grad_()
    value = block(x, generator=seeded())
    (first,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        second.sum().backward()


def test_weight_changed_before_backward_is_an_error() -> None:
    block = small_block("fc", batch_norm=False, constraint="none", gradient=Bptt())
    rates = block(2 * example_input("fc"))
    with torch.no_grad():
        block.feedback.op.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rates.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_spikes_of_any_type_as_input(dtype: torch.dtype) -> None:
    block, grads = block_of("conv", Bptt(recompute=3), with_time=True), []
    x = 2 * example_input("conv", time_steps=T) if dtype == torch.float32 else example_input("conv", time_steps=T)
    for frames in (x, x.to(dtype)):
        twin = copy.deepcopy(block)
        value = twin(frames, generator=seeded())
        grads.append((value, *torch.autograd.grad(value.square().sum(), list(twin.parameters()))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("output", ["rate", "spikes"])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_nan_shows(output: str, reset: str) -> None:
    block = block_of("multilayer", Bptt(output=output, reset=reset)).eval()
    block.check_input = False
    x = 2 * example_input("multilayer")
    x[1] = torch.nan
    value = block(x)
    sample = value[:, 1] if output == "spikes" else value[1]
    assert sample.isnan().all()
    assert value.isnan().sum() == sample.numel()
    value.sum().backward()
    assert block.input.op.weight.grad.isnan().any()


def test_autocast_simulates_in_low_precision_and_differentiates_in_full() -> None:
    """Membranes that are computed again are computed in the precision of the forward pass."""
    block = block_of("multilayer", Bptt(bn="frozen", recompute=3)).float()
    once, ide = copy.deepcopy(block), copy.deepcopy(block)
    once.gradient, ide.gradient = Bptt(bn="frozen"), Implicit()
    x = 2 * example_input("multilayer").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, other, rates = (owner(x, generator=seeded()) for owner in (block, once, ide))
    assert value.dtype == torch.float32
    assert torch.equal(value, rates)
    value.square().sum().backward()
    other.square().sum().backward()
    for p, q in zip(block.parameters(), once.parameters(), strict=True):
        assert p.grad.isfinite().all()
        assert torch.equal(p.grad, q.grad)
    assert block.input.op.weight.grad.abs().sum() > 0


def test_equilibrium_has_no_gradient_through_time() -> None:
    block = block_of("conv", Bptt())
    x = example_input("conv")
    with pytest.raises(ValueError, match=r"torch\.no_grad.*Implicit"):
        block.equilibrium(x)
    with torch.no_grad():
        assert block.eval().equilibrium(x)[1].outcome == "converged"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'frozen', 'per_step', 'time_batch'"):
        Bptt(bn="batch")
    with pytest.raises(ValueError, match="'rate', 'spikes'"):
        Bptt(output="rates")
    with pytest.raises(ValueError, match="'soft', 'hard'"):
        Bptt(reset="zero")
    for name in ("truncate", "recompute"):
        for value in (0, 2.0, True):
            with pytest.raises(ValueError, match=name):
                Bptt(**{name: value})
    with pytest.raises(TypeError, match="surrogate"):
        Bptt(surrogate="atan")
    with pytest.raises(ValueError, match="spiking=True"):
        Bptt(surrogate=ATan(spiking=False))
