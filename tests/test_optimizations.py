"""Constraints on the feedback weight, against dense norms from numpy and torch; variational dropout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ide_snn.dropout import VariationalDropout
from ide_snn.optimizations import (
    CONSTRAINTS,
    NormConstraint,
    PowerIteration,
    constrain,
    get_constraint,
    raw_weight,
    remove_constraint,
    update_constraints,
)

NAMES = [name for name in CONSTRAINTS if name != "none"]
ITERATED = [name for name in NAMES if name.startswith("spectral")]
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 5, bias=False),
    "conv": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False),
}
INPUTS = {"linear": (7,), "conv": (3, 6, 5), "transposed": (4, 3, 4)}
modest = settings(max_examples=15, deadline=None, derandomize=True)
every_constraint = pytest.mark.parametrize("name", NAMES)
every_module = pytest.mark.parametrize("kind", list(MODULES))


def made(kind: str, name: str, *, scale: float = 1.0, bound: float = 1.0, dtype: torch.dtype = torch.float64):
    """A constrained module whose initial weight is uniform in (-scale, scale)."""
    module = MODULES[kind]().to(dtype)
    nn.init.uniform_(module.weight, -scale, scale)
    return constrain(module, name, bound=bound, input_size=INPUTS[kind][1:] or None)


def constraint_of(module: nn.Module) -> NormConstraint:
    constraint = get_constraint(module)
    assert constraint is not None
    return constraint


def dense(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of the module's linear map, column by column, in float64."""
    module = copy.deepcopy(module).double().eval()
    basis = torch.eye(math.prod(shape), dtype=torch.float64)
    return module(basis.view(-1, *shape)).flatten(1).t().detach()


def true_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    return float(np.linalg.norm(dense(module, shape).numpy(), 2))


def expected_norm(kind: str, name: str, weight: Tensor) -> Tensor:
    """The norm by its definition, differentiable."""
    channel = 1 if kind == "transposed" else 0
    if name == "frobenius":
        return weight.square().sum().sqrt()
    if name == "weight_norm":
        others = [d for d in range(weight.dim()) if d != channel]
        return weight.square().sum(others, keepdim=True).sqrt()
    if name == "spectral_operator":
        basis = torch.eye(math.prod(INPUTS[kind]), dtype=torch.float64).view(-1, *INPUTS[kind])
        columns = torch.func.functional_call(MODULES[kind]().double(), {"weight": weight}, (basis,))
        return torch.linalg.matrix_norm(columns.flatten(1), 2)
    first = 0 if name.endswith("first_dim") else channel
    return torch.linalg.matrix_norm(weight.transpose(0, first).flatten(1), 2)


@every_module
@every_constraint
@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_the_weight_follows_its_formula(kind: str, name: str, scale: float) -> None:
    module = made(kind, name, scale=scale, bound=0.8)
    raw, constraint = raw_weight(module).detach(), constraint_of(module)
    norm = expected_norm(kind, name, raw)
    torch.testing.assert_close(constraint.alpha.detach(), norm, rtol=1e-5, atol=0)  # stored unclipped
    if scale < 1 and bool((norm < 0.8).all()):
        torch.testing.assert_close(module.weight, raw, rtol=1e-5, atol=0)
    for alpha in (constraint.alpha.detach().clone(), torch.tensor(0.5), torch.tensor(-0.5), torch.tensor(-7.0)):
        with torch.no_grad():
            constraint.alpha.copy_(alpha)
        expected = constraint.alpha.detach().numpy().clip(-0.8, 0.8) * raw.numpy() / norm.numpy()
        np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-12)


@modest
@given(n=st.integers(1, 60), m=st.integers(1, 60), seed=st.integers(0, 9**9), bound=st.floats(0.1, 3.0))
@pytest.mark.parametrize("name", ["spectral_matrix", "spectral_operator", "frobenius"])
def test_a_linear_map_stays_within_its_bound(name: str, n: int, m: int, seed: int, bound: float) -> None:
    torch.manual_seed(seed)
    module = nn.Linear(n, m, bias=False)
    nn.init.uniform_(module.weight, 5, 6) if seed % 3 == 0 else nn.init.normal_(module.weight, std=9)
    before = float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    constrain(module, name, bound=bound)
    norm = float(np.linalg.svd(module.weight.detach().double().numpy(), compute_uv=False)[0])
    assert norm <= bound * (1 + 1e-5)
    if name != "frobenius":  # and the bound is used
        assert norm == pytest.approx(min(bound, before), rel=1e-5)


@modest
@given(data=st.data(), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_stays_within_its_bound(transposed: bool, data: st.DataObject, seed: int) -> None:
    """The true operator norm: plain power iteration creeps here and ends up to 0.4 % short."""
    torch.manual_seed(seed)
    channels = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    shape = (channels[0], *data.draw(st.tuples(st.integers(3, 7), st.integers(3, 7))))
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(*channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.uniform_(module.weight, -3, 3)
    before = true_norm(module, shape)
    constrain(module, "spectral_operator", input_size=shape[1:])
    norm = true_norm(module, shape)
    assert norm <= 1 + 1e-4
    assert norm == pytest.approx(min(1, before), rel=1e-4)
    assert abs(constraint_of(module).excess(raw_weight(module))) < 1e-4


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("spectral_matrix", nn.Linear(60, 60, bias=False), (60,)),
        ("spectral_operator", nn.Conv2d(4, 4, 3, padding=1, bias=False), (4, 6, 6)),
        ("spectral_operator", nn.ConvTranspose2d(6, 3, 3, 2, 1, 1, bias=False), (6, 4, 4)),
    ],
)
def test_one_iteration_per_step_keeps_up_with_training(name: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """Excess over the bound in 100 steps at the recipe's learning rate: at most 5 % ever, 1 % at the end.

    Measured here: 1.4 % and 0.01 %; F400 on Fashion-MNIST: 1.9 % in 300 steps. No bound holds at any rate: where
    the weights move by more than half their norm within 100 steps, 30 % was seen.
    """
    module = copy.deepcopy(module)
    nn.init.uniform_(module.weight, -1, 1)
    with torch.no_grad():
        module.weight.div_(module.weight.flatten(1).norm(dim=1).view(-1, *(1,) * (module.weight.dim() - 1)))
    constrain(module, name, input_size=shape[1:] or None)
    x = torch.rand(64, *shape)
    target = torch.randn_like(module(x))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    norms = []
    for _ in range(100):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
        norms.append(true_norm(module, shape))
    assert max(norms) < 1.05
    assert norms[-1] < 1.01


def test_a_transposed_convolution_flattens_its_output_channels() -> None:
    """The original reshaped the first dimension, which runs over the input channels here."""
    weight, alphas = torch.randn(4, 3, 3, 3, dtype=torch.float64), []
    for name in ("spectral_matrix", "spectral_matrix_first_dim"):
        module = MODULES["transposed"]().double()
        module.weight.data = weight.clone()
        alphas.append(float(constraint_of(constrain(module, name)).alpha.detach()))
    matrices = weight.transpose(0, 1).reshape(3, -1), weight.reshape(4, -1)
    assert alphas == pytest.approx([np.linalg.norm(matrix, 2) for matrix in matrices], rel=1e-6)
    assert abs(alphas[0] / alphas[1] - 1) > 1e-3


def drift(module: nn.Module) -> None:
    """Moves the raw weight so that the norm's estimate has something left to learn."""
    with torch.no_grad():
        raw_weight(module).add_(torch.randn_like(raw_weight(module)), alpha=0.5)


@every_module
@every_constraint
def test_evaluation_changes_nothing(kind: str, name: str) -> None:
    """The original iterated in evaluation too: two identical passes differed."""
    module = made(kind, name)
    drift(module)
    module.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(2, *INPUTS[kind], dtype=torch.float64)
    assert torch.equal(module(x), module(x))
    assert torch.equal(module.train().weight, module.weight)  # reading does not count as a forward
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@every_module
@pytest.mark.parametrize("name", ITERATED)
def test_one_update_per_training_forward(kind: str, name: str) -> None:
    module = made(kind, name)
    drift(module)
    reference = copy.deepcopy(constraint_of(module))
    assert isinstance(reference, PowerIteration)
    x = torch.randn(2, *INPUTS[kind], dtype=torch.float64)
    constraint = constraint_of(module)
    assert isinstance(constraint, PowerIteration)
    for _ in range(3):
        before = reference.v.clone()
        first, second = module(x), module(x)
        (first * second).sum().backward()  # the second forward has not spoilt the graph of the first
        reference.update(raw_weight(module))
        reference.update(raw_weight(module))
        assert torch.equal(constraint.u, reference.u)
        assert torch.equal(constraint.v, reference.v)
        assert not torch.equal(reference.v, before)
    update_constraints(nn.Sequential(nn.Sequential(module), nn.ReLU()))
    reference.update(raw_weight(module))
    assert torch.equal(constraint.v, reference.v)


@every_module
@every_constraint
def test_gradients_of_the_weight(kind: str, name: str) -> None:
    """Against autograd through a dense norm; u and v at convergence are stationary, so they carry no gradient."""
    module = made(kind, name, bound=50.0)
    constraint = constraint_of(module)
    for _ in range(3000 if name in ITERATED else 0):
        constraint.update(raw_weight(module))
    raw, alpha = raw_weight(module), constraint.alpha
    cotangent = torch.randn_like(raw)
    ours = torch.autograd.grad((module.weight * cotangent).sum(), (raw, alpha))
    norm = expected_norm(kind, name, raw)
    theirs = torch.autograd.grad(((alpha.clamp(-50, 50) / norm) * raw * cotangent).sum(), (raw, alpha))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
    if name not in ITERATED:
        w, a = raw.detach().clone().requires_grad_(), alpha.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda w, a: torch.func.functional_call(constraint, {"alpha": a}, w), (w, a))


@every_constraint
@pytest.mark.parametrize(("alpha", "passes"), [(0.3, 1), (1.0, 1), (-1.0, 1), (1.0001, 0), (-1.0001, 0)])
def test_the_clamp_of_alpha_passes_the_gradient_at_equality(name: str, alpha: float, passes: int) -> None:
    module = made("linear", name)
    constraint = constraint_of(module)
    with torch.no_grad():
        constraint.alpha.fill_(alpha)
    module.weight.sum().backward()
    assert constraint.alpha.grad is not None
    assert bool((constraint.alpha.grad != 0).all()) == bool(passes)
    assert bool((constraint.alpha.detach() == alpha).all())


@every_module
@every_constraint
def test_copies_and_saved_states_are_equal_and_independent(kind: str, name: str) -> None:
    module = made(kind, name)
    drift(module)
    x = torch.randn(2, *INPUTS[kind], dtype=torch.float64)
    module(x)
    twin, other = copy.deepcopy(module), made(kind, name, scale=2.0)
    other.load_state_dict(module.state_dict())
    weight = module.weight.detach().clone()
    for copied in (twin, other):
        assert torch.equal(copied.weight, weight)
        drift(copied)
        copied(x)  # in training mode: moves its own estimate only
        with torch.no_grad():
            constraint_of(copied).alpha.mul_(0.5)
        assert not torch.equal(copied.weight, weight)
        assert torch.equal(module.weight, weight)


@every_constraint
def test_double_converts_everything(name: str) -> None:
    module = made("conv", name, dtype=torch.float32)
    single = module.weight.detach()
    module.double()
    assert {value.dtype for value in module.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(module.weight, single.double(), rtol=1e-5, atol=1e-7)
    module(torch.randn(2, *INPUTS["conv"], dtype=torch.float64)).sum().backward()


@every_module
@every_constraint
def test_remove_leaves_a_plain_weight(kind: str, name: str) -> None:
    module = made(kind, name, scale=3)
    weight = module.weight.detach().clone()
    assert remove_constraint(module) is module
    assert type(module) is type(MODULES[kind]())
    assert torch.equal(module.weight, weight)
    assert [type(p) for p in module.parameters()] == [nn.Parameter]
    assert list(module.state_dict()) == ["weight"]
    assert not module._forward_pre_hooks
    constrain(module, name, input_size=INPUTS[kind][1:] or None)  # and again


@every_constraint
@pytest.mark.parametrize("from_the_copy", [True, False])
def test_removing_from_one_leaves_copies_as_they_were(name: str, from_the_copy: bool) -> None:
    module = made("conv", name).eval()
    twin, weight = copy.deepcopy(module), module.weight.detach().clone()
    first, other = (twin, module) if from_the_copy else (module, twin)
    remove_constraint(first)
    assert torch.equal(other.weight, weight)
    assert get_constraint(other) is not None
    assert torch.equal(copy.deepcopy(other).weight, weight)
    assert type(remove_constraint(other)) is type(first) is nn.Conv2d


@pytest.mark.parametrize("name", ITERATED)
def test_assigning_a_weight_keeps_the_bound(name: str) -> None:
    """The singular vectors of the weight before say nothing about the one assigned."""
    module = made("conv", name)
    alpha = constraint_of(module).alpha.detach().clone()
    new = torch.randn_like(raw_weight(module)) * 40
    module.weight = new
    assert torch.equal(raw_weight(module), new)
    assert torch.equal(constraint_of(module).alpha, alpha)
    torch.testing.assert_close(module.weight, new / expected_norm("conv", name, new), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="zero weight"):
        module.weight = torch.zeros_like(new)


@every_constraint
def test_autocast_does_not_round_the_norm(name: str) -> None:
    module = made("conv", name, dtype=torch.float32)
    drift(module)
    twin, x = copy.deepcopy(module), torch.randn(2, *INPUTS["conv"])
    twin(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
        torch.testing.assert_close(module.weight, twin.weight, rtol=1e-6, atol=1e-7)


@every_constraint
@pytest.mark.parametrize(
    ("weight", "bound", "message"),
    [
        (torch.zeros(5, 7), 1.0, "zero weight: its norm is 0"),
        (torch.full((5, 7), math.nan), 1.0, "NaN or infinity"),
        (torch.ones(5, 7), 0.0, "must be positive and finite, got 0.0"),
        (torch.ones(5, 7), -1.0, "must be positive and finite, got -1.0"),
        (torch.ones(5, 7), math.inf, "must be positive and finite, got inf"),
    ],
)
def test_what_cannot_be_constrained(name: str, weight: Tensor, bound: float, message: str) -> None:
    module = nn.Linear(7, 5)
    module.weight.data = weight.clone()
    with pytest.raises(ValueError, match=message):
        constrain(module, name, bound=bound)
    assert get_constraint(module) is None


def test_misuse_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"unknown constraint 'spectral'; valid are spectral_matrix, .*none"):
        constrain(nn.Linear(3, 3), "spectral")
    for size in (None, (4,)):
        with pytest.raises(ValueError, match=r"needs input_size=\(height, width\)"):
            constrain(nn.Conv2d(2, 2, 3), "spectral_operator", input_size=size)
    with pytest.raises(ValueError, match="grouped transposed convolutions"):
        constrain(nn.ConvTranspose2d(4, 4, 3, groups=2), "spectral_matrix")
    with pytest.raises(ValueError, match="already constrained"):
        constrain(made("linear", "frobenius"), "spectral_matrix")
    with pytest.raises(ValueError, match="Linear has no constrained weight"):
        remove_constraint(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="not a known linear operator: Conv1d"):
        constrain(nn.Conv1d(2, 2, 3), "frobenius")
    dead_channel = nn.Linear(3, 3)
    dead_channel.weight.data[1] = 0
    with pytest.raises(ValueError, match="output channel has only zero weights"):
        constrain(dead_channel, "weight_norm")
    assert type(constrain(nn.Linear(3, 3), "none")) is nn.Linear


@pytest.mark.parametrize("name", ITERATED)
def test_the_start_is_reproducible_by_its_generator(name: str) -> None:
    module, states = nn.Conv2d(3, 4, 3), []
    for _ in range(2):
        twin, state = copy.deepcopy(module), torch.get_rng_state()
        constrain(twin, name, input_size=(6, 6), generator=torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), state)  # the global one is not touched
        states.append(twin.state_dict())
        torch.rand(3)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_gains(p: float) -> None:
    dropout = VariationalDropout(p)
    like = torch.zeros(200, 500, dtype=torch.float64).t().requires_grad_()
    gain, again, other = (dropout.draw(like, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert gain is not None
    assert (gain.shape, gain.dtype, gain.stride()) == (like.shape, like.dtype, like.stride())
    assert gain.unique().tolist() == pytest.approx([0, 1 / dropout.keep])
    assert dropout.keep == pytest.approx(1 - p, abs=2**-17)
    assert float(gain.mean()) == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / gain.numel()))
    assert torch.equal(gain, again)  # type: ignore[arg-type]
    assert not torch.equal(gain, other)  # type: ignore[arg-type]
    x = torch.rand(4, 60) + 1
    ratio = (dropout(x) / x).unique()
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([0, 1 / dropout.keep]))


@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 3, 5), (200, 400), (0, 3), (6, 1), (2, 1025)])
@pytest.mark.parametrize("p", [1e-4, 0.2, 0.9999])
def test_compiled_gains_are_the_same(shape: tuple[int, ...], p: float) -> None:
    dropout = VariationalDropout(p)
    for memory in (torch.contiguous_format, torch.channels_last if len(shape) == 4 else torch.contiguous_format):
        like = torch.zeros(shape).to(memory_format=memory)
        plain, native = (dropout.draw(like, torch.Generator().manual_seed(3), native=flag) for flag in (False, True))
        assert plain is not None
        assert native is not None
        assert torch.equal(plain, native)
        assert plain.stride() == native.stride()


def test_no_dropout_where_there_is_none() -> None:
    x = torch.randn(3, 4)
    for dropout in (VariationalDropout(0.0), VariationalDropout(0.5).eval()):
        assert dropout.draw(x) is None
        assert dropout(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_impossible_dropout_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout probability must lie in \[0, 1\)"):
        VariationalDropout(p)


def test_assigned_weight_is_bounded_even_where_the_old_vectors_are_exact_but_not_leading() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([2.0, 1, 1, 1])))
    constrain(linear, "spectral_matrix", bound=1.0)
    linear.weight = torch.diag(torch.tensor([2.0, 5, 1, 1]))
    assert torch.linalg.matrix_norm(linear.weight.detach(), 2) == pytest.approx(1.0, rel=1e-4)
