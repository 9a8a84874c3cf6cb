"""DSR nodes against golden values, finite differences and closed forms."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OWN_GOLDEN, golden_files
from dsr_nodes import KINDS, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ide_snn.dsr import DSRIFNode, DSRLIFNode, DSRNode
from ide_snn.dsr_network import DSRClassifier, DSRConvNet, DSRFCNet, DSROptions, DSRStage
from ide_snn.layers import Connection


def cases_of(path: Path) -> list[str]:
    return sorted({key.split("/")[0] for key in np.load(path, allow_pickle=False).files if key.startswith("dsr_")})


def golden_cases(paths: Iterable[Path]) -> list[Any]:
    return [pytest.param(path, case, id=f"{path.stem}-{case}") for path in paths for case in cases_of(path)]


# files of others may have surrogates only
GOLDEN = golden_cases(golden_files("spikingjelly/*.npz")) or golden_cases(OWN_GOLDEN.glob("spikingjelly/*.npz"))


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
        # the absolute part is for what is 0 but for the rounding of float32, and for the sum over all cotangents
        terms = wanted.abs().max() if wanted.dim() else 0.1 * cotangent.abs().sum()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(terms))


def test_golden_has_both_kinds_and_the_default_differs_for_lif() -> None:
    kinds = {case.split("_")[1] for path in OWN_GOLDEN.glob("spikingjelly/*.npz") for case in cases_of(path)}
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
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
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
