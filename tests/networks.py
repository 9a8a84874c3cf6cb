"""Small networks of every kind, in float64, for the tests of the block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, Gmres, Implicit, NeuronParams
from ide_snn.models import initialise

EXACT = Gmres(tol=1e-12, max_steps=300)
LIF = NeuronParams(2.0, 0.95)
KINDS = ("fc", "conv", "multilayer", "pooled")
INPUT_SHAPES = {"fc": (6,), "conv": (2, 8, 8), "multilayer": (2, 8, 8), "pooled": (2, 9, 9)}


def small_block(
    kind: str,
    *,
    batch_norm: bool = True,
    dropout: float = 0.0,
    constraint: str = "spectral_operator",
    neuron: NeuronParams = LIF,
    time_steps: int = 10,
    solver=EXACT,
    gradient=Implicit(),  # noqa: B008
    input_has_time: bool = False,
    precision: str = "float32",
    check_input: bool | None = None,
) -> FeedbackSNN:
    """A feedback block with one (fc, conv), three (multilayer) or two (pooled) populations."""
    options = {"batch_norm": batch_norm, "dropout": dropout}

    def made(op: nn.Module, **kw) -> Connection:
        return Connection(initialise(op.double()), **(options | kw)).double()

    stages: list[Connection]
    if kind == "fc":
        stages, back, size = [made(nn.Linear(6, 8))], nn.Linear(8, 8, bias=False), ()
    elif kind == "conv":
        stages, back, size = [made(nn.Conv2d(2, 3, 3, 2, 1))], nn.Conv2d(3, 3, 3, padding=1, bias=False), (4, 4)
    elif kind == "multilayer":
        stages = [made(nn.Conv2d(2, 3, 3, 2, 1)), made(nn.Conv2d(3, 4, 3, 2, 1)), made(nn.Conv2d(4, 3, 3, 1, 1))]
        back, size = nn.ConvTranspose2d(3, 3, 3, 2, 1, output_padding=1, bias=False), (2, 2)
    else:  # 9x9 -> 5x5 -> conv 5x5 -> pool 2x2 (drops a row and a column) -> 5x5
        stages = [made(nn.Conv2d(2, 3, 3, 2, 1)), made(nn.Conv2d(3, 4, 3, 1, 1), pool=2)]
        back, size = nn.ConvTranspose2d(4, 3, 3, 2, 0, bias=True), (2, 2)
    feedback = made(back, batch_norm=False, constraint=constraint, input_size=size)
    return FeedbackSNN(
        input=stages[0],
        layers=stages[1:],
        feedback=feedback,
        neuron=neuron,
        time_steps=time_steps,
        solver=solver,
        gradient=gradient,
        input_has_time=input_has_time,
        precision=precision,
        check_input=check_input,
    )


def warmed_up(block: FeedbackSNN) -> FeedbackSNN:
    """Gives every bias and batch norm values that are not the initial ones."""
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.2, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.2, 0.8)
        elif getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.bias, 0.1, 0.3)
    return block


def example_input(kind: str, batch: int = 4, time_steps: int | None = None) -> Tensor:
    shape = (batch, *INPUT_SHAPES[kind])
    if time_steps is None:
        return torch.randn(shape, dtype=torch.float64)
    return (torch.rand(time_steps, *shape) < 0.3).double()
