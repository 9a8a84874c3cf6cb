"""The same numbers on a GPU: run with pytest -m gpu where torch sees a CUDA device."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import KINDS, example_input, small_block, warmed_up

from ide_snn import Anderson, Broyden, FixedPoint, Gmres, Implicit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("solver", [FixedPoint, Anderson, Broyden, Gmres])
def test_training_step_equals_the_cpu_in_float64(kind: str, statistics: str, solver) -> None:
    block = warmed_up(small_block(kind, solver=solver(tol=1e-11, max_steps=400), gradient=Implicit(statistics)))
    x = example_input(kind)
    results = []
    for device in ("cpu", "cuda"):
        twin, point = copy.deepcopy(block).to(device), x.detach().to(device, copy=True).requires_grad_()
        rates = twin(point)
        rates.square().sum().backward()
        results.append([t.cpu() for t in (rates.detach(), point.grad, *(p.grad for p in twin.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_equilibrium_and_diagnostics_on_the_device(kind: str) -> None:
    block = warmed_up(small_block(kind)).cuda().eval()
    rates, solution = block.equilibrium(example_input(kind).cuda())
    assert rates.is_cuda
    assert solution.outcome == "converged"
    assert block.feedback_diagnostics()["feedback_norm"] <= 1.001


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_precisions_give_the_rates_of_float32(kind: str, precision) -> None:
    """TF32 has 11 significant bits: a rate may differ by some spikes, few of them."""
    block = warmed_up(small_block(kind, precision=precision)).float().cuda().eval()
    plain = warmed_up(small_block(kind)).float().cuda().eval()
    plain.load_state_dict(block.state_dict())
    x = example_input(kind).float().cuda()
    with torch.no_grad():
        difference, scale = block(x) - plain(x), plain(x).norm()
    assert float(difference.norm() / scale) < (0.2 if precision == "fast" else 0.02)


def test_a_step_of_fast_is_close_to_that_of_float32() -> None:
    block = warmed_up(small_block("conv", dropout=0.0, solver=Gmres(1e-3))).float().cuda()
    x, gradients = example_input("conv").float().cuda(), []
    for precision in ("float32", "fast"):
        twin = copy.deepcopy(block)
        twin.precision = precision
        twin(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_time_steps_are_those_that_are_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the weights of 4 steps are compared
    block = warmed_up(small_block(kind, dropout=0.3, precision="exact", solver=Gmres(1e-4))).float().cuda().train()
    graphed = copy.deepcopy(block)
    graphed.compile_ = True
    optimizers = [torch.optim.SGD(b.parameters(), 0.05) for b in (block, graphed)]
    x = example_input(kind).float().cuda()
    for seed in range(4):
        found = []
        for net, optimizer in zip((block, graphed), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(seed)
            value = net(x + seed)
            value.square().sum().backward()
            found.append((value.detach(), *(p.grad.clone() for p in net.parameters())))
            optimizer.step()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphed._graphed.graphs) == 1
    assert len(graphed._solves.graphs) >= 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_for_the_host_once(kind: str, compile: bool) -> None:
    block = warmed_up(small_block(kind, dropout=0.3, precision="exact", solver=Gmres(1e-2))).float().cuda().train()
    block.compile_ = compile
    optimizer = torch.optim.SGD(block.parameters(), 0.01)
    x, solves = example_input(kind).float().cuda(), []
    block.register_solve_hook(solves.append)
    for step in range(4):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step else "default")  # the first captures
            try:
                block(x).square().sum().backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in waits if "synchronizing CUDA operation" in str(w.message)]
        foreseen = step and solves[-1].stats.products <= solves[-2].stats.products
        assert not foreseen or len(waits) == 1, waits


@pytest.mark.parametrize("kind", KINDS)
def test_a_solve_ahead_of_the_host_is_the_one_that_asks(kind: str) -> None:
    block = warmed_up(small_block(kind, precision="exact", solver=Gmres(1e-3))).float().cuda().train()
    x, gradients = example_input(kind).float().cuda(), []
    for ahead in (True, False):
        twin = copy.deepcopy(block)
        if not ahead:
            twin._solves.ahead = lambda *_, **__: None
        twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
