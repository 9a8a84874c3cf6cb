"""Multi-step neurons against a plain autograd loop, and spikes kept as bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_bptt import one_step, saved_bytes
from torch import Tensor, nn

from ide_snn.neurons import NeuronParams
from ide_snn.operators import Operator
from ide_snn.spiking import Firing, apply_to_spikes, multi_step, pack_bits, unpack_bits
from ide_snn.surrogate import ATan, Sigmoid, SuperSpike

LEAKS = [1.0, 0.9]
RESETS = ["soft", "hard"]
FORMS = ["charge_fire_reset", "fused"]


def plain(current: Tensor, u: Tensor, neuron: NeuronParams, surrogate, reset: str, detach: bool):
    train = []
    for frame in current:
        s, u = one_step(u, frame, neuron, surrogate, reset, detach)
        train.append(s)
    return torch.stack(train), u


def problem(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    current = 1.5 * torch.randn(7, 3, 2, 5, dtype=dtype) + 0.6
    return current.requires_grad_(), torch.randn(3, 2, 5, dtype=dtype).requires_grad_()


def gradients(outputs, inputs, cotangents=None):
    cotangents = cotangents or [torch.randn(y.shape, dtype=y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents), cotangents


@pytest.mark.parametrize(("leak", "reset", "detach"), list(itertools.product(LEAKS, RESETS, [False, True])))
@pytest.mark.parametrize("recompute", [None, 1, 3, 20])
@pytest.mark.parametrize("surrogate", [ATan(), SuperSpike()])
def test_equals_plain_autograd_bit_for_bit(leak, reset, detach, recompute, surrogate) -> None:
    current, u0 = problem()
    neuron = NeuronParams(1.3, leak)
    expected = plain(current, u0, neuron, surrogate, reset, detach)
    found = multi_step(current, u0, neuron, surrogate, reset=reset, detach_reset=detach, recompute=recompute)
    want, cotangents = gradients(expected, (current, u0))
    got, _ = gradients(found, (current, u0), cotangents)
    assert 0.1 < float(expected[0].detach().mean()) < 0.9
    for a, b in zip((*expected, *want), (*found, *got), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("leak", [1.0, 0.5, 0.9])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("recompute", [None, 3])
def test_fused_form_is_the_same_model(leak: float, reset: str, recompute: int | None) -> None:
    """Bit for bit where leak times membrane is exact, to the last digits where it is rounded."""
    current, u0 = problem()
    neuron = NeuronParams(1.3, leak)
    runs = [multi_step(current, u0, neuron, reset=reset, form=form, recompute=recompute) for form in FORMS]
    want, cotangents = gradients(runs[0], (current, u0))
    got, _ = gradients(runs[1], (current, u0), cotangents)
    assert torch.equal(runs[0][0], runs[1][0])
    for a, b in zip((runs[0][1], *want), (runs[1][1], *got), strict=True):
        if leak == 0.9:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("leak", LEAKS)
def test_hard_reset_fused_is_the_equation_of_lisnn(leak: float) -> None:
    current, _ = problem()
    spikes, _ = multi_step(current, params=NeuronParams(1.3, leak), reset="hard", form="fused")
    u, s = torch.zeros_like(current[0]), torch.zeros_like(current[0])
    for t, x in enumerate(current):
        u = u * leak * (1 - s) + x
        s = (u >= 1.3).double()
        assert torch.equal(spikes[t], s)


@pytest.mark.parametrize(("leak", "reset", "form"), list(itertools.product(LEAKS, RESETS, FORMS)))
@pytest.mark.parametrize("recompute", [None, 2])
def test_gradient_is_that_of_finite_differences_in_primitive_mode(leak, reset, form, recompute) -> None:
    current, u0 = problem()
    current, u0 = current[:4, :1, 0].detach().requires_grad_(), u0[:1, 0].detach().requires_grad_()
    options = {"surrogate": Sigmoid(spiking=False), "reset": reset, "form": form, "recompute": recompute}
    assert torch.autograd.gradcheck(
        lambda x, u: multi_step(x, u, NeuronParams(1.3, leak), **options), (current, u0), atol=1e-6
    )


@pytest.mark.parametrize(("reset", "form"), list(itertools.product(RESETS, FORMS)))
def test_state_is_explicit(reset: str, form: str) -> None:
    """Two halves are the whole, a second backward of another forward is no trouble, and inputs are not changed."""
    current, u0 = problem()
    before = current.detach().clone(), u0.detach().clone()
    run = lambda x, u: multi_step(x, u, NeuronParams(1.3, 0.5), reset=reset, form=form)  # noqa: E731
    whole, last = run(current, u0)
    first, middle = run(current[:3], u0)
    second, end = run(current[3:], middle)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(end, last)
    weight = torch.randn_like(whole)
    want = torch.autograd.grad((whole * weight).sum() + last.sum(), (current, u0))
    got = torch.autograd.grad((torch.cat([first, second]) * weight).sum() + end.sum(), (current, u0))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert torch.equal(current, before[0])
    assert torch.equal(u0, before[1])


@pytest.mark.parametrize(("reset", "form"), list(itertools.product(RESETS, FORMS)))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_membrane_shows_in_spikes_and_state(reset: str, form: str, value: float) -> None:
    current, u0 = (x.detach() for x in problem())
    current[2, 1, 0, 3] = value
    spikes, last = multi_step(current, u0, NeuronParams(1.3, 0.9), reset=reset, form=form)
    broken = torch.zeros(3, 2, 5, dtype=torch.bool)
    broken[1, 0, 3] = True
    assert torch.equal(~last.isfinite(), broken)
    assert torch.equal(spikes.isnan(), broken.expand_as(spikes))


def test_kept_is_one_membrane_per_step_and_spike_trains_cost_nothing() -> None:
    steps, frame = 12, torch.randn(4, 50, requires_grad=True)
    size = frame.numel() * 4

    def run(recompute: int | None) -> int:
        return saved_bytes(lambda: multi_step(frame.expand(steps, 4, 50), recompute=recompute))

    assert run(None) == steps * size
    assert run(4) == (steps // 4) * size + size  # three starts, and the constant current once


def test_half_precision_current_has_float32_membranes() -> None:
    current = torch.randn(5, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    spikes, last = multi_step(current)
    assert spikes.dtype == last.dtype == torch.float32
    spikes.sum().backward()
    assert current.grad.dtype == torch.bfloat16
    assert current.grad.abs().sum() > 0


def test_no_gradient_no_memory() -> None:
    current, _ = problem()
    with torch.no_grad():
        assert saved_bytes(lambda: multi_step(current)) == 0
        assert not multi_step(current)[0].requires_grad


def test_double_backward_raises() -> None:
    current, u0 = problem()
    (g,) = torch.autograd.grad(multi_step(current, u0)[0].square().sum(), current, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        g.sum().backward()


def test_mistakes_are_named() -> None:
    current, u0 = problem()
    with pytest.raises(ValueError, match="'soft', 'hard'"):
        multi_step(current, reset="subtract")
    with pytest.raises(ValueError, match="'charge_fire_reset', 'fused'"):
        multi_step(current, form="lisnn")
    with pytest.raises(ValueError, match="recompute"):
        multi_step(current, recompute=0)
    with pytest.raises(ValueError, match="T >= 1"):
        multi_step(current[0, 0, 0])
    with pytest.raises(ValueError, match="T >= 1"):
        multi_step(current[:0])
    with pytest.raises(ValueError, match="u0 must have shape"):
        multi_step(current, u0[:1])
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        multi_step(current, u0.float())
    with pytest.raises(TypeError, match="floating point"):
        multi_step(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="surrogate"):
        Firing(surrogate="atan")


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 10**6), density=st.floats(0, 1))
def test_bits_round_trip(shape: list[int], seed: int, density: float) -> None:
    spikes = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    for dtype in (torch.float32, torch.float64, torch.bool, torch.bfloat16):
        bits = pack_bits(spikes.to(dtype))
        assert bits.dtype == torch.uint8
        assert bits.numel() == -(-spikes.numel() // 8)
        assert torch.equal(unpack_bits(bits, tuple(shape), dtype), spikes.to(dtype))


def test_bits_of_strided_tensors() -> None:
    spikes = (torch.rand(3, 4, 5, 6) < 0.5).float()
    for strided in (spikes.transpose(0, 2), spikes[:, ::2], spikes.to(memory_format=torch.channels_last)):
        assert torch.equal(unpack_bits(pack_bits(strided), tuple(strided.shape), torch.float32), strided)
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1])).tolist() == [129, 2]


MODULES = {
    "linear": (lambda: nn.Linear(11, 4), (11,)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, 2, 1, groups=2), (2, 7, 6)),
    "conv_transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, bias=False), (2, 4, 5)),
}


@pytest.mark.parametrize("name", MODULES)
def test_connection_of_packed_spikes_equals_the_module(name: str) -> None:
    make, shape = MODULES[name]
    module = make().double()
    operator = Operator.of(module)
    values = (torch.rand(8, *shape) < 0.4).double()
    a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, found = module(a), apply_to_spikes(operator, b, module.weight, module.bias)
    assert torch.equal(expected, found)
    g = torch.randn_like(expected)
    parameters = list(module.parameters())
    for want, got in zip(
        torch.autograd.grad(expected, (a, *parameters), g), torch.autograd.grad(found, (b, *parameters), g), strict=True
    ):
        assert torch.equal(want, got)
    weight = module.weight.numel() * 8
    bits = -(-values.numel() // 8)
    assert saved_bytes(lambda: apply_to_spikes(operator, b, module.weight, module.bias)) == weight + bits
    with pytest.raises(ValueError, match="0 or 1"):
        apply_to_spikes(operator, values * 0.5, module.weight)
    with pytest.raises(ValueError, match="0 or 1"):
        apply_to_spikes(operator, values * torch.nan, module.weight)
