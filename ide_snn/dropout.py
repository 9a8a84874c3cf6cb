"""Variational dropout: one mask for all time steps of a forward.

    gain = mask / keep          keep = 1 - round(65536 p) / 65536, the probability of a 1 in the mask

A mask element is one 16-bit piece of a 64-bit random number compared with a threshold, which takes a tenth of the time
of `bernoulli_`; p is therefore a multiple of 2^-16, and the gain is that of the probability really used.
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

from ide_snn.distributed import Share
from ide_snn.native import library, on_all_threads, why_unavailable

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

        It is drawn from `generator`, else from the stream of a training run (`DropoutStream`), else from torch's
        global one. Elements are drawn sample by sample, a channels-last sample [H, W, C] in its order in memory.
        `native` allows a compiled kernel for float32 on a CPU, with the same result.

        Raises:
            ValueError: from a stream, if B is not what it serves.
        """
        if not self.training or self._dropped == 0:
            return None
        channels_last = like.dim() == 4 and not like.is_contiguous()
        channels_last = channels_last and like.is_contiguous(memory_format=torch.channels_last)
        like = like.detach().permute(0, 2, 3, 1) if channels_last else like.detach()
        size = math.prod(like.shape[1:])
        numbers = (len(like), -(-size // PIECES))
        if generator is None and self._source is not None:
            stream, index = self._source
            bits = stream.draw(index, numbers, like.device)
        else:
            bits = _random(numbers, like.device, generator)
        gain, first = torch.empty_like(like), self._dropped - LEVELS // 2  # the first number that keeps its element
        if native and _is_plain(gain) and why_unavailable("elementwise") is None:
            _fill(gain, bits, size, first, 1 / self.keep)
        else:
            mask = bits.view(torch.int16)[:, :size] >= first
            gain.copy_(mask.view(like.shape)).mul_(1 / self.keep)
        return gain.permute(0, 3, 1, 2) if channels_last else gain

    def forward(self, x: Tensor) -> Tensor:
        gain = self.draw(x)
        return x if gain is None else x * gain

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # a copy of the module is not part of the training run


class DropoutStream:
    """Masks as a function of (seed, step, sample of the step's batch), whoever draws them.

    Each dropout module has a generator of its own, started anew in every step from hash(seed, step, number of the
    module in the model). It serves the samples of the step in order: those of the batches that are accumulated, and of
    each batch all, of which a rank takes its share. So a sample gets the same mask with any number of processes, and on
    the CPU with any division of the step into accumulated batches. (On a GPU, whose generators give other numbers to a
    tensor of another size, the division matters.)

    To draw the whole batch costs less than to find the own part of it: a CPU's generator cannot jump, and a mask takes
    a few 1/1000 of the products that it goes with (docs/scaling.md).

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
        self._seeds: list[int] = []
        self._begun: dict[int, Generator] = {}
        self._generators: dict[int, Generator] = {}

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """While entered, dropout in `model` draws from here."""
        modules = [module for module in model.modules() if isinstance(module, VariationalDropout)]
        self._seeds = [0] * len(modules)
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
        self._seeds = sequence.generate_state(len(self._seeds), np.uint64).tolist() if self._seeds else []
        self._begun = {}

    def serve(self, share: Share) -> None:
        """The next forward has these samples of its batch."""
        self._share = share

    def draw(self, index: int, size: tuple[int, int], device: torch.device) -> Tensor:
        """Random numbers, int64 [B, n] for size (B, n), of module `index`."""
        share = self._share
        if share is None:
            raise RuntimeError("call begin and serve before the forward that draws masks")
        rows, each = size
        if rows != share.size and share.size != share.total:
            raise ValueError(
                f"dropout sees a batch of {rows}, but this process has {share.size} of {share.total} samples: with "
                "several processes the first dimension of what is dropped has to be that of the samples"
            )
        total = share.total if rows == share.size else rows
        bits = _random((total, each), device, self._generator(index, device))
        return bits[share.first : share.end] if rows == share.size else bits

    def _generator(self, index: int, device: torch.device) -> Generator:
        if index not in self._begun:
            generator = self._generators.get(index)
            if generator is None or generator.device != device:
                generator = self._generators[index] = Generator(device)
            self._begun[index] = generator.manual_seed(self._seeds[index])
        return self._begun[index]


class _Gains(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "size", "stride", "next")),
        *((name, ctypes.c_void_p) for name in ("bits", "gain")),
        ("first", ctypes.c_int64),
        ("kept", ctypes.c_double),
    ]


def _is_plain(gain: Tensor) -> bool:
    """True for what the compiled kernel can fill."""
    return gain.is_contiguous() and gain.dtype == torch.float32 and gain.device.type == "cpu"


def _fill(gain: Tensor, bits: Tensor, size: int, first: int, kept: float) -> None:
    """gain [B, *] of `size` elements each = kept where the 16-bit number in `bits` [B, n] is >= first, else 0."""
    stride = bits.stride(0) * PIECES
    work = _Gains(len(gain), size, stride, 0, bits.data_ptr(), gain.data_ptr(), first, kept)
    on_all_threads(library("elementwise").gains, work, gain.numel())


def _random(size: tuple[int, int], device: torch.device, generator: Generator | None) -> Tensor:
    """int64 of all 64 bits; random_() without bounds would leave the highest one 0."""
    return torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
