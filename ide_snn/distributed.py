"""Several processes that train one model together, each on its share of every batch.

Started by `torchrun --nproc-per-node N ...`, which tells each process its rank. `Ranks()` is a process by itself: all
operations of this module then do nothing, so that one code serves both.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankError", "RankLostError", "Ranks", "Share", "environment_rank", "in_job", "local_rank", "process_group"]

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds


class RankError(RuntimeError):
    """The processes of a job are not in the same state; the message says what to do."""


class RankLostError(ConnectionError):
    """Another process of the job has ended, or did not answer in time."""


@dataclass(frozen=True)
class Share:
    """Samples first..end-1 of a batch of `total`."""

    first: int
    end: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Share:
        return cls(0, total, total)

    @property
    def size(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` of its job.

    Every method is a collective operation: all ranks have to call it, in the same order. What it returns is the same
    on all of them, bit for bit.

    Raises:
        RankLostError: from every method, if another rank has ended or does not answer within the time limit.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Of torch's default process group; a single rank where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """True for the rank that writes files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def share(self, total: int) -> Share:
        """The contiguous part of a batch that is this rank's; sizes differ by at most one. Not collective."""
        return Share(self.rank * total // self.count, (self.rank + 1) * total // self.count, total)

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, [count, *x.shape]; the shape of x is the same everywhere."""
        if self.is_alone:
            return x.unsqueeze(0)
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(self.count)]
        _collective(lambda: dist.all_gather(every, x))
        return torch.stack(every)

    def sum_(self, x: Tensor) -> Tensor:
        """Replaces the contiguous x by its sum over the ranks, and returns it."""
        if not self.is_alone:
            _collective(lambda: dist.all_reduce(x))
        return x

    def gather(self, value: T) -> list[T]:
        """Any small value of every rank. It is pickled, between the processes of this job only."""
        if self.is_alone:
            return [value]
        every: list[Any] = [None] * self.count
        _collective(lambda: dist.all_gather_object(every, value))
        return every

    def from_first(self, value: T) -> T:
        """The value of rank 0."""
        if self.is_alone:
            return value
        holder = [value]
        _collective(lambda: dist.broadcast_object_list(holder, src=0))
        return holder[0]

    def copy_from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors with those of rank 0."""
        if not self.is_alone:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                _collective(lambda values=values: dist.broadcast(values, src=0))  # type: ignore[misc]
                with torch.no_grad():
                    tensor.copy_(values)

    def largest(self, value: int) -> int:
        """The largest of a number; from and to the CPU, so that a GPU is not waited for."""
        if self.is_alone:
            return value
        number = torch.tensor(value)
        _collective(lambda: dist.all_reduce(number, dist.ReduceOp.MAX))
        return int(number)

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.largest(0)


def _collective(operation: Callable[[], object]) -> None:
    try:
        operation()
    except RuntimeError as error:
        raise RankLostError(
            "another process of this job has ended, or did not answer within trainer.process_timeout seconds; the "
            "messages of the other processes say why. Continue with the same command and resume=auto (by itself: "
            f"torchrun --max-restarts=1). [{str(error).splitlines()[0]}]"
        ) from error


def in_job() -> bool:
    """True where a launcher such as torchrun has started several processes that belong together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def environment_rank() -> int:
    """The rank that the launcher gave this process; 0 without one."""
    return int(os.environ.get("RANK", "0")) if in_job() else 0


def local_rank() -> int:
    """Number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if in_job() else 0


@contextmanager
def process_group(device: torch.device, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks of the job that a launcher has started this process in; `Ranks()` outside of one.

    A group that exists already is used and left. Tensors on the CPU travel by gloo, those on a GPU by nccl.

    Args:
        device: of this rank's model.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        RankLostError: not all processes came together in time.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks.current()
        return
    if not in_job():
        yield Ranks()
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    _collective(lambda: dist.init_process_group(backend, timeout=limit))
    yield Ranks.current()
    # not after an error: with a rank that has gone, leaving in order would wait for it
    dist.destroy_process_group()
