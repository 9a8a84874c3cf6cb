"""Ways to compute one linear product: by format of the numbers, memory layout and library call.

A way packs the weight and converts the input once (`prepare`) and gives a function that does the product alone.
Formats:

    float32   tf32 (CUDA)   bfloat16   float16 (CUDA)
    int8             spikes as uint8 times 8-bit weights, 32-bit sums, float32 result
    int8x2           16-bit weights as two 8-bit planes hi, lo: one product of [255 s | s] with [hi | lo], or two
                     (without VNNI instructions, pairs of 255 * hi do not fit the 16 bits of their sum)
    int8 to 8 bits   as int8, but the result is rounded to 8 bits (what fbgemm offers)
    events           float32, the zeros of the input skipped; counted as if they were not
    events16         the same for spikes, weights in 16-bit units, 16-bit sums
    whole numbers    both factors in 16 bits, 32-bit sums, float32 result

The int8 operators of torch are not a public interface: a build without them raises, and the caller says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ide_snn import event_driven, integers, native
from ide_snn.dense import DenseMap
from ide_snn.layers import Affine
from ide_snn.operators import Operator

Call = Callable[[], Tensor]
Prepare = Callable[[Operator, Tensor, Tensor, "Tensor | None"], Call]
CL = torch.channels_last
NONE: tuple[str, list[float], str] = ("none", [], "")  # no operation fused behind the product
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # elsewhere it is emulated


@dataclass(frozen=True)
class Way:
    """One way; `kinds` of operators and `roles` it is for, `needs` one of these processor flags."""

    name: str
    format: str
    prepare: Prepare
    kinds: tuple[str, ...] = ("linear", "conv", "conv_transposed")
    gradient: bool = False
    device: str = "any"
    needs: tuple[str, ...] = ()

    def fits(self, operator: Operator, role: str, x: Tensor, flags: Sequence[str]) -> bool:
        return (
            operator.kind in self.kinds
            and self.gradient == (role == "gradient")
            and self.device in ("any", x.device.type)
            and (not self.needs or x.device.type == "cuda" or any(flag in flags for flag in self.needs))
        )


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=CL) if channels_last and x.dim() == 4 else x.contiguous()


def plain(dtype: torch.dtype, channels_last: bool = False, tf32: bool = False) -> Prepare:
    """torch's own functions."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
        w, z = _layout(weight.to(dtype), channels_last), _layout(x.to(dtype), channels_last)
        return _on_gpu(lambda: operator.apply(z, w), z, tf32)

    return prepare


def gradient(dtype: torch.dtype, channels_last: bool = False, flip: bool = False, tf32: bool = False) -> Prepare:
    """dL/dW for input x and output gradient y; `flip` computes the transposed matrix of a linear operator."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, y: Tensor | None) -> Call:
        assert y is not None
        a, g = _layout(x.to(dtype), channels_last), _layout(y.to(dtype), channels_last)
        if operator.kind == "linear":
            return _on_gpu((lambda: (a.t() @ g).t()) if flip else (lambda: g.t() @ a), a, tf32)
        return _on_gpu(_convolution_gradient(operator, _layout(weight.to(dtype), channels_last), a, g), a, tf32)

    return prepare


def _convolution_gradient(operator: Operator, w: Tensor, x: Tensor, g: Tensor) -> Call:
    o, is_transposed = operator, operator.kind == "conv_transposed"
    geometry = (o.stride, o.padding, o.dilation, is_transposed, o.output_padding, o.groups)
    wanted = [False, True, False]
    return lambda: torch.ops.aten.convolution_backward(g, x, w, None, *geometry, wanted)[1]


def _as_convolution(operator: Operator, weight: Tensor, x: Tensor) -> tuple[Operator, Tensor, Tensor]:
    """A linear operator as a 1x1 convolution, which is another library call."""
    conv = Operator("conv", operator.in_channels, operator.out_channels)
    return conv, weight[:, :, None, None], x[:, :, None, None]


def gradient_as_convolution(operator: Operator, weight: Tensor, x: Tensor, y: Tensor | None) -> Call:
    assert y is not None
    conv, w, z = _as_convolution(operator, weight, x)
    return _convolution_gradient(conv, _layout(w, True), _layout(z, True), _layout(y[:, :, None, None], True))


def gradient_as_product(operator: Operator, _weight: Tensor, x: Tensor, y: Tensor | None) -> Call:  # noqa: ARG001
    """oneDNN's linear product of y^T and x^T; both are laid out anew in each call, as a step has to."""
    assert y is not None
    a, g = x.contiguous(), y.contiguous()
    return lambda: torch.ops.mkldnn._linear_pointwise(g.t().contiguous(), a.t().contiguous(), None, *NONE)


def packed(dtype: torch.dtype, as_convolution: bool = False) -> Prepare:
    """oneDNN with the weight in the layout it wants."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
        if operator.kind == "linear" and as_convolution:
            operator, weight, x = _as_convolution(operator, weight, x)
        o, w = operator, weight.to(dtype).contiguous()
        z = _layout(x.to(dtype), True)
        if o.kind == "linear":
            matrix = _reordered(torch.ops.mkldnn._reorder_linear_weight, w, z.shape[0])
            return lambda: torch.ops.mkldnn._linear_pointwise(z, matrix, None, *NONE)
        if o.kind == "conv":
            geometry = (list(o.padding), list(o.stride), list(o.dilation), o.groups)
            kernel = _reordered(torch.ops.mkldnn._reorder_convolution_weight, w, *geometry, list(z.shape))
            return lambda: torch.ops.mkldnn._convolution_pointwise(z, kernel, None, *geometry, *NONE)
        geometry = (list(o.padding), list(o.output_padding), list(o.stride), list(o.dilation), o.groups)  # type: ignore[assignment]
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
        kernel = _reordered(reorder, w, *geometry, list(z.shape))
        return lambda: torch.ops.mkldnn._convolution_transpose_pointwise(z, kernel, None, *geometry, *NONE)

    return prepare


def _reordered(reorder: Callable[..., Tensor], weight: Tensor, *geometry: object) -> Tensor:
    """The weight as oneDNN wants it; torch builds differ in the layout of the weight they take."""
    try:
        return reorder(weight, *geometry)
    except NotImplementedError:
        return reorder(weight.to_mkldnn(), *geometry)


def _planes(weight: Tensor, two: bool) -> tuple[Tensor, Tensor]:
    """(int8 weight, scale per output) with weight = scale * plane; two planes [hi | lo] side by side in the inputs."""
    rest = [d for d in range(weight.dim()) if d != 0]
    top = weight.abs().amax(rest, keepdim=True).clamp_min(1e-30)
    if not two:
        scale = top / 127
        return (weight / scale).round().to(torch.int8), scale.flatten()
    scale = top / (127 * 255)
    k = (weight / scale).round()
    hi = (k / 255).round()
    return torch.cat([hi, k - 255 * hi], dim=1).to(torch.int8), scale.flatten()


def _bytes(x: Tensor, two: bool) -> Tensor:
    s = (x != 0).to(torch.uint8)
    return torch.cat([255 * s, s], dim=1) if two else s


def integer(two: bool = False, scales: Tensor | None = None) -> Prepare:
    """oneDNN's uint8 x int8 products; x are spikes. With `scales` per output the weight is int8 already."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
        o, zero = operator, torch.zeros(operator.out_channels, dtype=torch.int64)
        w, scale = _planes(weight, two) if scales is None else (weight, scales)
        z = _layout(_bytes(x, two), True)
        if o.kind == "linear":
            matrix = torch.ops.onednn.qlinear_prepack(w, list(z.shape))
            tail = (None, 1.0, 0, torch.float32, *NONE)
            return lambda: torch.ops.onednn.qlinear_pointwise(z, 1.0, 0, matrix, scale, zero, *tail)
        s, p, d = list(o.stride), list(o.padding), list(o.dilation)
        kernel = torch.ops.onednn.qconv_prepack(w, scale, 1.0, 0, s, p, d, o.groups, list(z.shape))
        tail = (None, s, p, d, o.groups, 1.0, 0, torch.float32, *NONE)  # type: ignore[assignment]
        # its name before torch 2.7
        conv = getattr(torch.ops.onednn, "qconv_pointwise", None) or torch.ops.onednn.qconv2d_pointwise
        return lambda: conv(z, 1.0, 0, kernel, scale, zero, *tail)

    return prepare


def two_integers(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
    """255 hi s + lo s by two products of oneDNN."""
    planes, scale = _planes(weight, True)
    shape = [-1, *(1,) * (x.dim() - 2)]
    n, one = operator.in_channels, torch.ones_like(scale)
    prepare = integer(scales=one)
    high, low = (prepare(operator, plane.contiguous(), x, None) for plane in (planes[:, :n], planes[:, n:]))
    s = scale.view(shape)
    return lambda: high().mul_(255).add_(low()).mul_(s)


def fbgemm(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
    """fbgemm's quantised product; its result has 8 bits, here steps of 1/16 around 0."""
    w, scale = _planes(weight, False)
    o, z = operator, _layout(_bytes(x, False), True)
    zero = torch.zeros(o.out_channels, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")  # a torch that has removed them raises
        matrix = torch._make_per_channel_quantized_tensor(w, scale.double(), zero, 0)
        spikes = torch._make_per_tensor_quantized_tensor(z, 1.0, 0)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        if o.kind == "linear":
            pack = torch.ops.quantized.linear_prepack(matrix, None)
            return lambda: torch.ops.quantized.linear(spikes, pack, 1 / 16, 128)
        geometry = (list(o.stride), list(o.padding), list(o.dilation), o.groups)
        pack = torch.ops.quantized.conv2d_prepack(matrix, None, *geometry)
        return lambda: torch.ops.quantized.conv2d(spikes, pack, 1 / 16, 128)
    finally:
        torch.backends.quantized.engine = before


def events(levels: bool = False) -> Prepare:
    """This project's event-driven product, with `levels` of spikes and a weight in 16-bit units."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
        affine = Affine(operator, weight, None, 1, None, tuple(x.shape[1:]))
        reason = event_driven.why_not([affine]) or (event_driven.why_not_in_levels([affine]) if levels else None)
        if reason is not None:
            raise RuntimeError(reason)
        product = event_driven.EventConnection(affine, levels=levels)
        z = event_driven.channels_last(x.to(torch.uint8) if levels else x.float())
        return lambda: product(z)

    return prepare


def dense(*, whole: bool = False) -> Prepare:
    """This project's product of the linear solves, which multiplies with the transposed weight of a layer."""

    def prepare(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
        inputs, outputs = operator.in_channels, operator.out_channels
        return _skipping(Operator("linear", outputs, inputs), weight.t(), x, whole)

    return prepare


def dense_gradient(*, whole: bool = False) -> Prepare:
    """The same kernels for y^T x, which skip the zeros of y where there are many."""

    def prepare(operator: Operator, _weight: Tensor, x: Tensor, y: Tensor | None) -> Call:
        assert y is not None
        return _skipping(Operator("linear", operator.in_channels, len(x)), x, y.t(), whole)

    return prepare


def _skipping(layer: Operator, matrix: Tensor, x: Tensor, whole: bool) -> Call:
    if whole and integers.why_unavailable() is not None:
        raise RuntimeError(integers.why_unavailable())
    weight, z = matrix.float().contiguous(), x.float().contiguous()
    product = DenseMap(Affine(layer, weight, None, 1, None, tuple(weight.shape[1:])), whole=whole)
    return lambda: product.adjoint(z)


def whole_numbers(operator: Operator, weight: Tensor, x: Tensor, _y: Tensor | None) -> Call:
    """This project's product of input stages with `precision=fast`."""
    return _whole_product(x.float().contiguous(), weight, operator.out_channels, by_outputs=True)


def whole_gradient(operator: Operator, _weight: Tensor, x: Tensor, y: Tensor | None) -> Call:
    """The same for y^T x."""
    assert y is not None
    return _whole_product(y.float().t().contiguous(), x, operator.in_channels, by_outputs=False)


def _whole_product(x: Tensor, matrix: Tensor, outputs: int, *, by_outputs: bool) -> Call:
    if integers.why_unavailable() is not None:
        raise RuntimeError(integers.why_unavailable())
    matrix, y = matrix.float().contiguous(), x.new_empty(len(x), outputs)
    product = integers.IntegerProduct(*x.shape, outputs, by_outputs=by_outputs, own_memory=True)
    product.take(x, matrix, y)
    packing, multiplying = product.stages
    packing.run()
    again = native.Stages([multiplying])

    def call() -> Tensor:
        again.run()
        return y

    call.keep = x, matrix, product  # type: ignore[attr-defined]  # they are known by their addresses only
    return call


def _on_gpu(call: Call, x: Tensor, tf32: bool) -> Call:
    """The call itself on a CPU; on a GPU its CUDA graph, so that starting it costs the least, in float32 or TF32."""
    if x.device.type != "cuda":
        return call
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
    finally:
        matmul.allow_tf32 = before

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CONV, LINEAR = ("conv", "conv_transposed"), ("linear",)
WAYS = (
    Way("torch", "float32", plain(F32)),
    Way("torch, channels last", "float32", plain(F32, True), CONV),
    Way("oneDNN, packed", "float32", packed(F32), device="cpu"),
    Way("oneDNN, packed 1x1 convolution", "float32", packed(F32, True), LINEAR, device="cpu"),
    Way("torch", "bfloat16", plain(BF16), LINEAR, needs=FAST_BF16),
    Way("torch, channels last", "bfloat16", plain(BF16, True), CONV, needs=FAST_BF16),
    Way("oneDNN, packed", "bfloat16", packed(BF16), device="cpu", needs=FAST_BF16),
    Way("torch, channels last", "tf32", plain(F32, True, tf32=True), device="cuda"),
    Way("torch, channels last", "float16", plain(F16, True), device="cuda"),
    Way("oneDNN", "int8", integer(), ("linear", "conv"), device="cpu"),
    Way("oneDNN", "int8x2", integer(two=True), ("linear", "conv"), device="cpu"),
    Way("oneDNN, two products", "int8x2", two_integers, ("linear", "conv"), device="cpu"),
    Way("fbgemm", "int8 to 8 bits", fbgemm, ("linear", "conv"), device="cpu"),
    Way("dense", "float32", dense(), LINEAR, device="cpu"),
    Way("integers", "whole numbers", whole_numbers, LINEAR, device="cpu"),
    Way("integers, zeros skipped", "whole numbers", dense(whole=True), LINEAR, device="cpu"),
    Way("events", "events", events(), device="cpu"),
    Way("events", "events16", events(levels=True), device="cpu"),
    Way("torch", "float32", gradient(F32), gradient=True),
    Way("torch, transposed", "float32", gradient(F32, flip=True), LINEAR, gradient=True),
    Way("torch, channels last", "float32", gradient(F32, True), CONV, gradient=True),
    Way("oneDNN, 1x1 convolution", "float32", gradient_as_convolution, LINEAR, gradient=True, device="cpu"),
    Way("oneDNN, linear", "float32", gradient_as_product, LINEAR, gradient=True, device="cpu"),
    Way("dense", "float32", dense_gradient(), LINEAR, gradient=True, device="cpu"),
    Way("integers", "whole numbers", whole_gradient, LINEAR, gradient=True, device="cpu"),
    Way("integers, zeros skipped", "whole numbers", dense_gradient(whole=True), LINEAR, gradient=True, device="cpu"),
    Way("torch", "bfloat16", gradient(BF16), LINEAR, gradient=True, needs=FAST_BF16),
    Way("torch, channels last", "bfloat16", gradient(BF16, True), CONV, gradient=True, needs=FAST_BF16),
    Way("torch, channels last", "tf32", gradient(F32, True, tf32=True), gradient=True, device="cuda"),
    Way("torch, channels last", "float16", gradient(F16, True), gradient=True, device="cuda"),
)
