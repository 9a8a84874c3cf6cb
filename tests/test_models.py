"""The three networks: sizes as in the paper, initial weights, and one training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ide_snn import Gmres, NeuronParams, SNNIDEConvMultiLayerNet, SNNIDEConvNet, SNNIDEFCNet
from ide_snn.optimizations import get_constraint, raw_weight

CIFARNET = {"channels": (128, 256, 512, 1024, 512)}
SIZES = [
    pytest.param(SNNIDEFCNet, (1, 28, 28), 10, {}, 478_811, 1_194, id="F400"),
    pytest.param(SNNIDEConvNet, (1, 28, 28), 10, {}, 229_643, 13_338, id="F64C5-28"),
    pytest.param(SNNIDEConvNet, (2, 34, 34), 10, {"padding": 2}, 290_763, 20_818, id="F64C5-34"),
    pytest.param(SNNIDEConvMultiLayerNet, (3, 32, 32), 10, {}, 3_709_515, 158_730, id="AlexNet-F-10"),
    pytest.param(SNNIDEConvMultiLayerNet, (3, 32, 32), 100, {}, 5_184_165, 158_820, id="AlexNet-F-100"),
    pytest.param(SNNIDEConvMultiLayerNet, (3, 32, 32), 10, CIFARNET, 11_840_011, 232_458, id="CIFARNet-F-10"),
    pytest.param(SNNIDEConvMultiLayerNet, (3, 32, 32), 100, CIFARNET, 14_789_221, 232_548, id="CIFARNet-F-100"),
]


@pytest.mark.parametrize(("network", "shape", "classes", "options", "parameters", "neurons"), SIZES)
def test_sizes(network, shape, classes, options, parameters: int, neurons: int) -> None:
    net = network(shape, classes, **options)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == parameters
    assert net.num_neurons == neurons


@pytest.mark.parametrize(
    "make",
    [
        lambda g: SNNIDEFCNet((1, 6, 6), 4, hidden=12, generator=g),
        lambda g: SNNIDEConvNet((1, 6, 6), 4, channels=5, generator=g),
        lambda g: SNNIDEConvMultiLayerNet((3, 8, 8), 4, channels=(4, 6, 5), strides=(2, 2, 1), generator=g),
    ],
)
def test_initial_weights(make) -> None:
    net, twin, other = (make(torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            rows = raw_weight(module).transpose(0, int(isinstance(module, nn.ConvTranspose2d))).flatten(1)
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
            assert rows.min() < 0 < rows.max()
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    feedback = net.block.feedback.op
    constraint = get_constraint(feedback)
    exact = float(constraint.exact_norm(raw_weight(feedback)))
    assert float(constraint.alpha.detach()) == pytest.approx(exact, rel=1e-3)  # stored unclipped
    assert constraint.alpha > constraint.bound == 1.0
    assert net.block.feedback_diagnostics()["feedback_norm"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("leak", [1.0, 0.95])
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: SNNIDEFCNet((2, 8, 8), 4, hidden=12, **kw),
        lambda **kw: SNNIDEConvNet((2, 8, 8), 4, channels=5, **kw),
        lambda **kw: SNNIDEConvMultiLayerNet((2, 8, 8), 4, channels=(4, 6, 5), strides=(2, 2, 1), **kw),
    ],
)
@pytest.mark.parametrize("with_time", [True, False])
def test_learns_a_batch(make, leak: float, with_time: bool) -> None:
    net = make(
        time_steps=8, dropout=0.0, neuron=NeuronParams(2.0, leak), input_has_time=with_time, solver=Gmres(tol=1e-2)
    )
    x = torch.randn(16, 2, 8, 8)
    if with_time:
        x = torch.rand(8, 16, 2, 8, 8) < 0.3 * x.abs()
    y = torch.randint(0, 4, (16,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.4 * losses[0]


def test_the_feedback_may_have_a_kernel_of_its_own() -> None:
    net = SNNIDEConvNet((1, 8, 8), 3, channels=2, kernel_size=3, padding=1, feedback_kernel_size=5)
    assert net.block.input.op.weight.shape[2:] == (3, 3)
    assert net.block.feedback.op.weight.shape[2:] == (5, 5)
    with pytest.raises(ValueError, match="feedback_kernel_size must be odd"):
        SNNIDEConvNet((1, 8, 8), 3, feedback_kernel_size=4)


@pytest.mark.parametrize("hook", [False, True])
def test_channels_last_rates_have_the_same_logits_and_gradients(hook: bool) -> None:
    """Also where the classifier has hooks, which have to be called."""
    network = SNNIDEConvNet((1, 12, 10), 5, channels=6)
    seen: list[torch.Tensor] = []
    if hook:
        network.classifier.register_forward_hook(lambda _, __, logits: seen.append(logits))
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        rates = torch.rand(3, *network.population_shapes[-1], generator=torch.Generator().manual_seed(0))
        rates = rates.to(memory_format=memory).requires_grad_()
        logits = network._classify(rates)
        found = torch.autograd.grad(logits.square().sum(), [rates, *network.classifier.parameters()])
        results.append((logits, *found))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(seen) == 2 * hook
