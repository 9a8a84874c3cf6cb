"""The event-driven kernels against torch's dense products."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, example_input, small_block, warmed_up
from torch import Tensor, nn

from ide_snn import FeedbackSNN, Gmres, NeuronParams, convolutions, event_driven, native
from ide_snn.equilibrium import Known
from ide_snn.event_driven import EventConnection
from ide_snn.firing import fire_
from ide_snn.layers import Affine
from ide_snn.operators import Operator
from ide_snn.record import Record
from ide_snn.simulation import simulate

REASON = native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")

MODULES = {
    "linear": (nn.Linear(37, 45), (37,)),
    "conv": (nn.Conv2d(10, 12, 3, padding=1), (10, 5, 7)),
    "strided": (nn.Conv2d(3, 70, 5, stride=2, padding=2), (3, 9, 8)),
    "dilated": (nn.Conv2d(4, 5, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (4, 8, 6)),
    "transposed": (nn.ConvTranspose2d(9, 6, 3, stride=2, padding=1, output_padding=1), (9, 4, 5)),
    "wide": (nn.Conv2d(6, 200, 1), (6, 3, 3)),
}


def dyadic(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    """Multiples of 2^-6 of a few units: float32 adds them exactly, so the order of a sum means nothing."""
    return (torch.randn(shape, generator=generator) * scale * 64).round() / 64


def affine_of(module: nn.Module, shape: tuple[int, ...], batch: int, *, dropout: bool = True) -> Affine:
    generator = torch.Generator().manual_seed(0)
    operator = Operator.of(module)
    weight = dyadic(tuple(module.weight.shape), 0.3, generator)
    bias = dyadic((operator.out_channels,), 0.3, generator)
    output = operator.output_shape(shape)
    gain = 2.0 * (torch.rand(batch, *output, generator=generator) > 0.5) if dropout else None
    return Affine(operator, weight, bias, 1, gain, shape)


@pytest.mark.parametrize("name", MODULES)
def test_products_and_adjoints_equal_the_dense_ones(name: str) -> None:
    module, shape = MODULES[name]
    affine = affine_of(module, shape, 3)
    generator = torch.Generator().manual_seed(1)
    x = dyadic((3, *shape), 1.0, generator).relu()
    scale = dyadic((3, *shape), 1.0, generator)
    torch.testing.assert_close(EventConnection(affine)(x), affine(x), rtol=0, atol=0)
    torch.testing.assert_close(EventConnection(affine)(x, scale), affine(x * scale), rtol=1e-6, atol=1e-5)
    y = torch.randn(3, *affine.operator.output_shape(shape), generator=generator)
    torch.testing.assert_close(
        EventConnection(affine, adjoint=True)(y),
        affine.operator.adjoint(y, affine.weight, shape),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(max_examples=40, deadline=None)
@given(
    transposed=st.booleans(),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(7, 9), st.integers(7, 9)),
)
def test_any_geometry(transposed, channels, kernel, stride, padding, dilation, size) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(*channels, kernel, stride=stride, padding=padding, dilation=dilation)
    shape = (channels[0], *size)
    affine = affine_of(module, shape, 2, dropout=False)
    x = (torch.rand(2, *shape, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    torch.testing.assert_close(EventConnection(affine)(x), affine(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_walk_over_rates_has_the_value_and_the_gradients_of_the_dense_product(name: str, share: float) -> None:
    module, shape = MODULES[name]
    operator, results = Operator.of(module), []
    for apply in (convolutions.apply, Operator.apply):
        generator = torch.Generator().manual_seed(7)
        x = torch.rand(3, *shape, generator=generator) * (torch.rand(3, *shape, generator=generator) < share)
        leaves = [t.detach().clone().requires_grad_() for t in (x, module.weight, module.bias)]
        y = apply(operator, *leaves)
        cotangent = torch.randn(y.shape, generator=generator)
        results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "strided", "dilated", "wide"])
def test_a_convolution_by_columns_is_the_convolution(name: str) -> None:
    module, shape = MODULES[name]
    operator, x = Operator.of(module.double()), torch.randn(3, *shape, dtype=torch.float64)
    found = operator.apply_by_columns(x, module.weight, module.bias)
    torch.testing.assert_close(found, module(x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    module.float()


@pytest.mark.parametrize("leak", [1.0, 0.5])
@pytest.mark.parametrize(
    ("batch", "shape", "modules"),
    [
        (4, (8, 6, 6), [nn.Conv2d(8, 8, 5, padding=2)]),
        (4, (8, 6, 6), [nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)]),
        (150, (37,), [nn.Linear(37, 37)]),  # batches of 64, 64 and 22 together
        (64, (37,), [nn.Linear(37, 37), nn.Linear(37, 37)]),
        (5, (37,), [nn.Linear(37, 37), nn.Linear(37, 37), nn.Linear(37, 37)]),
    ],
    ids=str,
)
def test_simulation_equals_the_dense_one_bit_for_bit_where_sums_are_exact(leak: float, batch, shape, modules) -> None:
    populations = len(modules)
    feedback, *layers = (affine_of(module, shape, batch) for module in modules)
    drive = dyadic((batch, *shape), 1.5, torch.Generator().manual_seed(3))
    record = Record(all_rates=True, spike_fraction=True, spikes=True, membranes=True)
    arguments = (drive, layers, feedback, [shape] * populations, NeuronParams(1.0, leak), 6, record)
    dense, events = simulate(*arguments), simulate(*arguments, path="events")
    assert 0.05 < float(dense.firing_rate.mean()) < 0.95
    assert (dense.path, events.path) == ("dense", "events")
    for name in ("all", "spike_fraction", "spikes", "membranes"):
        for mine, theirs in zip(getattr(events, name), getattr(dense, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    # all steps in one call, without anybody looking, are the same steps
    torch.testing.assert_close(simulate(*arguments[:-1], path="events").last, dense.last, rtol=0, atol=0)
    # f needs the feedback of the rates: the mean of its responses to the steps, whoever looks in between
    expected = replace(feedback, gain=None)(dense.last)
    for looks in (False, True):
        found = simulate(*arguments[:-1], Record(mean_response=True, spikes=looks), path="events")
        torch.testing.assert_close(found.last, dense.last, rtol=0, atol=0)
        assert found.mean_response is not None
        torch.testing.assert_close(found.mean_response, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leak", [1.0, 0.95])
@pytest.mark.parametrize("record", [Record(), Record(all_rates=True, spike_fraction=True, spikes=True)])
@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6)), (nn.Linear(600, 600), (600,))]
)
def test_the_fused_kernel_has_the_rounding_of_the_dense_path(leak: float, record: Record, module, shape) -> None:
    batch = 4
    torch.manual_seed(0)
    maps = [affine_of(module, shape, batch) for _ in range(3)]
    maps = [replace(affine, weight=torch.randn_like(affine.weight) * 0.2) for affine in maps]
    drive = torch.randn(batch, *shape)
    arguments = (drive, maps[1:], maps[0], [shape] * 3, NeuronParams(1.0, leak), 6, record)
    dense, fused = simulate(*arguments), simulate(*arguments, path="fused")
    assert float(dense.last.mean()) > 0.05
    for mine, theirs in zip((fused.last, *fused.all), (dense.last, *dense.all), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(fused.spike_fraction + fused.spikes, dense.spike_fraction + dense.spikes, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("leak", [1.0, 0.5])
@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6)), (nn.Linear(600, 600), (600,))]
)
def test_the_path_for_tensor_cores_is_the_dense_one_with_channels_last(leak: float, module, shape) -> None:
    maps = [affine_of(module, shape, 4) for _ in range(3)]
    drive = dyadic((4, *shape), 1.5, torch.Generator().manual_seed(2))
    arguments = (drive, maps[1:], maps[0], [shape] * 3, NeuronParams(1.0, leak), 6)
    dense, fused = simulate(*arguments), simulate(*arguments, path="fused_half")
    assert float(dense.last.mean()) > 0.05
    assert torch.equal(fused.last, dense.last)
    if len(shape) == 3:
        assert fused.last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_that_of_rounded_weights_and_responses(kind: str, monkeypatch) -> None:
    """What the path for tensor cores computes, by products in float32 whose factors and results are rounded."""
    block = warmed_up(small_block(kind, dropout=0.3, time_steps=20)).float().train()
    x, found = example_input(kind).float(), {}
    plain = Affine.__call__
    half = [lambda t: t, lambda t: t if t is None else t.half().float()]

    def rounded(link: Affine, spikes: Tensor) -> Tensor:
        keep = half[path == "rounded"]
        maps = replace(link, weight=keep(link.weight), bias=keep(link.bias), gain=None)
        response = keep(plain(maps, spikes))
        return response if link.gain is None else response * link.gain

    for path in ("dense", "rounded", "fused_half"):
        monkeypatch.setattr(FeedbackSNN, "path_for", lambda *_, p=path: "dense" if p == "rounded" else p)
        monkeypatch.setattr(Affine, "__call__", rounded if path == "rounded" else plain)
        with torch.no_grad():
            twin = copy.deepcopy(block)
            found[path] = twin.simulate(x, generator=torch.Generator().manual_seed(1)).last
    assert found["fused_half"].dtype == torch.float32
    assert float(found["dense"].mean()) > 0.02
    same = {path: float((found["fused_half"] - found[path]).abs().gt(1e-6).float().mean()) for path in found}
    # a membrane within 2^-11 of the threshold decides otherwise; sums in another order round a response otherwise
    assert same["rounded"] <= 0.05
    assert same["dense"] <= 0.1


def test_half_precision_of_what_float16_does_not_have_is_seen() -> None:
    module = nn.Linear(4, 4, bias=False)
    affine = replace(affine_of(module, (4,), 2), weight=torch.full((4, 4), 30_000.0))
    drive = torch.tensor([[3.0] * 4, [0.0] * 4])
    rates = simulate(drive, [], affine, [(4,)], NeuronParams(1.0, 0.5), 4, path="fused_half").last
    assert rates.isnan().all(dim=1).tolist() == [True, False]


def test_an_input_that_varies_in_time_and_looks_at_every_step() -> None:
    batch, shape = 3, (5, 4, 4)
    feedback = affine_of(nn.Conv2d(5, 5, 3, padding=1), shape, batch)
    frames = dyadic((6, batch, *shape), 1.5, torch.Generator().manual_seed(4))
    seen: dict[str, list[Tensor]] = {"dense": [], "events": []}
    for path, rates in seen.items():
        record = Record(on_step=lambda step, rates=rates: rates.append(torch.cat([step.last_rate(), *step.spikes])))
        simulate(frames.__getitem__, [], feedback, [shape], NeuronParams(1.0, 0.5), 6, record, path=path)
    assert len(seen["dense"]) == 6
    for mine, theirs in zip(seen["events"], seen["dense"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_number_of_threads_does_not_matter() -> None:
    block = small_block("conv", dropout=0.0, time_steps=20, precision="exact").float().eval()
    x = example_input("conv", batch=7).float()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(block(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def in_levels(affine: Affine) -> tuple[Tensor, Tensor]:
    """(whole units, unit per output, shaped to multiply them) of a connection packed for `fast`, as its weight."""
    packed, operator = EventConnection(affine, levels=True), affine.operator
    assert packed.unit is not None
    rows = packed.weight.permute(0, 3, 2, 1).flatten(0, 1)[: packed.out_channels]  # [out, in, taps]
    channel = operator.output_dim_of_weight
    whole = rows.reshape(affine.weight.transpose(0, channel).shape).transpose(0, channel)
    return whole.double(), operator.per_output(packed.unit[: packed.out_channels].double())


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(MODULES)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_sums_of_whole_units_are_exact_and_never_overflow(name: str, seed: int, scale: float, sign: float) -> None:
    """Also the largest sum there is: of all weights of one sign."""
    module, shape = MODULES[name]
    operator, generator = Operator.of(module), torch.Generator().manual_seed(seed)
    weight = torch.randn(tuple(module.weight.shape), generator=generator)
    weight = (weight.abs() * sign if sign else weight) * scale
    weight.transpose(0, operator.output_dim_of_weight)[0] = 0
    affine = Affine(operator, weight, None, 1, None, shape)
    levels, unit = in_levels(affine)
    rows = levels.transpose(0, operator.output_dim_of_weight).flatten(1)
    assert float(rows.clamp(min=0).sum(1).max() - rows.clamp(max=0).sum(1).min()) > 0
    assert float(rows.clamp(min=0).sum(1).max()) <= 32767
    assert float(rows.clamp(max=0).sum(1).min()) >= -32767
    used = torch.maximum(rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1))[1:]  # the first channel is 0
    assert float(used.min()) > 32767 - rows.shape[1] - 10  # no coarser than needed
    assert bool(((levels * unit - weight).abs() <= unit * 0.502).all())
    spikes = torch.ones(2, *shape) if sign else (torch.rand(2, *shape, generator=generator) < 0.5).float()
    exact = operator.apply(spikes.double(), levels * unit)
    found = EventConnection(affine, levels=True)(spikes.to(torch.uint8))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("shape", "module"),
    [
        ((40,), nn.Linear(40, 40)),
        ((8, 6, 6), nn.Conv2d(8, 8, 5, padding=2)),
        ((32, 5, 4), nn.Conv2d(32, 32, 3, padding=1)),  # one block, positions that fill no stretch of neurons
        ((160, 3, 3), nn.ConvTranspose2d(160, 160, 3, padding=1)),  # several blocks
    ],
)
def test_fast_simulates_the_network_with_rounded_weights(shape: tuple[int, ...], module: nn.Module, batch: int) -> None:
    neuron, generator = NeuronParams(1.0, 0.75), torch.Generator().manual_seed(0)
    drive = torch.randn(batch, *shape, generator=generator)
    affine = affine_of(module, shape, batch)
    affine = replace(affine, weight=affine.weight / affine.weight[0].numel() ** 0.5)
    levels, unit = in_levels(affine)
    fast = simulate(drive, [], affine, [shape], neuron, 12, path="events16")
    dense = simulate(drive, [], replace(affine, weight=(levels * unit).float()), [shape], neuron, 12)
    assert fast.path == "events16"
    assert float((fast.last != dense.last).float().mean()) < 0.02  # rounding at the threshold
    assert 0.1 < float(dense.last.mean()) < 0.9
    for steps in (1, 12):
        rates = simulate(drive, [], affine, [shape], neuron, steps, Record(mean_response=True), path="events16")
        assert rates.mean_response is not None
        expected = replace(affine, weight=(levels * unit).float(), gain=None)(rates.last)
        torch.testing.assert_close(rates.mean_response, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fc", "conv", "multilayer"])
@pytest.mark.parametrize("time_steps", [1, 9])
def test_the_simulation_has_what_the_slopes_at_its_rates_need(kind: str, time_steps: int) -> None:
    block = warmed_up(small_block(kind, precision="exact", time_steps=time_steps)).float()
    moment = block._prepare(example_input(kind).float(), torch.Generator().manual_seed(0))
    rates = moment.simulate(Record(mean_response=True))
    assert rates.mean_response is not None
    applied, known = (moment.map.frozen_rates(rates.last, known) for known in ((), (Known(rates.mean_response),)))
    for mine, theirs in zip((*known[0], *known[1], known[2]), (*applied[0], *applied[1], applied[2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_levels_multiply_spikes_only() -> None:
    module, shape = MODULES["conv"]
    with pytest.raises(ValueError, match="levels=False"):
        EventConnection(affine_of(module, shape, 2), levels=True)(torch.ones(2, *shape))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["fc", "conv", "multilayer"])
def test_what_is_walked_over_together_does_not_matter(
    kind: str, threads: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = warmed_up(small_block(kind, dropout=0.2, precision=precision).float())
    block.solver = Gmres(tol=1e-3)
    x, state = example_input(kind, batch=11).float(), copy.deepcopy(block.state_dict())

    def step() -> list[Tensor]:
        block.load_state_dict(state)
        rates = block(x, generator=torch.Generator().manual_seed(0))
        v = torch.randn(rates.shape, generator=torch.Generator().manual_seed(1))
        return [rates, *torch.autograd.grad((rates * v).sum(), list(block.parameters()))]

    own_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        alone = step()
        monkeypatch.setattr(native, "WORTH_THREADS", 0)  # small as they are
        monkeypatch.setattr(event_driven, "CACHED", 0)  # large weights: some samples of a convolution at a time
        for few in (3, 8):
            monkeypatch.setattr(event_driven, "FEW", few)
            monkeypatch.setattr(event_driven, "TOGETHER", few)
            for one, other in zip(alone, step(), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
    finally:
        torch.set_num_threads(own_threads)


@pytest.mark.parametrize("name", ["conv", "strided", "transposed"])
def test_products_of_samples_together_are_those_of_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = MODULES[name]
    affine = affine_of(module, shape, 7)
    generator = torch.Generator().manual_seed(1)
    x, scale = (torch.randn(7, *shape, generator=generator).relu() for _ in range(2))
    spikes = (x > 0.5).to(torch.uint8)
    y = torch.randn(7, *affine.operator.output_shape(shape), generator=generator)

    def products() -> list[Tensor]:
        return [
            EventConnection(affine)(x, scale),
            EventConnection(affine)(spikes),
            EventConnection(affine, levels=True)(spikes),
            EventConnection(affine, adjoint=True)(y),
        ]

    alone = products()
    monkeypatch.setattr(event_driven, "CACHED", 0)
    for few in (2, 3, 8):
        monkeypatch.setattr(event_driven, "FEW", few)
        for one, other in zip(alone, products(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("has_drive", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 2000)])
def test_rates_and_slopes_are_their_equations(shape: tuple[int, ...], has_drive: bool, has_gain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    response, drive = (event_driven.channels_last(torch.randn(shape, generator=generator)) for _ in range(2))
    gain = 1.25 * (torch.rand(shape, generator=generator) > 0.2) if has_gain else torch.ones(shape)
    z = (gain * response + (drive if has_drive else 0)) / 1.5
    derivative = ((z >= 0) & (z <= 1)).float() / 1.5
    rate, slope, through = fire_(response.clone(), gain if has_gain else None, drive if has_drive else None, 1.5)
    torch.testing.assert_close(rate, z.clamp(0, 1))
    torch.testing.assert_close(slope, derivative * gain)
    assert 0.1 < float((slope != 0).float().mean()) < 0.9
    if has_drive or not has_gain:
        torch.testing.assert_close(through, derivative)
    else:
        assert through is None  # nobody asks for it
