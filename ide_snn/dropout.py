"""Variational dropout: one mask for all time steps of a forward.

    gain = mask / keep          keep = 1 - round(65536 p) / 65536, the probability of a 1 in the mask

A mask element is one 16-bit piece of a 64-bit random number compared with a threshold; p is therefore a multiple of
2^-16, and the gain is that of the probability really used. The numbers are a function of a key, of the sample b and of
the place j in the sample, two steps of SplitMix64 modulo 2^64,

    n(b, j) = mix(mix(key + (b + 1) G) + (j + 1) G)         G = 9e3779b97f4a7c15 (hexadecimal)

so that anybody can draw any part of a mask, on any device, with the same result (for the same layout in memory).
Source: G. Steele, D. Lea & C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ide_snn import memory
from ide_snn.distributed import Share
from ide_snn.native import Stage, is_plain, why_unavailable

__all__ = ["DropoutStream", "VariationalDropout"]

LEVELS = 1 << 16
PIECES = 4  # of a random number


class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once and then shared by all time steps of a forward.

    Called on a tensor it is ordinary dropout; `draw` gives the gain to reuse.
    Source: Gal & Ghahramani, NeurIPS 2016; Xiao et al., NeurIPS 2021, appendix on training details.

    Raises:
        ValueError: for p outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability must lie in [0, 1), got {p}")
        self.p = p
        self._source: tuple[DropoutStream, int] | None = None

    @property
    def keep(self) -> float:
        """Probability of a 1 in the mask, a multiple of 2^-16 above 0."""
        return (LEVELS - self._dropped) / LEVELS

    @property
    def _dropped(self) -> int:
        return min(round(self.p * LEVELS), LEVELS - 1)

    def draw(self, like: Tensor, generator: Generator | None = None, *, native: bool = False) -> Tensor | None:
        """Gain in {0, 1 / keep} of the shape [B, *], type, device and layout of `like`; None where it would be 1.

        Its key is drawn from `generator`, else it is that of the training run's `DropoutStream`, else drawn from
        torch's global generator. Elements are those of [C, H, W] in this order, of a channels-last sample [H, W, C].
        `native` allows a compiled kernel for float32 on a CPU, with the same result.

        Raises:
            ValueError: from a stream, if B is not what it serves.
        """
        if not self.training or self._dropped == 0:
            return None
        channels_last = like.dim() == 4 and not like.is_contiguous()
        channels_last = channels_last and like.is_contiguous(memory_format=torch.channels_last)
        like = like.detach().permute(0, 2, 3, 1) if channels_last else like.detach()
        key, first = self.place(len(like), like.device, generator)
        gain = memory.empty_like(like)
        if native and is_plain(gain) and why_unavailable("elementwise") is None:
            self.draw_stage(gain, int(key), first).run()
        else:
            size = math.prod(like.shape[1:])
            bits = random_bits(key, first, (len(like), -(-size // PIECES)), like.device)
            pieces = bits.reshape(-1).view(torch.int16).view(len(like), PIECES * bits.shape[1])
            mask = pieces[:, :size] >= self._least
            gain.copy_(mask.view(like.shape)).mul_(1 / self.keep)
        return gain.permute(0, 3, 1, 2) if channels_last else gain

    @property
    def drops(self) -> bool:
        """False where masks are all ones, in training too."""
        return self._dropped > 0

    @property
    def _least(self) -> int:
        """The smallest 16 bits that keep their element."""
        return self._dropped - LEVELS // 2

    def draw_stage(self, gain: Tensor, key: int = 0, first: int = 0) -> Stage:
        """The kernel that fills a contiguous float32 `gain` [B, *] on a CPU; `work` has key and first."""
        size = gain.numel() // max(len(gain), 1)
        work = _Gains(len(gain), size, 0, key, first, self._least, gain.data_ptr(), 1 / self.keep)
        return Stage("elementwise", "gains", work, gain.numel(), (gain,))

    def place(self, samples: int, device: torch.device, generator: Generator | None) -> tuple[int | Tensor, int]:
        """(key, number of the first sample) of the next mask."""
        if generator is None and self._source is not None:
            stream, index = self._source
            return stream.take(index, samples)
        # all 64 bits: random_() without bounds would leave the highest one 0
        key = torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        return (int(key) if device.type == "cpu" else key), 0

    def forward(self, x: Tensor) -> Tensor:
        gain = self.draw(x)
        return x if gain is None else x * gain

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # a copy of the module is not part of the training run


class DropoutStream:
    """Masks as a function of (seed, step, sample of the step), whoever draws them.

    Each dropout module has a key of its own, hash(seed, step, number of the module in the model). The samples of a step
    are numbered in order: those of the batches that are accumulated, and of each batch all, of which a rank has its
    share. So a sample gets the same mask with any number of processes and any division of the step into accumulated
    batches. A module that is called again in the same forward gets another key.

        with stream.serving(model):
            stream.begin(step)
            stream.serve(share)     # once for each batch of the step
            model(x)
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.seed = seed
        self._share: Share | None = None
        self._keys: list[int] = []
        self._calls: list[int] = []  # of each module in this forward
        self._batch = self._before = 0  # number of the batch in the step, and samples of those before it

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """While entered, dropout in `model` draws from here."""
        modules = [module for module in model.modules() if isinstance(module, VariationalDropout)]
        self._keys = [0] * len(modules)
        try:
            for index, module in enumerate(modules):
                module._source = self, index
            yield
        finally:
            for module in modules:
                module._source = None

    def begin(self, step: int) -> None:
        """Start the masks of a step."""
        # the 3 keeps this apart from what DeviceLoader draws from (seed, epoch)
        sequence = np.random.SeedSequence((self.seed, step, 3))
        self._keys = sequence.generate_state(len(self._keys), np.uint64).view(np.int64).tolist()
        self._share, self._batch, self._before = None, 0, 0

    def serve(self, share: Share) -> None:
        """The next forward has these samples of its batch."""
        if self._share is not None:
            self._batch, self._before = self._batch + 1, self._before + self._share.total
        self._share, self._calls = share, [0] * len(self._keys)

    def take(self, index: int, samples: int) -> tuple[int, int]:
        """(key, number of the first sample) for a mask of `samples` samples of module `index`."""
        share = self._share
        if share is None:
            raise RuntimeError("call begin and serve before the forward that draws masks")
        if samples != share.size and share.size != share.total:
            raise ValueError(
                f"dropout sees a batch of {samples}, but this process has {share.size} of {share.total} samples: with "
                "several processes the first dimension of what is dropped has to be that of the samples"
            )
        call, self._calls[index] = self._calls[index], self._calls[index] + 1
        if samples != share.size:  # of what is dropped the first dimension is not that of the samples
            return self._key(index, call, self._batch), 0
        return self._key(index, call, 0), self._before + share.first

    def _key(self, index: int, call: int, batch: int) -> int:
        if call == batch == 0:
            return self._keys[index]
        sequence = np.random.SeedSequence((self._keys[index] % 2**64, call, batch))
        return int(sequence.generate_state(1, np.uint64).view(np.int64)[0])


class _Gains(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "size", "next", "key", "first", "least")),
        ("gain", ctypes.c_void_p),
        ("kept", ctypes.c_double),
    ]


def random_bits(key: int | Tensor, first: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """n(b, j) for b = first, ..., j = 0, ...: int64 of `size` [B, n].

    Args:
        key: any 64 bits, as a signed number or an int64 tensor [] on `device`.
    """
    rows, columns = (torch.arange(1, n + 1, dtype=torch.int64, device=device) for n in size)
    samples = _mix((rows + first) * GAMMA + key)
    return _mix(samples[:, None] + columns * GAMMA)


def _mix(z: Tensor) -> Tensor:
    """The output function of SplitMix64, in place, of int64 as 64 bits without a sign."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # >> copies the sign, which the mask takes away
        z.bitwise_xor_((z >> shift) & ((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z


def _signed(bits: int) -> int:
    return bits - (bits >> 63 << 64)


GAMMA = _signed(0x9E3779B97F4A7C15)
