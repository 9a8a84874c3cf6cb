"""A function of tensors captured once as a CUDA graph and replayed: one launch instead of hundreds."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_own = threading.local()

Result = TypeVar("Result")  # a tensor, or a tuple of them


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # static: the graph reads these addresses
    outputs: Any  # static: the graph writes these


class GraphedCall(Generic[Result]):
    """`fn` of CUDA tensors, as a graph per combination of the tensors' shapes, strides, types and devices.

    The first call with a new combination runs `fn` `warm_up` times on a side stream (libraries choose algorithms and
    workspaces then), captures it, and replays it; later calls copy the tensors into the graph's inputs and replay.
    No gradient is recorded.

    What `fn` must be:

    - without synchronisation with the host: no `.item()`, `.cpu()`, `bool(tensor)`, nor a shape that depends on values;
    - a function of its tensors alone: it runs several times at capture and its Python code never again, so it must
      not count, log, or change tensors beside its result. Tensors it takes from elsewhere (weights) are read at the
      addresses they had at capture: change them in place only, and keep them alive;
    - free of random numbers, except those of CUDA's default generator.

    Args:
        fn: returns a tensor or a tuple of tensors.
        warm_up: runs before the capture, at least 1.
        max_graphs: combinations to keep; each holds its own memory.

    The owner of this object owns the graphs: they live until `release`, or as long as the object. A copy or a
    pickle starts without graphs.

    Raises:
        RuntimeError: where torch sees no CUDA device.
        ValueError: for numbers below 1.
    """

    def __init__(self, fn: Callable[..., Result], *, warm_up: int = 3, max_graphs: int = 8) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA graphs need a CUDA device, and torch sees none: call the function itself")
        if warm_up < 1 or max_graphs < 1:
            raise ValueError(f"warm_up and max_graphs must be at least 1, got {warm_up} and {max_graphs}")
        self.fn, self.warm_up, self.max_graphs = fn, warm_up, max_graphs
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def __call__(self, *tensors: Tensor) -> Result:
        """fn(*tensors). The result lies in the graph's memory: the next call of the same combination overwrites it.

        Raises:
            ValueError: without tensors, or for tensors that are not on one CUDA device.
            RuntimeError: for more than `max_graphs` combinations, or where `fn` cannot be captured.
        """
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(tensors)
        with torch.cuda.device(captured.inputs[0].device):
            for static, x in zip(captured.inputs, tensors, strict=True):
                static.copy_(x.detach())
            captured.graph.replay()
        return captured.outputs

    @property
    def graphs(self) -> int:
        """Number of graphs held."""
        return len(self._captured)

    def release(self) -> None:
        """Waits for the device and frees all graphs with their memory; results of earlier calls become invalid."""
        if self._captured:
            torch.cuda.synchronize()
            for captured in self._captured.values():
                captured.graph.reset()
            self._captured.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": {}}

    def _capture(self, tensors: tuple[Tensor, ...]) -> _Captured:
        devices = {x.device for x in tensors}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices))) or "no tensors"
            raise ValueError(f"a graph needs tensors on one CUDA device, got {found}")
        if len(self._captured) >= self.max_graphs:
            raise RuntimeError(
                f"{len(self._captured)} graphs are held and another combination of shapes came: keep shapes fixed "
                "(drop the last partial batch), raise max_graphs, or release()"
            )
        with torch.cuda.device(next(iter(devices))):
            return self._record(tensors)

    @torch.inference_mode(False)  # the graph's memory serves training, too
    @torch.no_grad()
    def _record(self, tensors: tuple[Tensor, ...]) -> _Captured:
        inputs = tuple(x.detach().clone() for x in tensors)
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(self.warm_up):
                self.fn(*inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those of a process group, may use the device meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = self.fn(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves the other one
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"the function cannot be captured as a CUDA graph ({error}): it must not synchronise with the host "
                "nor allocate outside torch, see GraphedCall"
            ) from error
        return _Captured(graph, inputs, outputs)


def _side_stream(device: int) -> torch.cuda.Stream:
    """For captures of this thread; one, since cuBLAS keeps a workspace for every stream."""
    streams: dict[int, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


class Graphs:
    """Functions captured for one purpose each, such as a size of batch; of too many the one not used longest leaves.

    A copy or a pickle starts without any.

    Args:
        name: of what is captured, for the log.
        most: graphs to keep; each holds memory of its own.
    """

    def __init__(self, name: str, most: int = 4) -> None:
        self.name, self.most = name, most
        self._held: OrderedDict[tuple[Hashable, ...], GraphedCall[tuple[Tensor, ...]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __call__(
        self, purpose: Hashable, fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """fn(*tensors), captured where the purpose or the kind of tensors is new; `fn` is as `GraphedCall` wants it."""
        key = (purpose, *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if key not in self._held:
            if len(self._held) >= self.most:
                self._held.popitem(last=False)[1].release()
            log.info("%s: captured as a CUDA graph", self.name)
            self._held[key] = GraphedCall(fn, max_graphs=1)
        self._held.move_to_end(key)
        # the graph's own memory is overwritten by its next replay
        return tuple(result.clone() for result in self._held[key](*tensors))

    def __reduce__(self) -> tuple[type[Graphs], tuple[str, int]]:
        return Graphs, (self.name, self.most)
