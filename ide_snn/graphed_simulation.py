"""The time steps of a simulation on a GPU as one CUDA graph (`compile=true`): one launch instead of several per step.

The numbers are those of `simulate`, whose operations are captured when sizes and settings are first seen and replayed
from then on. Drive, weights, biases and gains are copied into the graph's own tensors before every replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ide_snn.graphs import Graphs
from ide_snn.layers import Affine
from ide_snn.neurons import NeuronParams
from ide_snn.record import Path, Rates, Record
from ide_snn.say_once import SayOnce
from ide_snn.simulation import FUSED_PATHS, Map, simulate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blanks:
    """Maps without their tensors, which a graph reads from memory of its own."""

    maps: tuple[Affine, ...]
    present: tuple[tuple[bool, bool], ...]  # bias, gain

    @classmethod
    def of(cls, maps: Sequence[Affine]) -> tuple[Blanks, list[Tensor]]:
        """(the maps without tensors, their tensors)."""
        tensors = [t for link in maps for t in (link.weight, link.bias, link.gain) if t is not None]
        blanks = tuple(replace(link, weight=None, bias=None, gain=None) for link in maps)  # type: ignore[arg-type]
        return cls(blanks, tuple((link.bias is not None, link.gain is not None) for link in maps)), tensors

    def filled(self, tensors: Sequence[Tensor]) -> list[Affine]:
        """The maps with these tensors."""
        given = iter(tensors)
        return [
            replace(
                blank,
                weight=next(given),
                bias=next(given) if has_bias else None,
                gain=next(given) if has_gain else None,
            )
            for blank, (has_bias, has_gain) in zip(self.maps, self.present, strict=True)
        ]


class GraphedSimulations:
    """The graphs of one block. A copy or a pickle starts without any."""

    def __init__(self) -> None:
        self.graphs = Graphs("the time steps")
        self.say_once = SayOnce(log)

    def __call__(
        self,
        drive: Tensor | Callable[[int], Tensor],
        layers: Sequence[Map],
        feedback: Map,
        shapes: Sequence[tuple[int, ...]],
        neuron: NeuronParams,
        time_steps: int,
        record: Record,
        path: Path,
    ) -> Rates | None:
        """`simulate` with these arguments; None where it cannot be captured, which the log says."""
        maps = [link for link in (feedback, *layers) if isinstance(link, Affine)]
        reason = _why_not(drive, len(maps) == 1 + len(layers), record, path)
        self._say(reason)
        if reason is not None or not isinstance(drive, Tensor):
            return None
        blanks, tensors = Blanks.of(maps)
        wanted = Record(all_rates=record.all_rates, spike_fraction=record.spike_fraction)

        def steps(drive: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            first, *others = blanks.filled(tensors)
            rates = simulate(drive, others, first, shapes, neuron, time_steps, wanted, path=path)
            return (rates.last, *rates.all, *rates.spike_fraction)

        purpose = (blanks, tuple(shapes), neuron, time_steps, wanted, path)
        last, *others = self.graphs(purpose, steps, drive, *tensors)
        count = len(shapes) if wanted.all_rates else 0
        return Rates(last, time_steps, path, all=tuple(others[:count]), spike_fraction=tuple(others[count:]))

    def _say(self, reason: str | None) -> None:
        what = "the time steps are a CUDA graph" if reason is None else f"no effect ({reason})"
        self.say_once(f"compile=True: {what}", warn=reason is not None)

    def __reduce__(self) -> tuple[type[GraphedSimulations], tuple[()]]:
        return GraphedSimulations, ()


def _why_not(drive: object, is_known: bool, record: Record, path: Path) -> str | None:
    if path not in FUSED_PATHS:
        return "on a GPU it is for precision exact and fast with Triton"
    if not isinstance(drive, Tensor):
        return "the input has time"
    if not is_known:
        return "a connection is a module of your own"
    if record.spikes or record.membranes or record.on_step is not None or record.stop is not None:
        return "single time steps are recorded"
    return None
