"""compile=True: what changes between steps, what is refused, and runs from the command line's configuration."""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_blocks import REASON, assert_close, block, images, is_compiled, step
from networks import example_input, small_block, warmed_up
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ide_snn import Anderson, FeedbackSNN, Gmres, NeuronParams, SNNIDEFCNet
from ide_snn.bptt import Bptt
from ide_snn.checkpoint import load_checkpoint
from ide_snn.config import config_from_dict, config_to_dict, load_config
from ide_snn.config_errors import ConfigError
from ide_snn.dropout import VariationalDropout
from ide_snn.normalization import batch_norms
from ide_snn.optimizations import get_constraint, raw_weight
from ide_snn.run import train
from ide_snn.solvers import SolverWarning

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


class OwnGmres(Gmres):
    """Of a user, who may have changed anything."""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def transpose_(weight: Tensor) -> None:
    weight.data = weight.data.t()


CHANGES: dict[str, Any] = {
    "time steps": lambda net: setattr(net, "time_steps", 2),
    "neuron": lambda net: setattr(net, "neuron", NeuronParams(1.0, 0.5)),
    "tolerance": lambda net: setattr(net, "solver", Gmres(1e-1)),
    "precision": lambda net: setattr(net, "precision", "fast"),
    "dropout": lambda net: setattr(net.feedback.dropout, "p", 0.6),
    "no dropout": lambda net: setattr(net.input, "dropout", VariationalDropout(0.0)),
    "dropout off": lambda net: net.input.dropout.eval(),
    "momentum": lambda net: setattr(net.input.bn, "momentum", 0.5),
    "no batch norm": lambda net: setattr(net.input, "bn", None),
    "batch norm off": lambda net: net.input.bn.eval(),
    "other weights": lambda net: setattr(net.input.op, "weight", nn.Parameter(-net.input.op.weight.detach())),
    "weights in place": lambda net: net.input.op.weight.data.mul_(-1),
    "other data": lambda net: setattr(net.input.op.weight, "data", -net.input.op.weight.data),
    "loaded": lambda net: net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}),
    "hook": lambda net: net.input.bn.register_forward_hook(lambda _m, _i, y: y * 2),
    "bound": lambda net: setattr(get_constraint(net.feedback.op), "bound", 0.3),
    "transposed": lambda net: transpose_(raw_weight(net.feedback.op)),
    "no statistics": lambda net: setattr(net.input.bn, "track_running_stats", False),
    "backward hook": lambda net: net.input.bn.register_full_backward_hook(lambda _m, given, _: (2 * given[0],)),
    "hook of the constraint": lambda net: get_constraint(net.feedback.op).register_forward_hook(
        lambda _m, _i, w: w / 2
    ),
    "solver of one's own": lambda net: setattr(net, "solver", OwnGmres(1e-3)),
    "parametrized bias": lambda net: parametrize.register_parametrization(net.input.op, "bias", Doubled()),
    "frozen": lambda net: net.feedback.eval(),
    "other solver": lambda net: setattr(net, "solver", Anderson(1e-4, max_steps=100)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_are_seen(change: str) -> None:
    found = []
    for on in (False, True):
        net = block(compile=on)
        step(net, images())
        CHANGES[change](net)
        found.append(step(net, images()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_of_all_modules_is_called(before: bool) -> None:
    def doubled(module: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        return 2 * y if isinstance(module, nn.BatchNorm1d) else None

    found = []
    for on in (False, True):
        net = block(compile=on)
        if not before:
            step(net, images())
        handle = register_module_forward_hook(doubled)
        try:
            found.append(step(net, images()))
        finally:
            handle.remove()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert_close(found[1][1], found[0][1])


def test_a_parametrized_bias_of_the_feedback() -> None:
    found = []
    for on in (False, True):
        net = block(compile=on, feedback_bias=True)
        parametrize.register_parametrization(net.feedback.op, "bias", Doubled())
        found.append([step(net, images()) for _ in range(2)])
    for (expected, gradients), (rates, compiled) in zip(*found, strict=True):
        torch.testing.assert_close(rates, expected, rtol=0, atol=1e-6)
        assert_close(compiled, gradients)


def test_the_graphs_of_weights_that_are_given_are_not_kept() -> None:
    """As `functional_call` gives them, in meta-learning or for a mean of weights: they are not leaves."""
    net, x, found = block(), images(), []
    step(net, x)
    for compile in (True, False):
        net.compile_ = compile
        source = net.get_parameter("input.op.weight").detach().clone().requires_grad_()
        given = {"input.op.weight": 2 * source}
        graph = weakref.ref(given["input.op.weight"])
        generator = {"generator": torch.Generator().manual_seed(1)}
        torch.func.functional_call(net, given, (x,), generator).square().sum().backward()
        found.append(source.grad)
        del given
        assert graph() is None
    assert torch.equal(*found)
    assert net.path.startswith("precision=exact")


def test_alpha_at_its_bound_has_its_gradient() -> None:
    found = []
    for on in (False, True):
        net = block(compile=on)
        constraint = get_constraint(net.feedback.op)
        constraint.bound = 0.1  # which float32 does not have
        with torch.no_grad():
            constraint.alpha.fill_(0.1)
        found.append(step(net, images())[1])
    assert found[0]["feedback.op.parametrizations.weight.0.alpha"].abs() > 1e-3
    assert_close(found[1], found[0])


def test_a_feedback_of_another_size_is_an_error_before_anything_is_computed() -> None:
    for size in (20, 50):
        net = FeedbackSNN(input=nn.Linear(21, 37), feedback=nn.Linear(37, size), precision="exact", compile=True)
        with pytest.raises(ValueError, match=rf"output \[{size}\] must have the shape of population 1, \[37\]"):
            net(images())


def test_a_backward_on_more_threads_than_the_forward() -> None:
    expected = step(block(200, 90), images(150, 90))[1]
    try:
        for _ in range(5):
            net = block(200, 90)
            rates = net(images(150, 90), generator=torch.Generator().manual_seed(0))
            loss = (rates * torch.linspace(-1, 2, rates.numel()).view_as(rates)).sum()
            torch.set_num_threads(4)
            loss.backward()
            torch.set_num_threads(1)
            assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("on", [False, True])
def test_the_default_type_of_new_tensors_does_not_matter(on: bool) -> None:
    expected = step(block(compile=on), images())
    net, x = block(compile=on), images()
    weights = torch.linspace(-1, 2, 9 * 37).view(9, 37)
    torch.set_default_dtype(torch.float64)
    rates = net(x, generator=torch.Generator().manual_seed(0))
    (rates * weights).sum().backward()
    assert torch.equal(rates, expected[0])
    assert_close({n: p.grad for n, p in net.named_parameters()}, expected[1])
    assert is_compiled(net) == on


def test_frozen_parts_need_not_stay_as_they_were() -> None:
    found = []
    for on in (False, True):
        net, x = block(compile=on), images()
        net.input.requires_grad_(False)
        rates = net(x, generator=torch.Generator().manual_seed(0))
        x.zero_()
        with torch.no_grad():
            net.input.op.bias.zero_()
        rates.square().sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2
    assert_close(found[1], found[0])


def own(op: nn.Module) -> FeedbackSNN:
    net = block(constraint="none")
    net.input.op = op
    return net


REFUSED: dict[str, tuple[Any, str]] = {
    "conv": (lambda: warmed_up(small_block("conv", precision="exact")).float(), "fully connected"),
    "layers": (lambda: warmed_up(small_block("multilayer", precision="exact")).float(), "one population"),
    "float32": (lambda: block(precision="float32"), "take exact or fast"),
    "anderson": (lambda: block(solver=Anderson()), "solver gmres"),
    "bptt": (lambda: block(gradient=Bptt(), precision="float32"), "implicit differentiation"),
    "float64": (lambda: block().double(), "float32 on a CPU"),
    "frobenius": (lambda: block(constraint="frobenius"), "spectral_matrix"),
    "own weight": (lambda: own(parametrizations.weight_norm(nn.Linear(21, 37))), "parametrized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_said_once_and_works(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = REFUSED[name]
    net = make()
    net.compile_ = True
    x = example_input(name if name == "conv" else "multilayer") if name in ("conv", "layers") else images()
    x = x.to(next(net.parameters()).dtype)
    with caplog.at_level(logging.INFO, "ide_snn.compiled"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        for _ in range(2):
            net(x).sum().backward()
    (said,) = [record for record in caplog.records if record.name == "ide_snn.compiled"]
    assert said.message.startswith("compile=True: no effect (")
    assert reason in said.message
    assert said.levelno == logging.WARNING


def test_settings_that_change_in_every_step_have_a_plan_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ide_snn.compiled")
    net = block(compile=None)
    for number in range(20):
        net.solver = Gmres(1e-3 * (1 + number / 100))
        step(net, images())
        assert net.path.endswith("; the training step is compiled")
    assert len(net._compiled._plans) == 4
    assert len(caplog.records) == 1


def test_a_checkpoint_computes_again_what_its_forward_was() -> None:
    """However many sizes of batches there were in between."""
    net = block(compile=None)
    outputs = [checkpoint(net, images(samples).requires_grad_(), use_reentrant=False) for samples in range(2, 12)]
    torch.cat([y.sum()[None] for y in outputs]).sum().backward()
    assert net.input.op.weight.grad is not None


def test_the_plan_that_is_used_most_stays() -> None:
    net = block()
    for samples in (9, 2, 3, 9, 4, 5, 6):
        step(net, images(samples))
    assert {key[0][0] for key in net._compiled._plans} == {9, 4, 5, 6}


def test_batch_norm_over_several_processes_is_not_compiled() -> None:
    net = block()
    for norm in batch_norms(net):
        norm.__dict__["forward"] = norm.forward  # as `normalization.synchronised` does it
    step(net, images())
    assert not is_compiled(net)


def test_a_batch_of_one_meets_torchs_own_error() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block()(images(1))
    assert block(batch_norm=False)(images(1)).shape == (1, 37)


def test_compiled_steps_train_the_classifier_as_others_do() -> None:
    losses: list[list[float]] = []
    for on in (False, True):
        torch.manual_seed(0)
        net = SNNIDEFCNet((1, 8, 8), 10, hidden=64, precision="exact", compile=on, solver=Gmres(1e-3), time_steps=5)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x, generator=generator), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_from_the_configuration_to_the_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = [
        *("model.hidden=32", "time_steps=3", "dataset.train_limit=300", "dataset.test_limit=100"),
        *("trainer.epochs=2", "trainer.threads=null", "trainer.progress=false", "device=cpu", "precision=exact"),
    ]
    results = []
    for text in ("false", "true"):
        config = load_config([*tiny, f"compile={text}"])
        with caplog.at_level(logging.INFO, "ide_snn"):
            results.append(train(config, tmp_path / text))
    assert "the training step is compiled" in caplog.text
    plain, compiled = (result.history[-1] if hasattr(result, "history") else result for result in results)
    assert compiled.test_accuracy_best == pytest.approx(plain.test_accuracy_best, abs=0.03)
    assert (tmp_path / "true" / "config.yaml").read_text().count("compile: true") == 1
    with pytest.raises(ConfigError, match="'perhaps' is not a valid bool"):
        load_config(["compile=perhaps"])
    before_there_was_one = config_to_dict(load_config(tiny))
    assert before_there_was_one.pop("compile") is None
    assert config_from_dict(before_there_was_one).compile is False


def test_a_resumed_run_is_as_one_never_stopped(tmp_path: Path) -> None:
    tiny = [
        *("model.hidden=32", "time_steps=3", "dataset.train_limit=300", "dataset.test_limit=100", "schedule=none"),
        *("trainer.threads=null", "trainer.progress=false", "device=cpu", "precision=fast"),
    ]
    for run, epochs, compile in (("whole", 3, "true"), ("parts", 1, "true"), ("parts", 3, "null")):
        train(load_config([*tiny, f"trainer.epochs={epochs}", "resume=auto", f"compile={compile}"]), tmp_path / run)
    whole, parts = (load_checkpoint(tmp_path / run / "checkpoints" / "last.pt").model for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_an_input_with_time_is_not_compiled_and_says_so(caplog) -> None:
    net = block(input_has_time=True)
    with caplog.at_level(logging.WARNING, "ide_snn.compiled"):
        step(net, torch.stack([images()] * net.time_steps))
    assert not is_compiled(net)
    assert "no effect (the input has time)" in caplog.text


def test_a_parametrization_of_ones_own_is_read_once_per_forward() -> None:
    """Also where a plan is looked for, for every size of batch: torch's spectral_norm takes a step at every reading."""
    found = []
    for on in (False, True):
        net = block(compile=on, constraint="none")
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(net.feedback.op)
        for samples in (8, 7, 6, 8):
            step(net, images(samples))
        found.append(net.get_buffer("feedback.op.parametrizations.weight.0._u"))
    assert torch.equal(*found)


def test_the_path_is_that_of_the_latest_forward() -> None:
    net, compiled = block(), "the training step is compiled"
    for precision in ("exact", "fast", "exact", "fast"):
        net.precision = precision
        step(net, images())
        assert net.path.startswith(f"precision={precision}: ")
        assert net.path.endswith(compiled)
    x = images()
    for turned in (False, True, False):
        step(net, x.t().contiguous().t() if turned else x)
        assert net.path.endswith("no effect (it is for contiguous float32 on a CPU)" if turned else compiled)
    assert copy.deepcopy(net).path == "no forward yet"


@pytest.mark.parametrize(
    "kept",
    [torch.autograd.graph.allow_mutation_on_saved_tensors, lambda: saved_tensors_hooks(Tensor.clone, lambda t: t)],
)
def test_parameters_changed_under_hooks_on_saved_tensors_are_an_error(kept: Any) -> None:
    """Autograd does not compare their versions then, and kernels read the parameters themselves."""
    net = block(compile=None)
    with kept():
        y = net(images())
        with torch.no_grad():
            raw_weight(net.feedback.op).mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* set compile=False"):
            y.sum().backward()


def test_a_shallow_copy_has_plans_of_its_own() -> None:
    """As torch's data parallelism makes one."""
    net = block(compile=None)
    other = net._replicate_for_data_parallel()
    other._modules.update({name: copy.deepcopy(module) for name, module in net._modules.items()})
    with torch.no_grad():
        other.input.op.weight.mul_(3)
    for one in (other, net, other):
        expected = copy.deepcopy(one)
        expected.compile_ = False
        rates = [each(images(), generator=torch.Generator().manual_seed(0)) for each in (one, expected)]
        torch.testing.assert_close(*rates, rtol=0, atol=1e-6)
        assert is_compiled(one)
