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
    # a comparison would round a bare constant to float32
    spikes = (u >= tl.full([], V_THRESHOLD, u.dtype)).to(u.dtype)
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
    if out_ptr.dtype.element_ty != tl.float64:
        product = product.to(tl.float32)  # as torch rounds float64 to 16 bits
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


@triton.jit
def arnoldi(
    basis_ptr,
    newest_ptr,
    image_ptr,
    target_ptr,
    column_ptr,
    groups,
    plane,
    N: tl.constexpr,
    K: tl.constexpr,
    NOISE: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `ide_snn.kernels.krylov.arnoldi_step_`; program g has row g of N elements.

    A barrier stands between what some threads of a program have written and others read.
    """
    group = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    row = group * N
    before = tl.zeros([BLOCK], target_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK):
        at = row + start + lanes
        inside = start + lanes < N
        image = tl.load(image_ptr + at, mask=inside, other=0)
        w = tl.load(newest_ptr + at, mask=inside, other=0) - image.to(before.dtype)
        before += w * w
        tl.store(target_ptr + at, w, mask=inside)
    tl.debug_barrier()
    for _ in tl.static_range(PASSES):
        q_ptr = basis_ptr + row
        h_ptr = column_ptr + group
        for _i in range(K + 1):
            product = tl.zeros([BLOCK], before.dtype)
            for start in range(0, N, BLOCK):
                inside = start + lanes < N
                w = tl.load(target_ptr + row + start + lanes, mask=inside, other=0)
                product += w * tl.load(q_ptr + start + lanes, mask=inside, other=0)
            h = tl.sum(product)
            so_far = tl.load(h_ptr)
            tl.debug_barrier()
            tl.store(h_ptr, so_far + h)
            for start in range(0, N, BLOCK):
                inside = start + lanes < N
                w = tl.load(target_ptr + row + start + lanes, mask=inside, other=0)
                w -= h * tl.load(q_ptr + start + lanes, mask=inside, other=0)
                tl.store(target_ptr + row + start + lanes, w, mask=inside)
            tl.debug_barrier()
            q_ptr += plane
            h_ptr += groups
    after = tl.zeros([BLOCK], before.dtype)
    for start in range(0, N, BLOCK):
        w = tl.load(target_ptr + row + start + lanes, mask=start + lanes < N, other=0)
        after += w * w
    length = tl.sqrt(tl.sum(after))
    length = tl.where(length <= NOISE * tl.sqrt(tl.sum(before)), 0.0, length)
    unit = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        w = tl.load(target_ptr + row + start + lanes, mask=inside, other=0)
        tl.store(target_ptr + row + start + lanes, w * unit, mask=inside)
    tl.store(column_ptr + group + (K + 1) * groups, length)


@triton.jit
def rotate(
    columns_ptr,
    beta_ptr,
    bound_ptr,
    factor_ptr,
    turns_ptr,
    right_ptr,
    groups,
    lanes,
    DIMENSIONS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """(dimensions that are taken, 1 where more are needed) and the triangular factor, by Givens rotations.

    Bounds of loops are constants, also where half of a loop is masked, and comparisons are of vectors: older
    interpreters know no others.
    """
    inside = lanes < groups
    zeros = lanes * 0
    last = tl.load(beta_ptr + lanes, mask=inside, other=0).to(tl.float64)
    bound = tl.load(bound_ptr + lanes, mask=inside, other=0).to(tl.float64)
    taking = 1
    used = 0
    for k in range(DIMENSIONS):
        column = columns_ptr + k * (DIMENSIONS + 1) * groups + lanes
        upper = tl.load(column, mask=inside, other=0).to(tl.float64)
        size = upper * upper
        for i in range(DIMENSIONS):
            earlier = inside & (zeros + i < k)
            lower = tl.load(column + (i + 1) * groups, mask=earlier, other=0).to(tl.float64)
            size += lower * lower
            cos = tl.load(turns_ptr + i * groups + lanes, mask=earlier, other=1)
            sin = tl.load(turns_ptr + (DIMENSIONS + i) * groups + lanes, mask=earlier, other=0)
            tl.store(factor_ptr + (i * DIMENSIONS + k) * groups + lanes, cos * upper + sin * lower, mask=earlier)
            upper = tl.where(earlier, cos * lower - sin * upper, upper)
        lower = tl.load(column + (k + 1) * groups, mask=inside, other=0).to(tl.float64)
        size += lower * lower
        radius = tl.sqrt(upper * upper + lower * lower)
        useless = radius <= NOISE * tl.sqrt(size)
        cos = tl.where(useless, 0.0, upper / tl.where(useless, 1.0, radius))
        sin = tl.where(useless, 1.0, lower / tl.where(useless, 1.0, radius))
        tl.store(factor_ptr + (k * DIMENSIONS + k) * groups + lanes, tl.where(useless, 0.0, radius), mask=inside)
        tl.store(turns_ptr + k * groups + lanes, cos, mask=inside)
        tl.store(turns_ptr + (DIMENSIONS + k) * groups + lanes, sin, mask=inside)
        # of dimensions that are not taken the coefficients become 0
        tl.store(right_ptr + k * groups + lanes, tl.where(taking > 0, cos * last, 0.0), mask=inside)
        last = -sin * last
        is_open = inside & (tl.abs(last) > bound) & (tl.abs(last) < float("inf"))
        used += taking
        taking = taking * tl.max(is_open.to(tl.int32))
        tl.debug_barrier()
    return used, taking


@triton.jit
def least_squares(
    columns_ptr,
    beta_ptr,
    bound_ptr,
    factor_ptr,
    turns_ptr,
    right_ptr,
    solution_ptr,
    remainder_ptr,
    verdict_ptr,
    groups,
    DIMENSIONS: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `ide_snn.kernels.krylov.least_squares`; one program with a lane per group, float64.

    factor [m, m, G], turns [2, m, G] and right [m, G] are scratch memory, the last of the coefficients in the end.
    """
    lanes = tl.arange(0, BLOCK)
    inside = lanes < groups
    zeros = lanes * 0
    used, taking = rotate(
        columns_ptr, beta_ptr, bound_ptr, factor_ptr, turns_ptr, right_ptr, groups, lanes, DIMENSIONS, NOISE
    )
    for back in range(DIMENSIONS):
        i = DIMENSIONS - 1 - back
        rest = tl.load(right_ptr + i * groups + lanes, mask=inside, other=0)
        for j in range(DIMENSIONS):
            taken = inside & (zeros + j > i) & (zeros + j < used)
            known = tl.load(right_ptr + j * groups + lanes, mask=taken, other=0)
            rest -= known * tl.load(factor_ptr + (i * DIMENSIONS + j) * groups + lanes, mask=taken, other=0)
        pivot = tl.load(factor_ptr + (i * DIMENSIONS + i) * groups + lanes, mask=inside, other=0)
        has_part = (pivot != 0) & (zeros + i < used)
        c = tl.where(has_part, rest / tl.where(has_part, pivot, 1.0), 0.0)
        tl.debug_barrier()
        tl.store(right_ptr + i * groups + lanes, c, mask=inside)
        tl.store(solution_ptr + i * groups + lanes, c.to(solution_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    beta = tl.load(beta_ptr + lanes, mask=inside, other=0).to(tl.float64)
    for i in range(DIMENSIONS + 1):
        rest = tl.where(zeros + i == 0, beta, 0.0)
        for k in range(DIMENSIONS):
            taken = inside & (zeros + k < used)
            entry = tl.load(columns_ptr + (k * (DIMENSIONS + 1) + i) * groups + lanes, mask=taken, other=0)
            rest -= entry.to(tl.float64) * tl.load(right_ptr + k * groups + lanes, mask=taken, other=0)
        rest = tl.where(zeros + i <= used, rest, 0.0)
        tl.store(remainder_ptr + i * groups + lanes, rest.to(remainder_ptr.dtype.element_ty), mask=inside)
    tl.store(verdict_ptr, used)
    tl.store(verdict_ptr + 1, taking)


@triton.jit
def combine(
    basis_ptr,
    solution_ptr,
    remainder_ptr,
    verdict_ptr,
    y_ptr,
    r_ptr,
    norms_ptr,
    groups,
    plane,
    N: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `ide_snn.kernels.krylov.combine`; program g has row g of N elements."""
    group = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    used = tl.load(verdict_ptr)
    of_r = tl.zeros([BLOCK], y_ptr.dtype.element_ty)
    of_y = tl.zeros([BLOCK], of_r.dtype)
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        at = group * N + start + lanes
        y = tl.zeros([BLOCK], of_r.dtype)
        r = tl.zeros([BLOCK], of_r.dtype)
        q_ptr = basis_ptr + at
        for i in range(DIMENSIONS + 1):
            # a vector that is not taken may be anything
            q = tl.load(q_ptr, mask=inside & (i <= used), other=0)
            if i < DIMENSIONS:
                y += tl.load(solution_ptr + i * groups + group) * q
            r += tl.load(remainder_ptr + i * groups + group) * q
            q_ptr += plane
        tl.store(y_ptr + at, y, mask=inside)
        tl.store(r_ptr + at, r, mask=inside)
        of_y += y * y
        of_r += r * r
    tl.store(norms_ptr + group, tl.sqrt(tl.sum(of_r)))
    tl.store(norms_ptr + groups + group, tl.sqrt(tl.sum(of_y)))


# With TRITON_INTERPRET=1 in the environment the decorator above makes functions that run in numpy.
INTERPRETED = not isinstance(neuron_step, triton.JITFunction)


def blocks(n: int) -> int:
    """Programs that cover n elements."""
    return -(-n // BLOCK)


def launch(kernel, programs: int, like: torch.Tensor, *operands, **constants) -> None:
    """Runs `programs` programs of the kernel on the device and current stream of `like`."""
    if programs > 0:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*operands, **{"BLOCK": BLOCK, **OPTIONS, **constants})
