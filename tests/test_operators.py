"""Operators against the torch modules whose geometry they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ide_snn.operators import Operator

modest = settings(max_examples=80, deadline=None, derandomize=True)


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def modules(draw: st.DrawFn, *, bias: bool = True) -> tuple[nn.Module, tuple[int, ...]]:
    """A float64 module of random geometry and an input shape it accepts."""
    kind = draw(st.sampled_from([nn.Linear, nn.Conv2d, nn.ConvTranspose2d]))
    if kind is nn.Linear:
        n, m = draw(pairs(1, 6))
        return nn.Linear(n, m, bias=bias, dtype=torch.float64), (n,)
    groups = draw(st.integers(1, 2))
    n, m = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, size = draw(pairs(1, 3)), draw(pairs(1, 7))
    options = {name: draw(pairs(low, high)) for name, low, high in (("stride", 1, 3), ("padding", 0, 2))}
    options["dilation"] = dilation = draw(pairs(1, 3))
    if kind is nn.ConvTranspose2d:
        room = [max(s, d) - 1 for s, d in zip(options["stride"], dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, r)) for r in room)
        ends = zip(
            size, options["stride"], options["padding"], dilation, kernel, options["output_padding"], strict=True
        )
        assume(all((i - 1) * s - 2 * p + d * (k - 1) + o + 1 >= 1 for i, s, p, d, k, o in ends))
    else:
        assume(
            all(i + 2 * p > d * (k - 1) for i, p, d, k in zip(size, options["padding"], dilation, kernel, strict=True))
        )
    return kind(n, m, kernel, groups=groups, bias=bias, dtype=torch.float64, **options), (n, *size)


@modest
@given(modules())
def test_apply_equals_the_module(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    operator = Operator.of(module)
    x = torch.randn(3, *shape, dtype=torch.float64)
    response = module(x)
    assert operator.output_shape(shape) == tuple(response.shape[1:])
    torch.testing.assert_close(operator.apply(x, module.weight, module.bias), response, rtol=0, atol=0)


@modest
@given(modules(bias=False))
def test_adjoint_is_the_adjoint(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    operator = Operator.of(module)
    x = torch.randn(2, *shape, dtype=torch.float64)
    response = module(x).detach()
    y = torch.randn_like(response)
    back = operator.adjoint(y, module.weight.detach(), shape)
    assert back.shape == x.shape
    scale = float(response.norm() * y.norm()) + 1
    assert float((response * y).sum()) == pytest.approx(float((x * back).sum()), abs=1e-12 * scale)


def test_adjoint_where_the_output_padding_exceeds_the_stride() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, stride=1, dilation=2, output_padding=1, bias=False)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    y = torch.randn_like(module(x))
    (expected,) = torch.autograd.grad(module(x), x, y)
    torch.testing.assert_close(Operator.of(module).adjoint(y, module.weight, (2, 5, 5)), expected)


def test_adjoint_of_a_channels_last_tensor_is_the_same() -> None:
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False, dtype=torch.float64)
    y = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    operator = Operator.of(module)
    torch.testing.assert_close(
        operator.adjoint(y.to(memory_format=torch.channels_last), module.weight, (4, 7, 7)),
        operator.adjoint(y, module.weight, (4, 7, 7)),
    )


@modest
@given(modules(bias=False))
def test_per_output_scales_the_channels_of_the_response(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    operator = Operator.of(module)
    factors = torch.randn(operator.out_channels, dtype=torch.float64)
    if operator.kind == "conv_transposed" and operator.groups > 1:
        with pytest.raises(ValueError, match="groups=1"):
            operator.per_output(factors)
        return
    x = torch.randn(2, *shape, dtype=torch.float64)
    scaled = operator.apply(x, module.weight * operator.per_output(factors))
    factors = factors.view(-1, *(1,) * (len(shape) - 1))
    torch.testing.assert_close(scaled, module(x) * factors)


@pytest.mark.parametrize(
    ("module", "channel"), [(nn.Linear(3, 5), 0), (nn.Conv2d(3, 5, 2), 0), (nn.ConvTranspose2d(3, 5, 2), 1)]
)
def test_which_dimension_of_the_weight_is_the_output(module: nn.Module, channel: int) -> None:
    operator = Operator.of(module)
    assert operator.output_dim_of_weight == channel
    assert module.weight.shape[channel] == operator.out_channels == 5


def test_operators_are_values() -> None:
    one, other = Operator.of(nn.Conv2d(3, 5, 2)), Operator.of(nn.Conv2d(3, 5, 2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Operator.of(nn.Conv2d(3, 5, 2, padding=1))


def test_unknown_modules_are_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"Conv1d; known are Linear, Conv2d, ConvTranspose2d"):
        Operator.of(nn.Conv1d(2, 2, 3))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(2, 2, 3, padding="same"), "padding='same' is not supported"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode='circular' is not supported"),
    ],
)
def test_unknown_paddings_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Operator.of(module)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Linear(4, 2), (5,), r"expects \[4\] features, got \[5\]"),
        (nn.Linear(4, 2), (1, 2, 2), r"expects \[4\] features"),
        (nn.Conv2d(2, 2, 3), (3, 8, 8), r"expects \[2, H, W\], got \[3, 8, 8\]"),
        (nn.Conv2d(2, 2, 3), (2, 8), r"expects \[2, H, W\]"),
        (nn.Conv2d(2, 2, 5), (2, 4, 9), r"\[2, 4, 9\] is too small"),
        (nn.ConvTranspose2d(2, 2, 1, padding=2), (2, 3, 9), r"\[2, 3, 9\] is too small"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Operator.of(module).output_shape(shape)
