"""Memory of large tensors on a CPU, handed from one step to the next.

A training step allocates the same large tensors as the step before. In the system's heap the small tensors between them
live longer and break up the room that they leave, so that the process grows to twice what is ever in use at once, by an
amount that differs from run to run; and what the heap gives back has to be mapped and cleared anew. So the large
tensors that kernels write to have blocks of their own. A block is used again, by a tensor of the same size, when
nothing refers to the one before: neither a view of it nor a graph.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections import deque
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
    memory = torch.from_numpy(_blocks.take(like.numel() * like.itemsize)).untyped_storage()
    # not a view, which autograd would refuse to overwrite in some places
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(memory, 0, like.shape, like.stride())


class Blocks:
    """Blocks of memory: in use by an array, or idle.

    Arrays may end in any thread at any moment, also while another is taken, when Python collects garbage. So what ends
    is only put in a queue, without a lock; the next `take` finds it there.

    Attributes:
        held: bytes of all blocks.
        used: bytes of those in use, when an array was taken last.
        most: the largest `used` so far.
    """

    def __init__(self) -> None:
        self.held = self.used = self.most = 0
        self._idle: dict[int, list[mmap.mmap]] = {}  # by size; the sizes that were asked for last come last
        self._ended: deque[tuple[int, mmap.mmap]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """An array of `size` bytes with any content."""
        with self._lock:
            self._collect()
            self.used += size
            self.most = max(self.most, self.used)
            idle = self._idle[size] = self._idle.pop(size, [])
            if idle:
                block = idle.pop()
            else:
                self._shrink(max(0, int(SPARE * self.most) - size))
                block = _map(size)
                self.held += size
        array = np.frombuffer(block, np.uint8)
        weakref.finalize(array, self._ended.append, (size, block)).atexit = False
        return array

    def release(self) -> None:
        """Unmaps the idle blocks; what was most in use counts from now on."""
        with self._lock:
            self._collect()
            self._shrink(0)
            self.most = self.used

    def _collect(self) -> None:
        """Makes the blocks idle whose arrays have ended."""
        for _ in range(len(self._ended)):  # others may be added meanwhile
            size, block = self._ended.popleft()
            self.used -= size
            self._idle.setdefault(size, []).append(block)

    def _shrink(self, most: int) -> None:
        """Unmaps idle blocks, of the sizes that were asked for the longest ago, until at most these bytes are held."""
        for size in tuple(self._idle):
            while self._idle[size] and self.held > most:
                self._idle[size].pop()
                self.held -= size
            if not self._idle[size]:
                del self._idle[size]


def _map(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process writes to its own


_blocks = Blocks()
