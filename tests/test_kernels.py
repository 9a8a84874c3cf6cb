"""Fused kernels: the torch path, the choice of a backend, errors; and the Triton kernels through kernel_checks.py."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from torch import Tensor

from ide_snn import NeuronParams
from ide_snn.kernels import (
    apply_slope,
    available,
    in_layout_of,
    masked_update_,
    neuron_step_,
    residual,
    why_unavailable,
)
from ide_snn.neurons import step

LIF = NeuronParams(2.0, 0.95)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install -e '.[kernels]'"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def run_checks(**environment: str) -> None:
    """Runs kernel_checks.py in its own process: triton reads TRITON_INTERPRET when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_checks.py"]
    done = subprocess.run(command, cwd=PROJECT, env=kept | environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@needs_triton
def test_triton_kernels_equal_the_torch_path_in_the_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@needs_cuda
def test_triton_kernels_equal_the_torch_path_on_the_gpu() -> None:
    run_checks()


STEP = {
    "current_ptr": "*bf16",
    "u_ptr": "*fp32",
    "spikes_ptr": "*i8",
    "gain_ptr": "*u8",
    "drive_ptr": "*fp32",
    "rate_ptr": "*fp32",
    "n": "i64",
}
ROWS = {"n": "i32", "blocks": "i32"}
# kernel: types of the operands, values of the compile-time constants
COMPILED = {
    "neuron_step": (STEP, {"count_ptr": None, "V_THRESHOLD": 2.0, "LEAK": 0.95, "GAIN_SCALE": 1.25}),
    "apply_slope": ({"v_ptr": "*fp32", "mask_ptr": "*u8", "out_ptr": "*bf16", "n": "i32"}, {"SCALE": 0.7}),
    "residual": (
        {"b_ptr": "*fp32", "image_ptr": "*bf16", "y_ptr": "*fp32", "out_ptr": "*fp32", "squares_ptr": "*fp32"} | ROWS,
        {},
    ),
    "arnoldi": (
        dict.fromkeys(("basis_ptr", "newest_ptr", "image_ptr", "target_ptr", "column_ptr"), "*fp32")
        | {"groups": "i32", "plane": "i64"},
        {"N": 16384, "K": 3, "NOISE": 1e-6, "PASSES": 2, "BLOCK": 4096},
    ),
    "combine": (
        dict.fromkeys(("basis_ptr", "solution_ptr", "remainder_ptr", "y_ptr", "r_ptr", "norms_ptr"), "*fp32")
        | {"verdict_ptr": "*i32", "groups": "i32", "plane": "i64"},
        {"N": 16384, "DIMENSIONS": 5, "BLOCK": 4096},
    ),
    "least_squares": (
        dict.fromkeys(("columns_ptr", "beta_ptr", "bound_ptr", "solution_ptr", "remainder_ptr"), "*fp32")
        | dict.fromkeys(("factor_ptr", "turns_ptr", "right_ptr"), "*fp64")
        | {"verdict_ptr": "*i32", "groups": "i32"},
        {"DIMENSIONS": 5, "NOISE": 1e-6, "BLOCK": 128},
    ),
    "masked_update": ({"y_ptr": "*fp32", "r_ptr": "*fp32", "active_ptr": "*u8"} | ROWS, {"STEP": 0.7}),
}


SUMS = ("arnoldi", "least_squares", "combine")  # whose rounding nobody relies on


def machine_code(name: str, capability: int, **options: bool) -> str:
    """SASS of a kernel as `launch` compiles it; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ide_snn.kernels import triton_kernels

    if triton_kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    kernel, (operands, constants) = getattr(triton_kernels, name), COMPILED[name]
    constants = {"BLOCK": triton_kernels.BLOCK} | constants
    types = operands | dict.fromkeys(constants, "constexpr")
    name_of_constants = "constexprs" if "constexprs" in inspect.signature(ASTSource).parameters else "constants"  # 3.2
    signature = {arg: types[arg] for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, **{name_of_constants: constants})
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=triton_kernels.OPTIONS | options).asm["sass"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SUMS)
def test_kernels_of_sums_compile(name, capability, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = machine_code(name, capability)
    assert "BAR.SYNC" in code or name == "combine"  # between what threads write and others read
    assert ("DADD" in code) == (name == "least_squares")


@needs_triton
@pytest.mark.parametrize(
    ("name", "capability"), [("neuron_step", 80), *((name, 90) for name in COMPILED if name not in SUMS)]
)
def test_compiled_kernels_have_no_fused_multiply_add(name, capability, tmp_path, monkeypatch) -> None:
    """What the interpreter cannot see: a product and a sum are rounded one by one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = machine_code(name, capability)
    assert "FADD" in code or "FMUL" in code
    assert "FFMA" not in code
    if (name, capability) == ("neuron_step", 90):  # the look at the code would see them
        assert "FFMA" in machine_code(name, capability, enable_fp_fusion=True)


@needs_triton
def test_every_launch_forbids_fusion_and_covers_all_elements() -> None:
    from ide_snn.kernels import triton_kernels

    calls: list[tuple[tuple, tuple, dict]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *operands, **options: calls.append((grid, operands, options))

    u = torch.zeros(2)
    for n in (0, 1, triton_kernels.BLOCK, triton_kernels.BLOCK + 1, 2**31 + 1):
        triton_kernels.launch(Kernel(), triton_kernels.blocks(n), u, n, LEAK=0.5)
    assert [grid for grid, _, _ in calls] == [(1,), (1,), (2,), (2**31 // triton_kernels.BLOCK + 1,)]
    assert all(options["enable_fp_fusion"] is False and options["LEAK"] == 0.5 for _, _, options in calls)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, ide_snn, ide_snn.kernels, ide_snn.graphs; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120).returncode == 0


# ---- the torch path


def loose_step(current: Tensor, u: Tensor, neuron: NeuronParams, gain=1.0, drive=0.0, rate=0.0, count=0.0):
    """The equations, one operation after the other."""
    spikes, u = step(current.to(u.dtype) * gain + drive, u, neuron)
    return u, spikes, rate * neuron.leak + spikes, count + spikes


@pytest.mark.parametrize("neuron", [NeuronParams(0.7, 1.0), NeuronParams(0.7, 0.9)], ids=["if", "lif"])
@pytest.mark.parametrize("spike_type", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("current_type", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mask_type", [torch.float32, torch.bool, torch.uint8], ids=str)
def test_torch_path_is_the_equations_bit_for_bit(neuron, spike_type, current_type, mask_type) -> None:
    shape = (3, 5, 4, 7)
    u, rate, count = torch.randn(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    drive, keep = torch.randn(shape), torch.rand(shape) < 0.7
    spikes = torch.empty(shape, dtype=spike_type)
    scale = float(torch.tensor(1 / 0.7))
    gain = keep * scale if mask_type == torch.float32 else keep.to(mask_type)
    expected = (u, None, rate, count.float())
    for _ in range(6):
        current = torch.randn(shape, dtype=torch.float64).to(current_type)
        expected = loose_step(current, expected[0], neuron, keep * scale, drive, expected[2], expected[3])
        neuron_step_(
            current,
            u,
            spikes,
            neuron,
            gain=gain,
            gain_scale=1.0 if mask_type == torch.float32 else scale,
            drive=drive,
            rate=rate,
            count=count,
        )
        for found, wanted in zip((u, spikes.float(), rate, count.float()), expected, strict=True):
            assert torch.equal(found, wanted)


def test_current_is_kept_without_gain_and_drive() -> None:
    x, u = torch.randn(4, 5), torch.zeros(4, 5)
    before = x.clone()
    neuron_step_(x, u, torch.empty_like(u), LIF)
    assert torch.equal(x, before)


def test_solver_parts_are_their_equations() -> None:
    b, y, image = torch.randn(3, 3, 50)
    r, norm = residual(b, image, y)
    assert torch.equal(r, b + image - y)
    torch.testing.assert_close(norm, r.norm(dim=1))
    updated = masked_update_(y.clone(), r, torch.tensor([True, False, True]), 0.5)
    assert torch.equal(updated, torch.stack([y[0] + r[0] * 0.5, y[1], y[2] + r[2] * 0.5]))
    v, mask = torch.randn(2, 4), torch.tensor([[1, 0, 1, 0]] * 2, dtype=torch.uint8)
    assert torch.equal(apply_slope(v, mask, 0.5), v * mask * 0.5)
    half = apply_slope(v, mask, 1 / 3, torch.empty_like(v, dtype=torch.bfloat16))
    assert torch.equal(half, (v * (mask * torch.tensor(1 / 3))).bfloat16())  # rounded once on the way


# ---- the choice


def test_the_log_line_says_why() -> None:
    if not torch.cuda.is_available():
        assert str(available("cpu")) == "neuron kernel: torch (no CUDA device)"
        assert str(available("cuda")) == "neuron kernel: torch (no CUDA device)"
    assert available("cpu").backend == "torch"


@needs_triton
def test_triton_on_a_cpu_is_refused_with_the_remedy() -> None:
    x, u, s = torch.zeros(3, 2, 4)
    with pytest.raises(RuntimeError, match=r"cannot run on cpu .*backend='auto'.*TRITON_INTERPRET=1"):
        neuron_step_(x, u, s, LIF, backend="triton")


def test_triton_that_is_not_installed_is_refused_with_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ide_snn.kernels.triton_kernels", raising=False)
    monkeypatch.delattr("ide_snn.kernels.triton_kernels", raising=False)
    x, u, s = torch.zeros(3, 2, 4)
    with pytest.raises(ImportError, match=r"\.\[kernels\]"):
        neuron_step_(x, u, s, LIF, backend="triton")
    neuron_step_(x, u, s, LIF)  # and is not needed


def test_gpu_without_triton_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ide_snn.kernels.triton_kernels", raising=False)
    monkeypatch.delattr("ide_snn.kernels.triton_kernels", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert available("cuda").backend == "torch"
    assert "pip install -e '.[kernels]'" in str(available("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert str(available("cuda")) == "neuron kernel: torch (compute capability 6.1, triton needs 7.0)"
    assert str(available("cpu")) == "neuron kernel: torch (device cpu)"


# ---- errors

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'torch'"),
        ({"current": torch.zeros(SHAPE, dtype=torch.int32)}, "current must be floating point"),
        ({"current": torch.zeros(2, 3, 4, 1)}, "do not broadcast"),
        ({"current": torch.zeros(SHAPE).to(memory_format=torch.channels_last)}, r"in_layout_of\(u, current\)"),
        ({"u": torch.zeros(SHAPE, dtype=torch.bfloat16)}, "u must be torch.float32 or torch.float64"),
        ({"u": torch.zeros(4, 3, 4, 5)[::2]}, "u .* has gaps"),
        ({"spikes": torch.zeros(SHAPE, dtype=torch.int64)}, "spikes must be"),
        ({"gain": torch.zeros(SHAPE, dtype=torch.int32)}, "gain must be"),
        ({"gain": torch.ones(SHAPE), "gain_scale": 2.0}, "belongs to a gain that is a mask"),
        ({"gain_scale": 2.0}, "belongs to a gain that is a mask"),
        ({"gain": torch.ones(SHAPE, dtype=torch.bool), "gain_scale": 0.0}, "positive finite"),
        ({"drive": torch.zeros(SHAPE, dtype=torch.float64)}, "drive must be torch.float32"),
        ({"rate": torch.zeros(SHAPE, dtype=torch.float64)}, "rate must be torch.float32"),
        ({"count": torch.zeros(SHAPE, dtype=torch.bfloat16)}, "count must be"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else "",
)
def test_step_refuses(change, message) -> None:
    arguments = {"current": torch.zeros(SHAPE), "u": torch.zeros(SHAPE), "spikes": torch.zeros(SHAPE), "neuron": LIF}
    with pytest.raises(ValueError, match=message):
        neuron_step_(**(arguments | change))


def test_step_refuses_shared_memory() -> None:
    current, u, spikes, rate = torch.zeros(4, 2, 3)
    for shared in (
        {"rate": rate, "count": rate},
        {"rate": u},
        {"drive": u},
        {"gain": spikes},
    ):
        with pytest.raises(ValueError, match="same memory"):
            neuron_step_(current, u, spikes, LIF, **shared)
    neuron_step_(current, u, spikes, LIF, drive=rate, gain=rate)  # what is only read may be shared


def test_solver_parts_refuse() -> None:
    y = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="contiguous rows"):
        residual(y, y, torch.zeros(3, 2).t())
    with pytest.raises(ValueError, match="one type"):
        residual(y.double(), y, y)
    with pytest.raises(ValueError, match="same memory"):
        residual(y, y.clone(), y.clone(), y)
    with pytest.raises(ValueError, match=r"active must be bool or uint8 \[2\]"):
        masked_update_(y, y.clone(), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="step must be finite"):
        masked_update_(y, y.clone(), torch.ones(2, dtype=torch.bool), float("nan"))
    with pytest.raises(ValueError, match="mask must be"):
        apply_slope(y, y, 1.0)
    with pytest.raises(ValueError, match="scale must be"):
        apply_slope(y, y.bool(), float("inf"))


def test_layouts_with_dimensions_of_one_element_agree() -> None:
    u = torch.zeros(2, 1, 4, 5)
    current = torch.ones(2, 4, 5, 1).permute(0, 3, 1, 2)  # other strides, same order in memory
    assert current.stride() != u.stride()
    assert in_layout_of(u, current) is current
    neuron_step_(current, u, torch.zeros_like(u), LIF)
    assert bool((u == 0.95).all())
    copied = in_layout_of(torch.zeros(SHAPE).to(memory_format=torch.channels_last), torch.ones(SHAPE))
    assert copied.is_contiguous(memory_format=torch.channels_last)


def test_why_the_kernels_are_not_at_hand() -> None:
    assert why_unavailable("cpu") == available("cpu").reason
    assert (why_unavailable() is None) == (available("cuda").backend == "triton")
