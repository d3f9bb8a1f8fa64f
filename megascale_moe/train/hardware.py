"""What the machine can do and what the process took from it: the denominator of MFU, cores, memory.

MFU divides by the dense BF16 peak of the GPU's data sheet, whatever the dtype, as the literature does. A CPU has no
such figure that could be reached, so there the yardstick is this machine's own matrix product, measured in 0.3 s:
MFU then says which share of the achievable rate the training step keeps. An unknown GPU is measured likewise.
"""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megascale_moe.comm.local_ranks import job_processors

# Dense BF16 FLOP/s. One word of torch.cuda.get_device_name decides; the form (SXM where nothing is said) may add to it.
GPU_PEAKS = {
    "A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12, "GH200": 989e12,
    "B200": 2250e12, "B300": 2250e12, "GB200": 2500e12, "GB300": 2500e12,
}  # fmt: skip
SLOWER_FORMS = {("H100", "PCIE"): 756e12, ("H800", "PCIE"): 756e12, ("H100", "NVL"): 835e12}

MEASURING_SECONDS = 0.3
MATRIX_SIZES = (256, 512, 1024)
REPEATS = 8  # of each size; the first ones also warm up


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one rank could reach, and where the figure comes from."""

    flops: float
    source: str  # "data sheet" or "measured"


def peak_flops(device: torch.device, dtype: torch.dtype, local_ranks: int = 1) -> Peak:
    """The peak of one of `local_ranks` ranks of this machine; on a CPU, ranks beyond the cores share them.

    Call it in one rank while the others wait: a CPU is measured, once per dtype and number of torch threads.
    """
    if device.type == "cuda":
        known = gpu_peak(torch.cuda.get_device_name(device))
        return Peak(known, "data sheet") if known else Peak(_measured_flops(device, dtype, 1), "measured")
    threads = torch.get_num_threads()
    share = min(1.0, available_cores() / (local_ranks * threads))
    return Peak(_measured_flops(device, dtype, threads) * share, "measured")


def gpu_peak(name: str) -> float | None:
    """Dense BF16 FLOP/s of a GPU by its name; None if it is unknown, or only a slice of one (MIG)."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if "MIG" in words:
        return None
    for (model, form), flops in SLOWER_FORMS.items():
        if {model, form} <= words:
            return flops
    return next((flops for model, flops in GPU_PEAKS.items() if model in words), None)


@cache
def _measured_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Best rate of a square matrix product; `threads` only tells measurements apart."""
    best, deadline = 0.0, time.perf_counter() + MEASURING_SECONDS
    for size in MATRIX_SIZES:
        matrix = torch.full((size, size), 0.5, dtype=dtype, device=device)  # no random draw: training must not notice
        for _ in range(REPEATS):
            if best and time.perf_counter() > deadline:
                return best
            best = max(best, 2 * size**3 / _product_seconds(matrix))
    return best


def _product_seconds(matrix: torch.Tensor) -> float:
    _synchronize(matrix.device)
    start = time.perf_counter()
    matrix @ matrix
    _synchronize(matrix.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: of GPU memory, or (to about a megabyte) of main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    high_water = _proc_kilobytes(Path("/proc/self/status"), "VmHWM")
    if high_water is not None:
        return high_water * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available_memory() -> int | None:
    """Bytes of main memory that new processes could take, within the container's limit; None if unknown."""
    free = _proc_kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        return None
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()  # "max" where there is none
    return min(free * 1024, int(limit)) if limit.isdigit() else free * 1024


def available_cores() -> int:
    """Cores this process, or the job of this rank, may run on: its affinity, and the container's quota."""
    affinity = len(job_processors()) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return min(affinity, max(1, math.ceil(int(quota) / int(period))))
    return affinity


def cpu_model() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Names of the processor's instruction sets as Linux spells them; empty where it does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _proc_kilobytes(path: Path, key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB$", _text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
