"""The Triton kernels. Imported only through `backend.load_kernels`, because triton is an optional package.

Rounding: every operation is rounded by itself, as in torch's separate operations. Left alone, the compiler contracts
a product and the sum behind it into one fused multiply-add, which rounds once: lambda a + s and gain c + u would then
differ in the last digit from every other path, and spikes with them. `OPTIONS` forbid it (`enable_fp_fusion=False`).
V_th, lambda and the scales are compile-time constants, so that they take the tensors' precision, float64 too.

Offsets are int64: tensors may have more than 2^31 elements. An operand that is None is left out at compile time.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements per program: eight per thread, two vector loads of 16 bytes in float32
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TRITON_VERSION = triton.__version__


@triton.jit
def neuron_step(
    current_ptr,
    u_ptr,
    spikes_ptr,
    gain_ptr,
    drive_ptr,
    rate_ptr,
    count_ptr,
    n,
    V_THRESHOLD: tl.constexpr,
    LEAK: tl.constexpr,
    GAIN_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `ide_snn.kernels.neuron`; all operands are flat, of n elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    u = tl.load(u_ptr + at, mask=inside, other=0)
    current = tl.load(current_ptr + at, mask=inside, other=0).to(u.dtype)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + at, mask=inside, other=0).to(u.dtype)
        current = current * (gain * GAIN_SCALE)
    if drive_ptr is not None:
        current = current + tl.load(drive_ptr + at, mask=inside, other=0)
    if rate_ptr is not None:  # here, so that all loads are on their way before the first store
        rate = tl.load(rate_ptr + at, mask=inside, other=0)
    if count_ptr is not None:
        count = tl.load(count_ptr + at, mask=inside, other=0)
    u = u + current
    spikes = (u >= V_THRESHOLD).to(u.dtype)
    u = u - spikes * V_THRESHOLD
    if LEAK != 1:
        u = u * LEAK
    tl.store(u_ptr + at, u, mask=inside)
    tl.store(spikes_ptr + at, spikes.to(spikes_ptr.dtype.element_ty), mask=inside)
    if rate_ptr is not None:
        if LEAK != 1:
            rate = rate * LEAK
        tl.store(rate_ptr + at, rate + spikes, mask=inside)
    if count_ptr is not None:
        tl.store(count_ptr + at, count + spikes.to(count.dtype), mask=inside)


@triton.jit
def apply_slope(v_ptr, mask_ptr, out_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """out = v (mask scale); float64 where v has it, otherwise in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    v = tl.load(v_ptr + at, mask=inside, other=0)
    if v.dtype != tl.float64:
        v = v.to(tl.float32)
    mask = tl.load(mask_ptr + at, mask=inside, other=0).to(v.dtype)
    product = v * (mask * SCALE)
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def residual(b_ptr, image_ptr, y_ptr, out_ptr, squares_ptr, n, blocks, BLOCK: tl.constexpr):
    """out = (b + image) - y on rows of n elements; program i writes the sum of its squares to squares[i]."""
    program = tl.program_id(0)
    lane = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = (program // blocks).to(tl.int64) * n + lane
    inside = lane < n
    y = tl.load(y_ptr + at, mask=inside, other=0)
    b = tl.load(b_ptr + at, mask=inside, other=0)
    image = tl.load(image_ptr + at, mask=inside, other=0).to(y.dtype)
    r = (b + image) - y
    tl.store(out_ptr + at, r, mask=inside)
    tl.store(squares_ptr + program, tl.sum(r * r))


@triton.jit
def masked_update(y_ptr, r_ptr, active_ptr, n, blocks, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = y + step r on the active rows of n elements; a program of another row touches nothing."""
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    lane = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group * n + lane
    inside = (lane < n) & (tl.load(active_ptr + group) != 0)
    y = tl.load(y_ptr + at, mask=inside, other=0)
    r = tl.load(r_ptr + at, mask=inside, other=0)
    if STEP != 1:
        r = r * STEP
    tl.store(y_ptr + at, y + r, mask=inside)


# With TRITON_INTERPRET=1 in the environment the decorator above makes functions that run in numpy.
INTERPRETED = not isinstance(neuron_step, triton.JITFunction)


def blocks(n: int) -> int:
    """Programs that cover n elements."""
    return -(-n // BLOCK)


def launch(kernel, programs: int, like: torch.Tensor, *operands, **constants) -> None:
    """Runs `programs` programs of the kernel on the device and current stream of `like`."""
    if programs > 0:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*operands, **constants, BLOCK=BLOCK, **OPTIONS)
