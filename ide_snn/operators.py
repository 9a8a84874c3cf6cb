"""The three known linear operators (linear, convolution, transposed convolution) and their adjoints.

An operator is the geometry of a torch module without its numbers: the same object applies K(W) x and
K(W)^T y for any weight W, so that constraints, simulation and solver need no copy of the module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

Pair = tuple[int, int]
FEW_INPUTS = 32
KNOWN_MODULES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Operator:
    """Geometry of `nn.Linear`, `nn.Conv2d` or `nn.ConvTranspose2d`; weights in the modules' own layouts."""

    kind: str  # "linear" | "conv" | "conv_transposed"
    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    output_padding: Pair = (0, 0)
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Operator:
        """Reads the geometry off a module.

        Raises:
            TypeError: for a module that is none of the three.
            ValueError: for a padding given as text or a padding mode other than zeros.
        """
        if isinstance(module, nn.Linear):
            return cls("linear", module.in_features, module.out_features)
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            names = ", ".join(m.__name__ for m in KNOWN_MODULES)
            raise TypeError(f"not a known linear operator: {type(module).__name__}; known are {names}")
        if isinstance(module.padding, str):
            raise ValueError(f"padding={module.padding!r} is not supported: give the padding as numbers")
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode={module.padding_mode!r} is not supported: use 'zeros'")
        transposed = isinstance(module, nn.ConvTranspose2d)
        return cls(
            kind="conv_transposed" if transposed else "conv",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            dilation=_pair(module.dilation),
            output_padding=_pair(module.output_padding) if transposed else (0, 0),
            groups=module.groups,
        )

    @property
    def output_dim_of_weight(self) -> int:
        """The dimension of the weight that runs over output channels: 1 for a transposed convolution."""
        return 1 if self.kind == "conv_transposed" else 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.kind == "linear":
            return self.out_channels, self.in_channels
        sizes = self.out_channels, self.in_channels
        first, second = sizes[::-1] if self.kind == "conv_transposed" else sizes
        return first, second // self.groups, *self.kernel_size

    def require_sizes(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises ValueError for tensors of other sizes, which kernels would read or write past."""
        if weight.shape != self.weight_shape:
            raise ValueError(
                f"the weight has the shape {list(weight.shape)}, its module says {list(self.weight_shape)}"
            )
        if bias is not None and bias.shape != (self.out_channels,):
            raise ValueError(f"the bias has the shape {list(bias.shape)}, its module says [{self.out_channels}]")

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """K(W) x + bias for x of shape [B, C, H, W] ([B, C] for linear)."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "conv":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv_transpose2d(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    @property
    def suits_onednn(self) -> bool:
        """True for convolutions that torch leaves to oneDNN; its own sum the products of bfloat16 in bfloat16."""
        is_padded = any(p >= s for p, s in zip(self.output_padding, self.stride, strict=True))
        return self.kind != "linear" and not (self.kind == "conv_transposed" and is_padded)

    @property
    def has_few_inputs(self) -> bool:
        """True for convolutions of so few numbers per output that `apply_by_columns` pays on a CPU."""
        return self.kind == "conv" and self.groups == 1 and self.in_channels * math.prod(self.kernel_size) <= FEW_INPUTS

    def apply_by_columns(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`apply` of a convolution as one matrix product, in channels-last memory."""
        columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)  # [B, C kh kw, positions]
        y = F.linear(columns.transpose(1, 2), weight.flatten(1), bias)
        height, width = (self._extent(n, d) for d, n in enumerate(x.shape[2:]))
        return y.view(len(x), height, width, self.out_channels).permute(0, 3, 1, 2)

    def adjoint(self, y: Tensor, weight: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        """K(W)^T y for y of the output's shape; `input_shape` is [C, H, W] without the batch ([C] for linear)."""
        if self.kind == "linear":
            return y.mm(weight) if y.dim() == 2 else F.linear(y, weight.t())
        if self.kind == "conv_transposed":
            x = F.conv2d(y, weight, None, self.stride, self.padding, self.dilation, self.groups)
            # an output_padding >= stride (allowed below the dilation) makes room for more than the input had
            return x[..., : input_shape[1], : input_shape[2]]
        size = (y.shape[0], *input_shape)
        return conv2d_input(size, weight, y, self.stride, self.padding, self.dilation, self.groups)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the response to an input of shape [C, H, W] ([C] for linear), both without the batch.

        Raises:
            ValueError: if the operator cannot take such an input.
        """
        if self.kind == "linear":
            if shape != (self.in_channels,):
                raise ValueError(f"linear connection expects [{self.in_channels}] features, got {list(shape)}")
            return (self.out_channels,)
        if len(shape) != 3 or shape[0] != self.in_channels:
            raise ValueError(f"convolution expects [{self.in_channels}, H, W], got {list(shape)}")
        size = tuple(self._extent(n, d) for d, n in enumerate(shape[1:]))
        if min(size) < 1:
            raise ValueError(f"an input of {list(shape)} is too small for kernel size {self.kernel_size}")
        return (self.out_channels, *size)

    def _extent(self, n: int, d: int) -> int:
        reach = self.dilation[d] * (self.kernel_size[d] - 1)
        if self.kind == "conv":
            return (n + 2 * self.padding[d] - reach - 1) // self.stride[d] + 1
        return (n - 1) * self.stride[d] - 2 * self.padding[d] + reach + self.output_padding[d] + 1

    def per_output(self, vector: Tensor) -> Tensor:
        """A vector over output channels, shaped to multiply the weight."""
        if self.kind == "linear":
            return vector[:, None]
        if self.kind == "conv":
            return vector[:, None, None, None]
        if self.groups != 1:
            raise ValueError("batch norm behind a grouped transposed convolution is not supported: use groups=1")
        return vector[None, :, None, None]


def _pair(value: object) -> Pair:
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, tuple) and len(value) == 2:
        return (int(value[0]), int(value[1]))
    raise ValueError(f"expected a number or a pair of numbers, got {value!r}")
