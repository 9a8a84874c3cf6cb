"""Which output positions an input position of a linear operator reaches, through which tap of the kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from ide_snn.operators import Operator


@dataclass(frozen=True)
class Reach:
    """Where the events at each input position go: target [taps, in_positions] is the output position or -1."""

    in_positions: int
    out_positions: int
    taps: int
    target: np.ndarray
    _of_samples: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, operator: Operator, input_shape: tuple[int, ...], *, adjoint: bool = False) -> Reach:
        """Of K, or of K^T, on inputs of K of `input_shape` [C, H, W] or [C]."""
        out_shape = operator.output_shape(input_shape)
        source, tap, target = _pairs(operator, input_shape[1:], out_shape[1:])
        sizes = int(np.prod(input_shape[1:], dtype=int)), int(np.prod(out_shape[1:], dtype=int))
        if adjoint:
            source, target, sizes = target, source, sizes[::-1]
        taps = operator.kernel_size[0] * operator.kernel_size[1]
        table = np.full((taps, sizes[0]), -1, dtype=np.int32)
        table[tap, source] = target  # for each tap and source there is one target
        return cls(*sizes, taps, table)

    def targets(self, samples: int) -> np.ndarray:
        """`target` of so many samples whose positions follow each other, [taps, samples * in_positions]."""
        if samples in self._of_samples:
            return self._of_samples[samples]
        before = self.out_positions * np.arange(samples, dtype=np.int32)[:, None]
        target = np.where(self.target[:, None] < 0, np.int32(-1), self.target[:, None] + before)
        return self._of_samples.setdefault(samples, target.reshape(self.taps, -1))


def _pairs(
    operator: Operator, input_size: tuple[int, ...], output_size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (input position, tap, output position) that K connects."""
    if operator.kind == "linear":
        zero = np.zeros(1, dtype=int)
        return zero, zero, zero
    # a transposed convolution leads where the convolution comes from
    near, far = (output_size, input_size) if operator.kind == "conv" else (input_size, output_size)
    y, x, ky, kx = np.indices((*near, *operator.kernel_size)).reshape(4, -1)
    fy = y * operator.stride[0] - operator.padding[0] + ky * operator.dilation[0]
    fx = x * operator.stride[1] - operator.padding[1] + kx * operator.dilation[1]
    inside = (fy >= 0) & (fy < far[0]) & (fx >= 0) & (fx < far[1])
    here, there = (y * near[1] + x)[inside], (fy * far[1] + fx)[inside]
    tap = (ky * operator.kernel_size[1] + kx)[inside]
    return (there, tap, here) if operator.kind == "conv" else (here, tap, there)
