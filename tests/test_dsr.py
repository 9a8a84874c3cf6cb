"""DSR nodes against golden values, finite differences and closed forms; networks of them in training."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ide_snn.data import DeviceLoader, load_dataset
from ide_snn.dsr import DSRIFNode, DSRLIFNode, DSRNode, record_firing_rates
from ide_snn.dsr_network import DSRClassifier, DSRConvNet, DSRFCNet, DSROptions, DSRStage
from ide_snn.layers import Connection
from ide_snn.training import fit

KINDS: dict[str, type[DSRNode]] = {"if": DSRIFNode, "lif": DSRLIFNode}
SLOW_LIF = {"tau": 2.0, "delta_t": 0.5}  # leak 0.78: the time weights matter
GOLDEN = [
    pytest.param(path, case, id=f"{path.stem}-{case}")
    for path in golden_files("spikingjelly/*.npz")
    for case in sorted({key.split("/")[0] for key in np.load(path, allow_pickle=False).files if key.startswith("dsr_")})
]


def gradients(node: DSRNode, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dL/dx, dL/dV_th) for L = sum cotangent * y."""
    x = x.clone().requires_grad_()
    y = node(x)
    return y.detach(), *torch.autograd.grad(y, (x, node.v_threshold), cotangent)


@pytest.mark.parametrize(("path", "case"), GOLDEN)
def test_golden_outputs_and_gradients(path: Path, case: str) -> None:
    with np.load(path, allow_pickle=False) as data:
        config = json.loads(str(data[f"{case}/config"]))
        names = ("x", "cotangent", "y", "grad_x", "grad_v_threshold")
        x, cotangent, *expected = (torch.from_numpy(np.asarray(data[f"{case}/{name}"])) for name in names)
    assert len(x) == config.pop("T")
    node = KINDS[case.split("_")[1]](compat="spikingjelly", **config)
    for got, wanted in zip(gradients(node, x, cotangent), expected, strict=True):
        # the absolute part is for what is 0 but for the rounding of float32
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_golden_has_both_kinds_and_the_default_differs_for_lif() -> None:
    kinds = {case.values[1].split("_")[1] for case in GOLDEN}  # type: ignore[union-attr]
    assert kinds == {"if", "lif"}
    x, cotangent = 100 * torch.randn(6, 5, 40), torch.randn(6, 5, 40)
    for kind, same in (("if", True), ("lif", False)):
        default, peer = (gradients(KINDS[kind](compat=c), x, cotangent) for c in ("none", "spikingjelly"))
        assert torch.equal(default[0], peer[0])
        for a, b in zip(default[1:], peer[1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) == same


@st.composite
def nodes(draw: st.DrawFn) -> tuple[DSRNode, int, tuple[int, ...], int]:
    """(node in float64, T, shape [B, *], seed)."""
    kind = draw(st.sampled_from(["if", "lif"]))
    config = {"v_threshold": draw(st.floats(0.2, 6)), "alpha": draw(st.floats(0.1, 1))}
    if kind == "lif":
        config |= {"tau": draw(st.floats(0.3, 4)), "delta_t": draw(st.floats(0.02, 1))}
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    return KINDS[kind](**config).double(), draw(st.integers(1, 9)), shape, draw(st.integers(0, 999))


def weights(node: DSRNode, steps: int) -> NDArray[np.float64]:
    w = np.array([math.exp(-(steps - 1 - t) * node.model.delta_t / node.model.tau) for t in range(steps)])
    return np.ones(steps) / steps if isinstance(node, DSRIFNode) else w / w.sum()


def representation(node: DSRNode, x: NDArray[np.float64], v_threshold: float) -> NDArray[np.float64]:
    """The clamp in numpy, [B, *]."""
    drive = np.tensordot(weights(node, len(x)), x, 1) / node.model.tau
    return drive.clip(0, v_threshold / node.model.delta_t)


def current_for(node: DSRNode, shape: tuple[int, ...], seed: int) -> Tensor:
    """Float64 input [T, B, *] that leaves neurons silent, in between and saturated."""
    top = node.v_threshold.item() / node.model.delta_t * node.model.tau
    generator = torch.Generator().manual_seed(seed)
    return top * (0.5 + 1.5 * torch.randn(shape, dtype=torch.float64, generator=generator))


@settings(max_examples=40, deadline=None)
@given(nodes())
def test_gradients_are_finite_differences_of_the_representation(
    drawn: tuple[DSRNode, int, tuple[int, ...], int],
) -> None:
    node, steps, shape, seed = drawn
    x = current_for(node, (steps, *shape), seed)
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    v_threshold = node.v_threshold.item()
    _, grad_x, grad_v = gradients(node, x, cotangent)

    def loss(x: NDArray[np.float64], v_threshold: float) -> float:
        return float((cotangent.numpy() * representation(node, x, v_threshold)).sum())

    h = 1e-6 * v_threshold
    drive = np.tensordot(weights(node, steps), x.numpy(), 1) / node.model.tau
    kink = np.minimum(abs(drive), abs(drive - v_threshold / node.model.delta_t))
    if kink.min() < 10 * h / min(node.model.delta_t, node.model.tau, 1):
        return  # a finite difference across a kink is no derivative
    numeric = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        moved = np.zeros(x.shape)
        moved[index] = h
        numeric[index] = (loss(x.numpy() + moved, v_threshold) - loss(x.numpy() - moved, v_threshold)) / (2 * h)
    numeric_v = (loss(x.numpy(), v_threshold + h) - loss(x.numpy(), v_threshold - h)) / (2 * h)
    scale = max(1.0, float(cotangent.abs().sum()) / node.model.delta_t)
    np.testing.assert_allclose(grad_x.numpy(), numeric, rtol=1e-6, atol=1e-7 * scale)
    assert grad_v.item() == pytest.approx(numeric_v, rel=1e-6, abs=1e-7 * scale)


@settings(max_examples=30, deadline=None)
@given(nodes())
def test_gradients_are_those_of_the_differentiable_representation(
    drawn: tuple[DSRNode, int, tuple[int, ...], int],
) -> None:
    node, steps, shape, seed = drawn
    x = current_for(node, (steps, *shape), seed).requires_grad_()
    o = node.representation(x)
    np.testing.assert_allclose(o.detach().numpy(), representation(node, x.detach().numpy(), node.v_threshold.item()))
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    plain = torch.autograd.grad(o.expand(x.shape), (x, node.v_threshold), cotangent)
    for a, b in zip(gradients(node, x.detach(), cotangent)[1:], plain, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(nodes())
def test_spikes_follow_the_equations(drawn: tuple[DSRNode, int, tuple[int, ...], int]) -> None:
    node, steps, shape, seed = drawn
    v_threshold, model = node.v_threshold.item(), node.model
    leak = 1.0 if isinstance(node, DSRIFNode) else math.exp(-model.delta_t / model.tau)
    gain = 1.0 if isinstance(node, DSRIFNode) else 1 - leak
    x = current_for(node, (steps, *shape), seed)
    v, expected, margin = np.zeros(shape), [], np.inf
    for frame in x.numpy():
        u = leak * v + gain * frame
        margin = min(margin, float(abs(u - node.alpha * v_threshold).min()))
        spikes = (u >= node.alpha * v_threshold).astype(float)
        v = u - v_threshold * spikes
        expected.append(spikes * v_threshold / model.delta_t)
    if margin > 1e-9:
        np.testing.assert_allclose(node(x).detach().numpy(), np.stack(expected))


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_if_rounds_a_constant_current_to_the_nearest_count(steps: int) -> None:
    node = DSRIFNode(v_threshold=3.0, alpha=0.5).double()
    x = torch.linspace(-1, 4, 301, dtype=torch.float64)[None] + 1e-4
    count = (node(x.expand(steps, *x.shape)) != 0).sum(0)
    assert torch.equal(count, (steps * x / 3).round().clamp(0, steps).long())


def test_equality_fires_and_passes_the_gradient() -> None:
    x = torch.tensor([[-0.1, 0.0, 0.9, 1.0, 2.0, 2.1]])
    y, grad_x, grad_v = gradients(DSRIFNode(v_threshold=2.0, alpha=0.5), x, torch.ones_like(x))
    assert y[0].tolist() == [0, 0, 0, 2, 2, 2]
    assert grad_x[0].tolist() == [0, 1, 1, 1, 1, 0]
    assert grad_v.item() == 1


@pytest.mark.parametrize(("compat", "passes"), [("none", 1), ("spikingjelly", 0)])
def test_lif_gradient_at_equality(compat: str, passes: int) -> None:
    x = torch.tensor([[-0.1, 0.0, 0.1, 4.0, 4.1]])
    node = DSRLIFNode(v_threshold=2.0, tau=1.0, delta_t=0.5, compat=compat)
    _, grad_x, grad_v = gradients(node, x, torch.ones_like(x))
    assert grad_x[0].tolist() == [0, passes, 1, passes, 0]
    assert grad_v.item() == (2 if compat == "none" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_spike_representation_approaches_the_clamp(kind: str) -> None:
    # delta_t / tau = 0.01: the paper's 1 / tau then is within 1 % of the exact (1 - leak) / delta_t
    node = (DSRIFNode(v_threshold=2.0) if kind == "if" else DSRLIFNode(tau=1.0, delta_t=0.01, alpha=0.5)).double()
    top = node.v_threshold.item() / node.model.delta_t
    x = (top * torch.linspace(-0.5, 1.5, 41, dtype=torch.float64)).expand(1000, 1, 41)
    error = (node.average(node(x)) - node.representation(x)).abs().max().item()
    assert error < (2e-3 if kind == "if" else 2e-2) * top


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_gradient_scaling(kind: str) -> None:
    x, cotangent = 20 * torch.randn(5, 4, 30), torch.randn(5, 4, 30)
    plain, scaled = (gradients(KINDS[kind](v_threshold_grad_scaling=s), x, cotangent) for s in (1.0, 0.25))
    assert torch.equal(plain[1], scaled[1])
    torch.testing.assert_close(0.25 * plain[2], scaled[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compat", ["none", "spikingjelly"])
def test_lower_bound_is_used_but_never_stored(kind: str, compat: str) -> None:
    bounded = KINDS[kind](v_threshold_lower_bound=0.5, compat=compat)
    at_bound = KINDS[kind](v_threshold=0.5, v_threshold_lower_bound=0.5, compat=compat)
    with torch.no_grad():
        bounded.v_threshold.fill_(-0.2)
    x, cotangent = 20 * torch.randn(5, 4, 30), torch.rand(5, 4, 30)
    low, reference = gradients(bounded, x, cotangent), gradients(at_bound, x, cotangent)
    assert bounded.v_threshold.item() == pytest.approx(-0.2)
    assert torch.equal(low[0], reference[0])
    assert torch.equal(low[1], reference[1])
    assert reference[2] > 0
    assert low[2] == (reference[2] if compat == "none" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_memory_does_not_depend_on_time_steps(kind: str) -> None:
    def kept_bytes(steps: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            KINDS[kind]()(torch.randn(steps, 4, 30, requires_grad=True))
        return sum(sizes)

    assert 0 < kept_bytes(2) == kept_bytes(50) <= 2 * 4 * 30 + 4


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_do_not_look_like_silence(kind: str) -> None:
    for bad in (math.nan, -math.inf):
        x = torch.zeros(4, 2, 3)
        x[1, 0, 2] = bad
        y = KINDS[kind]()(x)
        assert y.isnan().any(0).nonzero().tolist() == [[0, 2]]


def test_node_is_an_ordinary_module() -> None:
    node = DSRLIFNode(v_threshold=1.5)
    assert [name for name, _ in node.named_parameters()] == ["v_threshold"]
    assert node.v_threshold.shape == ()
    fixed = DSRLIFNode(v_threshold=1.0, v_threshold_training=False)
    assert not list(fixed.parameters())
    fixed.load_state_dict(node.state_dict())
    x = 20 * torch.randn(3, 2, 5, requires_grad=True)
    y = copy.deepcopy(node)(x)
    assert torch.equal(y, fixed(x))
    assert "v_threshold=1.5 (learned), alpha=0.3, tau=2.0" in repr(node)
    assert "compat=spikingjelly" in repr(DSRIFNode(compat="spikingjelly"))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_half_precision_sums_in_float32() -> None:
    x = torch.full((1000, 1, 1), 0.01, dtype=torch.bfloat16)  # bfloat16 sums stall near 2
    y = DSRIFNode(v_threshold=8.0, alpha=1.0)(x)
    assert y.dtype == torch.bfloat16
    assert (y != 0).sum() == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DSRIFNode(v_threshold=0), "v_threshold"),
        (lambda: DSRIFNode(v_threshold=0.001), "lower_bound"),
        (lambda: DSRIFNode(v_threshold=math.nan), "v_threshold"),
        (lambda: DSRIFNode(v_threshold_lower_bound=0), "v_threshold_lower_bound"),
        (lambda: DSRIFNode(v_threshold_grad_scaling=-1), "v_threshold_grad_scaling"),
        (lambda: DSRIFNode(alpha=1.5), "alpha"),
        (lambda: DSRIFNode(alpha=0), "alpha"),
        (lambda: DSRIFNode(compat="snntorch"), "none, spikingjelly"),
        (lambda: DSRLIFNode(tau=0), "tau"),
        (lambda: DSRLIFNode(delta_t=-0.1), "delta_t"),
        (lambda: DSRIFNode()(torch.zeros(3)), "T, B"),
        (lambda: DSRIFNode()(torch.zeros(0, 2, 3)), "T >= 1"),
        (lambda: DSRIFNode()(torch.zeros(2, 2, dtype=torch.bool)), "floating-point"),
        (lambda: DSRFCNet((4,), 1), "num_classes"),
        (lambda: DSRFCNet((4,), 2, hidden=()), "hidden"),
        (lambda: DSRFCNet((4,), 2, hidden=[3, 0]), "hidden"),
        (lambda: DSRFCNet((4,), 2, time_steps=0), "time_steps"),
        (lambda: DSRFCNet((4,), 2, hidden=3)(torch.zeros(2, 5)), r"\['B', 4\]"),
        (lambda: DSRFCNet((4,), 2, hidden=3, input_has_time=True)(torch.zeros(0, 2, 4)), r"\['T', 'B', 4\]"),
        (lambda: DSRConvNet((8, 8), 2), r"\[C, H, W\]"),
        (lambda: DSRConvNet((1, 8, 8), 2, channels=(3, 3), strides=(1,)), "same length"),
        (lambda: DSRConvNet((1, 8, 8), 2, channels=(3,), strides=(1,), pools=(1, 2)), "same length"),
        (lambda: DSRConvNet((1, 8, 8), 2, kernel_size=4), "odd"),
        (lambda: DSRConvNet((1, 8, 8), 2, channels=(3,), strides=(1,), pools=(9,)), "pool"),
        (lambda: DSRClassifier((), (4,), 2, DSROptions()), "at least one stage"),
        (lambda: DSRStage(Connection(nn.Linear(2, 2), dropout=0.1), DSRIFNode()), "dropout"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="tau"):
        DSRFCNet((4,), 2, tau=2.0)


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
