"""Surrogate functions: golden values, finite differences, both modes, validation, and the figure of all of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import runpy
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OWN_GOLDEN, PROJECT, golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from ide_snn import surrogate as module
from ide_snn.surrogate import SURROGATES, ATan, Rect, Sigmoid, SquarewaveFourierSeries, SuperSpike, Surrogate, heaviside

WITHOUT_PRIMITIVE = {"super_spike", "fake_numerical_gradient"}
WITH_PRIMITIVE = sorted(set(SURROGATES) - WITHOUT_PRIMITIVE)
CLASSES = {cls.__name__: cls for cls in SURROGATES.values()}
NAN = float("nan")


def golden_cases(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Every (file, class name) for which there are golden values."""
    cases = []
    for path in paths:
        with np.load(path, allow_pickle=False) as data:
            cases += [
                (path, key.split("/")[1]) for key in data.files if key.startswith("surrogate/") and "defaults" in key
            ]
    return cases


# files of others may have other things only
CASES = golden_cases(golden_files("spikingjelly/*.npz")) or golden_cases(OWN_GOLDEN.glob("spikingjelly/*.npz"))


def load(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    with np.load(path, allow_pickle=False) as data:
        prefix = f"surrogate/{name}/"
        values = {
            k.removeprefix(prefix): torch.from_numpy(data[k])
            for k in data.files
            if k.startswith(prefix) and k[-1] in "yd"
        }
        values["x"] = torch.from_numpy(data["surrogate/x"])
        return values, json.loads(str(data[f"{prefix}defaults"]))


def value_and_gradient(function: Surrogate, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.sum().backward()
    return y.detach(), x.grad


def kinks(surrogate: Surrogate) -> list[float]:
    """Where g or g' has a kink."""
    width = {
        "PiecewiseQuadratic": lambda s: 1 / s.alpha,
        "PiecewiseLeakyReLU": lambda s: s.w,
        "FakeNumericalGradient": lambda s: 1 / s.alpha,
        "LogTailedReLU": lambda s: 1.0,  # noqa: ARG005
        "Rect": lambda s: 0.5 / s.alpha,
    }.get(type(surrogate).__name__)
    return [0.0] if width is None else [0.0, width(surrogate), -width(surrogate)]


@st.composite
def surrogates(draw: st.DrawFn, names: list[str]) -> Surrogate:
    cls = SURROGATES[draw(st.sampled_from(names))]
    options = {}
    for f in dataclasses.fields(cls)[1:]:
        low = f.metadata.get("above", f.metadata.get("minimum"))
        if f.name == "T_period":
            low = 4.0  # finite differences need the period to be long against their step
        options[f.name] = draw(st.integers(2, 5) if f.type == "int" else st.floats(low + 0.25, low + 4))
    return cls(**options)


smooth_points = st.lists(st.floats(-3, 3), min_size=4, max_size=8)


def away_from_kinks(surrogate: Surrogate, points: list[float], distance: float = 1e-2) -> Tensor:
    x = torch.tensor(points, dtype=torch.float64)
    for kink in kinks(surrogate):
        x = x[(x - kink).abs() > distance]
    return x


@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda v: v if isinstance(v, str) else v.stem)
@pytest.mark.parametrize("mode", ["spiking", "primitive"])
def test_golden_values_and_gradients(path: Path, name: str, mode: str) -> None:
    golden, options = load(path, name)
    if f"{mode}/y" not in golden:
        # the reference has no primitive of SuperSpike and no values of FakeNumericalGradient
        assert name == "FakeNumericalGradient" or (name, mode) == ("SuperSpike", "primitive")
        return
    surrogate = CLASSES[name](**options, spiking=mode == "spiking")
    y, grad = value_and_gradient(surrogate, golden["x"])
    tolerance, compared = 1e-6, torch.ones_like(y, dtype=torch.bool)
    if (name, mode) == ("S2NN", "primitive"):
        tolerance = 1.1e-5 * surrogate.beta  # the reference takes ln(1 + x + 1e-5)
    if mode == "spiking" and name in ("PiecewiseLeakyReLU", "Rect"):  # there the modes of the reference differ
        compared = golden["x"].abs() != (surrogate.w if name == "PiecewiseLeakyReLU" else 0.5 / surrogate.alpha)
    torch.testing.assert_close(y, golden[f"{mode}/y"], rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(grad[compared], golden[f"{mode}/grad"][compared], rtol=1e-6, atol=tolerance)


def test_golden_file_names_all_surrogates_and_their_defaults() -> None:
    path = PROJECT / "tests" / "golden" / "spikingjelly" / "values.npz"
    with np.load(path, allow_pickle=False) as data:
        defaults = {
            k.split("/")[1]: json.loads(str(data[k])) for k in data.files if k.startswith("surrogate/") and "def" in k
        }
    assert {n: dataclasses.asdict(cls()) for n, cls in CLASSES.items()} == {
        n: options | {"spiking": True} for n, options in defaults.items()
    }
    assert len(SURROGATES) == 16


def test_formulas_without_golden_values() -> None:
    x = torch.tensor([-4.0, -0.5, 0.0, 0.5, 8.0])
    assert SURROGATES["fake_numerical_gradient"](alpha=0.5).derivative(x).tolist() == [0.25, 0.5, 0.5, 0.5, 0.125]
    assert SuperSpike(alpha=3.0).derivative(torch.tensor([-1.0, 0.0, 2.0])).tolist() == pytest.approx(
        [0.75, 3.0, 1 / 3]
    )
    # three harmonics, by hand, at a quarter of the period
    assert SquarewaveFourierSeries(n=4, T_period=4.0).primitive(torch.ones(1)).item() == pytest.approx(
        0.5 + 2 / np.pi * (1 - 1 / 3 + 1 / 5)
    )


@given(surrogates(WITH_PRIMITIVE), smooth_points)
@settings(max_examples=150, deadline=None)
def test_the_derivative_is_that_of_the_primitive(surrogate: Surrogate, points: list[float]) -> None:
    x, h = away_from_kinks(surrogate, points), 1e-5
    slope = (surrogate.primitive(x + h) - surrogate.primitive(x - h)) / (2 * h)
    torch.testing.assert_close(surrogate.derivative(x), slope, rtol=1e-6, atol=1e-7)


@given(surrogates(WITH_PRIMITIVE), smooth_points)
@settings(max_examples=100, deadline=None)
def test_double_backward_is_the_slope_of_the_derivative(surrogate: Surrogate, points: list[float]) -> None:
    x, h = away_from_kinks(surrogate, points).requires_grad_(), 1e-5
    slope = (surrogate.derivative(x + h) - surrogate.derivative(x - h)).detach() / (2 * h)
    for spiking in (True, False):
        (grad,) = torch.autograd.grad(dataclasses.replace(surrogate, spiking=spiking)(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        torch.testing.assert_close(second, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WITH_PRIMITIVE)
def test_gradcheck_in_primitive_mode(name: str) -> None:
    x = torch.tensor([-1.7, -0.83, -0.31, 0.27, 0.71, 1.9], dtype=torch.float64, requires_grad=True)
    function = SURROGATES[name](spiking=False)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("name", WITH_PRIMITIVE)
def test_autograd_through_the_primitive_itself(name: str) -> None:
    """`primitive` is plain torch: its own gradient is the derivative, at the kink in 0 and far out too."""
    surrogate = SURROGATES[name]()
    far = [] if name == "squarewave_fourier_series" else [-1e30, 1e30]  # a periodic function needs the digits of x
    x = torch.tensor([-200.0, -1.5, -0.3, 0.0, 0.3, 1.5, 200.0, *far], requires_grad=True)
    (grad,) = torch.autograd.grad(surrogate.primitive(x).sum(), x)
    torch.testing.assert_close(grad, surrogate.derivative(x).detach(), rtol=1e-4, atol=1e-6)


@given(surrogates(sorted(SURROGATES)), smooth_points)
@settings(max_examples=100, deadline=None)
def test_spikes_are_the_step_and_the_gradient_is_the_derivative(surrogate: Surrogate, points: list[float]) -> None:
    x = torch.tensor([*points, 0.0, -0.0], dtype=torch.float64)
    y, grad = value_and_gradient(surrogate, x)
    assert y.tolist() == [float(value >= 0) for value in x.tolist()]
    assert torch.equal(grad, surrogate.derivative(x))


@pytest.mark.parametrize("name", sorted(SURROGATES))
@pytest.mark.parametrize("spiking", [True, False])
def test_class_and_function_agree(name: str, spiking: bool) -> None:
    function, cls, x = getattr(module, name), SURROGATES[name], torch.linspace(-2, 2, 9)
    options = {f.name: f.default + 1 for f in dataclasses.fields(cls)[1:]}
    if not spiking and name in WITHOUT_PRIMITIVE:
        with pytest.raises(ValueError, match="has no primitive, only a derivative; use it with spiking=True"):
            function(x, spiking=False)
        return
    for expected, value in zip(
        value_and_gradient(cls(**options, spiking=spiking), x),
        value_and_gradient(lambda z: function(z, **options, spiking=spiking), x),
        strict=True,
    ):
        assert torch.equal(expected, value)
    assert torch.equal(function(x, *options.values()), cls(*options.values())(x))
    assert function.__doc__ == cls.__doc__


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_nan_and_infinity(name: str) -> None:
    """A NaN membrane stays visible in value and gradient; an infinite one fires or not and gives no NaN."""
    x = torch.tensor([NAN, float("inf"), -float("inf")])
    surrogate = SURROGATES[name]()
    y, grad = value_and_gradient(surrogate, x)
    torch.testing.assert_close(y, torch.tensor([NAN, 1.0, 0.0]), equal_nan=True)
    assert grad[0].isnan()
    assert name == "squarewave_fourier_series" or not grad[1:].isnan().any()
    if name not in WITHOUT_PRIMITIVE:
        assert surrogate.primitive(x)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-2.1, 2.2, 24)
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for spiking in (True, False) if name in WITH_PRIMITIVE else (True,):
        surrogate = SURROGATES[name](spiking=spiking)
        for expected, value in zip(
            value_and_gradient(surrogate, x.to(dtype).float()), value_and_gradient(surrogate, x.to(dtype)), strict=True
        ):
            assert value.dtype == dtype
            torch.testing.assert_close(value.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spiking", [True, False])
def test_autocast(spiking: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), ATan(spiking=spiking), nn.Linear(4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(3, 4))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@dataclasses.dataclass(eq=False, repr=False)
class Promoting(Surrogate):
    """Computes in float32, as autocast makes some functions do on a GPU."""

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.float32)

    def primitive(self, x: Tensor) -> Tensor:
        return x.float()


def test_the_dtype_of_the_input_is_kept_where_functions_compute_in_another() -> None:
    for value in value_and_gradient(Promoting(spiking=False), torch.ones(3, dtype=torch.bfloat16)):
        assert value.dtype == torch.bfloat16


def test_compile_and_vmap() -> None:
    """No branch on data: one graph; `aot_eager` compiles without a C++ compiler."""
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    functions = [Sigmoid(), Rect(spiking=False)]
    if not torch.__version__.startswith("2.6."):  # whose compiler refuses a dataclass's fields, and says so
        functions.append(lambda z: module.atan(z, alpha=3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        for function in functions:
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            (expected,) = torch.autograd.grad(function(x).sum(), x)
            (grad,) = torch.autograd.grad(compiled(x).sum(), x)
            torch.testing.assert_close(grad, expected)
    per_sample = torch.func.vmap(torch.func.grad(Sigmoid()))(x.detach())
    torch.testing.assert_close(per_sample, Sigmoid().derivative(x.detach()))


def test_a_surrogate_is_a_value() -> None:
    fire = Sigmoid(alpha=2)
    assert repr(fire) == "Sigmoid(alpha=2)"
    assert repr(Sigmoid(spiking=False)) == "Sigmoid(spiking=False, alpha=4.0)"
    assert eval(repr(fire), {"Sigmoid": Sigmoid}) == fire == Sigmoid(2.0)
    assert fire not in (Sigmoid(), Sigmoid(2, spiking=False), ATan(2.0), "Sigmoid(alpha=2)")
    assert copy.deepcopy(fire) == pickle.loads(pickle.dumps(fire)) == fire
    assert dataclasses.replace(fire, alpha=3.0) == Sigmoid(3.0)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"dataclasses.replace\(surrogate, alpha=...\)"):
        fire.alpha = 3.0
    assert fire.alpha == 2


def test_a_surrogate_is_a_module() -> None:
    net = nn.Sequential(nn.Linear(3, 3), Sigmoid(), nn.Linear(3, 3), Sigmoid()).double().eval()
    assert sum(isinstance(m, Sigmoid) for m in net.modules()) == 2  # equal ones are both there, for hooks
    assert not net[1].training
    assert list(net[1].parameters()) == []
    assert net[1].state_dict() == {}
    assert set(net(torch.randn(5, 3, dtype=torch.float64)).unique().tolist()) <= {0.0, 1.0}


def test_memory_only_the_input_is_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for name in SURROGATES:
        kept.clear()
        x = torch.randn(7, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            SURROGATES[name]()(x)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(alpha=0), "Sigmoid: alpha must be a number, finite, above 0; got 0"),
        (lambda: Sigmoid(alpha=NAN), "alpha must be a number, finite, above 0; got nan"),
        (lambda: Sigmoid(alpha=float("inf")), "got inf"),
        (lambda: Sigmoid(alpha="4"), "alpha must be a number, finite, above 0; got '4'"),
        (lambda: Sigmoid(alpha=True), "got True"),
        (lambda: Sigmoid(spiking=1), "spiking must be True or False, got 1"),
        (lambda: SURROGATES["q_pseudo_spike"](alpha=1.0), "QPseudoSpike: alpha must be a number, finite, above 1"),
        (lambda: SURROGATES["piecewise_leaky_relu"](c=-0.1), "c must be a number, finite, minimum 0; got -0.1"),
        (lambda: SquarewaveFourierSeries(n=2.0), "n must be an integer, finite, minimum 2; got 2.0"),
        (lambda: SquarewaveFourierSeries(n=1), "n must be an integer, finite, minimum 2; got 1"),
        (lambda: SuperSpike(spiking=False), "SuperSpike has no primitive, only a derivative; use it with spiking=True"),
        (lambda: SuperSpike().primitive(torch.ones(1)), "SuperSpike has no primitive"),
    ],
)
def test_mistakes_are_one_clear_error(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_every_option_has_a_range(name: str) -> None:
    for f in dataclasses.fields(SURROGATES[name])[1:]:
        limit = f.metadata.get("above", f.metadata.get("minimum"))
        for bad in (limit - 1, limit if "above" in f.metadata else limit - 1e-9, NAN, None):
            with pytest.raises(ValueError, match=f"{f.name} must be"):
                SURROGATES[name](**{f.name: bad})


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Sigmoid needs a floating-point tensor \(u - v_threshold\), got torch.int64"):
        Sigmoid()(torch.tensor([1]))


def test_a_new_surrogate_is_a_few_lines() -> None:
    """The example of the module's docstring."""
    text = module.__doc__.split("choose it by name.")[1].split("\n\n", 1)[1]
    lines = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    names = dict(vars(module))
    exec(compile(lines, "example", "exec", dont_inherit=True), names)
    gaussian = names["Gaussian"](width=2.0)
    _, grad = value_and_gradient(gaussian, torch.tensor([0.0, 2.0]))
    assert grad.tolist() == pytest.approx([1.0, np.exp(-0.5)])
    with pytest.raises(ValueError, match="Gaussian: width must be a number, finite, above 0"):
        names["Gaussian"](width=-1.0)
    with pytest.raises(ValueError, match="Gaussian has no primitive"):
        names["Gaussian"](spiking=False)


def test_heaviside() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-45, -1e-45, 3.0, float("inf"), -float("inf"), NAN], requires_grad=True)
    expected = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, NAN])
    y = heaviside(x)
    torch.testing.assert_close(y.detach(), expected, equal_nan=True)
    assert torch.autograd.grad(y[:-1].sum(), x)[0].tolist() == [0.0] * 9


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_option_files_list_the_defaults(name: str) -> None:
    options = dict(OmegaConf.load(PROJECT / "configs" / "surrogate" / f"{name}.yaml"))
    options.pop("defaults", None)
    assert options.pop("name") == name
    assert options | {"spiking": True} == dataclasses.asdict(SURROGATES[name]())


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    script = PROJECT / "scripts" / "plot_surrogates.py"
    path = tmp_path / "all.png"
    monkeypatch.setattr(sys, "argv", [str(script), str(path)])
    names = runpy.run_path(str(script), run_name="__main__")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out
    panels = names["figure"]().axes
    assert [axes.get_title().split("\n")[0] for axes in panels] == list(SURROGATES)
    assert [len(axes.lines) for axes in panels] == [2 if name in WITHOUT_PRIMITIVE else 3 for name in SURROGATES]


def test_figure_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    names = runpy.run_path(str(PROJECT / "scripts" / "plot_surrogates.py"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[viz\]'"):
        names["figure"]()
