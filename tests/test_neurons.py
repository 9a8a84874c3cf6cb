"""The neuron's step, its rates and the activation of its equilibrium, against plain Python."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ide_snn.neurons import NeuronParams, rate_weights, sigma, sigma_mask, step, step_, time_average

NEURONS = [NeuronParams(2.0, 1.0), NeuronParams(2.0, 0.95), NeuronParams(0.3, 0.5)]
modest = settings(max_examples=50, deadline=None, derandomize=True)
leaks = st.one_of(st.just(1.0), st.floats(0.05, 1.0))


def run(currents: torch.Tensor, params: NeuronParams) -> tuple[torch.Tensor, torch.Tensor]:
    u, spikes = torch.zeros_like(currents[0]), []
    for current in currents:
        s, u = step(current, u, params)
        spikes.append(s)
    return torch.stack(spikes), u


@pytest.mark.parametrize("params", NEURONS)
def test_step_equals_a_plain_loop(params: NeuronParams) -> None:
    currents = torch.randn(40, 3, dtype=torch.float64) + 0.7
    spikes, u = run(currents, params)
    fired = 0
    for b in range(3):
        membrane = 0.0
        for t in range(40):
            membrane += float(currents[t, b])
            spike = 1.0 if membrane >= params.v_threshold else 0.0
            membrane = params.leak * (membrane - params.v_threshold * spike)
            assert float(spikes[t, b]) == spike
            fired += int(spike)
        assert float(u[b]) == pytest.approx(membrane, abs=1e-14)
    assert 0 < fired < 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("params", NEURONS)
def test_step_is_pure_and_the_one_in_place_rounds_alike(params: NeuronParams, dtype: torch.dtype) -> None:
    u = torch.randn(64, 7, dtype=dtype)
    v, spikes_in_place = u.clone(), torch.empty_like(u)
    total = 0.0
    for _ in range(20):
        current = torch.randn(64, 7, dtype=dtype) + 0.5
        given_current, given_u = current.clone(), u.clone()
        spikes, u_next = step(current, u, params)
        assert torch.equal(current, given_current)
        assert torch.equal(u, given_u)
        step_(current, v, spikes_in_place, params)
        assert torch.equal(current, given_current)
        assert torch.equal(spikes, spikes_in_place)
        assert torch.equal(u_next, v)
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}
        u, total = u_next, total + float(spikes.sum())
    assert total > 0


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_equality_fires(leak: float) -> None:
    at = torch.tensor([2.0, math.nextafter(2.0, 0.0), math.nextafter(2.0, 3.0)], dtype=torch.float64)
    spikes, u = step(at, torch.zeros(3, dtype=torch.float64), NeuronParams(2.0, leak))
    assert spikes.tolist() == [1.0, 0.0, 1.0]
    assert float(u[0]) == 0
    assert float(u[1]) == leak * math.nextafter(2.0, 0.0)


@modest
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 200),
    v=st.floats(0.1, 5.0),
    mean=st.floats(-0.5, 3.0),
    leak=leaks,
)
def test_charge_is_conserved(seed: int, steps: int, v: float, mean: float, leak: float) -> None:
    """IF: sum of inputs = V_th * count + remaining membrane; with a leak every term fades by its age."""
    generator = torch.Generator().manual_seed(seed)
    currents = torch.randn(steps, 4, generator=generator, dtype=torch.float64) + mean
    spikes, u = run(currents, NeuronParams(v, leak))
    fade = torch.tensor([leak ** (steps - t) for t in range(steps)], dtype=torch.float64)[:, None]
    if leak == 1:
        torch.testing.assert_close(currents.sum(0), v * spikes.sum(0) + u, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close((fade * currents).sum(0), v * (fade * spikes).sum(0) + u, rtol=1e-12, atol=1e-10)


def test_leaky_membrane_under_constant_input_has_its_closed_form() -> None:
    leak, current = 0.9, 0.15
    params = NeuronParams(2.0, leak)
    u = torch.zeros(1, dtype=torch.float64)
    for t in range(1, 60):
        spikes, u = step(torch.full((1,), current, dtype=torch.float64), u, params)
        assert float(spikes) == 0  # the limit 1.35 stays below the threshold
        assert float(u) == pytest.approx(current * leak * (1 - leak**t) / (1 - leak), rel=1e-13)


@pytest.mark.parametrize("v", [0.0, -1.0, math.nan, math.inf])
def test_bad_thresholds_are_refused(v: float) -> None:
    with pytest.raises(ValueError, match="v_threshold must be a positive finite number"):
        NeuronParams(v_threshold=v)


@pytest.mark.parametrize("value", ["2", None, [1.0]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="v_threshold must be a number"):
        NeuronParams(v_threshold=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="leak must be a number"):
        NeuronParams(leak=value)  # type: ignore[arg-type]
    assert NeuronParams(np.float32(2), np.float64(0.5)).leak == 0.5


@pytest.mark.parametrize("leak", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_bad_leaks_are_refused(leak: float) -> None:
    with pytest.raises(ValueError, match=r"leak must lie in \(0, 1\]"):
        NeuronParams(leak=leak)


def test_params_are_values() -> None:
    assert NeuronParams(2.0, 0.95) == NeuronParams(2.0, 0.95)
    assert hash(NeuronParams(2.0, 0.95)) == hash(NeuronParams(2.0, 0.95))
    with pytest.raises(dataclasses.FrozenInstanceError):
        NeuronParams().leak = 0.5  # type: ignore[misc]


@modest
@given(time_steps=st.integers(1, 300), leak=leaks)
def test_rate_weights_follow_the_formula(time_steps: int, leak: float) -> None:
    raw = [leak ** (time_steps - t) for t in range(1, time_steps + 1)]
    weights = rate_weights(time_steps, leak)
    assert weights.shape == (time_steps,)
    assert weights.tolist() == pytest.approx([w / math.fsum(raw) for w in raw], rel=1e-11, abs=1e-300)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert NeuronParams(2.0, leak).total_weight(time_steps) == pytest.approx(math.fsum(raw), rel=1e-9)
    assert rate_weights(time_steps, leak, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("leak", [1.0, 0.95, 0.3])
def test_time_average_weights_the_frames_in_order(leak: float) -> None:
    """The original's leaky mean shifted the frames by one around the end: +20 % at leak 0.95 and T = 30."""
    steps = 30
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    before = x.clone()
    total = math.fsum(leak ** (steps - t) for t in range(1, steps + 1))
    expected = sum(leak ** (steps - t) * x[t - 1] for t in range(1, steps + 1)) / total
    torch.testing.assert_close(time_average(x, leak, torch.float64), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(x, before)
    for t in range(steps):  # one frame at a time: which weight it has
        pulse = torch.zeros(steps, 1, dtype=torch.float64)
        pulse[t] = 1
        assert float(time_average(pulse, leak, torch.float64)) == pytest.approx(leak ** (steps - 1 - t) / total)


def test_time_average_of_a_constant_is_the_constant() -> None:
    x = torch.ones(30, 4)
    torch.testing.assert_close(time_average(x, 0.95, torch.float32), torch.ones(4))


def test_time_average_takes_bool_spikes_and_passes_gradients() -> None:
    spikes = torch.rand(9, 2, 5) < 0.4
    average = time_average(spikes, 0.8, torch.float64)
    torch.testing.assert_close(average, time_average(spikes.double(), 0.8, torch.float64), rtol=0, atol=0)
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    time_average(x, 0.8, torch.float64).sum().backward()
    torch.testing.assert_close(x.grad, rate_weights(9, 0.8)[:, None].expand(9, 2))


def test_the_average_of_spikes_is_the_firing_rate() -> None:
    params = NeuronParams(2.0, 0.95)
    currents = torch.randn(25, 3, dtype=torch.float64) + 1
    spikes, _ = run(currents, params)
    expected = (rate_weights(25, 0.95)[:, None] * spikes).sum(0)
    torch.testing.assert_close(time_average(spikes, 0.95, torch.float64), expected)
    assert bool(((expected >= 0) & (expected <= 1)).all())


def test_sigma_clamps_and_passes_the_gradient_at_equality() -> None:
    z = torch.tensor([-1.0, -1e-9, 0.0, 0.4, 1.0, 1.0 + 1e-6, 3.0], requires_grad=True)
    a = sigma(z)
    assert a.tolist() == pytest.approx([0, 0, 0, 0.4, 1, 1, 1])
    a.sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert sigma_mask(z).dtype == torch.bool
    assert torch.equal(sigma_mask(z).float(), z.grad)
