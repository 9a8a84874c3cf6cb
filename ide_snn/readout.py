"""The linear layer behind a population, logits = W a + b, as kernels of a compiled step (`csrc/readout.c`).

Its products are small, a thousandth of a step's, so calling them takes longer than computing them. For rates a [B, N],
the weight W [O, N] and cotangents d [B, O] of the logits

    dL/da = d W        dL/dW = d^T a        dL/db = sum over the samples of d

Float32 on a CPU.
"""

from __future__ import annotations

import ctypes

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ide_snn.native import Stage, is_plain, pointer
from ide_snn.torch_modules import owns, runs_as_torch_wrote_it

MOST_OUTPUTS = 64  # of which the kernels make light; a library's products suit more


class _Dots(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "inputs", "outputs", "next")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
    ]


class _Combine(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "terms", "columns", "next", "by_row", "by_term")),
        *((name, ctypes.c_void_p) for name in ("factor", "x", "y", "sums")),
    ]


def suits(linear: nn.Module, features: int) -> bool:
    """True where calling `linear` on rates of a population of so many neurons is what the kernels do."""
    return (
        isinstance(linear, nn.Linear)
        and not parametrize.is_parametrized(linear)
        and runs_as_torch_wrote_it(linear)
        and owns(linear, "weight", "bias")
        and len(linear.weight) <= MOST_OUTPUTS
        and linear.weight.shape[1] == features
        and (linear.bias is None or linear.bias.shape == linear.weight.shape[:1])  # torch would spread a single number
        and all(map(is_plain, linear.parameters()))
    )


class Readout:
    """The kernels for rates [B, N] that lie at one place, with a weight [O, N] and bias [O].

    Attributes:
        outputs: O.
        forward_stage: computes the logits, once `take` has said where to.
        backward_stages: compute `to_rates` [B, N] and the cotangents of the weight and the bias, once `pull` has said
            of what.
    """

    def __init__(self, rates: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        (samples, inputs), outputs = rates.shape, len(weight)
        assert weight.shape == (outputs, inputs)  # the kernels would read past it
        self.outputs = outputs
        self.to_rates = rates.new_empty(samples, inputs)
        pointers = rates.data_ptr(), weight.data_ptr(), pointer(bias), None
        elements, keep = rates.numel() + weight.numel(), (rates, weight, bias, self.to_rates)
        dots = _Dots(samples, inputs, outputs, 0, *pointers)
        of_rates = (samples, outputs, inputs, 0, outputs, 1), (None, weight.data_ptr(), self.to_rates.data_ptr(), None)
        of_weight = (outputs, samples, inputs, 0, 1, outputs), (None, rates.data_ptr(), None, None)
        self.forward_stage = Stage("readout", "dots", dots, elements, keep)
        self.backward_stages = tuple(
            Stage("readout", "combine", _Combine(*sizes, *places), elements, keep)
            for sizes, places in (of_rates, of_weight)
        )

    def take(self, logits: Tensor) -> None:
        """Write to these [B, O] from now on."""
        self.forward_stage.work.y = logits.data_ptr()

    def pull(self, cotangent: Tensor, to_weight: Tensor, to_bias: Tensor | None) -> None:
        """From contiguous cotangents of the logits [B, O], to those of the weight and the bias, from now on."""
        of_rates, of_weight = (stage.work for stage in self.backward_stages)
        of_rates.factor = of_weight.factor = cotangent.data_ptr()
        of_weight.y, of_weight.sums = to_weight.data_ptr(), pointer(to_bias)
