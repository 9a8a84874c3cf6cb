"""The event-driven kernels against torch's dense products."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import example_input, small_block, warmed_up
from torch import Tensor, nn

from ide_snn import FeedbackSNN, Gmres, NeuronParams, event_driven, implicit, native
from ide_snn import chain as chain_module
from ide_snn.bptt import Bptt
from ide_snn.event_driven import EventConnection
from ide_snn.layers import Affine, Connection
from ide_snn.operators import Operator
from ide_snn.precision import Precision, products_rounded
from ide_snn.simulation import Record, simulate
from ide_snn.solvers import LinearProblem, Outcome, solve
from ide_snn.solvers.vectors import NativeKrylov

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
    for apply in (event_driven.apply, Operator.apply):
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
    dense, fused = simulate(*arguments), simulate(*arguments, path="fused_tf32")
    assert float(dense.last.mean()) > 0.05
    assert torch.equal(fused.last, dense.last)
    if len(shape) == 3:
        assert fused.last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
def test_only_fast_lets_a_gpu_round_products(precision: Precision, monkeypatch) -> None:
    """In the forward and in the solve, whatever the process has set, which is there again afterwards."""
    block = warmed_up(small_block("conv", precision=precision, solver=Gmres(1e-3))).float()
    seen = []

    def look(*_: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    block.register_simulation_hook(look)
    monkeypatch.setattr(implicit, "solve", lambda *arguments: (look(), solve(*arguments))[1])
    for before in ("float32", "fast"):
        with products_rounded(before):
            block(example_input("conv").float()).sum().backward()
            look()
    allowed = (precision == "fast",) * 2
    assert seen == [allowed, allowed, (False, False), allowed, allowed, (True, True)]


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


def gradients(block: FeedbackSNN, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    block.zero_grad()
    value = block(x)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    (value * weights).sum().backward()
    return value.detach(), [p.grad.clone() for p in block.parameters()]


@pytest.mark.parametrize("kind", ["conv", "multilayer"])
def test_a_block_gives_the_rates_and_gradients_of_float32(kind: str) -> None:
    # few steps: later a spike more or less, from rounding, would be another network
    options = {"dropout": 0.0, "time_steps": 3, "solver": Gmres(tol=1e-6)}
    torch.manual_seed(0)
    plain = warmed_up(small_block(kind, **options).float())
    block = small_block(kind, precision="exact", **options).float()
    block.load_state_dict(plain.state_dict())
    x = example_input(kind).float()
    paths = []
    block.register_simulation_hook(lambda rates: paths.append(rates.path))
    (value, found), (expected, wanted) = gradients(block.eval(), x), gradients(plain.eval(), x)
    assert paths == ["events"]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "multilayer"])
def test_a_nan_poisons_its_sample_only(kind: str) -> None:
    """Also where it is in the first population, whose silence the others do not show."""
    block = small_block(kind, dropout=0.0, time_steps=4, check_input=False, precision="exact").float().eval()
    x = example_input(kind, batch=3).float()
    x[1, 0, 0, 0] = float("nan")
    rates = block(x).detach()
    assert bool(rates[1].isnan().all())
    assert bool(rates[[0, 2]].isfinite().all())


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_a_native_solve_is_the_same_at_any_scale_of_the_right_hand_side(scale: float) -> None:
    generator = torch.Generator().manual_seed(8)
    matrix, rhs = 0.05 * torch.randn(64, 64, generator=generator), torch.randn(3, 64, generator=generator)
    values = [
        solve(LinearProblem(lambda v: v @ matrix.T, rhs * s, native=True), Gmres(tol=1e-4)).value / s
        for s in (1.0, scale)
    ]
    assert torch.equal(*values)


def test_the_verdict_of_a_native_solve_with_restarts_is_on_what_it_returns() -> None:
    generator = torch.Generator().manual_seed(9)
    matrix = 0.7 * torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    rhs = torch.randn(6, 40, generator=generator)
    solution = solve(LinearProblem(lambda v: v @ matrix.T, rhs, native=True), Gmres(tol=1e-2, max_steps=60, restart=2))
    found = (rhs + solution.value @ matrix.T - solution.value).norm(dim=1) / rhs.norm(dim=1)
    torch.testing.assert_close(solution.stats.residual, found.double(), rtol=1e-3, atol=1e-6)
    assert solution.outcome is Outcome.converged
    assert solution.stats.steps > 4


def test_a_native_solve_of_a_tensor_without_strides() -> None:
    """Gradients of sums arrive expanded."""
    for shape in ((5, 12), (3, 4, 5, 5)):
        factor = torch.rand(shape, generator=torch.Generator().manual_seed(3)) / 2
        rhs = torch.ones(()).expand(shape)
        solution = solve(LinearProblem(lambda v, factor=factor: v * factor, rhs, native=True), Gmres(tol=1e-5))
        torch.testing.assert_close(solution.value, 1 / (1 - factor), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_sum_of_rates() -> None:
    """Of a chain with batch norm, whose solve gets autograd's expanded ones."""
    torch.manual_seed(0)
    options = {"time_steps": 3, "solver": Gmres(tol=1e-5)}
    plain = warmed_up(small_block("multilayer", **options).float()).eval()
    block = small_block("multilayer", precision="exact", **options).float().eval()
    block.load_state_dict(plain.state_dict())
    x, found = example_input("multilayer").float(), []
    for network in (plain, block):
        network(x).sum().backward()
        found.append([p.grad for p in network.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    block = small_block("conv", precision="exact", constraint="none", solver=Gmres(1e-3)).float()
    value = block(example_input("conv").float())
    with torch.no_grad():
        block.feedback.op.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_a_native_krylov_space_that_is_exhausted_gets_a_zero_direction() -> None:
    """The first group is an eigenvector, the second is not."""
    r = torch.tensor([[3.0, 0.1, 0.7], [1.0, 2.0, 4.0]])
    factors = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.5, 0.9]])
    space = NativeKrylov(r, 3, 1, 1e-6)
    left = space.extend(space.newest * factors)
    assert bool((space.newest[0] == 0).all())
    assert float(space.newest[1].norm()) == pytest.approx(1)
    assert left[0] < 1e-6 < left[1]


def test_native_gmres_solves_as_torch_and_as_linear_algebra() -> None:
    generator = torch.Generator().manual_seed(6)
    matrix = 0.8 * torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q
    rhs = torch.randn(5, 60, generator=generator)
    rhs[2] = 0
    solutions = [
        solve(LinearProblem(lambda v: v @ matrix.T, rhs, native=flag), Gmres(tol=1e-5, max_steps=60))
        for flag in (False, True)
    ]
    exact = torch.linalg.solve(torch.eye(60) - matrix, rhs.T).T
    for solution in solutions:
        assert solution.outcome is Outcome.converged
        torch.testing.assert_close(solution.value, exact, rtol=0, atol=3e-4)
    assert solutions[0].stats.products == solutions[1].stats.products


@pytest.mark.parametrize(
    ("kind", "dtype", "words"), [("conv", torch.float64, "float64"), ("pooled", torch.float32, "average pooling")]
)
def test_what_it_does_not_do_is_done_densely_and_said_once(kind: str, dtype, words: str, caplog) -> None:
    block = small_block(kind, dropout=0.0, time_steps=3, precision="fast").to(dtype)
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        for _ in range(2):
            block.eval()(example_input(kind).to(dtype))
    said = [record for record in caplog.records if "precision=fast" in record.message]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert words in said[0].message


def test_without_a_compiler_the_dense_products_are_taken(monkeypatch, caplog) -> None:
    monkeypatch.setattr(event_driven.native, "why_unavailable", lambda name: f"no {name} here")
    block = small_block("conv", dropout=0.0, time_steps=3, precision="exact").float().eval()
    plain = small_block("conv", dropout=0.0, time_steps=3).float().eval()
    plain.load_state_dict(block.state_dict())
    x = example_input("conv").float()
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        assert torch.equal(block(x), plain(x))
    assert "dense (no events here)" in caplog.text


@pytest.fixture
def fresh_library(monkeypatch):
    monkeypatch.setattr(native, "library", native.library.__wrapped__)


@pytest.mark.usefixtures("fresh_library")
def test_kernels_are_compiled_once_into_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path / "kernels"))
    native.library("krylov")
    (made,) = (tmp_path / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    native.library("krylov")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()] == [stamp]


@pytest.mark.usefixtures("fresh_library")
def test_reasons_name_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native.NativeUnavailable, match="named by CC was not found"):
        native.library("events")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.NativeUnavailable, match="failed on events"):
        native.library("events")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CC")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.NativeUnavailable, match="set IDE_SNN_CACHE"):
        native.library("events")


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", [source.stem for source in native.SOURCES.glob("*.c")])
@pytest.mark.usefixtures("fresh_library")
def test_every_kernel_compiles_without_a_warning(name: str, tmp_path, monkeypatch) -> None:
    """The other tests of this file are skipped where kernels do not compile."""
    monkeypatch.setenv("IDE_SNN_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-sign-compare"))
    native.library(name)


def test_threads_of_its_own_find_the_same(monkeypatch) -> None:
    """Where torch's threads cannot be had."""
    monkeypatch.setattr(native, "WORTH_THREADS", 0)
    block = small_block("conv", time_steps=20, precision="fast", solver=Gmres(1e-3)).float().eval()
    x = example_input("conv", batch=7).float()
    (value, found) = gradients(block, x)
    monkeypatch.setattr(native, "_torch_threads", lambda: None)
    (expected, wanted) = gradients(block, x)
    assert torch.equal(value, expected)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_poison_fast_rates_too(value: float) -> None:
    block = small_block("conv", dropout=0.0, time_steps=4, precision="fast").float().eval()
    with torch.no_grad():
        block.feedback.op.parametrizations.weight.original[0, 0, 0, 0] = value
    assert bool(block(example_input("conv").float()).isnan().all())


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


def test_too_many_inputs_keep_float32_weights_and_say_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(event_driven, "MOST_INPUTS", 10)
    block = small_block("conv", precision="fast").float().eval()
    paths = []
    block.register_simulation_hook(lambda rates: paths.append(rates.path))
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        block(example_input("conv").float())
    assert paths == ["events"]
    assert "event-driven float32 (sums of" in caplog.text


def test_levels_multiply_spikes_only() -> None:
    module, shape = MODULES["conv"]
    with pytest.raises(ValueError, match="levels=False"):
        EventConnection(affine_of(module, shape, 2), levels=True)(torch.ones(2, *shape))


@pytest.mark.parametrize("kind", ["fc", "conv", "without batch norm"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_written_out_gradient_is_that_of_autograd(kind: str, dropout: float, monkeypatch) -> None:
    """Of input, weights, biases and alpha, for one population and for a chain of three."""
    if kind == "without batch norm":
        chain = [Connection(nn.Conv2d(4, 6, 3, stride=2, padding=1), dropout=dropout), Connection(nn.Conv2d(6, 5, 1))]
        feedback = nn.ConvTranspose2d(5, 4, 3, stride=2, padding=1, output_padding=1)
        stage = Connection(nn.Conv2d(2, 4, 3, padding=1), batch_norm=True)
        back = Connection(feedback, constraint="spectral_matrix", bound=0.5, dropout=dropout)
        neuron = NeuronParams(0.7, 0.9)
        block = FeedbackSNN(
            input=stage, layers=chain, feedback=back, neuron=neuron, time_steps=6, solver=Gmres(1e-6), precision="exact"
        )
        x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    else:
        block = small_block(kind, precision="exact", dropout=dropout, time_steps=6, solver=Gmres(1e-6)).float()
        x = example_input(kind).float()
    x = (3 * x).requires_grad_()
    results = []
    for taken in (chain_module.has_written_out_gradient, lambda _: False):
        monkeypatch.setattr(implicit, "has_written_out_gradient", taken)
        torch.manual_seed(2)
        value, found = gradients(block.train(), x)
        results.append((value, x.grad.clone(), *found))
        x.grad = None
    assert float(results[0][1].abs().max()) > 0
    largest = max(float(theirs.abs().max()) for theirs in results[1])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * largest)


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="float32, exact, fast"):
        small_block("conv", precision="half")
    block = small_block("conv", precision="fast", gradient=Bptt())
    with pytest.raises(ValueError, match="implicit differentiation"):
        block(example_input("conv").to(next(block.parameters()).dtype))
