"""Networks of DSR nodes: sizes, gradients, dropout, training, several processes."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from dsr_nodes import KINDS, SLOW_LIF, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ide_snn.data import DeviceLoader, load_dataset
from ide_snn.dsr import DSRIFNode, DSRLIFNode, record_firing_rates
from ide_snn.dsr_network import DSRClassifier, DSRConvNet, DSRFCNet, DSRStage
from ide_snn.layers import Connection
from ide_snn.training import fit


def small_net(kind: str, *, conv: bool = False, **options: object) -> DSRClassifier:
    settings = {} if kind == "if" else SLOW_LIF
    options = {"node": functools.partial(KINDS[kind], v_threshold=1.0, **settings), "time_steps": 6} | options
    if conv:
        return DSRConvNet((1, 8, 8), 3, channels=(4, 5), strides=(2, 1), pools=(1, 2), kernel_size=3, **options)
    return DSRFCNet((1, 3, 2), 3, hidden=(7, 5), **options)


def example(conv: bool, *lead: int) -> Tensor:
    return 2 * torch.randn(*lead, *((1, 8, 8) if conv else (1, 3, 2)))


def test_sizes() -> None:
    assert small_net("if").num_neurons == 6 + 7 + 5 + 3
    net = small_net("if", conv=True)
    assert net.population_shapes == ((4, 4, 4), (5, 2, 2))
    assert net.num_neurons == 64 + 64 + 20 + 3
    assert net(example(True, 2)).shape == (2, 3)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_constant_input_is_the_repeated_frame(kind: str, conv: bool, training: bool) -> None:
    net = small_net(kind, conv=conv).double().train(training)
    x = example(conv, 4).double()
    constant = net(x)
    net.input_has_time = True
    torch.testing.assert_close(net(x.expand(6, *x.shape)), constant)
    assert net(x.expand(3, *x.shape)).shape == (4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradients_are_those_of_the_representations(kind: str) -> None:
    """dL/dW_2 = C_2 o_1^T and, through W_2, dL/dW_1 = C_1 x^T with C the masked cotangents of the representations."""
    net = small_net(kind, batch_norm=False, input_has_time=True, time_steps=1).double()
    x = example(False, 9, 4).double()
    seen: list[tuple[Tensor, Tensor]] = []
    for stage in net.stages:
        stage.node.register_forward_hook(lambda _m, args, y: seen.append((args[0].detach(), y.detach())))
    cotangent = torch.randn(4, 3, dtype=torch.float64)
    logits = net(x)
    logits.backward(cotangent)
    (current_1, y_1), (current_2, y_2) = seen
    first, second = net.stages
    o_2 = np.tensordot(weights(second.node, 9), y_2.numpy(), 1)
    torch.testing.assert_close(logits, net.classifier(torch.from_numpy(o_2)))

    def masked(stage: DSRStage, current: Tensor, upstream: Tensor) -> Tensor:
        drive = stage.node.average(current) / stage.node.model.tau
        return upstream * ((drive >= 0) & (drive <= 1 / stage.node.model.delta_t)) / stage.node.model.tau

    c_2 = masked(second, current_2, cotangent @ net.classifier.weight.detach())
    c_1 = masked(first, current_1, c_2 @ second.connection.op.weight.detach())
    assert c_1.any()
    torch.testing.assert_close(second.connection.op.weight.grad, c_2.T @ first.node.average(y_1))
    torch.testing.assert_close(first.connection.op.weight.grad, c_1.T @ first.node.average(x.flatten(2)))


def test_dropout_has_one_mask_for_all_steps() -> None:
    stage = DSRStage(Connection(nn.Linear(6, 200)), DSRIFNode(v_threshold=1.0), 0.5)
    nn.init.zeros_(stage.connection.op.weight)
    nn.init.constant_(stage.connection.op.bias, 0.6)  # kept neurons get 1.2 and fire in every step
    x = torch.zeros(5, 3, 6)
    spikes = stage(x, generator=torch.Generator().manual_seed(1)) != 0
    assert torch.equal(spikes.all(0), spikes.any(0))
    assert 0.35 < spikes[0].float().mean() < 0.65
    assert not torch.equal(spikes[0, 0], spikes[0, 1])
    assert torch.equal(spikes, stage(x, generator=torch.Generator().manual_seed(1)) != 0)
    repeated = stage(x[0], repeat=5, generator=torch.Generator().manual_seed(1)) != 0
    assert torch.equal(spikes, repeated)
    assert (stage.eval()(x) != 0).any(0).all()


def test_generator_makes_the_network_reproducible() -> None:
    one, two, other = (DSRFCNet((6,), 3, hidden=5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)


def test_firing_rates() -> None:
    net = small_net("if")
    x = example(False, 4)
    outputs: list[Tensor] = []
    handles = [stage.node.register_forward_hook(lambda _m, _x, y: outputs.append(y)) for stage in net.stages]
    with record_firing_rates(net) as rates:
        net(x)
    for handle in handles:
        handle.remove()
    assert list(rates) == ["population_1", "population_2"]
    for rate, y in zip(rates.values(), outputs, strict=True):
        assert rate.item() == pytest.approx((y > 0).float().mean().item())
        assert 0 < rate < 1
    before = dict(rates)
    net(x[:2])
    assert rates == before
    with record_firing_rates(net) as rates, torch.no_grad():
        net.eval()(torch.full_like(x, math.nan))
    assert all(rate.isnan() for rate in rates.values())


@pytest.mark.parametrize("kind", KINDS)
def test_network_learns_the_digits(kind: str) -> None:
    data = load_dataset("digits")
    common = {"normalization": data.normalization, "batch_size": 32}
    settings = SLOW_LIF | {"v_threshold": 1.0} if kind == "lif" else {"v_threshold": 2.0}
    node = functools.partial(KINDS[kind], **settings)
    net = DSRFCNet((1, 8, 8), 10, hidden=100, node=node, time_steps=10)
    before = net.stages[0].node.v_threshold.item()
    result = fit(
        net,
        DeviceLoader(data.train, shuffle=True, **common),
        DeviceLoader(data.test, shuffle=False, **common),
        optimizer=torch.optim.Adam(net.parameters(), lr=0.005),
        epochs=3,
        progress=False,
    )
    assert result.test_accuracy_last > 0.92
    assert result.neurons == 64 + 100 + 10
    assert net.stages[0].node.v_threshold.item() != before


def test_convolutional_network_learns() -> None:
    torch.manual_seed(0)
    net, x = small_net("if", conv=True), example(True, 60)
    labels = torch.arange(60) % 3
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
    assert (net(x).argmax(1) == labels).float().mean() > 0.9


def ddp_network() -> tuple[DSRClassifier, Tensor]:
    torch.manual_seed(3)
    node = functools.partial(DSRLIFNode, v_threshold=1.0, v_threshold_lower_bound=1.0, **SLOW_LIF)
    net, x = small_net("lif", node=node, batch_norm=False), 2 * example(False, 8)
    with torch.no_grad():
        net.stages[1].node.v_threshold.fill_(0.9)  # below its bound
        net.stages[1].connection.op.weight.mul_(6)  # some of its neurons saturate
    return net, x


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    net, x = ddp_network()
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        ddp(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        optimizer.step()
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_is_training_on_the_whole_batch(tmp_path: Path) -> None:
    # not forked: a fork of a process with threads may wait for ever
    mp.start_processes(ddp_worker, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    net, x = ddp_network()
    start = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for rank in range(2):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value)
            assert not torch.equal(value, start[name]), name
