"""The Triton kernels against the torch path, on the device at hand; run by test_kernels.py in a process of its own.

Triton decides between its interpreter and the GPU when it is imported, so this file is not collected with the others:

    TRITON_INTERPRET=1 pytest tests/kernel_checks.py       on a CPU
    pytest tests/kernel_checks.py                          on a CUDA device
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ide_snn import NeuronParams
from ide_snn.kernels import apply_slope, available, in_layout_of, masked_update_, neuron_step_, residual
from ide_snn.kernels.krylov import arnoldi_step_, combine, least_squares
from ide_snn.kernels.triton_kernels import BLOCK, INTERPRETED

# of the interpreter of triton 3.2 itself
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
IF, LIF = NeuronParams(2.0, 1.0), NeuronParams(2.0, 0.95)
# sizes around a program's block, odd ones, one element, none
SHAPES = [(0, 3), (1, 1), (1, BLOCK), (5, 205), (2, BLOCK + 1), (4, 3, 8, 11), (2, 5, 1, 9), (3, 1, 7, 5), (2, 3, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPIKES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool]
GAINS = [None, "float", torch.bool, torch.uint8]
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=5).map(tuple)


def draw(shape: tuple[int, ...], channels_last: bool, *, scale: float = 1.5, dtype=torch.float32) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).mul_(scale).to(dtype).to(DEVICE)
    return x.to(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def identical(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def run(backend: Any, neuron: NeuronParams, options: dict[str, Any], steps: int = 4) -> dict[str, Tensor]:
    """State after some steps with fresh currents, the same for both backends."""
    torch.manual_seed(1)
    shape, last, dtype = options["shape"], options.get("channels_last", False), options.get("dtype", torch.float32)
    u = draw(shape, last, dtype=dtype)
    state = {"u": u, "spikes": torch.empty_like(u, dtype=options.get("spikes", dtype))}
    if options.get("rate"):
        state["rate"] = torch.zeros_like(u)
    if options.get("count") is not None:
        state["count"] = torch.zeros_like(u, dtype=options["count"])
    extra: dict[str, Any] = {name: x for name, x in state.items() if name in ("rate", "count")}
    kind = options.get("gain")
    if kind is not None:
        keep = draw(shape, last) > -1
        extra["gain"] = (keep / 0.8).to(dtype) if kind == "float" else keep.to(kind)
        extra["gain_scale"] = 1.0 if kind == "float" else 1 / 0.7
    if options.get("drive"):
        extra["drive"] = draw(shape, last, scale=0.5, dtype=dtype)
    for _ in range(steps):
        current = draw(shape, last, dtype=options.get("current", dtype))
        neuron_step_(current, state["u"], state["spikes"], neuron, **extra, backend=backend)
    return state


def compare(neuron: NeuronParams, **options: Any) -> None:
    expected, found = (run(backend, neuron, options) for backend in ("torch", "triton"))
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        identical(found[name], x)
    if expected["u"].numel() > 100:
        assert 0 < expected["spikes"].float().mean() < 1  # the comparison is of neurons that fire, and not always


def test_the_device_is_what_the_environment_says() -> None:
    assert (DEVICE == "cpu") == INTERPRETED
    # the interpreter is never taken unasked
    assert available(DEVICE).backend == ("torch" if INTERPRETED else "triton")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("neuron", [IF, LIF], ids=["if", "lif"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_step_at_every_size(shape, neuron, channels_last) -> None:
    compare(neuron, shape=shape, channels_last=channels_last, rate=True, drive=True, gain=torch.uint8)


@pytest.mark.parametrize("gain", GAINS, ids=str)
@pytest.mark.parametrize("drive", [False, True], ids=["", "drive"])
@pytest.mark.parametrize("rate", [False, True], ids=["", "rate"])
@pytest.mark.parametrize("count", [None, torch.float32, torch.int32], ids=str)
def test_step_with_every_option(gain, drive, rate, count) -> None:
    compare(NeuronParams(0.7, 0.9), shape=(3, 401), gain=gain, drive=drive, rate=rate, count=count)


@pytest.mark.parametrize("spikes", SPIKES, ids=str)
@pytest.mark.parametrize("current", [*FLOATS, torch.float64], ids=str)
def test_step_in_every_type(spikes, current) -> None:
    options = {"shape": (3, 401), "rate": True, "count": torch.int32, "gain": torch.bool}
    compare(LIF, **options, spikes=spikes, current=current)


@pytest.mark.parametrize("neuron", [NeuronParams(0.3, 1.0), NeuronParams(0.3, 0.95)], ids=["if", "lif"])
def test_step_in_float64_has_constants_in_float64(neuron) -> None:
    # 0.3 and 0.95 rounded to float32 would differ
    compare(neuron, shape=(3, 401), dtype=torch.float64, rate=True, gain=torch.bool, drive=True)


@pytest.mark.parametrize("threshold", [0.3, 0.7])  # rounded to float32 the one is larger, the other smaller
def test_the_threshold_of_float64_is_not_rounded(threshold) -> None:
    current = torch.tensor([1, 1 + 1e-9, 1 - 1e-9], dtype=torch.float64, device=DEVICE) * threshold
    spikes = torch.empty_like(current)
    neuron_step_(current, torch.zeros_like(current), spikes, NeuronParams(threshold, 0.9), backend="triton")
    assert spikes.tolist() == [1, 1, 0]


@settings(max_examples=20, deadline=None)
@given(shape=shapes, last=st.booleans(), leak=st.floats(0.01, 1), threshold=st.floats(0.01, 10), data=st.data())
def test_step_at_drawn_shapes_and_parameters(shape, last, leak, threshold, data) -> None:
    options = {
        "spikes": st.sampled_from(SPIKES),
        "current": st.sampled_from(FLOATS),
        "gain": st.sampled_from(GAINS),
        "drive": st.booleans(),
        "rate": st.booleans(),
    }
    chosen = {name: data.draw(strategy, label=name) for name, strategy in options.items()}
    neuron = NeuronParams(threshold, leak)
    expected, found = (
        run(backend, neuron, {"shape": shape, "channels_last": last, **chosen}) for backend in ("torch", "triton")
    )
    for name, x in expected.items():
        identical(found[name], x)


def test_equality_fires_and_nan_stays_silent_and_visible() -> None:
    u = torch.tensor([0.0, 0.0, 1.0, float("nan"), 0.0], device=DEVICE)
    current = torch.tensor([2.0, 1.99999997, 3.0, 5.0, -1.0], device=DEVICE)
    spikes = torch.empty_like(u)
    neuron_step_(current, u, spikes, NeuronParams(2.0, 0.5), backend="triton")
    assert spikes.tolist() == [1, 1, 1, 0, 0]  # 1.99999997 is 2 in float32
    identical(u, torch.tensor([0.0, 0.0, 1.0, float("nan"), -0.5], device=DEVICE))


def test_step_leaves_what_lies_behind_the_tensors_alone() -> None:
    room = {name: torch.full((BLOCK + 40,), 7.0, device=DEVICE) for name in ("u", "spikes", "rate")}
    u, spikes, rate = (x[: BLOCK + 8].zero_() for x in room.values())
    neuron_step_(torch.full_like(u, 3.0), u, spikes, LIF, rate=rate, backend="triton")
    assert all(bool((x[BLOCK + 8 :] == 7).all()) for x in room.values())
    assert bool((spikes == 1).all())


@pytest.mark.parametrize(
    ("v_type", "out_type"), [(v, out) for v in FLOATS for out in FLOATS] + [(torch.float64, torch.float64)], ids=str
)
@pytest.mark.parametrize("mask_type", [torch.bool, torch.uint8], ids=str)
def test_slope(v_type, out_type, mask_type) -> None:
    v = draw((2, 3, 5, 41), True, dtype=v_type)
    mask = (draw((2, 3, 5, 41), True) > 0).to(mask_type)
    expected, found = (
        apply_slope(v, mask, 1 / 1.4, torch.empty_like(v, dtype=out_type), backend=backend)
        for backend in ("torch", "triton")
    )
    exact = v.double() * mask * (1 / 1.4)
    if INTERPRETED and out_type == torch.bfloat16:  # the interpreter cuts the digits off, a GPU rounds to the nearest
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(out_type).eps, atol=0)
    else:
        identical(found, expected)
    torch.testing.assert_close(expected.double(), exact, rtol=torch.finfo(out_type).eps, atol=1e-7)


def test_slope_in_place() -> None:
    v, mask = draw((3, 700), False), draw((3, 700), False) > 0
    expected = apply_slope(v, mask, 0.5, backend="torch")
    assert apply_slope(v, mask, 0.5, v, backend="triton") is v
    identical(v, expected)


@pytest.mark.parametrize("rows", [(1, 5000), (7, 400), (3, BLOCK), (2, 1), (4, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("image_type", [torch.float32, torch.bfloat16], ids=str)
def test_residual(rows, image_type) -> None:
    b, y, image = draw(rows, False), draw(rows, False), draw(rows, False, dtype=image_type)
    expected, found = (residual(b, image, y, backend=backend) for backend in ("torch", "triton"))
    identical(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)


def test_residual_of_one_bad_row_leaves_the_others() -> None:
    b, y, image = (draw((3, BLOCK + 3), False) for _ in range(3))
    image[1, 5] = float("nan")
    r, norm = residual(b, image, y, image, backend="triton")
    assert r is image
    assert norm.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [(1, 5000), (7, 400), (3, BLOCK), (4, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("mask_type", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("step", [1.0, 0.7])
def test_masked_update(rows, mask_type, step) -> None:
    y, r = draw(rows, False), draw(rows, False)
    active = (torch.arange(rows[0], device=DEVICE) % 2 == 0).to(mask_type)
    r[~active.bool()] = float("nan")  # must not reach a row that is not active
    expected, found = (masked_update_(y.clone(), r, active, step, backend=b) for b in ("torch", "triton"))
    identical(found, expected)
    assert bool(found.isfinite().all())


def test_in_layout_of_makes_a_current_fit() -> None:
    u, current = draw((2, 3, 4, 5), True), draw((2, 3, 4, 5), False)
    twins = []
    for backend in ("torch", "triton"):
        state, spikes = u.clone(), torch.empty_like(u)
        neuron_step_(in_layout_of(u, current), state, spikes, LIF, backend=backend)
        twins.append(state)
    identical(*twins)
    assert in_layout_of(u, u) is u


def krylov(backend: Any, matrices: Tensor, b: Tensor, bound: float, *, m: int, passes: int) -> dict[str, Tensor]:
    """A run of m dimensions of GMRES for v = b + A v, one matrix A per group: what the kernels write."""
    groups, n = b.shape
    noise = 10 * torch.finfo(b.dtype).eps
    basis, columns = b.new_full((m + 1, groups, n), 7.0), b.new_zeros(m, m + 1, groups)
    beta = b.norm(dim=1)
    basis[0] = torch.where(beta > 0, 1 / beta, 0.0)[:, None] * b
    for k in range(m):
        image = torch.einsum("gij,gj->gi", matrices, basis[k]).contiguous()
        arnoldi_step_(basis, image, columns, k, passes=passes, noise=noise, backend=backend)
    solution, remainder, verdict = least_squares(columns, beta, bound * beta, noise=noise, backend=backend)
    y, r, norms = combine(basis, solution, remainder, verdict, backend=backend)
    names = ("basis", "columns", "solution", "remainder", "verdict", "y", "r", "norms")
    return dict(zip(names, (basis, columns, solution, remainder, verdict, y, r, norms), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("groups", "n", "m", "bound"), [(5, 37, 4, 1e-2), (1, 5000, 3, 1e-9), (9, 6, 8, 1e-3), (3, 1, 2, 1e-3)]
)
def test_krylov(dtype, passes, groups, n, m, bound) -> None:
    torch.manual_seed(2)
    matrices = (torch.randn(groups, n, n, dtype=torch.float64) * 0.4 / n**0.5).to(dtype).to(DEVICE)
    b = draw((groups, n), False, dtype=dtype)
    expected, found = (krylov(backend, matrices, b, bound, m=m, passes=passes) for backend in ("torch", "triton"))
    tolerance = 1e3 * torch.finfo(dtype).eps
    for name in ("y", "r", "verdict"):
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)
    if n > m:  # the space is not exhausted, where rounding decides
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=tolerance, atol=tolerance, msg=name)
    y = found["y"]
    left = b + torch.einsum("gij,gj->gi", matrices, y) - y
    torch.testing.assert_close(found["r"], left, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found["norms"], torch.stack([left.norm(dim=1), y.norm(dim=1)]), rtol=1e-3, atol=tolerance
    )
    used, is_open = found["verdict"].tolist()
    assert bool((left.norm(dim=1) <= 1.01 * bound * b.norm(dim=1)).all()) == (is_open == 0)
    assert 1 <= used <= m


def test_krylov_of_groups_that_are_zero_or_nan_leaves_the_others() -> None:
    torch.manual_seed(3)
    matrices, b = torch.randn(4, 30, 30).to(DEVICE) * 0.05, draw((4, 30), False)
    b[1], b[2, 3] = 0, float("nan")
    alone = krylov("triton", matrices[[0, 3]], b[[0, 3]], 1e-4, m=5, passes=1)
    for backend in ("torch", "triton"):
        found = krylov(backend, matrices, b, 1e-4, m=5, passes=1)
        assert found["verdict"].tolist() == alone["verdict"].tolist()
        assert found["y"][1].tolist() == [0.0] * 30
        assert bool(found["norms"][0, 2].isnan())
        for name in ("y", "r"):
            torch.testing.assert_close(found[name][[0, 3]], alone[name], rtol=1e-4, atol=1e-5)
