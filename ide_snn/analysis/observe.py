"""One forward pass of any model, with every feedback block in it seen at every time step.

Blocks are found by type and answered for while the model runs: the rest of the model is whatever it is. The same
mechanism runs the rest of the model again on the rates of an earlier time step, without another simulation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ide_snn.block import FeedbackSNN
from ide_snn.evaluation import device_of, pair_of, show_bar
from ide_snn.monitor import feedback_blocks
from ide_snn.operators import KNOWN_MODULES
from ide_snn.record import Rates, Record
from ide_snn.simulation import Step

__all__ = ["Meter", "Observation", "RestCall", "Site", "evaluation_mode", "measure", "observe"]

Answer = Callable[[str, FeedbackSNN, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a feedback block in a forward pass of the model.

    Attributes:
        prefix: of its figures' names, as in `ide_snn.monitor`: empty for the only block of a model.
        block: the block that was called.
        x: its input [B, *] or [T, B, *].
        rates: weighted rates and spike fractions of all populations.
        over_time: a_n[t], t = 1..T, of the last population [T, B, *].
        last_spikes: spikes of the last population in step T, bool [B, *]; the feedback never carries them.
    """

    prefix: str
    block: FeedbackSNN
    x: Tensor
    rates: Rates
    over_time: Tensor
    last_spikes: Tensor

    @property
    def batch(self) -> int:
        """B of the block, which need not be the model's number of samples."""
        return self.over_time.shape[1]

    def inputs_of(self, index: Tensor | slice) -> Tensor:
        """The block's input for the chosen entries of its batch."""
        return self.x[:, index] if self.block.input_has_time else self.x[index]

    def population(self, index: int) -> str:
        """Name of population `index` (from 0), the same as in metrics.csv."""
        return f"{self.prefix}population_{index + 1}"


@dataclass(frozen=True)
class RestCall:
    """A call of a linear, conv or transposed conv module outside the blocks; `input_shape` includes the batch."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Observation:
    """What one forward pass of `model` on x showed; `output` is the model's, for `samples` samples."""

    model: nn.Module
    x: Tensor
    output: Tensor
    sites: tuple[Site, ...]
    rest: tuple[RestCall, ...]

    @property
    def samples(self) -> int:
        return self.output.shape[0]

    @property
    def time_steps(self) -> int:
        """The largest T of the blocks."""
        return max(site.block.time_steps for site in self.sites)

    def output_at(self, t: int) -> Tensor:
        """The model's output if every block had simulated min(t, its own T) steps.

        A block whose input is the observed one answers with its recorded rate, bit for bit that of a separate run;
        an input with time is cut to its first t frames at the block. A block behind another block has a new input
        at every t, so it is simulated again.

        Raises:
            ValueError: for t outside 1..T.
        """
        if not 1 <= t <= self.time_steps:
            raise ValueError(f"t must lie in 1..{self.time_steps}, got {t}")
        seen = {site.prefix: site for site in self.sites}

        def answer(prefix: str, block: FeedbackSNN, x: Tensor) -> Tensor:
            steps = min(t, block.time_steps)
            site = seen.get(prefix)
            if site is not None and x.shape == site.x.shape and torch.equal(x, site.x):
                return site.over_time[steps - 1].clone()  # the model may change it in place
            with _time_steps(block, steps):
                return block.simulate(x[:steps] if block.input_has_time else x).last

        with evaluation_mode(self.model), torch.no_grad(), _answering(self.model, answer):
            return _tensor(self.model(self.x))


class Meter(Protocol):
    """Something that adds up what observations show."""

    def add(self, observation: Observation, labels: Tensor) -> None:
        """Count in one batch; labels [B]."""
        ...


def measure(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *meters: Meter, progress: bool | None = False
) -> None:
    """Shows every batch (inputs, labels) to the meters, with one simulation each; what labels are is theirs to say.

    Needs memory for T rates of the last population of one batch.

    Raises:
        ValueError: there is no batch, a batch is no pair, or the model has no feedback block.
    """
    device, empty = device_of(model), True
    for batch in show_bar(batches, "analysing", progress):
        x, y = pair_of(batch)
        observation = observe(model, x.to(device))
        for meter in meters:
            meter.add(observation, y.to(device))
        empty = False
    if empty:
        raise ValueError("there is no batch to analyse: pass a loader or a list, an iterator is used up after one pass")


def observe(model: nn.Module, x: Tensor) -> Observation:
    """Runs `model` on x in evaluation mode, without gradients, and keeps what its blocks did.

    Raises:
        ValueError: no feedback block ran, the output is not one tensor, or a membrane became NaN or infinite.
    """
    sites: list[Site] = []
    rest: list[RestCall] = []

    def answer(prefix: str, block: FeedbackSNN, inputs: Tensor) -> Tensor:
        inputs = inputs.detach().clone()  # the model may go on to change it in place
        sites.append(_observe_block(prefix, block, inputs))
        return sites[-1].rates.last.clone()

    with evaluation_mode(model), torch.no_grad(), _answering(model, answer), _noting_rest(model, rest):
        output = _tensor(model(x))
    if not sites:
        raise ValueError("the model's forward called no FeedbackSNN, so there is nothing to analyse")
    return Observation(model, x, output, tuple(sites), tuple(rest))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def call_prefix(prefix: str, call: int) -> str:
    """Prefix of the figures of a block's `call`-th call (from 1) in one forward."""
    return prefix if call == 1 else f"{prefix}call_{call}_"


def rest_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules outside the blocks, by name; the insides of known linear operators are not listed."""
    yield from _walk("", model)


def runs_as_known(module: nn.Module) -> bool:
    """True for linear, conv and transposed conv modules, except subclasses with a forward of their own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in KNOWN_MODULES)


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, FeedbackSNN):
        return
    yield name, module
    if not runs_as_known(module):
        for child_name, child in module.named_children():
            yield from _walk(f"{name}.{child_name}" if name else child_name, child)


def _observe_block(prefix: str, block: FeedbackSNN, x: Tensor) -> Site:
    over_time: list[Tensor] = []
    last: list[Tensor] = []

    def keep(step: Step) -> None:
        over_time.append(step.last_rate())
        if step.t == block.time_steps:
            last.append(step.spikes[-1].bool())

    rates = block.simulate(x, Record(all_rates=True, spike_fraction=True, on_step=keep))
    if not bool(torch.isfinite(rates.last).all()):
        raise ValueError(f"membranes of {prefix.rstrip('_') or 'the block'} became NaN or infinite: check the weights")
    return Site(prefix, block, x, rates, torch.stack(over_time), last[0])


@contextmanager
def _answering(model: nn.Module, answer: Answer) -> Iterator[None]:
    """Inside, for one forward of `model`, calls of its blocks are answered by `answer(prefix, block, input)`.

    A block that is called again in the same forward gets another prefix.
    """
    blocks = feedback_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} contains no FeedbackSNN block, so there is nothing to analyse")
    before = [(block, block.__dict__.get("forward")) for block in blocks.values()]
    try:
        for prefix, block in blocks.items():
            # hooks on the block go on to work, which they would not if it were swapped for another module
            block.__dict__["forward"] = _answerer(prefix, block, answer)
        yield
    finally:
        for block, own in before:
            if own is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = own


def _answerer(prefix: str, block: FeedbackSNN, answer: Answer) -> Callable[..., Tensor]:
    calls = itertools.count(1)

    def forward(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG001
        return answer(call_prefix(prefix, next(calls)), block, x)

    return forward


@contextmanager
def _noting_rest(model: nn.Module, calls: list[RestCall]) -> Iterator[None]:
    """Inside, calls of known operators outside the blocks are noted."""
    handles = []
    try:
        for name, module in rest_modules(model):
            if runs_as_known(module):
                handles.append(module.register_forward_pre_hook(_noter(name, calls)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noter(name: str, calls: list[RestCall]) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, inputs: Any) -> None:
        calls.append(RestCall(name or type(module).__name__, module, tuple(inputs[0].shape)))

    return note


@contextmanager
def _time_steps(block: FeedbackSNN, steps: int) -> Iterator[None]:
    before = block.time_steps
    try:
        block.time_steps = steps
        yield
    finally:
        block.time_steps = before


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return one tensor [B, ...] to be analysed, got {type(output).__name__}")
    return output
