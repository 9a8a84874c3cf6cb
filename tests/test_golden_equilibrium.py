"""Simulation and implicit gradient against the float64 oracle: every file of GOLDEN_DIR/equilibrium."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_files
from torch import Tensor, nn

from ide_snn import Anderson, Broyden, Connection, FeedbackSNN, FixedPoint, Gmres, Implicit, NeuronParams
from ide_snn.equilibrium import dense_jacobian
from ide_snn.optimizations import get_constraint, raw_weight
from ide_snn.record import Record

FILES = golden_files("equilibrium/*.npz")
SOLVERS = [
    FixedPoint(tol=1e-12, max_steps=20_000),  # enough for eigenvalues of J up to 0.998
    Anderson(tol=1e-12, max_steps=500, memory=20),
    Broyden(tol=1e-12, max_steps=500, memory=200),
    Gmres(tol=1e-12, max_steps=500, restart=200),
]


@cache
def load(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as data:
        tensors = {k: torch.from_numpy(data[k]) for k in data.files if data[k].dtype.kind in "biuf"}
        return tensors | {"config": json.loads(str(data["config"]))}


class GoldenNet(nn.Module):
    """The network a golden file describes."""

    def __init__(self, data: dict[str, Tensor], solver=Gmres(), gradient=Implicit()) -> None:  # noqa: B008
        super().__init__()
        config = data["config"]

        def shape(name: str) -> torch.Size:
            return data[f"param/{name}.weight"].shape

        def stage(name: str, stride: int) -> Connection:
            out, inside, *kernel = shape(name)
            bias = f"param/{name}.bias" in data
            op = nn.Conv2d(inside, out, kernel, stride, 1, bias=bias) if kernel else nn.Linear(inside, out, bias)
            connection = Connection(op.double(), batch_norm=f"param/{name}.bn.weight" in data).double()
            if connection.bn is not None:
                connection.bn.eps = config["bn_eps"]
            return connection

        first, second, *kernel = shape("feedback")
        feedback = {
            "fc": lambda: nn.Linear(second, first, bias=False),
            "conv": lambda: nn.Conv2d(second, first, kernel, 1, 1, bias=False),
            "multilayer": lambda: nn.ConvTranspose2d(first, second, kernel, 2, 1, output_padding=1, bias=False),
        }[config["kind"]]().double()
        self.block = FeedbackSNN(
            input=stage("input", 2),
            layers=[stage(name, stride) for name, stride in config["stages"]],
            feedback=Connection(feedback, constraint="spectral_matrix_first_dim", bound=0.5 * config["v_threshold"]),
            neuron=NeuronParams(config["v_threshold"], config["leak"]),
            time_steps=config["time_steps"],
            solver=solver,
            gradient=gradient,
            input_has_time=config["input"] == "spikes",
        )
        classes, features = data["param/classifier.weight"].shape
        self.classifier = nn.Linear(features, classes).double()
        self.stages = {"input": self.block.input} | {
            name: layer for (name, _), layer in zip(config["stages"], self.block.layers, strict=True)
        }
        self._load(data)

    def named_golden_parameters(self) -> dict[str, nn.Parameter]:
        names = {"feedback.weight": raw_weight(self.block.feedback.op), "feedback.alpha": self.constraint.alpha}
        names |= {f"classifier.{k}": p for k, p in self.classifier.named_parameters()}
        for name, stage in self.stages.items():
            names |= {f"{name}.{k}": p for k, p in stage.op.named_parameters()}
            if stage.bn is not None:
                names |= {f"{name}.bn.{k}": p for k, p in stage.bn.named_parameters()}
        return names

    @property
    def constraint(self):
        return get_constraint(self.block.feedback.op)

    def _load(self, data: dict[str, Tensor]) -> None:
        parameters = self.named_golden_parameters()
        assert {f"param/{name}" for name in parameters} == {k for k in data if k.startswith("param/")}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(data[f"param/{name}"])
            self.constraint.u.copy_(data["buffer/feedback.u"])
            self.constraint.v.copy_(data["buffer/feedback.v"])
            for name, stage in self.stages.items():
                if stage.bn is not None:
                    stage.bn.running_mean.copy_(data[f"buffer/{name}.bn.running_mean"])
                    stage.bn.running_var.copy_(data[f"buffer/{name}.bn.running_var"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.block(x)
        return self.classifier(rate.flatten(1)), rate


def variants(path: Path) -> list[Implicit]:
    keys = {k.split("/")[0] for k in load(path) if k.startswith("jacobian_bn=")}
    pairs = [dict(part.split("=") for part in key.split(",")) for key in sorted(keys)]
    return [Implicit(jacobian_bn=p["jacobian_bn"], jacobian_at=p["at"]) for p in pairs]


CASES = [
    pytest.param(path, gradient, solver, id=f"{path.stem}-{gradient.jacobian_bn}-{gradient.jacobian_at}-{i}")
    for path in FILES
    for gradient in variants(path)
    for i, solver in zip(("fixed_point", "anderson", "broyden", "gmres"), SOLVERS, strict=True)
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_golden_simulation(path: Path, mode: str) -> None:
    data = load(path)
    net = GoldenNet(data).train(mode == "train")
    rates = net.block.simulate(data["x"], Record(all_rates=True, spike_fraction=True, spikes=True))
    assert torch.equal(rates.spikes[-1], data[f"{mode}/spike_train"].bool())
    torch.testing.assert_close(rates.last, data[f"{mode}/rate"], rtol=0, atol=1e-12)
    for i, fraction in enumerate(rates.spike_fraction):
        torch.testing.assert_close(fraction, data[f"{mode}/spike_fraction/{i}"], rtol=0, atol=1e-12)
    assert f"{mode}/spike_fraction/{len(rates.spike_fraction)}" not in data


def jacobian_norm(net: GoldenNet, data: dict[str, Tensor], gradient: Implicit) -> float:
    rates, f = net.block.linearisation_point(data["x"])
    with torch.no_grad():
        point = rates if gradient.jacobian_at == "rate" else f(rates, "batch")
    jacobian = f.linearise(point, gradient.jacobian_bn)
    return float(torch.linalg.matrix_norm(dense_jacobian(jacobian.matvec, rates), 2))


@pytest.mark.parametrize(("path", "gradient", "solver"), CASES)
def test_golden_gradient(path: Path, gradient: Implicit, solver) -> None:
    data = load(path)
    key = f"jacobian_bn={gradient.jacobian_bn},at={gradient.jacobian_at}"
    if isinstance(solver, FixedPoint) and data[f"{key}/jacobian_norm"] >= 1:
        pytest.skip("the Neumann series need not converge where ||J|| >= 1")
    net = GoldenNet(data, solver, gradient).train()
    solutions = []
    net.block.register_solve_hook(solutions.append)

    logits, rate = net(data["x"])
    rate.retain_grad()
    loss = F.cross_entropy(logits, data["y"].long())
    loss.backward()

    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, data["loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(rate.grad, data["loss_grad_rate"], rtol=0, atol=1e-12)
    (solution,) = solutions
    assert solution.outcome == "converged"
    torch.testing.assert_close(solution.value, data[f"{key}/cotangent"], rtol=1e-9, atol=1e-11)
    expected = {n: data[f"{key}/grad/{n}"] for n in net.named_golden_parameters()}
    total = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, parameter in net.named_golden_parameters().items():
        error = float((parameter.grad - expected[name]).norm())
        assert error <= 1e-7 * max(float(expected[name].norm()), 1e-3 * total), (name, error)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_jacobian_norm(path: Path) -> None:
    data = load(path)
    for gradient in variants(path):
        key = f"jacobian_bn={gradient.jacobian_bn},at={gradient.jacobian_at}"
        measured = jacobian_norm(GoldenNet(data).train(), data, gradient)
        assert measured == pytest.approx(float(data[f"{key}/jacobian_norm"]), rel=1e-9)
