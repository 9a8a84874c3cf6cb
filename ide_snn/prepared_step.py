"""The training step of a fully connected block as a few calls of kernels that are prepared once (`compile`).

A step of a small network spends much of its time between kernels: in Python, in autograd, in waking threads. For blocks
of one fully connected population, whose derivative is known by hand, everything is laid out when a batch of that size
is first seen: buffers, weights' packed copies, the arguments of the kernels. A step then runs them, between the two
products that torch computes:

    W_fb = clip(alpha, -c, c) W / ||W||, packed, and the dropout gains g_in, g_fb        1 call
    y = x W_in^T                                                                         torch
    Xbar = g_in BN(y + b_in), the simulation's rates a,
    slope = g_fb sigma'(z) / V_th, through = sigma'(z) / V_th                            1 call
        at z = (g_fb (W_fb a + b_fb) + Xbar) / V_th
    logits = W_out a + b_out, where a linear layer reads the rates                       in that call
    dL/da = W_out^T dL/dlogits, dL/dW_out, dL/db_out                                     in the next
    (I - J^T) v = dL/da, J = slope W_fb                                                  1 call
    d = slope v, e = through g_in v, dL/dy from e by BN's derivative,
    dL/dW_fb = d^T a, and from it dL/dW and dL/dalpha                                    1 call
    dL/dW_in = (dL/dy)^T x                                                               torch

Where the products of the input stage are in whole numbers (`ide_snn.integers`), they are part of the calls beside them.
Vectors are [B, N]. The numbers are those of the step that is not compiled, up to the rounding of sums.
Float32 on a CPU. Source: Xiao et al., NeurIPS 2021, sections 4.2 to 4.4.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from ide_snn import event_driven, input_stage, integers, native, spectral
from ide_snn.chain import UNROLLED, of_rates
from ide_snn.dense import DenseMap
from ide_snn.dropout import VariationalDropout
from ide_snn.firing import fire_stage, rate_stage
from ide_snn.implicit import SolveHook, report
from ide_snn.input_stage import Behind
from ide_snn.integers import MOST_INPUTS, IntegerProduct
from ide_snn.layers import Affine
from ide_snn.native import Stage, Stages
from ide_snn.neurons import NeuronParams
from ide_snn.once import differentiable_once
from ide_snn.operators import Operator
from ide_snn.optimizations import SpectralMatrix
from ide_snn.products import product_stage
from ide_snn.readout import Readout
from ide_snn.record import Path
from ide_snn.solvers import Gmres, LinearProblem, Solution, solve
from ide_snn.solvers.krylov import PreparedGmres

EAGER = "set compile=False (block.compile_ = False)"
REFUSED_MANY = (
    "a training step that is compiled with the layer behind the block takes one cotangent at a time (without "
    f"is_grads_batched=True, vmap): {EAGER}"
)
CHANGED = (
    "a parameter was modified by an inplace operation between forward and backward, of which a compiled training step "
    f"has no copy: {EAGER}"
)
MOST_FREE = 2  # sets of buffers that are kept for the next step, however many forwards there were at a time


@dataclass(frozen=True)
class Parts:
    """What a step is of."""

    w_in: Tensor
    b_in: Tensor | None
    bn: nn.BatchNorm1d | None
    w: Tensor  # of the feedback, unconstrained
    b: Tensor | None
    constraint: SpectralMatrix | None
    dropouts: tuple[VariationalDropout, VariationalDropout]  # of the input stage and the feedback
    operator: Operator  # of the feedback
    neuron: NeuronParams
    time_steps: int
    solver: Gmres
    path: Path
    in_integers: bool  # products of the input stage, see `ide_snn.integers`
    may_be_whole: bool  # loose solves and the gradient of the feedback may be in whole numbers, too
    readout: nn.Linear | None  # of the rates

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        bn, constraint, readout = self.bn, self.constraint, self.readout
        of_bn = (None, None) if bn is None else (bn.weight, bn.bias)
        of_readout = (None, None) if readout is None else (readout.weight, readout.bias)
        alpha = None if constraint is None else constraint.alpha
        return self.w_in, self.b_in, *of_bn, self.w, alpha, self.b, *of_readout


class Plan:
    """The step for one size of batch, with buffers for every forward whose graph is alive."""

    def __init__(self, parts: Parts, batch: int) -> None:
        self.parts, self.batch = parts, batch
        self.free: list[_Slot] = []

    def step(self, x: Tensor, generator: Generator | None, hooks: tuple[SolveHook, ...]) -> Tensor:
        """The rates of inputs x [B, inputs], or what the readout makes of them, with their gradient."""
        lease = _Lease(self, self.take())
        lease.slot.draw(x, generator)
        value: Tensor = _Step.apply(lease, hooks, x, *self.parts.parameters)
        return value

    def take(self) -> _Slot:
        try:
            return self.free.pop()
        except IndexError:  # asking first could be overtaken by another thread
            return _Slot(self.parts, self.batch)


class _Lease:
    """Buffers as long as a graph needs them."""

    def __init__(self, plan: Plan, slot: _Slot) -> None:
        self.plan, self.slot = plan, slot

    def __del__(self) -> None:
        if len(self.plan.free) < MOST_FREE:
            self.plan.free.append(self.slot)


@dataclass
class _State:
    """The population, see `event_driven.State`."""

    u: Tensor
    spikes: Tensor
    weighted: Tensor | None
    response: Tensor | None
    count: Tensor | None = None


class _Slot:
    """Buffers of one step, and the works of its kernels, which hold their addresses. All vectors are [B, N]."""

    def __init__(self, parts: Parts, batch: int) -> None:
        self.parts, self.lock = parts, threading.RLock()  # two threads may go back through one graph
        # their memory stays while kernels have its address, unless the storage itself is resized
        self.values = tuple(None if p is None else p.detach() for p in parts.parameters)
        self._addresses = [native.pointer(value) for value in self.values]
        w_in, _, _, _, raw, _, b, w_out, b_out = self.values
        assert w_in is not None  # the two weights are always there
        assert raw is not None
        self._w_in = w_in
        features = len(w_in)

        def vector() -> Tensor:
            return w_in.new_empty(batch, features)

        self.y, self.drive, self.rates, self.membrane, self.of_feedback = (vector() for _ in range(5))
        self.gains = [vector() if dropout.drops else None for dropout in parts.dropouts]
        # A step is as fast as its memory, so what nobody reads any more is written over: the gain by the slope, spike
        # counts by rates, and in the backward pass what the forward pass has left.
        self.slope = vector() if self.gains[1] is None else self.gains[1]
        self.through = self.slope if self.gains[1] is None else vector()
        self.readout = None if w_out is None else Readout(self.rates, w_out, b_out)
        self.to_y = self.drive
        # transposed, as products take it
        self.to_response, self.to_y_turned = (t.view(features, batch) for t in (self.membrane, self.of_feedback))
        weighing = self._lay_out_weight(raw)
        affine = Affine(parts.operator, raw, b, 1, self.gains[1], (features,))
        self._lay_out_forward(weighing, affine)
        self._lay_out_backward(affine, batch)

    def _lay_out_weight(self, raw: Tensor) -> list[Stage]:
        """The stages behind which `self.factor` is the address of what the weight is multiplied by to be in use."""
        constraint, self.pull, self.factor = self.parts.constraint, None, None
        if constraint is None:
            return []
        alpha = constraint.alpha.detach()
        self.largest_alpha = alpha.new_tensor(float(constraint.bound)).item()  # the bound as alpha's type has it
        u, v = constraint.u.clone(), constraint.v.clone()  # those of this step: the next one changes them
        self.weighing, self.factor = spectral.weighing_stage(raw, constraint, alpha, u, v)
        self.pull = spectral.pull_stage(raw, raw, u, v, raw)  # of a cotangent that each step has anew
        return [self.weighing]

    def _in_use(self, packing: Stage) -> Stage:
        """Of the weight in use."""
        packing.work.scale = self.factor
        return packing

    def _lay_out_forward(self, weighing: list[Stage], affine: Affine) -> None:
        neuron, steps, (of_input, of_feedback) = self.parts.neuron, self.parts.time_steps, self.gains
        _, b_in, gamma, beta, *_ = self.values
        self.behind = Behind(self.y, b_in, of_input, self.parts.bn, gamma, beta, *self.y.new_empty(2, self.y.shape[1]))
        connection = event_driven.connect(affine, levels=self.parts.path == "events16")
        self.draws = [
            None if gain is None else dropout.draw_stage(gain)
            for gain, dropout in zip(self.gains, self.parts.dropouts, strict=True)
        ]
        before = [*weighing, self._in_use(connection.packing), *filter(None, self.draws)]
        response, total = self.of_feedback, neuron.total_weight(steps)
        states = [_State(self.membrane, torch.empty_like(self.y, dtype=torch.uint8), self.rates, response)]
        simulation = event_driven.simulation_stage(
            [connection], states, self.drive, neuron, steps, from_rest=True, share=1 / total, own_memory=True
        )
        behind = [
            input_stage.forward_stage(self.behind, self.drive),
            simulation,
            rate_stage(states, total, self.rates),
            fire_stage(response, of_feedback, self.drive, self.slope, self.through, neuron.v_threshold),
            *([] if self.readout is None else [self.readout.forward_stage]),
        ]
        self.response = None  # of the input stage, in whole numbers
        if self.parts.in_integers:
            features, inputs = self._w_in.shape
            self.response = IntegerProduct(len(self.y), inputs, features, by_outputs=True, own_memory=True)
            self.forward_calls = [Stages([*before, *self.response.stages, *behind])]
        else:
            self.forward_calls = [Stages(before), Stages(behind)]

    def _lay_out_backward(self, affine: Affine, batch: int) -> None:
        features = affine.operator.out_channels
        of_readout = () if self.readout is None else self.readout.backward_stages
        self.solve_call = Stages([*of_readout, *self._lay_out_solve(affine, batch)])
        self.of_input_stage = input_stage.backward_stage(
            self.behind, self.to_y, self.to_y_turned, self.slope, self.through, self.to_response
        )
        # the weight's cotangent d^T a, by a product that skips the zeros of d
        rates = of_rates(self.rates, whole=self.parts.may_be_whole)
        self.product = product_stage(rates.adjoint_factor(None), features, batch, own_memory=True)
        self.product.work.x = self.to_response.data_ptr()
        stages = [self.of_input_stage, rates.packing, self.product, *([] if self.pull is None else [self.pull])]
        self.backward_call, self.to_w_in = Stages(stages), None
        if self.parts.in_integers and batch <= MOST_INPUTS:  # its sums are over the samples
            self.to_w_in = IntegerProduct(features, batch, self._w_in.shape[1], own_memory=True)
            self.backward_call_with_input = Stages([*stages, *self.to_w_in.stages])

    def _lay_out_solve(self, affine: Affine, batch: int) -> list[Stage]:
        """The stages of the solve, with J^T in whole numbers where the tolerance allows that."""
        solver, features = self.parts.solver, affine.operator.out_channels
        self.exact, noise = DenseMap(replace(affine, gain=None)), integers.noise(features)  # the slope has the gain
        self.is_rough = self.parts.may_be_whole and self.exact.can_be_whole and solver.tolerates(noise)
        used, noise = (replace(self.exact, whole=True), noise) if self.is_rough else (self.exact, 0)
        self.terms = solver.terms(torch.float32, noise)
        self.gmres = PreparedGmres(
            *((used.adjoint_factor(self.slope),), batch, features, self.terms, min(solver.restart, solver.max_steps)),
            own_memory=True,
            rounding=noise,
            keep_residual=False,
        )
        return [self._in_use(used.packing), self.gmres.stage]

    def draw(self, x: Tensor, generator: Generator | None) -> None:
        """The keys of this step's masks."""
        for dropout, stage in zip(self.parts.dropouts, self.draws, strict=True):
            if stage is not None:
                key, stage.work.first = dropout.place(len(x), x.device, generator)
                stage.work.key = int(key)

    def forward(self, x: Tensor) -> Tensor:
        """The rates of inputs x [B, inputs], or the readout's logits."""
        logits = None
        if self.readout is not None:
            logits = self.rates.new_empty(len(self.rates), self.readout.outputs)
            self.readout.take(logits)
        if self.response is not None:
            self.response.take(x, self._w_in, self.y)
        self.forward_calls[0].run()
        if self.response is None:
            torch.mm(x.detach(), self._w_in.t(), out=self.y)
        for stages in self.forward_calls[1:]:
            stages.run()
        return self.rates.clone() if logits is None else logits  # the user's, who may change it

    def to_rates(self, cotangent: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The cotangents of the rates, from that of the value, and of the readout's parameters: `solve` writes them."""
        if self.readout is None:
            return cotangent, [None, None]
        to_readout = [None if p is None else torch.empty_like(p) for p in self.values[-2:]]
        self.readout.pull(cotangent, cast(Tensor, to_readout[0]), to_readout[1])
        return self.readout.to_rates, to_readout

    def require_memory(self) -> None:
        """Raises RuntimeError where the memory of a parameter was freed or moved, whose address kernels have."""
        if [native.pointer(value) for value in self.values] != self._addresses:
            raise RuntimeError(
                "the storage of a parameter was resized between forward and backward, which a compiled training step "
                f"cannot follow: {EAGER}"
            )

    def solve(self, g: Tensor) -> Solution:
        """v with (I - J^T) v = g for the g of `to_rates`."""
        self.gmres.take(g)
        self.solve_call.run()
        run, solver = self.gmres.result(), self.parts.solver
        if self.terms.trust(run) and run.worst <= solver.tol:
            return Solution.of(run, run.y)
        factors = (self.exact.adjoint_factor(self.slope),)
        problem = LinearProblem(partial(self.exact.adjoint, scale=self.slope), g, native=True, factors=lambda: factors)
        if self.is_rough:
            Stages([self._in_use(self.exact.packing)]).run()  # which was not needed so far
        return solve(problem, solver, begun=run)

    def backward(self, v: Tensor, x: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
        """Cotangents of x and the block's parameters from the solution v."""
        _, b_in, gamma, beta, raw, alpha, b, *_ = self.values
        assert raw is not None  # as above
        vectors = [None if p is None else torch.empty_like(p) for p in (gamma, beta, b_in, b)]
        to_raw, to_alpha = torch.empty_like(raw), None
        input_stage.set_results(self.of_input_stage, v, *vectors)
        self.product.work.y = to_raw.data_ptr()
        if self.pull is not None:
            work = self.pull.work
            work.g = work.result = to_raw.data_ptr()
            work.s, work.scale = self.weighing.work.s, self.weighing.work.factor
        to_w_in = torch.empty_like(self._w_in) if needed[1] else None
        if to_w_in is not None and self.to_w_in is not None:
            self.to_w_in.take(self.to_y_turned, cast(Tensor, x), to_w_in)
            self.backward_call_with_input.run()
        else:
            self.backward_call.run()
            if to_w_in is not None:
                torch.mm(self.to_y_turned, cast(Tensor, x), out=to_w_in)
        if self.pull is not None and alpha is not None:
            to_alpha = torch.full_like(alpha, self.pull.work.p * (abs(alpha.item()) <= self.largest_alpha))  # NaN stays
        to_gamma, to_beta, to_b_in, to_b = vectors
        to_x = self.to_y.mm(self._w_in) if needed[0] else None
        return [to_x, to_w_in, to_b_in, to_gamma, to_beta, to_raw, to_alpha, to_b]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lease: _Lease, hooks: tuple[SolveHook, ...], x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.lease, ctx.hooks = lease, hooks
        # what the backward pass reads is saved for autograd to see that it is still that of the forward
        to_x, to_w_in, *_ = ctx.needs_input_grad[2:]
        w_in, _, gamma, _, raw, alpha, _, w_out, _ = parameters
        read = [p for p in (w_in if to_x else None, gamma, raw, alpha, w_out) if p is not None]
        ctx.save_for_backward(x if to_w_in else None, *read)
        ctx.read, ctx.versions = read, [p._version for p in read]
        return lease.slot.forward(x)

    @staticmethod
    @differentiable_once("a compiled training step", f"{UNROLLED}; for the layer behind the block {EAGER}")
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        slot, needed = ctx.lease.slot, ctx.needs_input_grad[2:]
        if slot.readout is not None:
            _require_one(cotangent)
        # kernels have their addresses, and hooks on saved tensors may give them another layout
        x, cotangent = None if x is None else x.contiguous(), cotangent.contiguous()
        with slot.lock:
            slot.require_memory()
            if [p._version for p in ctx.read] != ctx.versions:  # hooks on saved tensors keep autograd from seeing it
                raise RuntimeError(CHANGED)
            g, of_readout = slot.to_rates(cotangent)
            solution = slot.solve(g)
            report(solution, slot.parts.solver, ctx.hooks)
            gradients = [*slot.backward(solution.value, x, needed), *of_readout]
        return None, None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True))


def _require_one(cotangent: Tensor) -> None:
    """Raises RuntimeError where many cotangents come as one, which has no memory."""
    try:
        cotangent.data_ptr()
    except RuntimeError as error:
        raise RuntimeError(REFUSED_MANY) from error
