"""The spectral norm constraint by compiled kernels against torch's operations."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ide_snn import native, spectral
from ide_snn.optimizations import PowerIteration, constrain, get_constraint, raw_weight, update_constraints

REASON = native.why_unavailable("spectral")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


def assert_same_step(module: nn.Module) -> None:
    """One update, forward and backward by kernels and by torch."""
    weight = raw_weight(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    cotangent = torch.randn(weight.shape, generator=generator)
    by_kernels, by_torch = copy.deepcopy(module), copy.deepcopy(module)
    for flag, own in ((True, by_kernels), (False, by_torch)):
        update_constraints(own, native=flag)
        (own.weight * cotangent).sum().backward()
    # relative to the whole: singular values that are close together mix at rounding level
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(by_kernels.weight, by_torch.weight, **close)
    torch.testing.assert_close(by_kernels.state_dict(), by_torch.state_dict(), **close)
    for mine, theirs in zip(by_kernels.parameters(), by_torch.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **close)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 9), st.sampled_from([0.1, 100.0]), st.integers(1, 3))
def test_any_matrix_on_any_threads(rows: int, columns: int, seed: int, bound: float, threads: int) -> None:
    """With a bound below alpha, where alpha gets no gradient, and above."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_step(constrain(linear, "spectral_matrix", bound=bound, generator=generator))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 20, 3, bias=False),
        nn.ConvTranspose2d(7, 9, 3, bias=False),
        nn.ConvTranspose2d(6, 3, 1, bias=False),  # whose matrix is a view, of other strides
        nn.ConvTranspose2d(4, 4, 1, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("constraint", ["spectral_matrix", "spectral_matrix_first_dim"])
def test_weights_of_convolutions(module: nn.Module, constraint: str) -> None:
    assert_same_step(constrain(copy.deepcopy(module), constraint, bound=1.0))


def test_a_weight_that_changed_after_the_step_is_measured_anew() -> None:
    module = constrain(nn.Linear(30, 30, bias=False), "spectral_matrix", bound=1.0)
    constraint, raw = get_constraint(module), raw_weight(module)
    assert constraint is not None
    assert spectral.fits(raw.detach(), raw.detach())
    update_constraints(module, native=True)
    with torch.no_grad():
        raw.mul_(3)
    first = module.weight.detach().clone()
    torch.testing.assert_close(torch.linalg.matrix_norm(first, 2), constraint.alpha.clamp(max=1.0), rtol=1e-3, atol=0)
    update_constraints(module, native=True)
    torch.testing.assert_close(module.weight, first, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        raw.data.mul_(5)  # unseen by version counters: a step serves one forward only
    torch.testing.assert_close(module.weight, first, rtol=1e-3, atol=1e-5)


def test_what_the_kernels_cannot_take() -> None:
    weight = torch.randn(4, 5, 3, 3)
    for other in (weight.double(), weight.to(memory_format=torch.channels_last), weight.transpose(0, 1)):
        assert not spectral.fits(other.flatten(1), other)
    assert not spectral.fits(weight.transpose(0, 1).flatten(1), weight)
    assert spectral.fits(weight.flatten(1), weight)


def test_a_step_is_that_of_these_vectors_and_this_type() -> None:
    module = constrain(nn.Linear(30, 30, bias=False), "spectral_matrix", bound=0.5)
    constraint = get_constraint(module)
    assert isinstance(constraint, PowerIteration)
    for change in (
        lambda: constraint.converge(raw_weight(module).detach()),
        lambda: update_constraints(module),
        module.double,
    ):
        with torch.no_grad():
            raw = raw_weight(module)
            raw.add_(torch.randn(raw.shape, generator=torch.Generator().manual_seed(1)).to(raw))
        update_constraints(module, native=True)
        change()
        s = torch.dot(constraint.u, raw_weight(module).detach() @ constraint.v)
        expected = constraint.alpha.clamp(max=0.5) / s * raw_weight(module)
        torch.testing.assert_close(module.weight, expected, rtol=1e-5, atol=1e-7)
