"""`precision=fast`: dense convolutions of f and of gradients in bfloat16, where the processor multiplies it."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from networks import LIF
from test_precision import gradients
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, Gmres, Implicit, Unrolled, convolutions, equilibrium, native, precision
from ide_snn.convolutions import RoundedMap
from ide_snn.dense import DenseMap
from ide_snn.equilibrium import BFLOAT16_NOISE, AnalyticLinearisation, EquilibriumMap
from ide_snn.event_driven import EventMap
from ide_snn.layers import Affine
from ide_snn.native import Factor
from ide_snn.operators import Operator
from ide_snn.precision import rounds_convolutions
from ide_snn.solvers import LinearProblem, Outcome, Rough, solve
from ide_snn.spiking import operator_gradients

REASON = native.why_unavailable("events")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}"),
    pytest.mark.skipif(not precision.multiplies_bfloat16(), reason="the processor has no products of bfloat16"),
]
with torch.random.fork_rng():
    torch.manual_seed(0)
    MODULES = {
        "conv": nn.Conv2d(5, 7, 3, stride=2, padding=1),
        "conv_transposed": nn.ConvTranspose2d(5, 7, 3, stride=2, padding=1, output_padding=1),
        "linear": nn.Linear(5, 7),
    }


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)], ids=str)
def test_gradients_are_rounded_to_eight_bits(kind: str, needs: tuple[bool, bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    operator, weight = Operator.of(MODULES[kind]), MODULES[kind].weight.detach()
    x = torch.randn(4, 5, *([] if kind == "linear" else [9, 9]), generator=generator)
    y = torch.randn(operator.apply(x, weight).shape, generator=generator)
    exact = operator_gradients(operator, x, y, weight, needs)
    found = operator_gradients(operator, x, y, weight, needs, rounded=True)
    for number, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
        if not needs[number]:
            continue
        assert mine.dtype == torch.float32
        error = float((mine - theirs).norm() / theirs.norm())
        if kind == "linear" or number == 2:  # sums of y: nothing is multiplied
            assert error < 1e-6
        else:
            assert 1e-4 < error < 2.0**-8
    if kind == "linear":
        return
    half = operator_gradients(operator, x.bfloat16(), y.bfloat16(), weight.bfloat16(), needs, rounded=True)
    for of_half, of_floats, dtype in zip(half[:2], found[:2], (torch.bfloat16, torch.float32), strict=True):
        assert (of_half is None) == (of_floats is None)
        if of_half is not None:
            assert of_half.dtype == dtype
            assert float((of_half - of_floats).norm() / of_floats.norm()) < 2.0**-8
    if needs[2]:
        torch.testing.assert_close(half[2], y.bfloat16().double().sum((0, 2, 3)).float())


@pytest.mark.parametrize("kind", ["conv", "conv_transposed"])
@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("bias", [False, True])
def test_responses_are_rounded_where_they_are_dense(kind: str, share: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    module = MODULES[kind]
    operator, weight, b = Operator.of(module), module.weight.detach(), module.bias.detach() if bias else None
    x = torch.rand(4, 5, 9, 9, generator=generator)
    x = x * (torch.rand(x.shape, generator=generator) < share)
    found, exact = convolutions.apply(operator, x, weight, b, rounded=True), operator.apply(x, weight, b)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert (1e-4 < error < 2.0**-8) if share > convolutions.SPARSE_BESIDE_BFLOAT16 else error < 1e-6


def network(kind: str, **options: object) -> FeedbackSNN:
    """One population and its written-out gradient, or three with batch norm and autograd's."""
    torch.manual_seed(1)
    stage = Connection(nn.Conv2d(2, 6, 3, padding=1), batch_norm=True)
    if kind == "one":
        feedback, layers = nn.Conv2d(6, 6, 3, padding=1), []
    else:
        feedback = nn.ConvTranspose2d(4, 6, 2, stride=2)
        layers = [
            Connection(nn.Conv2d(6, 8, 3, stride=2, padding=1), batch_norm=True),
            Connection(nn.Conv2d(8, 4, 3, padding=1), batch_norm=True),
        ]
    back = Connection(feedback, constraint="spectral_matrix", bound=0.5)
    return FeedbackSNN(
        input=stage, layers=layers, feedback=back, neuron=LIF, time_steps=8, solver=Gmres(1e-5), **options
    )


def images() -> Tensor:
    return 3 * torch.randn(24, 2, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["one", "three"])
def test_a_block_rounds_them_with_fast_alone_and_says_so(kind: str, monkeypatch, caplog) -> None:
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        _, rounded = gradients(network(kind, precision="fast").train(), images())
    assert "16-bit weights, dense convolutions in bfloat16" in caplog.text
    monkeypatch.setattr(equilibrium, "rounds_convolutions", lambda *_: False)
    _, plain = gradients(network(kind, precision="fast").train(), images())
    # those in front of batch norm are 0 but for rounding
    pairs = [(a, b) for a, b in zip(rounded, plain, strict=True) if float(b.norm()) > 1e-2]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    assert len(errors) > 3
    assert 1e-4 < max(errors) < 0.2  # a slope here and there is another one
    cpu = torch.device("cpu")
    assert rounds_convolutions("fast", cpu)
    assert not rounds_convolutions("exact", cpu)
    assert not rounds_convolutions("float32", cpu)
    assert not rounds_convolutions("fast", torch.device("cuda"))


def test_without_the_instructions_they_are_float32(monkeypatch, caplog) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        gradients(network("one", precision="fast").train(), images())
    assert "event-driven, 16-bit weights, dense convolutions in float32" in caplog.text


def test_what_onednn_does_not_compute_is_float32(monkeypatch) -> None:
    """Torch's own kernels would sum in bfloat16."""
    module = nn.ConvTranspose2d(3, 4, 3, stride=1, padding=2, dilation=2, output_padding=1)
    operator, weight = Operator.of(module), module.weight.detach()
    assert not operator.suits_onednn
    x = torch.randn(256, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randn(operator.apply(x, weight).shape, generator=torch.Generator().manual_seed(1))
    for flag in (True, False):
        found = operator_gradients(operator, x, y, weight, (True, True, False), rounded=flag)
        exact = operator_gradients(operator, x.double(), y.double(), weight.double(), (True, True, False))
        for mine, theirs in zip(found[:2], exact[:2], strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
        assert (
            float((convolutions.apply(operator, x, weight, None, rounded=flag) - operator.apply(x, weight)).norm())
            < 1e-3
        )
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert not rounds_convolutions("fast", torch.device("cpu"))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_rates_between_convolutions_stay_rounded(share: float, monkeypatch) -> None:
    """Of three populations, in the one to the third: with batch statistics and with running ones."""
    monkeypatch.setattr(convolutions, "SPARSE_BESIDE_BFLOAT16", 1.1 * share)
    seen = []
    product = convolutions._product
    monkeypatch.setattr(
        convolutions,
        "_product",
        lambda a, x, *r, walks: (seen.append((x.dtype, walks)), product(a, x, *r, walks=walks))[1],
    )
    _, found = gradients(network("three", precision="fast").train(), images())
    half, whole = (torch.bfloat16, share > 0), (torch.float32 if share else torch.bfloat16, share > 0)
    assert seen == [whole, half, half]
    _, exact = gradients(network("three", precision="exact").train(), images())
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True) if float(b.norm()) > 1e-2]
    assert max(errors) < 0.3  # spikes of 16-bit weights, and a slope here and there


def test_between_convolutions_of_which_one_is_float32(monkeypatch) -> None:
    """Rates in front of the one that oneDNN does not compute are not rounded."""
    torch.manual_seed(0)
    wide = nn.ConvTranspose2d(8, 4, 3, stride=1, padding=2, dilation=2, output_padding=1)
    assert not Operator.of(wide).suits_onednn
    monkeypatch.setattr(convolutions, "SPARSE_BESIDE_BFLOAT16", 0.0)  # dense, whatever the rates are
    block = FeedbackSNN(
        input=Connection(nn.Conv2d(2, 6, 3, padding=1), batch_norm=True),
        layers=[
            Connection(nn.Conv2d(6, 8, 3, padding=1), batch_norm=True),
            Connection(wide, batch_norm=True),
            Connection(nn.Conv2d(4, 6, 4, padding=1), batch_norm=True),
        ],
        feedback=Connection(nn.Conv2d(6, 6, 3, padding=1), constraint="spectral_matrix", bound=0.5),
        precision="fast",
        time_steps=4,
    )
    states = copy.deepcopy(block.state_dict())
    _, rounded = gradients(block.train(), images())
    monkeypatch.setattr(equilibrium, "rounds_convolutions", lambda *_: False)
    block.load_state_dict(states)
    _, plain = gradients(block.train(), images())
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(rounded, plain, strict=True) if float(b.norm()) > 1e-2]
    assert 1e-4 < max(errors) < 0.2


@pytest.mark.parametrize("gradient", [Unrolled(2), Implicit(jacobian_bn="batch")], ids=str)
def test_it_is_not_said_where_it_is_not_done(gradient: Unrolled | Implicit, caplog) -> None:
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        gradients(network("three", precision="fast", gradient=gradient).train(), images())
    assert "precision=fast: event-driven, 16-bit weights" in caplog.text
    assert "bfloat16" not in caplog.text


def test_it_is_said_where_j_alone_is_of_the_batch(caplog, monkeypatch) -> None:
    """J of the batch at f of the rates: f itself still takes them."""
    monkeypatch.setattr(convolutions, "SPARSE_BESIDE_BFLOAT16", 0.0)
    seen = []
    product = convolutions._product
    monkeypatch.setattr(convolutions, "_product", lambda *a, **k: (seen.append(y := product(*a, **k)), y)[1])
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        gradients(network("three", precision="fast", gradient=Implicit("batch", "f")).train(), images())
    assert [y.dtype for y in seen] == [torch.float32, torch.bfloat16, torch.bfloat16]  # the first has a bias
    assert "dense convolutions in bfloat16" in caplog.text


def linearised(kind: str, share: float) -> tuple[EquilibriumMap, AnalyticLinearisation, Tensor]:
    """(f, J with this share of slopes that are not 0, a right-hand side)."""
    block = network(kind, precision="fast").eval()
    rates, f = block.linearisation_point(images())
    generator = torch.Generator().manual_seed(0)
    slopes = [
        0.5 * (torch.rand(len(rates), *s, generator=generator) < share) for s in block.population_shapes((2, 16, 16))
    ]
    return f, f.linearise_with(slopes), torch.randn(rates.shape, generator=generator)


@pytest.mark.parametrize("kind", ["one", "three"])
def test_loose_solves_round_products_with_dense_slopes(kind: str) -> None:
    f, jacobian, g = linearised(kind, 0.8)
    problem = f.adjoint_problem(jacobian, g)
    exact = jacobian.rmatvec(g)
    assert problem.rough is not None
    assert 1e-4 < float((problem.rough.matvec(g) - exact).norm() / exact.norm()) < 1e-2
    assert problem.rough.matvec(g).dtype == torch.float32
    torch.testing.assert_close(problem.matvec(g), exact, rtol=0, atol=0)
    for tol, is_rough in ((1e-2, True), (5e-3, False)):
        calls = []
        counted = replace(problem.rough, matvec=lambda v, to=calls: (to.append(v), problem.rough.matvec(v))[1])
        solution = solve(replace(problem, rough=counted), Gmres(tol))
        residual = (g + jacobian.rmatvec(solution.value) - solution.value).flatten(1).norm(dim=1)
        assert bool(calls) is is_rough
        assert solution.outcome is Outcome.converged
        assert float((residual / g.flatten(1).norm(dim=1) - solution.stats.residual).max()) < 1e-6
    assert f.adjoint_problem(linearised(kind, 0.1)[1], g).rough is None


def test_one_population_with_thin_slopes_has_walks_for_all() -> None:
    f, jacobian, g = linearised("three", 0.8)
    thin = replace(jacobian, slopes=(jacobian.slopes[0], jacobian.slopes[1] * (g.mean() > 2), jacobian.slopes[2]))
    assert f.adjoint_problem(thin, g).rough is None


@pytest.mark.parametrize("strength", [0.9, 0.99])
def test_verdicts_are_on_what_is_not_rounded(strength: float) -> None:
    """I - J nearly singular: v is so long that the rounding of J^T v is larger than the tolerance."""
    module = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    weight = torch.full((4, 4, 3, 3), strength / 36)
    affine, shape = Affine(Operator.of(module), weight, None, 1, None, (4, 16, 16)), (6, 4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    slope = 1.0 + 0.1 * torch.rand(shape, generator=generator)
    slope = (slope / slope.mean()).contiguous(memory_format=torch.channels_last)
    g = torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    jacobian = AnalyticLinearisation((EventMap(affine),), (slope,))
    rounded = jacobian.in_bfloat16()
    assert rounded is not None
    factors, rough = jacobian.transposed_factors(), Rough(rounded.rmatvec, BFLOAT16_NOISE)
    solution = solve(LinearProblem(jacobian.rmatvec, g, native=True, factors=factors, rough=rough), Gmres(1e-2))
    residual = (g + jacobian.rmatvec(solution.value) - solution.value).flatten(1).norm(dim=1)
    assert float(solution.value.norm() / g.norm()) > 5
    assert solution.outcome is Outcome.converged
    assert float((residual / g.flatten(1).norm(dim=1)).max()) <= 1e-2


def test_training_takes_them(monkeypatch) -> None:
    seen = []
    rounded = AnalyticLinearisation.in_bfloat16
    monkeypatch.setattr(AnalyticLinearisation, "in_bfloat16", lambda self: (seen.append(rounded(self)), seen[-1])[1])
    monkeypatch.setattr(convolutions, "SPARSE_BESIDE_BFLOAT16", 0.0)  # whatever the slopes are
    monkeypatch.setattr(equilibrium, "SPARSE_BESIDE_BFLOAT16", 0.0)
    products = []
    adjoint = RoundedMap.adjoint
    monkeypatch.setattr(RoundedMap, "adjoint", lambda *arguments: (products.append(1), adjoint(*arguments))[1])
    block = network("three", precision="fast").train()
    block.solver = Gmres(1e-2)
    gradients(block, images())
    assert len(seen) == 1
    assert products


def test_kernels_are_packed_for_solves_that_need_them_only() -> None:
    packed = []

    def factors() -> tuple[Factor, ...]:
        packed.append(1)
        return (DenseMap(Affine(Operator("linear", 3, 3), matrix, None, 1, None, (3,))).adjoint_factor(None),)

    matrix, b = 0.1 * torch.eye(3), torch.ones(2, 3)
    for noise, asked in ((1e-3, []), (9e-3, [1])):  # at five times its noise a rough solve is worth a try
        rough = Rough(lambda v: v @ matrix, noise)
        solution = solve(LinearProblem(lambda v: v @ matrix, b, native=True, factors=factors, rough=rough), Gmres(1e-2))
        assert solution.outcome is Outcome.converged
        assert packed == asked


def test_a_linearisation_packs_its_kernels_once_when_it_is_asked(monkeypatch) -> None:
    packed = []
    factor = EventMap.adjoint_factor
    monkeypatch.setattr(EventMap, "adjoint_factor", lambda *of: (packed.append(1), factor(*of))[1])
    maps = [EventMap(Affine(Operator.of(MODULES["conv"]), MODULES["conv"].weight.detach(), None, 1, None, (5, 9, 9)))]
    factors = AnalyticLinearisation((*maps,), (torch.ones(2, 7, 5, 5),)).transposed_factors()
    assert factors is not None
    assert packed == []
    assert factors() is factors()
    assert packed == [1]


def test_rounded_maps_and_their_adjoints_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    for module in (MODULES["conv"], MODULES["conv_transposed"]):
        link = RoundedMap(Affine(Operator.of(module), module.weight.detach(), None, 1, None, (5, 9, 9)))
        x = torch.randn(4, 5, 9, 9, generator=generator)
        y = torch.randn(link.linear(x).shape, generator=generator)
        scale = torch.rand(y.shape, generator=generator)
        torch.testing.assert_close(
            (link.linear(x) * y * scale).sum(), (x * link.adjoint(y, scale)).sum(), rtol=1e-2, atol=0.5
        )
        exact = link.affine.adjoint(y * scale)
        assert 1e-4 < float((link.adjoint(y, scale) - exact).norm() / exact.norm()) < 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_scaled_vectors_are_those_of_torch_bit_for_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-140, 127, (3, 5, 67, 71), generator=generator)
    x = torch.ldexp(torch.randn(exponents.shape, generator=generator), exponents).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    scale = torch.rand(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 0.5)
    x, scale = x.contiguous(memory_format=layout), scale.contiguous(memory_format=torch.channels_last)
    scale[0, 0, 0, :3] = torch.tensor([1.0, 0.5, 0.0])
    found = convolutions.scaled(x, scale)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (x.float() * scale).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_the_share_of_zeros_is_taken_all_over() -> None:
    x = torch.zeros(64, 8, 16, 16)
    x[:4] = 1  # the first samples are not like the others
    for layout in (torch.channels_last, torch.contiguous_format):
        assert convolutions.is_sparse(x.contiguous(memory_format=layout), 0.1)
        assert not convolutions.is_sparse(x.contiguous(memory_format=layout), 0.05)
    assert convolutions.is_sparse(x.flatten(1), 0.1)
    assert convolutions.is_sparse(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("size", [14, 16, 49])
def test_the_share_of_zeros_is_not_that_of_a_border(size: int) -> None:
    x = torch.ones(32, 64, size, size).contiguous(memory_format=torch.channels_last)
    x[..., 0], x[:, :, 0] = 0, 0
    assert not convolutions.is_sparse(x, 0.5)
    assert convolutions.is_sparse(1 - x, 0.5)
