"""The time steps of a simulation on a GPU as one CUDA graph (`compile=true`): one launch instead of several per step.

The numbers are those of `simulate`, whose operations are captured when sizes and settings are first seen and replayed
from then on. Drive, weights, biases and gains are copied into the graph's own tensors before every replay.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ide_snn.graphs import GraphedCall
from ide_snn.layers import Affine
from ide_snn.neurons import NeuronParams
from ide_snn.simulation import FUSED_PATHS, Map, Path, Rates, Record, simulate

log = logging.getLogger(__name__)

MOST_GRAPHS = 4  # sizes of batches and other settings; each holds memory of its own


class GraphedSimulations:
    """The graphs of one block, by what they were captured for; the oldest leaves when there are too many.

    A copy or a pickle starts without any.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[object, ...], GraphedCall[tuple[Tensor, ...]]] = OrderedDict()
        self._said: str | None = None

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
        tensors = [t for link in maps for t in (link.weight, link.bias, link.gain) if t is not None]
        blanks = tuple(replace(link, weight=None, bias=None, gain=None) for link in maps)  # type: ignore[arg-type]
        present = tuple((link.bias is not None, link.gain is not None) for link in maps)
        wanted = Record(all_rates=record.all_rates, spike_fraction=record.spike_fraction)
        settings = (blanks, present, tuple(shapes), neuron, time_steps, wanted, path)
        key = (*settings, *((t.shape, t.stride(), t.dtype, t.device) for t in (drive, *tensors)))

        def steps(drive: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            first, *others = _filled(blanks, present, tensors)
            rates = simulate(drive, others, first, shapes, neuron, time_steps, wanted, path=path)
            return (rates.last, *rates.all, *rates.spike_fraction)

        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)[1].release()
            self._graphs[key] = GraphedCall(steps, max_graphs=1)
        # the graph's own memory is overwritten by its next replay
        last, *others = (result.clone() for result in self._graphs[key](drive, *tensors))
        count = len(shapes) if wanted.all_rates else 0
        return Rates(last, time_steps, path, all=tuple(others[:count]), spike_fraction=tuple(others[count:]))

    def _say(self, reason: str | None) -> None:
        message = "compile=True: the time steps are a CUDA graph"
        message = message if reason is None else f"compile=True: no effect ({reason})"
        if message != self._said:
            self._said = message
            log.log(logging.INFO if reason is None else logging.WARNING, message)

    def __reduce__(self) -> tuple[type[GraphedSimulations], tuple[()]]:
        return GraphedSimulations, ()


def _why_not(drive: object, is_known: bool, record: Record, path: Path) -> str | None:
    if path not in FUSED_PATHS:
        return "on a GPU it is for precision exact and fast with Triton"
    if not isinstance(drive, Tensor):
        return "the input has time"
    if not is_known:
        return "a connection is a module of your own"
    if record.spikes or record.membranes or record.on_step is not None:
        return "single time steps are recorded"
    return None


def _filled(blanks: Sequence[Affine], present: Sequence[tuple[bool, bool]], tensors: Sequence[Tensor]) -> list[Affine]:
    """The maps with these weights, biases and gains."""
    given = iter(tensors)
    return [
        replace(
            blank,
            weight=next(given),
            bias=next(given) if has_bias else None,
            gain=next(given) if has_gain else None,
        )
        for blank, (has_bias, has_gain) in zip(blanks, present, strict=True)
    ]
