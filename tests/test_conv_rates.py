"""Convolutions' responses by batch norm, their rates and derivatives: the kernels against torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, conv_rates, native
from ide_snn.conv_rates import ROWS, response, suits
from ide_snn.distributed import Ranks
from ide_snn.firing import fire_
from ide_snn.layers import FixedConnection
from ide_snn.normalization import synchronised

REASON = native.why_unavailable("conv_rates")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")
SHAPES = [(2, 5, 3, 7), (32, 16, 8, 8), (3, 600, 9, 5), (1, 1, ROWS, 2), (300, 3, 16, 16)]
CHANNELS_LAST = torch.channels_last


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return x.to(dtype).contiguous(memory_format=CHANNELS_LAST if len(shape) == 4 else torch.contiguous_format)


def fixed(shape: tuple[int, ...], *, dropout: float = 0.5, bias: bool = True) -> FixedConnection:
    """A training connection with this shape [B, C, H, W] of its response and a batch norm of random parameters."""
    connection = Connection(nn.Conv2d(2, shape[1], 1, bias=bias), batch_norm=True, dropout=dropout).train()
    bn = connection.bn
    assert bn is not None
    with torch.no_grad():
        for seed, vector in enumerate((bn.weight, bn.bias, bn.running_mean, *([connection.op.bias] if bias else []))):
            vector.copy_(numbers(shape[1], seed=10 + seed))
    return connection.prepare((2, *shape[2:]), torch.zeros(shape[0]), torch.Generator().manual_seed(3), native=True)


def by_torch(y: Tensor, link: FixedConnection, threshold: float | None) -> tuple[Tensor, ...]:
    """(result, gradients in y, gamma and beta for the cotangent `numbers(seed=7)`, running statistics), in float64."""
    bn = copy.deepcopy(link.connection.bn).double()
    y = y.detach().double().requires_grad_()
    b = 0 if link.bias is None else link.bias.detach().double().view(1, -1, 1, 1)
    z = bn(y + b)
    z = z if link.gain is None else z * link.gain.double()
    z = z if threshold is None else (z / threshold).clamp(0, 1)
    z.backward(numbers(*y.shape, seed=7).double())
    return z.detach(), y.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var


def by_kernels(y: Tensor, link: FixedConnection, threshold: float | None, **options: bool) -> tuple[Tensor, ...]:
    bn = link.connection.bn
    y = y.detach().requires_grad_()
    if threshold is None:
        z = conv_rates.respond(link, y)
    else:
        z, _ = conv_rates.rates(link, y, threshold, **{"rounded": False, "with_slope": False, **options})
    z.backward(numbers(*y.shape, seed=7).to(z.dtype))
    return z.detach(), y.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threshold", [None, 1.5])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_kernels_are_torchs_batch_norm_and_derivative(
    shape: tuple[int, ...], threshold: float | None, dropout: float
) -> None:
    y, link = numbers(*shape), fixed(shape, dropout=dropout)
    for found, exact in zip(
        by_kernels(y, link, threshold), by_torch(y, fixed(shape, dropout=dropout), threshold), strict=True
    ):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 2e-6
    assert int(link.connection.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("threshold", [None, 1.5])
def test_rounded_responses_rates_and_cotangents(threshold: float | None) -> None:
    y, link = numbers(8, 20, 9, 9, dtype=torch.bfloat16), fixed((8, 20, 9, 9))
    found = by_kernels(y, link, threshold, rounded=True)
    # the rounding of the cotangent, which `numbers` would have in float64
    exact = by_torch(y, fixed((8, 20, 9, 9)), threshold)
    assert [t.dtype for t in found[:2]] == [torch.float32 if threshold is None else torch.bfloat16, torch.bfloat16]
    for number, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        is_rounded = number in (1,) or (threshold is not None and number < 4)
        assert (1e-5 < error < 2.0**-8) if is_rounded else error < 2e-6


def test_the_bias_changes_running_statistics_alone_and_has_the_gradient_zero() -> None:
    shape = (8, 6, 5, 5)
    y = numbers(*shape)
    link, without = fixed(shape), fixed(shape, bias=False)
    assert link.bias is not None
    values = [by_kernels(y, of, 1.0) for of in (link, without)]
    for mine, theirs in zip(*(value[:4] for value in values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(values[0][4], values[1][4] + 0.1 * link.bias.detach())
    assert link.connection.op.bias.grad is not None  # zeros: weight decay and momentum go on
    assert not link.connection.op.bias.grad.any()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (64, 40)], ids=str)
def test_rates_and_slopes_are_those_of_fire(gain: bool, shape: tuple[int, ...]) -> None:
    y, given = numbers(*shape), numbers(*shape, seed=1).relu() if gain else None
    rate, slope = response(y, None, None, given, 1.5).fire()
    exact, slopes, _ = fire_(y.clone(), given, None, 1.5)
    torch.testing.assert_close(rate, exact, rtol=0, atol=0)
    torch.testing.assert_close(slope, slopes, rtol=0, atol=0)
    rounded, _ = response(y, None, None, given, 1.5).fire(rounded=True)
    torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)
    factor, shift = numbers(shape[1], seed=2), numbers(shape[1], seed=3)
    per_channel = [v.view(-1, *(1,) * (len(shape) - 2)) for v in (factor, shift)]
    moved, _ = response(y.contiguous(), factor, shift, given, 1.5).fire()
    torch.testing.assert_close(moved, fire_(y * per_channel[0] + per_channel[1], given, None, 1.5)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    shape, before = (64, 48, 16, 16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(by_kernels(numbers(*shape, dtype=dtype), fixed(shape), 1.0))
    finally:
        torch.set_num_threads(before)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    shape = (16, 4, 16, 16)
    y = 1e4 + numbers(*shape)
    link = fixed(shape)
    for found, exact in zip(by_kernels(y, link, None)[4:], by_torch(y, fixed(shape), None)[4:], strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    constant = by_kernels(torch.full(shape, 0.1).contiguous(memory_format=CHANNELS_LAST), fixed(shape), None)
    assert constant[0].isfinite().all()
    assert float(constant[-1].min()) >= 0.9 - 1e-6  # a biased variance of 0


def test_what_is_not_a_number_is_seen_in_its_channel_alone() -> None:
    shape = (4, 6, 5, 5)
    y = numbers(*shape)
    y[1, 2, 3, 3] = torch.nan
    found = by_kernels(y, fixed(shape), 1.0)
    for tensor in found[:2]:
        assert tensor[:, 2].isnan().all()
        assert tensor[:, [0, 1, 3, 4, 5]].isfinite().all()


def no_torch_norm(bn: nn.Module) -> None:
    bn.__class__ = type("Own", (nn.BatchNorm2d,), {})


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "eval": lambda bn: bn.eval(),
    "cumulative": lambda bn: setattr(bn, "momentum", None),
    "hook": lambda bn: bn.register_forward_hook(lambda *_: None),
    "subclass": no_torch_norm,
    "forward": lambda bn: setattr(bn, "forward", nn.BatchNorm2d.forward.__get__(bn)),
    "no statistics": lambda bn: setattr(bn, "track_running_stats", False),
    "double": lambda bn: bn.double(),
    "not affine": lambda bn: setattr(bn, "affine", False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_batch_norms_of_ones_own_go_through_their_own_forward(kind: str) -> None:
    link = fixed((4, 6, 5, 5))
    assert suits(link, 4)
    OTHERS[kind](link.connection.bn)
    assert not suits(link, 4)


def test_one_value_per_channel_and_several_processes_are_left_to_torch() -> None:
    link = fixed((1, 6, 1, 1))
    assert not suits(link, 1)
    assert suits(fixed((4, 6, 5, 5)), 4)
    connection = fixed((4, 6, 5, 5)).connection

    class Two(Ranks):
        is_alone = False

    with synchronised(connection, Two()):
        assert not suits(connection.prepare((2, 5, 5), torch.zeros(4), native=True), 4)


def network(*, dropout: float = 0.2) -> FeedbackSNN:
    torch.manual_seed(0)
    block = FeedbackSNN(
        input=Connection(nn.Conv2d(3, 6, 3, padding=1), batch_norm=True, dropout=dropout),
        layers=[
            Connection(nn.Conv2d(6, 8, 3, stride=2, padding=1), batch_norm=True, dropout=dropout),
            Connection(nn.Conv2d(8, 4, 3, padding=1, bias=False), batch_norm=True),
        ],
        feedback=Connection(nn.ConvTranspose2d(4, 6, 2, stride=2), constraint="spectral_matrix", bound=0.5),
        time_steps=8,
        precision="exact",
    )
    for link in (block.input, *block.layers):
        nn.init.constant_(link.bn.bias, 0.5)  # so that all populations fire
    return block.train()


def differentiate(block: FeedbackSNN, x: Tensor) -> None:
    value = block(x, generator=torch.Generator().manual_seed(len(x)))
    assert 0.1 < float(value.detach().mean()) < 0.9
    (value * numbers(*value.shape, seed=2)).sum().backward()
    # alpha is beyond its bound
    assert all(p.grad.any() for name, p in block.named_parameters() if not name.endswith(("op.bias", "alpha")))


def trained(block: FeedbackSNN, steps: int = 3) -> list[Tensor]:
    """Gradients of the last of some steps, and the buffers."""
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-4)
    for step in range(steps):
        block.zero_grad()
        differentiate(block, numbers(16, 3, 8, 8, seed=step))
        optimizer.step()
    # gradients of biases in front of batch norm are 0 but for rounding
    behind = {f"{name}.op.bias" for name, part in block.named_modules() if getattr(part, "bn", None) is not None}
    return [p.grad for name, p in block.named_parameters() if name not in behind] + list(block.buffers())


def test_a_network_trains_as_by_torchs_batch_norm(monkeypatch) -> None:
    calls = []
    fire = conv_rates._fire
    monkeypatch.setattr(conv_rates, "_fire", lambda *a, **k: (calls.append(1), fire(*a, **k))[1])
    found = trained(network())
    assert len(calls) == 3 * 3  # input stage and two layers, each step
    monkeypatch.setattr(conv_rates, "suits", lambda *_: False)
    exact = trained(network())
    assert len(calls) == 3 * 3
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_parameters_that_changed_before_the_backward_are_noticed() -> None:
    shape = (4, 6, 5, 5)
    link = fixed(shape)
    y = numbers(*shape).requires_grad_()
    value = conv_rates.respond(link, y)
    with torch.no_grad():
        link.connection.bn.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("has_time", [False, True])
@pytest.mark.parametrize("change", ["pool", "hook", "forward"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_input_stages_that_are_not_the_kernels(change: str, has_time: bool, dropout: float, monkeypatch) -> None:
    """Pooling behind batch norm, hooks, and a forward of one's own: as in float32, whose masks are others."""

    def trained_as(precision: str) -> list[Tensor]:
        torch.manual_seed(0)
        pool = 2 if change == "pool" else 1
        conv = nn.Conv2d(3, 6, 3, padding=1)
        if change == "hook":
            conv.register_forward_hook(lambda _, __, y: 2 * y)
        if change == "forward":
            conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
        block = FeedbackSNN(
            input=Connection(conv, batch_norm=True, pool=pool, dropout=dropout),
            feedback=Connection(nn.Conv2d(6, 6, 3, padding=1), constraint="spectral_matrix", bound=0.5),
            time_steps=8,
            precision=precision,
            input_has_time=has_time,
        ).train()
        nn.init.constant_(block.input.bn.bias, 0.5)  # so that it fires
        x = numbers(4, 3, 8, 8)
        value = block(x.expand(8, *x.shape) if has_time else x, generator=torch.Generator().manual_seed(1))
        (value * numbers(*value.shape, seed=2)).sum().backward()
        assert 0.1 < float(value.detach().mean()) < 0.9
        return [value.detach(), *(p.grad for name, p in block.named_parameters() if name != "input.op.bias")]

    if has_time and change != "pool":
        with pytest.raises(ValueError, match="an input stage of your own cannot contain batch norm"):
            trained_as("exact")
        return
    found = trained_as("exact")
    monkeypatch.setattr(conv_rates, "suits", lambda *_: False)
    for mine, theirs in zip(found, trained_as("exact" if dropout else "float32"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


class Learned(nn.Module):
    """A dropout whose gain is a parameter."""

    drops = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def draw(self, like: Tensor, generator: torch.Generator | None = None, **_: bool) -> Tensor:  # noqa: ARG002
        return self.scale * torch.ones_like(like)


@pytest.mark.parametrize("where", ["input", "layers.0", "feedback"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_gain_that_is_learned_has_its_gradient(where: str, kind: str) -> None:
    found = []
    for precision in ("float32", "exact", "fast"):
        block = network(dropout=0.0)
        if kind == "linear":
            torch.manual_seed(0)
            stage, layer, back = (nn.Linear(n, m) for n, m in ((192, 6), (6, 5), (5, 6)))
            stage, layer = (Connection(op, batch_norm=True) for op in (stage, layer))
            block = FeedbackSNN(input=stage, layers=[layer], feedback=Connection(back), time_steps=4).train()
        block.precision = precision
        block.get_submodule(where).dropout = Learned()
        x = numbers(16, 3, 8, 8)
        value = block(x if kind == "conv" else x.flatten(1), generator=torch.Generator().manual_seed(1))
        (value * numbers(*value.shape, seed=2)).sum().backward()
        found.append(float(block.get_submodule(where).dropout.scale.grad))
    assert found[0] != 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] != 0  # some spikes of which are others


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    found = []
    for pack in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        block = network()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            differentiate(block, numbers(16, 3, 8, 8))
        found.append([p.grad for name, p in block.named_parameters() if not name.endswith("op.bias")])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_responses_gains_and_cotangents_may_lie_otherwise() -> None:
    shape = (8, 6, 5, 7)
    link, given = fixed(shape), numbers(*shape)
    exact = by_torch(given, fixed(shape), 1.5)
    object.__setattr__(link, "gain", link.gain.contiguous())
    y = given.contiguous().requires_grad_()
    rate, slope = conv_rates.rates(link, y, 1.5, rounded=False, with_slope=True)
    assert slope.shape == shape
    rate.backward(numbers(*shape, seed=7).contiguous())
    for mine, theirs in zip((rate.detach(), y.grad), exact[:2], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-6
    factor = torch.stack([numbers(6, seed=2)] * 2, 1)[:, 0]
    assert not factor.is_contiguous()
    moved, _ = response(given, factor, factor, None, 1.5).fire()
    torch.testing.assert_close(
        moved, response(given, factor.clone(), factor.clone(), None, 1.5).fire()[0], rtol=0, atol=0
    )


def test_what_nobody_asks_for_is_not_computed(monkeypatch) -> None:
    ran = []
    run = conv_rates._run
    monkeypatch.setattr(conv_rates, "_run", lambda kernel, *a: (ran.append(kernel), run(kernel, *a))[1])
    shape = (8, 6, 5, 7)
    link, y = fixed(shape), numbers(*shape)
    conv_rates.respond(link, y).square().sum().backward()
    assert ran == ["moments", "moments", "rates", "sums"]
    exact = by_torch(y, fixed(shape), None)
    assert link.connection.bn.weight.grad.shape == exact[2].shape
