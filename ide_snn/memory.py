"""Memory of large tensors on a CPU, handed from one step to the next.

A training step allocates the same large tensors as the step before. In the system's heap the small tensors between them
live longer and break up the room that they leave, so that the process grows to twice what is ever in use at once, by an
amount that differs from run to run; and what the heap gives back has to be mapped and cleared anew. So the large
tensors that kernels write to have blocks of their own. A block is used again, by a tensor of the same size, when
nothing refers to the one before: neither a view of it nor a graph.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST = 1 << 20  # bytes; smaller tensors are in the heap
SPARE = 1.5  # all blocks are at most so many times as large as those that were in use at once


def empty(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """`torch.empty`, on a CPU in a block where it is large; such a tensor cannot be resized."""
    if _is_large(math.prod(shape) * dtype.itemsize, device):
        return _in_a_block(torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=layout))
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like`, as `empty`."""
    is_large = _is_large(x.numel() * x.itemsize, x.device)
    return _in_a_block(torch.empty_like(x, device="meta")) if is_large else torch.empty_like(x)


def clone(x: Tensor) -> Tensor:
    """`x.clone()`, as `empty`."""
    return empty_like(x).copy_(x)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y of tensors of one shape and type without a graph, as `empty`."""
    return torch.mul(x, y, out=empty_like(x))


def release() -> None:
    """Gives the blocks that no tensor uses back to the system."""
    _blocks.release()


def _is_large(size: int, device: torch.device) -> bool:
    return size >= LEAST and device.type == "cpu"


def _in_a_block(like: Tensor) -> Tensor:
    """A tensor with the shape, type and strides of `like`, which is dense."""
    try:
        memory = torch.from_numpy(_blocks.take(like.numel() * like.itemsize)).untyped_storage()
    except MemoryError:  # the system has none left: torch finds some, or raises what its users know
        release()
        return torch.empty_like(like, device="cpu")
    # not a view, which autograd would refuse to overwrite in some places
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(memory, 0, like.shape, like.stride())


class _Lease(weakref.ref[NDArray[np.uint8]]):
    """That an array has a block, as long as it lives."""

    block: mmap.mmap


class Blocks:
    """Blocks of memory: leased to an array, or idle.

    Arrays may end in any thread at any moment. No code runs then: it could swallow the KeyboardInterrupt of a Ctrl-C.
    The next `take` looks which have. Bytes are counted anew each time, for an interrupt between two counts would spoil
    them, and in copies: a signal's handler, or a destructor, may take a block while another is taken.

    Attributes:
        most: the largest `used` since the last `release`.
    """

    def __init__(self) -> None:
        self.most = 0
        self._leases: dict[int, _Lease] = {}  # by their id: an array has no hash, nor have references to it
        self._idle: dict[int, list[mmap.mmap]] = {}  # by size; the sizes that were asked for last come last
        self.unlock()

    def unlock(self) -> None:
        """For a forked process: the thread that holds the lock may not be in it."""
        self._lock = threading.RLock()

    @property
    def used(self) -> int:
        """Bytes of the blocks of arrays that live."""
        return sum(len(lease.block) for lease in self._leases.copy().values() if lease() is not None)

    @property
    def held(self) -> int:
        """Bytes of all blocks."""
        leased = sum(len(lease.block) for lease in self._leases.copy().values())
        return leased + sum(size * len(idle) for size, idle in self._idle.copy().items())

    def take(self, size: int) -> NDArray[np.uint8]:
        """An array of `size` bytes with any content.

        Raises:
            MemoryError: if the system has none left.
        """
        with self._lock:
            self._collect()
            self.most = max(self.most, self.used + size)
            idle = self._idle[size] = self._idle.pop(size, [])
            block = _popped(idle)
            if block is None:
                self._shrink(int(SPARE * self.most) - size)
                block = _map(size)
            array = np.frombuffer(block, np.uint8)
            lease = _Lease(array)
            lease.block = block
            self._leases[id(lease)] = lease
        return array

    def release(self) -> None:
        """Unmaps the idle blocks; what was most in use counts from now on."""
        with self._lock:
            self._collect()
            self._idle.clear()
            self.most = self.used

    def _collect(self) -> None:
        """Makes the blocks idle whose arrays have ended."""
        for key, lease in self._leases.copy().items():
            if lease() is None and self._leases.pop(key, None) is not None:
                self._idle.setdefault(len(lease.block), []).append(lease.block)

    def _shrink(self, most: int) -> None:
        """Unmaps idle blocks, of the sizes that were asked for the longest ago, until at most these bytes are held."""
        for size, idle in self._idle.copy().items():
            while self.held > most and _popped(idle) is not None:
                if not idle:  # others of the size may be in use: when they end it counts as asked for then
                    self._idle.pop(size, None)


def _popped(some: list[mmap.mmap]) -> mmap.mmap | None:
    """The last of them, if there is one: a signal's handler may come between a look and a pop."""
    try:
        return some.pop()
    except IndexError:
        return None


def _map(size: int) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, size)
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process writes to its own
    except OSError as error:
        if error.errno != errno.ENOMEM:  # such as the TimeoutError of a signal's handler
            raise
        raise MemoryError(f"no {size} bytes") from error


_blocks = Blocks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _blocks.unlock())
