"""Shared by the benchmarks: peak memory, processes of their own, interleaved timing, the machine, Markdown tables."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# what decides which products are fast; the names of Linux
FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)
# of <sys/personality.h>
ADDR_NO_RANDOMIZE, PERSONALITY_UNCHANGED = 0x0040000, 0xFFFFFFFF
CPUINFO, STATUS = Path("/proc/cpuinfo"), Path("/proc/self/status")


class Peak:
    """Bytes above the level at construction: of the resident set on a CPU (Linux), of torch's allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            _take_workspaces(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present level
            self.start = _resident("VmRSS")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return _resident("VmHWM") - self.start


def _take_workspaces(device: torch.device) -> None:
    """Lets cuBLAS take what it keeps, some 32 MB for this thread and as much for that of backward passes."""
    x = torch.ones(8, 8, device=device, requires_grad=True)
    (x @ x).sum().backward()


def _resident(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    if match is None:
        raise OSError(f"{STATUS} has no {key}: memory can be measured on Linux only")
    return int(match[1]) * 1024


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), computed in a fresh process; both must be importable there.

    The process has the same addresses and hashes each time: where they are random, the holes that the allocator leaves
    between buffers differ from run to run by a tenth of the peak.

    Raises:
        RuntimeError: if the process ends without a result (it has printed why, unless it was killed).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, *arguments))
    with _fixed_layout():
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended without a result, exit code {process.exitcode}") from None
    process.join()
    return result


@contextmanager
def _fixed_layout() -> Iterator[None]:
    """Processes started here have no random addresses (Linux) and no random hashes."""
    hashes, personality = os.environ.get("PYTHONHASHSEED"), getattr(ctypes.CDLL(None), "personality", None)
    os.environ["PYTHONHASHSEED"] = "0"
    before = personality(PERSONALITY_UNCHANGED) if personality else -1
    if before != -1:
        personality(before | ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        if before != -1:
            personality(before)
        if hashes is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = hashes


def _child(connection: Any, function: Callable[..., Any], *arguments: Any) -> None:
    connection.send(function(*arguments))


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def summary(self) -> dict[str, Any]:
        return {"median_s": self.median, "minimum_s": self.minimum, "rounds": len(self.seconds)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[int], object]], rounds: Mapping[str, int], device: torch.device
) -> dict[str, Times]:
    """Calls every function once per round, one after the other, and times each call.

    Args:
        calls: by name; called with the number of the round.
        rounds: in how many rounds, from the first, each takes part.
        device: waited for before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if number < rounds[name]:
                synchronize(device)
                start = time.perf_counter()
                call(number)
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items() if values}


def processor_flags() -> tuple[str, ...]:
    """Those of FLAGS that this processor has; empty where the system does not say."""
    if not CPUINFO.exists():
        return ()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    present = set(match[1].split()) if match else set()
    return tuple(flag for flag in FLAGS if flag in present)


def machine() -> dict[str, Any]:
    """The processor and what it can do."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = {
        key: match[1].strip()
        for key in ("model name", "cpu family", "model", "stepping")
        if (match := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))
    }
    name = found.pop("model name", platform.processor() or platform.machine())
    return {
        "processor": name,
        **{key.replace(" ", "_"): value for key, value in found.items()},
        "flags": list(processor_flags()),
        "cores": os.cpu_count(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; no rows, no text."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
