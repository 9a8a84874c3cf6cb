"""Blocks with precision exact and fast against float32, and what they say of themselves."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from networks import example_input, small_block, warmed_up
from torch import Tensor, nn

from ide_snn import FeedbackSNN, Gmres, NeuronParams, convolutions, event_driven, implicit, native
from ide_snn import block as block_module
from ide_snn import chain as chain_module
from ide_snn.bptt import Bptt
from ide_snn.layers import Connection
from ide_snn.paths import PATHS
from ide_snn.precision import Precision, products_rounded, round_products, rounds_convolutions

REASON = native.why_unavailable("events")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


def float32_products() -> tuple[object, ...]:
    """What torch is set to do with float32 products on a GPU."""
    matrices, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matrices, "fp32_precision"):
        return matrices.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return matrices.allow_tf32, cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
def test_only_fast_lets_a_gpu_round_products(precision: Precision) -> None:
    matrices, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        for set_before in ("fast", "float32"):
            round_products(set_before)
            assert (cudnn.allow_tf32, matrices.allow_tf32) == (set_before == "fast",) * 2
            before = float32_products()
            with suppress(KeyError), products_rounded(precision, torch.device("cuda")):
                assert set(float32_products()) <= ({"tf32", True} if precision == "fast" else {"ieee", False})
                assert matrices.allow_fp16_reduced_precision_reduction is False
                assert not getattr(matrices, "allow_fp16_accumulation", False)
                raise KeyError
            assert float32_products() == before
            assert matrices.allow_fp16_reduced_precision_reduction is True
            assert getattr(matrices, "allow_fp16_reduced_precision_reduction_split_k", True)
            assert (cudnn.allow_tf32, matrices.allow_tf32) == (set_before == "fast",) * 2
            with products_rounded(precision, torch.device("cpu")):
                assert float32_products() == before
    finally:  # as torch begins
        cudnn.allow_tf32, matrices.allow_tf32 = True, False


def test_forward_and_solve_are_in_the_scope_of_their_precision(monkeypatch) -> None:
    seen = []

    @contextmanager
    def spy(name: str, device: torch.device) -> Iterator[None]:
        seen.append((name, device.type, "in"))
        yield
        seen.append((name, device.type, "out"))

    for module in (block_module, implicit):
        monkeypatch.setattr(module, "products_rounded", spy)
    block = warmed_up(small_block("conv", precision="fast", solver=Gmres(1e-3))).float()
    block.register_simulation_hook(lambda _: seen.append("simulated"))
    block.register_solve_hook(lambda _: seen.append("solved"))
    seen.clear()
    block(example_input("conv").float()).sum().backward()
    enter, leave = ("fast", "cpu", "in"), ("fast", "cpu", "out")
    assert seen == [enter, "simulated", leave, enter, leave, "solved"]


@pytest.mark.parametrize("where", ["input", "layer"])
def test_a_backward_hook_of_a_batch_norm_is_called(where: str) -> None:
    found, x = [], example_input("multilayer").float()
    start = warmed_up(small_block("multilayer", dropout=0.0, solver=Gmres(1e-4))).float()  # masks follow the layout
    for precision in ("float32", "exact"):
        block = copy.deepcopy(start)
        block.precision = precision
        norm = (block.input if where == "input" else block.layers[0]).bn
        norm.register_full_backward_hook(lambda _m, given, _: (3 * given[0], *given[1:]))
        rates = block(x, generator=torch.Generator().manual_seed(0))
        (rates * torch.linspace(-1, 2, rates.numel()).view_as(rates)).sum().backward()
        found.append([p.grad for p in block.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)  # biases in front of batch norm: rounding


class _Keeping(torch.nn.BatchNorm2d):
    kept: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept.append((y, y.detach().clone()))
        return y


@pytest.mark.parametrize("how", ["its forward", "its class"])
@pytest.mark.parametrize("where", ["input", "layer"])
@pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
def test_what_a_batch_norm_of_somebodys_own_has_kept_is_not_overwritten(where: str, how: str, precision: str) -> None:
    block = warmed_up(small_block("multilayer", precision=precision, solver=Gmres(1e-3))).float()
    norm = (block.input if where == "input" else block.layers[0]).bn
    norm.kept, plain = [], norm.forward
    if how == "its class":
        norm.__class__ = _Keeping
    else:
        norm.forward = lambda x: (norm.kept.append((y := plain(x), y.detach().clone())), y)[1]
    block(example_input("multilayer").float()).sum().backward()
    assert norm.kept
    assert all(torch.equal(output, then) for output, then in norm.kept)


def test_what_a_hook_of_a_batch_norm_has_kept_is_not_overwritten() -> None:
    kept = []
    block = warmed_up(small_block("multilayer", precision="exact", solver=Gmres(1e-3))).float()
    norm = block.layers[0].bn
    norm.register_forward_hook(lambda _module, _inputs, output: kept.append((output, output.detach().clone())))
    block(example_input("multilayer").float()).sum().backward()
    assert kept
    assert all(torch.equal(output, then) for output, then in kept)
    assert float(kept[0][1].min()) < 0


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


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_an_input_stage_of_another_type_is_dense(precision: Precision, caplog) -> None:
    """Its drive is what the kernels would read as float32."""
    block = small_block("fc", dropout=0.0, time_steps=3, precision=precision).float().eval()
    block.input.double()
    with caplog.at_level(logging.INFO, "ide_snn.block"), torch.no_grad(), suppress(RuntimeError):
        block(example_input("fc").double())
    assert "dense (the input stage is torch.float64)" in caplog.text


def test_without_a_compiler_the_dense_products_are_taken(monkeypatch, caplog) -> None:
    monkeypatch.setattr(event_driven.native, "why_unavailable", lambda name: f"no {name} here")
    block = small_block("conv", dropout=0.0, time_steps=3, precision="exact").float().eval()
    plain = small_block("conv", dropout=0.0, time_steps=3).float().eval()
    plain.load_state_dict(block.state_dict())
    x = example_input("conv").float()
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        assert torch.equal(block(x), plain(x))
    assert "dense (no events here)" in caplog.text


def test_too_many_inputs_keep_float32_weights_and_say_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(event_driven, "MOST_INPUTS", 10)
    block = small_block("conv", precision="fast").float().eval()
    paths = []
    block.register_simulation_hook(lambda rates: paths.append(rates.path))
    with caplog.at_level(logging.INFO, "ide_snn.block"):
        block(example_input("conv").float())
    assert paths == ["events"]
    assert "event-driven float32" in caplog.text
    assert "(sums of" in caplog.text


def test_a_connection_of_too_many_inputs_alone_keeps_float32_weights(monkeypatch, caplog) -> None:
    monkeypatch.setattr(event_driven, "MOST_INPUTS", 36)  # 4 channels of 3 x 3
    narrow, wide = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
    made = []
    make = event_driven.EventConnection
    monkeypatch.setattr(event_driven, "EventConnection", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    stage = nn.Conv2d(2, 4, 3, padding=1)
    options = {"input": stage, "layers": [narrow], "feedback": wide, "neuron": NeuronParams(0.7, 0.9), "time_steps": 6}
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    rates = {}
    for precision in ("exact", "fast"):
        block = FeedbackSNN(**options, precision=precision).eval()
        with caplog.at_level(logging.INFO, "ide_snn.block"), torch.no_grad():
            rates[precision] = block(x)
    of_fast = made[-2:]  # feedback, layer
    assert [connection.unit is None for connection in of_fast] == [True, False]
    assert block.path == (
        "precision=fast: event-driven, 16-bit weights, dense convolutions in bfloat16 "
        "(sums of 54 weights need more than 16 bits and are in float32)"
    ).replace("bfloat16", "bfloat16" if rounds_convolutions("fast", x.device) else "float32")
    moved = (rates["fast"] - rates["exact"]).abs()
    assert float((moved > 1e-6).float().mean()) < 0.05  # spikes here and there


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


def test_the_block_says_how_it_computes() -> None:
    block = small_block("conv", precision="exact").float()
    assert block.path == "no forward yet"
    for precision in ("exact", "fast", "float32"):
        block.precision = precision
        rates = block.simulate(example_input("conv").float())
        assert block.path.startswith(f"precision={precision}: ")
        assert f": {PATHS[rates.path]}" in block.path


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="float32, exact, fast"):
        small_block("conv", precision="half")
    with pytest.raises(ValueError, match="implicit differentiation"):
        small_block("conv", precision="fast", gradient=Bptt())
    block = small_block("conv", precision="fast")
    block.gradient = Bptt()
    with pytest.raises(ValueError, match="implicit differentiation"):
        block(example_input("conv").to(next(block.parameters()).dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_poison_fast_rates_too(value: float) -> None:
    block = small_block("conv", dropout=0.0, time_steps=4, precision="fast").float().eval()
    with torch.no_grad():
        block.feedback.op.parametrizations.weight.original[0, 0, 0, 0] = value
    assert bool(block(example_input("conv").float()).isnan().all())


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


@pytest.mark.parametrize("norms", [(False, True, True), (True, False, True), (False, False, True), (True, True, False)])
@pytest.mark.parametrize("kinds", ["conv", "linear"])
def test_training_with_batch_norm_has_the_gradients_of_float32(norms: tuple[bool, ...], kinds: str) -> None:
    """J with running statistics and f with the batch's have products in common up to the first batch norm."""

    def network(precision: Precision) -> FeedbackSNN:
        torch.manual_seed(3)
        if kinds == "linear":
            ops = [nn.Linear(9, 8, bias=False), nn.Linear(8, 7, bias=False), nn.Linear(7, 9, bias=False)]
            stage = nn.Linear(5, 9)
        else:
            ops = [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 4, 1)]
            stage = nn.Conv2d(2, 4, 3, padding=1)
        feedback, *layers = (
            Connection(op, batch_norm=norm, dropout=0.0) for op, norm in zip((ops[2], *ops[:2]), norms, strict=True)
        )
        return FeedbackSNN(
            input=Connection(stage, batch_norm=True),
            layers=layers,
            feedback=feedback,
            neuron=NeuronParams(0.7, 0.9),
            time_steps=4,
            solver=Gmres(1e-6),
            precision=precision,
        )

    x = 3 * torch.randn(12, *((5,) if kinds == "linear" else (2, 6, 6)), generator=torch.Generator().manual_seed(4))
    found = []
    for precision in ("float32", "exact"):
        block, solved = network(precision).train(), []
        block.register_solve_hook(lambda solution, seen=solved: seen.append(solution.value))
        for _ in range(2):  # so that running statistics are some
            gradients(block, x)
        # in front of batch norm the gradient of a bias is 0 but for rounding
        behind = {f"{name}.op.bias" for name, part in block.named_modules() if getattr(part, "bn", None) is not None}
        parameters = [p.grad for name, p in block.named_parameters() if name not in behind]
        value, _ = block.equilibrium(x)  # whose J is at another point and of the statistics so far
        value.square().sum().backward()
        found.append((*parameters, *solved, *(b for b in block.buffers() if b.is_floating_point())))
    largest = max(float(tensor.abs().max()) for tensor in found[0])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest)


def test_products_in_common_are_computed_once(monkeypatch) -> None:
    """Of three populations with batch norm behind the first: 2 + 1 instead of 3 + 3."""
    walks = []
    compute, linear = convolutions.apply, convolutions.linear
    monkeypatch.setattr(
        convolutions,
        "apply",
        lambda *a, known=None, **k: (walks.append(known is None), compute(*a, known=known, **k))[1],
    )
    monkeypatch.setattr(convolutions, "linear", lambda *a, **k: (walks.append(True), linear(*a, **k))[1])
    block = small_block("multilayer", precision="exact", time_steps=3).float().train()
    populations = 1 + len(block.layers)
    assert block.feedback.bn is None
    assert block.layers[0].bn is not None
    gradients(block, example_input("multilayer").float())
    assert sum(walks) == 2 * populations - 3  # the feedback's is the simulation's, the next one serves both
