"""Small fully connected blocks that are compiled, and what the tests of it compare."""

from __future__ import annotations

from typing import Any

import torch
from networks import LIF
from torch import Tensor, nn

from ide_snn import Connection, FeedbackSNN, Gmres, native
from ide_snn.models import initialise

REASON = next(filter(None, map(native.why_unavailable, ("events", "features", "sequence"))), None)


def block(
    features: int = 37,
    inputs: int = 21,
    *,
    batch_norm: bool = True,
    dropout: float = 0.3,
    constraint: str = "spectral_matrix",
    bias: bool = True,
    feedback_bias: bool = False,
    compile: bool | None = True,
    **options: Any,
) -> FeedbackSNN:
    generator = torch.Generator().manual_seed(3)
    ops = nn.Linear(inputs, features, bias=bias), nn.Linear(features, features, bias=feedback_bias)
    for op in ops:
        initialise(op, generator)
        if op.bias is not None:
            nn.init.uniform_(op.bias, -0.2, 0.2, generator=generator)
    feedback = Connection(ops[1], dropout=dropout, constraint=constraint, bound=1.0, generator=generator)
    chosen = {"neuron": LIF, "time_steps": 6, "solver": Gmres(1e-3), "precision": "exact", **options}
    stage = Connection(ops[0], batch_norm=batch_norm, dropout=dropout)
    return FeedbackSNN(input=stage, feedback=feedback, compile=compile, **chosen)


def images(samples: int = 9, inputs: int = 21) -> Tensor:
    return 3 * torch.randn(samples, inputs, generator=torch.Generator().manual_seed(4))


def step(net: FeedbackSNN, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """(rates, gradients by name) of a training step with a loss that is not symmetric in the samples."""
    net.zero_grad()
    rates = net(x, generator=torch.Generator().manual_seed(seed))
    (rates * torch.linspace(-1, 2, rates.numel()).view_as(rates)).sum().backward()
    return rates.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], precision: str = "exact") -> None:
    # whole numbers move both factors by up to 1.2e-4, and the last bit of one may decide which it becomes
    rounding = 5e-4 if precision == "fast" else 2e-5
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        # in front of batch norm the bias, and the length of the weights, have the gradient 0 but for rounding
        scale = max(float(tensor.abs().max()), 0.1 * largest)
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=rounding * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def is_compiled(net: FeedbackSNN) -> bool:
    return any(not isinstance(plan, str) for plan, *_ in net._compiled._plans.values())
