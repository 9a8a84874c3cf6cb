"""Products in whole numbers that skip zeros, and solves with them, against what they round and against exact ones."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compiled_blocks import block, images, step
from hypothesis import example, given, settings
from test_integers import rounding
from torch import Tensor

from ide_snn import Gmres, NeuronParams, implicit, integers, native, prepared_step
from ide_snn.dense import DenseMap, turned_product
from ide_snn.layers import Affine
from ide_snn.native import Stages
from ide_snn.operators import Operator
from ide_snn.solvers import LinearProblem, Outcome, Solution, solve

REASON = integers.why_unavailable() or native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no products in whole numbers: {REASON}")


def thin(outputs: int, inputs: int, samples: int, share: float, seed: int = 0) -> tuple[DenseMap, Tensor, Tensor]:
    """(W^T in whole numbers, vectors of which this share of numbers is not 0, scales) for W [outputs, inputs]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mask = torch.rand(samples, outputs, generator=generator) < share
    x, scale = torch.randn(samples, outputs, generator=generator), torch.rand(samples, outputs, generator=generator)
    layer = Affine(Operator("linear", inputs, outputs), weight, None, 1, None, (inputs,))
    return DenseMap(layer, whole=True), x * mask, scale


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 100), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.49, 0.6, 1.0]),
    seed=st.integers(0, 5),
)
@example(sizes=(400, 400, 128), share=0.37, seed=0)
@example(sizes=(4_096, 33, 3), share=0.3, seed=0)
@example(sizes=(4_095, 1, 3), share=0.9, seed=0)
def test_a_product_that_skips_zeros_is_that_of_float64_to_its_units(
    sizes: tuple[int, int, int], share: float, seed: int
) -> None:
    product, x, scale = thin(*sizes, share, seed)
    matrix = product.affine.weight
    for vectors, by in ((x, None), (x * scale, scale)):
        error = (product.adjoint(x, by).double() - vectors.double() @ matrix.double()).abs()
        assert bool((error <= rounding(vectors, matrix)).all())


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_vector_that_skips_zeros_does_not_depend_on_the_others_nor_on_threads(share: float, monkeypatch) -> None:
    monkeypatch.setattr(native, "WORTH_THREADS", 0)
    product, x, scale = thin(51, 70, 37, share)
    x[::3] = torch.randn(13, 51, generator=torch.Generator().manual_seed(1))  # some without zeros
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(product.adjoint(x, scale))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    alone = torch.cat([product.adjoint(x[i : i + 1], scale[i : i + 1]) for i in range(len(x))])
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost_among_zeros(value: float, share: float) -> None:
    product, x, _ = thin(33, 40, 5, share)
    clean = product.adjoint(x)
    x[2, 7] = value
    found = product.adjoint(x)
    assert not bool(found[2].isfinite().any())
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    product.affine.weight[3, 9] = value
    Stages([product.packing]).run()
    x[2, 7], x[:, 3] = 0, 1
    found = product.adjoint(x)
    assert not bool(found[:, 9].isfinite().any())
    assert bool(found[:, :9].isfinite().all())


def test_a_weight_is_scaled_as_it_is_packed() -> None:
    product, x, _ = thin(51, 70, 9, 0.4)
    factor = ctypes.c_float(0.37)
    scaled = DenseMap(replace(product.affine, weight=product.affine.weight * factor.value), whole=True)
    product.packing.work.scale = ctypes.addressof(factor)
    Stages([product.packing]).run()
    assert torch.equal(product.adjoint(x), scaled.adjoint(x))


@pytest.mark.parametrize(("features", "batch"), [(40, 30), (400, 128), (1_000, 20)])
def test_the_noise_of_a_solve_is_what_it_is_said_to_be(features: int, batch: int) -> None:
    """With slopes as thin as those of a trained network, whatever the size of J."""
    product, x, _ = thin(features, features, batch, 1.0)
    weight = 7 * product.affine.weight
    slopes = 1.25 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4)
    rounded, exact = (DenseMap(replace(product.affine, weight=weight), whole=r) for r in (True, False))
    wanted = exact.adjoint(x, slopes)
    error = (rounded.adjoint(x, slopes) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert 0.2 * integers.noise(features) < float(error.max()) < integers.noise(features)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("tol", "is_rough"), [(1e-2, True), (1e-3, False)])
def test_loose_solves_take_them_and_count_their_noise(tol: float, is_rough: bool, compile: bool, monkeypatch) -> None:
    calls, solutions = [], []
    factor = integers.rows_factor
    monkeypatch.setattr(integers, "rows_factor", lambda *a: (calls.append(a[1] is not None), factor(*a))[1])
    net = block(90, 60, compile=compile, precision="fast", solver=Gmres(tol))
    net.register_solve_hook(solutions.append)
    step(net, images(40, 60))
    assert any(calls) is is_rough  # with a scale: J^T
    assert len(calls) == 1 + is_rough  # the gradient of the feedback
    assert solutions[0].outcome is Outcome.converged
    assert 0.3 * tol < solutions[0].stats.max_residual <= tol
    assert float(solutions[0].stats.residual.min()) > (0.9 * integers.noise(90) if is_rough else 0)


@pytest.mark.parametrize("compile", [False, True])
def test_a_verdict_that_noise_could_decide_is_on_the_exact_product(compile: bool, monkeypatch) -> None:
    """A noise of tol / 5, a v of more than 1.5 times the length of the right-hand side."""
    found, residuals, exact = [], [], []

    def observed(problem: LinearProblem, solver: Gmres, **options: Any) -> Solution:
        solution, calls = solve(problem, solver, **options), list(exact)
        left = problem.rhs + problem.matvec(solution.value) - solution.value
        residuals.append(left.norm(dim=1) / problem.rhs.norm(dim=1) - solution.stats.residual)
        exact[:] = calls  # without this one
        return solution

    for module in (implicit, prepared_step):
        monkeypatch.setattr(module, "solve", observed)
    factor = DenseMap.adjoint_factor
    for noise in (integers.noise(90), 2e-3):
        solutions = []
        exact.clear()
        monkeypatch.setattr(integers, "noise", lambda _inputs, noise=noise: noise)
        monkeypatch.setattr(
            DenseMap, "adjoint_factor", lambda own, scale: (exact.append(not own.whole), factor(own, scale))[1]
        )
        net = block(90, 60, compile=compile, precision="fast", solver=Gmres(1e-2), neuron=NeuronParams(0.6, 0.95))
        net.register_solve_hook(solutions.append)
        gradients = step(net, images(40, 60))[1]
        found.append((any(exact), solutions[0], gradients))
    (by_exact, sure, mine), (then_by_exact, unsure, theirs) = found
    assert not by_exact
    assert then_by_exact
    assert sure.outcome is unsure.outcome is Outcome.converged
    assert unsure.stats.max_residual <= 1e-2
    assert float(residuals[-1].abs().max()) < 1e-5
    assert unsure.stats.products <= sure.stats.products + 2  # it goes on from where the rough run ended
    assert 1e-5 < float((sure.value - unsure.value).norm() / sure.value.norm()) < 2e-2
    for name, gradient in theirs.items():
        assert float((mine[name] - gradient).norm()) <= 0.03 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("sizes", [(1, 1), (3, 16), (5, 37), (128, 400)])
def test_a_turned_product_is_the_transpose_of_the_product(sizes: tuple[int, int]) -> None:
    x, y = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned_product(x, y), (x * y).t().contiguous())
    assert torch.equal(turned_product(x.t(), y.t()), x * y)
