"""The unrolled feedback network in plain autograd: every step's tensors kept, nothing packed. The tests' oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import small_block, warmed_up
from torch import Tensor

from ide_snn import FeedbackSNN, NeuronParams
from ide_snn.bptt import Bptt
from ide_snn.layers import FixedConnection
from ide_snn.neurons import time_average
from ide_snn.surrogate import Surrogate


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of everything autograd saves in `run`, each storage counted once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: addresses stay unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    del kept
    return sum(size for size, _ in storages.values())


T = 10


def block_of(kind: str, gradient: Bptt, *, leak: float = 0.9, with_time: bool = False, dropout: float = 0.2):
    torch.manual_seed(0)
    neuron = NeuronParams(2.0, leak)
    block = small_block(kind, dropout=dropout, neuron=neuron, time_steps=T, gradient=gradient, input_has_time=with_time)
    return warmed_up(block)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.surrogate.derivative(*ctx.saved_tensors), None


def one_step(u: Tensor, current: Tensor, neuron, surrogate, reset: str, detach_reset: bool) -> tuple[Tensor, Tensor]:
    """(spikes, state after reset and leak)."""
    u = u + current
    s = Fire.apply(u - neuron.v_threshold, surrogate)
    r = s.detach() if detach_reset else s
    after = u - neuron.v_threshold * r if reset == "soft" else u * (1 - r)
    return s, after if neuron.leak == 1 else neuron.leak * after


def folded(fixed: FixedConnection, moments=None):
    """(weight, bias) with the running statistics, or other moments, multiplied in; with graph."""
    bn, weight, bias = fixed.connection.bn, fixed.weight, fixed.bias
    if bn is not None:
        mean, var = (bn.running_mean.clone(), bn.running_var.clone()) if moments is None else moments
        scale = bn.weight * torch.rsqrt(var + bn.eps)
        shift = bn.bias - mean * scale
        weight = weight * fixed.connection.operator.per_output(scale)
        bias = shift if bias is None else bias * scale + shift
    return weight, bias


def finish(fixed: FixedConnection, y: Tensor) -> Tensor:
    y = F.avg_pool2d(y, fixed.connection.pool) if fixed.connection.pool > 1 else y
    return y if fixed.gain is None else y * fixed.gain


class PlainChain:
    """One connection of the chain, whose batch norm does what `mode` says; plain autograd."""

    def __init__(self, fixed: FixedConnection, mode: str) -> None:
        self.fixed, self.responses = fixed, []
        self.mode = mode if fixed.connection.uses_batch_statistics else "frozen"
        self.known = fixed.connection.is_known
        self.weights = folded(fixed) if self.known and self.mode == "frozen" else None

    def __call__(self, s: Tensor) -> Tensor:
        if not self.known:
            return self.fixed.respond(s, "running")
        apply, bn = self.fixed.connection.operator.apply, self.fixed.connection.bn
        if self.weights is not None:
            return finish(self.fixed, apply(s, *self.weights))
        y = apply(s, self.fixed.weight, self.fixed.bias)
        self.responses.append(y)
        if self.mode == "per_step":
            return finish(self.fixed, F.batch_norm(y, None, None, bn.weight, bn.bias, True, 0.0, bn.eps))
        so_far = torch.cat(self.responses)
        var, mean = torch.var_mean(so_far, [d for d in range(y.dim()) if d != 1], correction=0, keepdim=True)
        gamma, beta = (p.view(mean.shape) for p in (bn.weight, bn.bias))
        return finish(self.fixed, (y - mean) * torch.rsqrt(var + bn.eps) * gamma + beta)


def plain_bptt(
    block: FeedbackSNN, x: Tensor, generator: torch.Generator | None = None, chains: list[PlainChain] | None = None
) -> Tensor:
    """What block(x) with `Bptt` is to return, unrolled in plain autograd; updates no statistics but the input's.

    `chains` collects the connections from population i to i + 1, with their responses where statistics are the batch's.
    """
    bptt, neuron, time_steps = block.gradient, block.neuron, block.time_steps
    lead = 2 if block.input_has_time else 1
    inside = tuple(x.shape[lead:])
    shapes = block.population_shapes(inside)
    like = torch.empty(x.shape[lead - 1], dtype=x.dtype)
    connections = (block.input, *block.layers, block.feedback)
    fixed = [c.prepare(s, like, generator) for c, s in zip(connections, (inside, *shapes), strict=True)]
    stage, feedback = fixed[0], PlainChain(fixed[-1], bptt.bn)
    layers = [PlainChain(f, bptt.bn) for f in fixed[1:-1]]
    if chains is not None:
        chains += layers
    if block.input_has_time:
        moments, bn = None, stage.connection.bn
        if bn is not None and bn.training:
            y = stage.connection.operator.apply(time_average(x, neuron.leak, x.dtype), stage.weight, stage.bias)
            moments = torch.var_mean(y, [d for d in range(y.dim()) if d != 1], correction=0)[::-1]
        weights = folded(stage, moments)

        def drive(t: int) -> Tensor:
            return finish(stage, stage.connection.operator.apply(x[t], *weights))
    else:
        constant = stage.respond(x, "batch", update_running=True)

        def drive(t: int) -> Tensor:  # noqa: ARG001
            return constant

    u = [torch.zeros(len(like), *shape, dtype=x.dtype) for shape in shapes]
    s, a, train = torch.zeros_like(u[-1]), torch.zeros_like(u[-1]), []
    for t in range(time_steps):
        if bptt.truncate is not None and t % bptt.truncate == 0:
            u, s = [v.detach() for v in u], s.detach()
            for chain in (feedback, *layers):
                chain.responses = [y.detach() for y in chain.responses]
        first = feedback.weights is None or feedback.weights[1] is not None
        current = drive(t) if t == 0 and not first else feedback(s) + drive(t)
        for i in range(len(shapes)):
            s, u[i] = one_step(u[i], current, neuron, bptt.surrogate, bptt.reset, bptt.detach_reset)
            if i < len(layers):
                current = layers[i](s)
        a = s + (a if neuron.leak == 1 else a * neuron.leak)
        train.append(s)
    return a / neuron.total_weight(time_steps) if bptt.output == "rate" else torch.stack(train)
