"""Encoders: closed forms, rates within confidence bounds, reproducibility, shapes, dtypes and errors."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy import stats
from torch import Generator, Tensor

from ide_snn.encoding import ENCODERS, Bernoulli, Delta, Direct, Latency, Poisson, Population

STOCHASTIC = [Bernoulli(), Bernoulli(0.3), Poisson(), Poisson(7.5)]
STATIC = [Direct(), *STOCHASTIC, Latency(), Latency(tau=2.0), Latency(off_below=0.2)]
ALL = [*STATIC, Delta(), Delta(off_spikes="negative"), Delta(off_spikes="channel", accumulate=True), Population()]
NAN = float("nan")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def sequence(time_steps: int = 6) -> Tensor:
    return torch.rand(time_steps, 2, 3, 4, 5)


def encoded(encoder, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = sequence().to(dtype)
    x = x if isinstance(encoder, Delta) else x[0]
    return x, encoder.encode(x, 6, seeded(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("encoder", ALL, ids=str)
def test_shapes_and_dtypes(encoder, dtype: torch.dtype) -> None:
    x, y = encoded(encoder, dtype)
    channels = 3 * {Population: 8}.get(type(encoder), 1)
    if isinstance(encoder, Delta) and encoder.off_spikes == "channel":
        channels *= 2
    assert y.shape == (6, 2, channels, 4, 5)
    expected = {Direct: dtype, Poisson: torch.uint8}.get(type(encoder), torch.bool)
    assert y.dtype == (torch.int8 if getattr(encoder, "off_spikes", "") == "negative" else expected)
    assert not y.requires_grad
    assert y.device == x.device


@pytest.mark.parametrize("encoder", STATIC, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 7), (0, 3), (2, 3, 4, 5, 6)], ids=str)
def test_any_shape_with_the_batch_first(encoder, shape: tuple[int, ...]) -> None:
    assert encoder.encode(torch.rand(shape), 4).shape == (4, *shape)


@pytest.mark.parametrize("encoder", ALL, ids=str)
def test_the_generator_makes_it_reproducible(encoder) -> None:
    before = torch.get_rng_state()
    x = sequence() if isinstance(encoder, Delta) else sequence()[0]
    torch.set_rng_state(before)
    first, again = encoder.encode(x, 6, seeded()), encoder.encode(x, 6, seeded())
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)  # the global state is left alone
    assert torch.equal(first, encoder.encode(x, 6, seeded(1))) == (encoder not in STOCHASTIC)


@pytest.mark.parametrize("encoder", STOCHASTIC, ids=str)
def test_without_a_generator_the_global_seed_counts(encoder) -> None:
    x, drawn = torch.rand(50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(encoder.encode(x, 8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("encoder", ALL, ids=str)
def test_the_input_is_not_modified_and_may_require_a_gradient(encoder) -> None:
    x = (sequence() if isinstance(encoder, Delta) else sequence()[0]).requires_grad_()
    before = x.detach().clone()
    y = encoder.encode(x, 6, seeded())
    assert torch.equal(x, before)
    assert y.requires_grad == isinstance(encoder, Direct)


def test_direct_repeats_without_copying_and_passes_the_gradient() -> None:
    x = (torch.randn(2, 3) * 10).requires_grad_()  # any range
    y = Direct().encode(x, 5)
    assert y.data_ptr() == x.data_ptr()
    assert y.stride()[0] == 0
    assert torch.equal(y, x.detach().repeat(5, 1, 1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 5))


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_bernoulli_is_binomial(rate: float) -> None:
    values, copies, steps = [0.0, 0.01, 0.3, 0.5, 0.97, 1.0], 400, 25
    x = torch.tensor(values).repeat(copies, 1)
    spikes = Bernoulli(rate).encode(x, steps, seeded())
    for value, total in zip(values, spikes.sum((0, 1)).tolist(), strict=True):
        low, high = stats.binom.interval(1 - 1e-6, copies * steps, rate * value)
        assert low <= total <= high
    # independent over time: the variance of the counts is T p (1 - p), and successive steps are uncorrelated
    counts, p = spikes[..., 3].sum(0).double(), rate * 0.5
    assert counts.var().item() == pytest.approx(steps * p * (1 - p), rel=0.25)
    s = spikes[..., 3].double() - p
    assert (s[1:] * s[:-1]).mean().abs().item() < 5 * p * (1 - p) / math.sqrt(copies * (steps - 1))


def test_bernoulli_at_the_ends_is_certain() -> None:
    spikes = Bernoulli().encode(torch.tensor([0.0, 1.0]).repeat(2000, 1), 10, seeded())
    assert not spikes[..., 0].any()
    assert spikes[..., 1].all()


@pytest.mark.parametrize("rate", [1.0, 0.4, 20.0, 100.0])
def test_poisson_counts(rate: float) -> None:
    values, copies, steps = [0.0, 0.02, 0.5, 1.0], 400, 20
    counts = Poisson(rate).encode(torch.tensor(values).repeat(copies, 1), steps, seeded())
    for value, total in zip(values, counts.sum((0, 1)).tolist(), strict=True):
        low, high = stats.poisson.interval(1 - 1e-6, copies * steps * rate * value) if value else (0, 0)
        assert low <= total <= high
    # the whole distribution of the counts of one value, not only its mean
    observed = torch.bincount(counts[..., 2].flatten().long(), minlength=256).numpy()
    expected = stats.poisson.pmf(range(256), rate * 0.5) * copies * steps
    common = expected > 5
    assert (
        stats.chisquare(
            [*observed[common], observed[~common].sum()], [*expected[common], copies * steps - expected[common].sum()]
        ).pvalue
        > 1e-4
    )
    if rate >= 1:
        assert counts.max() > 1


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9),
    st.integers(1, 40),
    st.one_of(st.none(), st.floats(0.05, 1e4)),
)
@settings(max_examples=120, deadline=None)
def test_latency_fires_once_and_large_values_first(values: list[float], steps: int, tau: float | None) -> None:
    x = torch.tensor([*values, 0.0, 1.0])
    encoder = Latency(tau=tau)
    spikes, times = encoder.encode(x, steps), encoder.times(x, steps)
    assert (spikes.sum(0) == 1).all()
    assert torch.equal(spikes.int().argmax(0), times)
    assert times[-2] == steps - 1
    assert times[-1] == 0
    order = x.argsort(descending=True)
    assert (times[order].diff() >= 0).all()


def test_latency_closed_forms() -> None:
    x = torch.tensor([1.0, 0.76, 0.51, 0.24, 0.0])
    assert Latency().times(x, 101).tolist() == [0, 24, 49, 76, 100]
    for tau in (1.0, 3.0, 20.0):
        exact = [10 - tau * math.log1p(value * math.expm1(10 / tau)) for value in x.tolist()]
        assert Latency(tau=tau).times(x, 11).tolist() == [round(t) for t in exact]
    # the textbook form overflows here; below exp(-99) the floor takes over
    assert Latency(tau=1.0).times(torch.tensor([math.exp(-7.0), 0.0]), 100).tolist() == [7, 99]
    assert Latency(tau=0.01).times(torch.tensor([0.5, 0.0]), 1000).tolist() == [0, 999]
    torch.testing.assert_close(Latency(tau=1e6).times(x, 101), Latency().times(x, 101))


def test_latency_below_the_cutoff_is_silent() -> None:
    x = torch.tensor([0.0, 0.19, 0.2, 1.0])
    assert Latency(off_below=0.2).encode(x, 8).sum(0).tolist() == [0, 0, 1, 1]


def test_delta_closed_form() -> None:
    x = torch.tensor([0.0, 0.5, 0.5, 0.25, 0.375, 2.0, -1.0]).view(7, 1, 1)
    on, off = [0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 1]
    assert Delta(0.25).encode(x, 7).flatten().int().tolist() == on
    assert Delta(0.25, "negative").encode(x, 7).flatten().tolist() == [p - n for p, n in zip(on, off, strict=True)]
    both = Delta(0.25, "channel").encode(x, 7)
    assert both.shape == (7, 1, 2)
    assert both[:, 0, 0].int().tolist() == on
    assert both[:, 0, 1].int().tolist() == off


def test_delta_channels_keep_on_before_off() -> None:
    x = torch.zeros(2, 1, 3, 2, 2)
    x[1, :, 0], x[1, :, 2] = 1, -1
    y = Delta(0.5, "channel").encode(x, 2)[1, 0, :, 0, 0]
    assert y.int().tolist() == [1, 0, 0, 0, 0, 1]


def test_slow_changes_add_up_only_where_asked() -> None:
    ramp = (torch.arange(17) / 16).view(17, 1, 1)  # 1/16 per step, exact
    assert Delta(0.25).encode(ramp, 17).sum() == 0
    assert Delta(0.25, accumulate=True).encode(ramp, 17).flatten().nonzero().flatten().tolist() == [4, 8, 12, 16]
    down = Delta(0.25, "negative", accumulate=True).encode(-ramp, 17).flatten().tolist()
    assert [t for t, s in enumerate(down) if s == -1] == [4, 8, 12, 16]


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=12), st.integers(1, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_delta_against_a_plain_loop(frames: list[int], threshold: int, accumulate: bool) -> None:
    expected, reference = [0], frames[0]
    for before, frame in itertools.pairwise(frames):
        change = frame - (reference if accumulate else before)
        expected.append(0 if abs(change) < threshold else int(math.copysign(1, change)))
        reference = frame if expected[-1] else reference
    x = torch.tensor(frames, dtype=torch.float64).view(-1, 1, 1)
    encoder = Delta(float(threshold), "negative", accumulate)
    assert encoder.encode(x, len(frames)).flatten().tolist() == expected


def test_population_closed_form() -> None:
    low, high, m, beta = -1.0, 2.0, 6, 1.5
    encoder = Population(neurons=m, low=low, high=high, beta=beta)
    x = torch.tensor([[-1.0, 0.4], [2.0, 0.7]], dtype=torch.float64)
    r = encoder.responses(x)
    assert r.shape == (2, 2 * m)
    width = (high - low) / (m - 2)
    for b in range(2):
        for c in range(2):
            for i in range(1, m + 1):
                centre = low + (2 * i - 3) / 2 * width
                expected = math.exp(-((x[b, c].item() - centre) ** 2) / (2 * (width / beta) ** 2))
                assert r[b, c * m + i - 1].item() == pytest.approx(expected, rel=1e-12)
    spikes = encoder.encode(x, 11)
    times = (10 * (1 - r)).round().long()
    fires = r >= 0.1
    assert torch.equal(spikes.sum(0), fires.long())
    assert torch.equal(spikes.int().argmax(0)[fires], times[fires])


@given(st.floats(0, 1), st.integers(3, 20))
@settings(max_examples=60, deadline=None)
def test_some_neuron_of_the_population_answers_every_value(value: float, neurons: int) -> None:
    """The nearest centre is at most half a spacing away, so its response is at least exp(-beta^2 / 8)."""
    x = torch.tensor([[value]], dtype=torch.float64)
    assert Population(neurons).responses(x).max() >= math.exp(-(1.5**2) / 8) - 1e-9
    assert Population(neurons).encode(x, 10).sum() >= 1


def test_population_responses_suit_other_encoders() -> None:
    spikes = Bernoulli().encode(Population(5).responses(torch.rand(2, 3, 4, 4)), 7, seeded())
    assert spikes.shape == (7, 2, 15, 4, 4)


@pytest.mark.parametrize("encoder", [Bernoulli(), Poisson(), Latency(), Latency(tau=1.0), Population()], ids=str)
@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, NAN, float("inf")])
def test_values_outside_the_range_say_how_to_rescale(encoder, bad: float) -> None:
    x = torch.full((2, 3), 0.5)
    x[1, 1] = bad
    with pytest.raises(ValueError, match=type(encoder).__name__) as error:
        encoder.encode(x, 4)
    assert "x / 255" in str(error.value)
    assert "needs finite values in [0" in str(error.value)


@pytest.mark.parametrize("encoder", ALL, ids=str)
@pytest.mark.parametrize("time_steps", [0, -1, 2.0, True, None])
def test_time_steps_are_a_positive_integer(encoder, time_steps) -> None:
    with pytest.raises(ValueError, match="time_steps must be a positive integer"):
        encoder.encode(sequence(), time_steps)


@pytest.mark.parametrize("encoder", ALL, ids=str)
def test_integer_images_are_refused(encoder) -> None:
    with pytest.raises(TypeError, match=r"needs a floating-point tensor, got torch.uint8; .* x.float\(\) / 255"):
        encoder.encode(torch.zeros(6, 2, 3, dtype=torch.uint8), 6)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_delta_needs_finite_values(bad: float) -> None:
    with pytest.raises(ValueError, match="Delta needs finite values"):
        Delta().encode(torch.tensor([0.0, bad]).view(2, 1, 1), 2)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (6, 2)], ids=str)
def test_delta_of_a_static_image_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="A static image has none: use bernoulli"):
        Delta().encode(torch.rand(shape), 6)


def test_population_needs_channels() -> None:
    with pytest.raises(ValueError, match=r"widens the channels of x \[B, C, ...\]"):
        Population().encode(torch.rand(4), 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bernoulli(0.0), r"probability in \(0, 1\], got 0.0"),
        (lambda: Bernoulli(1.1), r"probability in \(0, 1\], got 1.1"),
        (lambda: Bernoulli(NAN), "got nan"),
        (lambda: Poisson(0.0), r"rate \(spikes per step\) must lie in \(0, 100\], got 0.0"),
        (lambda: Poisson(101.0), r"\(0, 100\], got 101.0"),
        (lambda: Latency(tau=0.0), "tau must be positive and finite"),
        (lambda: Latency(tau=float("inf")), "or None for linear, got inf"),
        (lambda: Latency(off_below=1.5), r"off_below must lie in \[0, 1\], got 1.5"),
        (lambda: Delta(threshold=0.0), "threshold must be positive and finite, got 0.0"),
        (lambda: Delta(off_spikes="both"), r"one of \('none', 'negative', 'channel'\), got 'both'"),
        (lambda: Population(neurons=2), "neurons must be an integer >= 3"),
        (lambda: Population(neurons=8.0), "neurons must be an integer >= 3"),
        (lambda: Population(low=1.0, high=1.0), "finite low < high"),
        (lambda: Population(high=float("inf")), "finite low < high"),
        (lambda: Population(beta=0.0), "beta must be positive"),
        (lambda: Population(cutoff=-0.1), "cutoff must lie in"),
    ],
)
def test_options_are_checked_at_construction(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_registry_and_the_option_files() -> None:
    assert list(ENCODERS) == ["direct", "bernoulli", "poisson", "latency", "delta", "population"]
    for name, cls in ENCODERS.items():
        if cls is Delta:  # of sequences, which no data set has
            continue
        options = dict(OmegaConf.load(PROJECT / "configs" / "encoder" / f"{name}.yaml"))
        options.pop("defaults", None)
        assert options.pop("name") == name
        assert options == dataclasses.asdict(cls())
        assert cls() == cls(**options)
        assert hash(cls()) == hash(cls(**options))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bernoulli().rate = 0.5
