"""Products of fully connected layers in whole numbers (`csrc/integers.c`), for `precision=fast`.

A product of 16-bit numbers with 32-bit sums costs half of one in float32. Both factors are written as whole multiples
of units, one per sample of x and one per output of the matrix M,

    y_j = u u_j sum over p of k_p k_pj      x_p = u k_p,       u = max |x| / 4,095
                                            M_pj = u_j k_pj,  u_j = max(sum |M_pj| / (524,416 - n), max |M_pj| / 32,767)

for n inputs, rounded to nearest. No sum of any x exceeds 32 bits, so sums are exact, in any order and on any number of
threads. An x is moved by at most 1.2e-4 of the largest of its sample, a weight by at most n / 10^6 of its output's mean
|M_pj| or 1.5e-5 of the largest: so n is limited to 4,096.

The input stage and its gradient take them (`multiply`), and where the slopes leave zeros in x, which are skipped, the
products with J^T in solves of a loose tolerance and the gradients of a chain without batch norm (`rows_factor`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ide_snn import native
from ide_snn.native import Factor, Stage, Stages, pointer
from ide_snn.once import differentiable_once
from ide_snn.operators import Operator
from ide_snn.products import product_stage

TOGETHER = 256  # vectors whose whole numbers fit the second-level cache beside a block of the matrix,
FEW_TOGETHER = 32  # and with the places of those that are not 0 the first
SPARE = 7  # of csrc/vectors.h
MOST_SIZES = 4  # of products that are kept, two of each network: forwards and backwards
MOST_BYTES = 1 << 24  # of their memory
MOST_INPUTS = 4096  # whose units still leave more than two digits

_own = threading.local()


class _Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "blocks", "by_outputs", "apart")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "packed", "unit")),
        ("next", ctypes.c_int64),
    ]


class _Whole(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "unit", "scale")),
    ]


@functools.cache
def why_unavailable() -> str | None:
    """None where the kernels can be used, else the reason."""
    reason = next(filter(None, map(native.why_unavailable, ("integers", "product", "sequence"))), None)
    if reason is None and not native.library("integers").columns():
        reason = "the processor has no instructions for products of 16-bit numbers (AVX2)"
    return reason


def allowed(precision: str) -> bool:
    """True where event-driven paths of this precision may take them, and can."""
    return precision == "fast" and why_unavailable() is None


def suits(operator: Operator | None) -> bool:
    """True where `apply` can compute K x for x [B, inputs] in float32 on a CPU, with the kernels."""
    return operator is not None and operator.kind == "linear" and operator.in_channels <= MOST_INPUTS


class IntegerProduct:
    """The kernels of x M in whole numbers for x [B, inputs] and M [inputs, outputs], contiguous float32 on a CPU.

    Args:
        batch: B.
        by_outputs: M is given as its transpose [outputs, inputs].
        own_memory: with scratch memory of its own, to be run at any time.

    Attributes:
        stages: to be run one after the other, once they were told by `take` what to multiply.
    """

    def __init__(
        self, batch: int, inputs: int, outputs: int, *, by_outputs: bool = False, own_memory: bool = False
    ) -> None:
        packing = _packing(inputs, outputs, by_outputs=by_outputs)
        packed, unit = packing.keep
        whole, each = _Whole(inputs, outputs, packed.data_ptr(), unit.data_ptr(), None), 4 * -(-inputs // 2)
        factor = Factor("integers", "multiply", whole, (packed, unit), outputs, TOGETHER, scratch_each=each)
        self.stages = packing, product_stage(factor, batch, inputs, own_memory=own_memory)
        self.bytes = sum(t.nbytes for stage in self.stages for t in stage.keep if isinstance(t, Tensor))

    def take(self, x: Tensor, matrix: Tensor, y: Tensor) -> None:
        """Multiply x with the matrix into y [B, outputs] from now on; they must stay."""
        packing, multiplying = self.stages
        packing.work.weight = matrix.data_ptr()
        multiplying.work.x, multiplying.work.y = x.data_ptr(), y.data_ptr()


def _packing(inputs: int, outputs: int, *, by_outputs: bool = False, apart: bool = False) -> Stage:
    """The kernel that writes a matrix, whose address is still to be set, in whole numbers; `keep`: (they, units)."""
    columns = int(native.library("integers").columns())
    pairs, blocks = -(-inputs // 2), -(-outputs // columns)
    # whatever torch's defaults are
    packed = torch.empty(blocks, pairs, columns, dtype=torch.int32, device="cpu")
    unit = torch.empty(blocks * columns, dtype=torch.float32, device="cpu")
    work = _Pack(inputs, outputs, blocks, by_outputs, apart, None, None, packed.data_ptr(), unit.data_ptr(), 0)
    return Stage("integers", "pack", work, inputs * outputs, (packed, unit))


def noise(inputs: int) -> float:
    """||error of x M|| in units of ||x M||, or so: that of x, and that of M, whose units grow with the inputs."""
    return 4e-4 + 4e-7 * inputs


def rows_packing(matrix: Tensor) -> Stage:
    """The kernel that writes a contiguous M [inputs, outputs] in whole numbers for `rows_factor`, which has run once.

    At most MOST_INPUTS inputs. `work.scale` may be the address of a float32 that M is multiplied by.
    """
    assert len(matrix) <= MOST_INPUTS  # sums might overflow
    stage = _packing(*matrix.shape, apart=True)
    stage.work.weight = matrix.data_ptr()
    stage.run()
    return replace(stage, keep=(*stage.keep, matrix))


def rows_factor(packing: Stage, scale: Tensor | None) -> Factor:
    """x -> (scale * x) M of single vectors [inputs], skipping zeros, for the M of a `rows_packing`."""
    (packed, unit, matrix), scale = packing.keep, None if scale is None else scale.contiguous()
    inputs, outputs = matrix.shape
    pointers = packed.data_ptr(), unit.data_ptr(), pointer(scale)
    room = 4 * (inputs + 1 + SPARE)
    each, keep = room + 4 * -(-inputs // 2), (packed, unit, scale)
    work = _Whole(inputs, outputs, *pointers)
    return Factor("integers", "multiply_thin", work, keep, outputs, FEW_TOGETHER, room, each)


def multiply(x: Tensor, matrix: Tensor, *, by_outputs: bool = False) -> Tensor:
    """x M [B, outputs] for x [B, inputs] and `matrix` M [inputs, outputs] or, with `by_outputs`, M^T.

    At most MOST_INPUTS inputs.
    """
    x, matrix = x.contiguous().resolve_neg(), matrix.contiguous().resolve_neg()
    inputs, outputs = reversed(matrix.shape) if by_outputs else matrix.shape
    assert x.shape[1:] == (inputs,)  # the kernel would read past it
    assert inputs <= MOST_INPUTS  # its sums might overflow
    product, stages = _kept(len(x), inputs, outputs, by_outputs)
    y = x.new_empty(len(x), outputs)
    product.take(x, matrix, y)
    stages.run()
    return y


def _kept(batch: int, inputs: int, outputs: int, by_outputs: bool) -> tuple[IntegerProduct, Stages]:
    """Kernels of these sizes with their memory, which this thread keeps for the next step where it is not much."""
    kept: OrderedDict[tuple[int, ...], tuple[IntegerProduct, Stages]] = _own.__dict__.setdefault("kept", OrderedDict())
    sizes = (batch, inputs, outputs, by_outputs, torch.get_num_threads())
    found = kept.pop(sizes, None)
    if found is None:
        product = IntegerProduct(batch, inputs, outputs, by_outputs=by_outputs, own_memory=True)
        found = product, Stages(product.stages)
    room = MOST_BYTES - found[0].bytes
    while room >= 0 and kept and (len(kept) >= MOST_SIZES or sum(product.bytes for product, _ in kept.values()) > room):
        kept.popitem(last=False)
    if room >= 0:
        kept[sizes] = found
    return found


def apply(operator: Operator, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    """`operator.apply` of a linear operator, and its gradient in the weight, in whole numbers; differentiable once."""
    y: Tensor = _Linear.apply(x, weight)
    return y if bias is None else y.add_(bias)  # nobody else has it


class _Linear(torch.autograd.Function):
    """x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, by_outputs=True)

    @staticmethod
    @differentiable_once("products in whole numbers")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = grad.mm(weight) if ctx.needs_input_grad[0] else None
        to_weight = product_of_samples(grad.t(), x) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


def product_of_samples(d: Tensor, x: Tensor) -> Tensor:
    """d x [N, inputs] for d [N, B] and x [B, inputs], in whole numbers where the batch is not too large for them."""
    return multiply(d, x) if len(x) <= MOST_INPUTS else d.mm(x)
