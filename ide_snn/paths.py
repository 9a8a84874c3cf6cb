"""How a forward is computed: the best path that precision, gradient, connections and the machine allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ide_snn import event_driven, integers
from ide_snn.bptt import Bptt
from ide_snn.implicit import Gradient, Implicit
from ide_snn.kernels import available
from ide_snn.layers import Affine, Connection, FixedConnection
from ide_snn.precision import Precision, rounds_convolutions, why_no_tf32
from ide_snn.record import Path
from ide_snn.simulation import EVENT_PATHS
from ide_snn.solvers import Gmres, Solver

PATHS = {  # as the log says them
    "dense": "dense",
    "events": "event-driven float32",
    "events16": "event-driven, 16-bit weights",
    "fused": "dense products, fused neuron kernel",
    "fused_half": "dense products in float16, fused neuron kernel; f and its gradient in TF32",
}


@dataclass(frozen=True)
class PathChoice:
    """What of a block decides for precision exact and fast.

    Args:
        precision, gradient, solver, input_has_time: of the block.
        input: its input stage.
    """

    precision: Precision
    gradient: Gradient | Bptt
    solver: Solver
    input: Connection
    input_has_time: bool

    def of(self, links: Sequence[FixedConnection], device: torch.device) -> tuple[Path, str | None, str]:
        """(path of a forward over `links`, why it is not the one that was asked for, what the log is to say)."""
        path, reason = self._best(links, device)
        said = ", ".join([PATHS[path], *self._rounded_besides(path, links, device)])
        return path, reason, f"precision={self.precision}: {said}" + (f" ({reason})" if reason else "")

    def takes_integers(self, path: Path) -> bool:
        """True where the input stage's products are those of `ide_snn.integers`, if the forward takes this path."""
        return self._could_take_integers(path) and integers.why_unavailable() is None

    def _could_take_integers(self, path: Path) -> bool:
        by_precision = self.precision == "fast" and path in EVENT_PATHS
        return by_precision and not self.input_has_time and integers.suits(self.input.operator)

    def _rounded_besides(self, path: Path, links: Sequence[FixedConnection], device: torch.device) -> Iterator[str]:
        """What `fast` may round beside the simulation, and whether it does on this machine."""
        if self.precision != "fast" or path not in EVENT_PATHS:
            return
        whole = [*(["input stage"] if self._could_take_integers(path) else []), *self._of_linear(links)]
        if whole:
            reason = integers.why_unavailable()
            yield f"{', '.join(whole)} in {'whole numbers' if reason is None else f'float32: {reason}'}"
        if self._walks_for_gradients(links) and any(link.operator and link.operator.suits_onednn for link in links):
            yield f"dense convolutions in {'bfloat16' if rounds_convolutions(self.precision, device) else 'float32'}"

    def _walks_for_gradients(self, links: Sequence[FixedConnection]) -> bool:
        """False where f's own graph is differentiated, in float32."""
        gradient = self.gradient
        if not isinstance(gradient, Implicit):
            return False
        return gradient.jacobian_at == "f" or not self._couples_samples(links)

    def _couples_samples(self, links: Sequence[FixedConnection]) -> bool:
        """True where J mixes the samples of the batch."""
        by_batch = isinstance(self.gradient, Implicit) and self.gradient.jacobian_bn == "batch"
        return by_batch and any(link.connection.uses_batch_statistics for link in links)

    def _of_linear(self, links: Sequence[FixedConnection]) -> Iterator[str]:
        """What may be in whole numbers behind the input stage."""
        are_linear = all(link.operator and link.operator.kind == "linear" for link in links)
        if are_linear and self._walks_for_gradients(links) and not self._couples_samples(links):
            outputs = [link.operator.out_channels for link in links if link.operator]
            fit = max(outputs) <= integers.MOST_INPUTS
            if fit and isinstance(self.solver, Gmres) and self.solver.tolerates(sum(map(integers.noise, outputs))):
                yield "loose solves"
            at_rate = isinstance(self.gradient, Implicit) and self.gradient.jacobian_at == "rate"
            if at_rate and all(link.connection.bn is None for link in links):
                yield "gradients"  # which `ide_snn.chain` has written out

    def _best(self, links: Sequence[FixedConnection], device: torch.device) -> tuple[Path, str | None]:
        if torch.is_autocast_enabled(device.type):
            return "dense", "autocast is on"
        if device.type == "cuda":
            kernel = available(device)
            if kernel.backend != "triton":
                return "dense", kernel.reason
            if self.precision == "exact":
                return "fused", None
            dtypes = {p.dtype for p in self.input.parameters() if p.is_floating_point()} - {torch.float32}
            reason = next((f"the weights are {dtype}" for dtype in dtypes), None) or why_no_tf32(device)
            return ("fused" if reason else "fused_half"), reason
        if any(link.gain is not None and link.gain.requires_grad for link in links):
            return "dense", "the gain of a dropout has a gradient"
        maps = [link.frozen for link in links]
        of_input = (p.dtype for p in self.input.parameters() if p.is_floating_point() and p.dtype != torch.float32)
        reason = next((f"the input stage is {dtype}" for dtype in of_input), None) or event_driven.why_not(maps)
        if reason is not None:
            return "dense", reason
        if self.precision == "exact":
            return "events", None
        affines = [affine for affine in maps if isinstance(affine, Affine)]  # all of them
        some_fit = any(event_driven.why_not_in_levels([affine]) is None for affine in affines)
        return ("events16" if some_fit else "events"), event_driven.why_not_in_levels(affines)
