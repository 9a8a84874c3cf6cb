"""What a user may put into a network, or around it, computes the same with every precision, or is refused."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from compiled_blocks import REASON, block, images, is_compiled, step
from conftest import PROJECT
from networks import LIF
from torch import Tensor, nn

from ide_snn import Connection, FeedbackClassifier, FeedbackSNN, FixedPoint, Gmres
from ide_snn.dropout import VariationalDropout
from ide_snn.solvers import FixedPointProblem, LinearProblem, solve

pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}"),
    pytest.mark.filterwarnings("ignore:.*no effect"),
]
every_precision = pytest.mark.parametrize("precision", ["float32", "exact", "fast"])
compiled_or_not = pytest.mark.parametrize("compile", [False, True])

UNDER_DEFAULTS = """
import sys, torch
from compiled_blocks import block, images, step
precision, compile = sys.argv[1], sys.argv[2] == "True"
nets, x = [block(400, 784, precision=precision, compile=compile) for _ in range(2)], images(40, 784)
weights = torch.linspace(-1, 2, 40 * 400).view(40, 400)
def run(net):
    rates = net(x, generator=torch.Generator("cpu").manual_seed(0))
    (rates * weights).sum().backward()
    return [rates.detach(), *(parameter.grad for parameter in net.parameters())], net.path
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
found, path = run(nets[0])  # first: kernels keep memory
torch.set_default_dtype(torch.float32)
torch.set_default_device("cpu")
expected, _ = run(nets[1])
assert "event-driven" in path and ("is compiled" in path) == compile, path
assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
print("equal")
"""


@pytest.mark.parametrize("precision", ["exact", "fast"])
@compiled_or_not
def test_defaults_of_torch_have_no_part_in_it(precision: str, compile: bool) -> None:
    """Kernels whose memory was of torch's default type or device wrote past it; so, in a process of its own."""
    command = [sys.executable, "-c", UNDER_DEFAULTS, precision, str(compile)]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", f"{done.returncode}: {done.stderr[-2000:]}"


class ByChannel(VariationalDropout):
    """Whole channels, or neurons in all samples: a gain that torch spreads."""

    def __init__(self, *, spread: bool) -> None:
        super().__init__(0.3)
        self.spread = spread

    def draw(self, like: Tensor, *_: object, **__: object) -> Tensor:
        shape = (*like.shape[:2], 1, 1) if like.dim() == 4 else (1, like.shape[1])
        gain = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.3
        return gain.expand_as(like).to(like).clone() if self.spread else gain


@pytest.mark.parametrize("kind", ["conv", "fc"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_gain_that_torch_spreads(kind: str, precision: str) -> None:
    found = []
    for spread in (False, True):
        torch.manual_seed(0)
        ops = (nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)) if kind == "conv" else ()
        ops = ops or (nn.Linear(21, 37), nn.Linear(37, 37))
        net = FeedbackSNN(input=ops[0], feedback=Connection(ops[1]), neuron=LIF, time_steps=6, precision=precision)
        net.feedback.dropout = ByChannel(spread=spread)
        found.append(step(net, torch.randn(5, 2, 8, 8) if kind == "conv" else torch.randn(5, 21)))
    assert "event-driven" in net.path
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())


@every_precision
@compiled_or_not
@pytest.mark.parametrize("part", ["input", "feedback"])
def test_a_bias_of_another_type_is_torchs_error(precision: str, compile: bool, part: str) -> None:
    net = block(precision=precision, compile=compile, feedback_bias=True)
    op = net.get_submodule(part).op
    op.bias.data = op.bias.data.double()
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        step(net, images())


class OwnStage(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # multiples of 1/8, so that the inputs and weights of the test are exact in every type
        weight = torch.randint(-4, 5, (37, 21), generator=torch.Generator().manual_seed(1)) / 8
        self.weight, self.dtype = nn.Parameter(weight), dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype))


@every_precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_time", [False, True])
def test_an_input_stage_that_computes_in_another_type(precision: str, dtype: torch.dtype, has_time: bool) -> None:
    rates = []
    x = torch.randint(-1, 2, (6, 5, 21) if has_time else (5, 21), generator=torch.Generator().manual_seed(2)).float()
    for kind in (torch.float32, dtype):
        options = {"neuron": LIF, "time_steps": 6, "precision": precision, "input_has_time": has_time}
        feedback = nn.Linear(37, 37)
        nn.init.eye_(feedback.weight)
        nn.init.zeros_(feedback.bias)
        rates.append(FeedbackSNN(input=OwnStage(kind), feedback=feedback, **options)(x))
    if not has_time or dtype == torch.float64:  # the mean of an input with time is rounded to the type
        torch.testing.assert_close(rates[1], rates[0], rtol=0, atol=1e-6)
    assert torch.isfinite(rates[1]).all()


class Scaled(nn.Module):
    """Hands the attributes of what it is around on, and has a forward of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.5))

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


@every_precision
def test_the_forward_of_what_is_put_around_a_connection_is_taken(precision: str) -> None:
    net, plain = (block(precision=precision, compile=False, dropout=0.0, constraint="none") for _ in range(2))
    net.feedback = Scaled(net.feedback)
    with torch.no_grad():
        plain.feedback.op.weight *= 0.5
    assert isinstance(net.feedback, Connection)
    rates, gradients = step(net, images())
    expected, _ = step(plain, images())
    assert float((rates - expected).abs().mean()) < (1e-6 if precision != "fast" else 0.02)
    assert "feedback.op.scale" in gradients


def test_dropout_inside_a_module_is_refused() -> None:
    inner = Connection(nn.Linear(8, 8), dropout=0.9)
    for op in (inner, nn.Sequential(inner), nn.Sequential(nn.Linear(8, 8), VariationalDropout(0.5)), Scaled(inner)):
        with pytest.raises(ValueError, match="contains variational dropout"):
            Connection(op)
    two = nn.Sequential(*(Connection(nn.Linear(8, 8), constraint="spectral_matrix") for _ in range(2)))
    assert FeedbackSNN(input=nn.Linear(5, 8), feedback=two, time_steps=3)(torch.ones(2, 5)).shape == (2, 8)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("where", ["input.op.weight", "input.op.bias", "feedback.op.weight", "input.bn.weight"])
def test_tensors_that_are_no_parameters_are_read_in_every_step(precision: str, where: str) -> None:
    """As a hypernetwork sets them: a plan would go on with the first."""
    nets = [block(precision=precision, compile=compile, constraint="none") for compile in (False, True)]
    path, name = where.rsplit(".", 1)
    for number in range(3):
        found = []
        for net in nets:
            owner = net.get_submodule(path)
            value = getattr(owner, name).detach()
            owner._parameters.pop(name, None)
            setattr(owner, name, value.roll(5) * (1 + number))
            found.append(step(net, images()))
        assert torch.equal(found[1][0], found[0][0])
    assert not is_compiled(nets[1])
    assert "neither a parameter nor a buffer" in nets[1].path


def test_a_readout_whose_weight_is_no_parameter_is_read_in_every_step() -> None:
    net = FeedbackClassifier(block(batch_norm=False), (21,), 5)
    weight = net.classifier.weight.detach()
    net(images())
    del net.classifier.weight
    for number in (1, 2, 3):
        net.classifier.weight = number * weight
        logits = net(images(), generator=torch.Generator().manual_seed(0))
        rates = net.block(images(), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(logits, net.classifier(rates))


@every_precision
def test_settings_of_a_convolution_are_those_of_now(precision: str) -> None:
    def network(dilation: int) -> FeedbackSNN:
        torch.manual_seed(0)
        feedback = nn.Conv2d(3, 3, 3, padding=dilation, dilation=dilation)
        return FeedbackSNN(
            input=nn.Conv2d(1, 3, 3, padding=1), feedback=feedback, neuron=LIF, time_steps=6, precision=precision
        )

    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wide, changed, replaced = network(2), network(1), network(1)
    changed(x), replaced(x)
    changed.feedback.op.dilation = changed.feedback.op.padding = (2, 2)
    replaced.feedback.op = wide.feedback.op
    expected = step(wide, x)
    for net in (changed, replaced):
        found = step(net, x)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1]["feedback.op.weight"], expected[1]["feedback.op.weight"])
    assert not torch.equal(network(1)(x), expected[0])


def test_the_norm_of_an_operator_that_was_changed_is_refused() -> None:
    feedback = Connection(nn.Conv2d(2, 2, 3, padding=1), constraint="spectral_operator", input_size=(4, 4))
    net = FeedbackSNN(input=nn.Conv2d(1, 2, 1), feedback=feedback, time_steps=2)
    net(torch.zeros(1, 1, 4, 4))
    feedback.op.dilation = feedback.op.padding = (2, 2)
    with pytest.raises(ValueError, match=r"bounds nothing for Operator.*remove_constraint"):
        net(torch.zeros(1, 1, 4, 4))


def test_an_own_module_that_was_changed_is_looked_at_again() -> None:
    net = FeedbackSNN(input=nn.Linear(5, 8), feedback=nn.Sequential(nn.Linear(8, 8)), time_steps=2)
    net(torch.zeros(1, 5))
    net.feedback.op.append(nn.ReLU())
    with pytest.raises(ValueError, match="Sequential is not affine"):
        net(torch.zeros(1, 5))


class Rescaled(nn.Module):
    """Computes in float32; its one tensor may be of fewer bits."""

    def __init__(self, dtype: torch.dtype, *, rectified: bool) -> None:
        super().__init__()
        self.scale, self.rectified = nn.Parameter(torch.full((), 0.5, dtype=dtype)), rectified

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.float() * (x.float().relu() if self.rectified else x.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_own_modules_are_affine_or_refused_whatever_their_type(dtype: torch.dtype) -> None:
    assert Connection(Rescaled(dtype, rectified=False)).output_shape((8,)) == (8,)
    with pytest.raises(ValueError, match="Rescaled is not affine"):
        Connection(Rescaled(dtype, rectified=True)).output_shape((8,))


def test_what_was_found_of_own_modules_is_not_kept_beside_them() -> None:
    net = FeedbackSNN(input=nn.Linear(5, 8), feedback=nn.Sequential(nn.Linear(8, 8)), time_steps=2)
    net(torch.zeros(1, 5))
    former = weakref.ref(net.feedback.op)
    net.feedback.op = nn.Linear(8, 8)
    gc.collect()
    assert former() is None
    net.feedback.op = nn.Sequential(nn.Linear(8, 8))
    net(torch.zeros(1, 5))
    assert copy.deepcopy(pickle.loads(pickle.dumps(net)))(torch.zeros(1, 5)).shape == (1, 8)


def test_layers_and_feedback_that_are_no_connections_are_named() -> None:
    net = FeedbackSNN(input=nn.Linear(5, 8), layers=[nn.Linear(8, 8)], feedback=nn.Linear(8, 8), time_steps=2)
    with pytest.raises(ValueError, match="a connection must be a module, got NoneType"):
        net.feedback = None
    net.layers[0] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"layers\[0\] is a plain Linear: wrap it in a Connection"):
        net(torch.zeros(1, 5))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@compiled_or_not
def test_an_input_with_the_bit_of_negation(precision: str, compile: bool) -> None:
    nets = [block(precision=precision, compile=compile) for _ in range(2)]
    expected, found = (step(net, x)[0] for net, x in zip(nets, (images(), torch._neg_view(-images())), strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@every_precision
@compiled_or_not
def test_alpha_is_one_number(precision: str, compile: bool) -> None:
    net = block(precision=precision, compile=compile)
    net.feedback.op.parametrizations.weight[0].alpha = nn.Parameter(torch.ones(37))
    with pytest.raises(ValueError, match=r"alpha of a spectral constraint is one number, got \[37\]"):
        step(net, images())


def test_the_path_is_that_of_the_latest_forward() -> None:
    net = block()
    step(net, images())
    assert net.path.endswith("the training step is compiled")
    net.eval()(images())
    assert net.path == "precision=exact: event-driven float32"


def test_a_run_is_gone_on_with_by_gmres_in_factors_only() -> None:
    linear = LinearProblem(lambda v: 0.5 * v, torch.ones(2, 3))
    fixed = FixedPointProblem(lambda z: 0.5 * z, torch.ones(2, 3))
    for problem, solver in ((linear, Gmres()), (linear, FixedPoint()), (fixed, FixedPoint())):
        with pytest.raises(ValueError, match="a run to go on from is of GMRES"):
            solve(problem, solver, begun=object())
