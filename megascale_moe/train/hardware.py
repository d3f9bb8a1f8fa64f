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


def peak_flops(device: torch.device, dtype: torch.dtype, local_ranks: int = 1) -> float:
    """Return the FLOP/s within reach of one of `local_ranks` ranks here; on a CPU, ranks beyond the cores share them.

    Call it in one rank while the others wait: a CPU is measured, once per dtype and number of torch threads.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device)) or _measured_flops(device, dtype, 1)
    threads = torch.get_num_threads()
    return _measured_flops(device, dtype, threads) * min(1.0, available_cores() / (local_ranks * threads))


def gpu_peak(name: str) -> float | None:
    """Return the dense BF16 FLOP/s of a GPU by its name; None if it is unknown, or only a slice of one (MIG)."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if "MIG" in words:
        return None
    for (model, form), flops in SLOWER_FORMS.items():
        if {model, form} <= words:
            return flops
    return next((flops for model, flops in GPU_PEAKS.items() if model in words), None)


@cache
def _measured_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Return the best rate of a square matrix product; `threads` only tells measurements apart."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best, deadline = 0.0, now() + MEASURING_SECONDS
    for size in MATRIX_SIZES:
        matrix = torch.full((size, size), 0.5, dtype=dtype, device=device)  # no random draw: training must not notice
        for _ in range(REPEATS):
            start = now()
            if best and start > deadline:
                return best
            matrix @ matrix
            best = max(best, 2 * size**3 / (now() - start))
    return best


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held so far: of GPU memory, or (to about a megabyte) of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    high_water = _found(r"^VmHWM:\s*(\d+) kB$", "/proc/self/status")
    most = int(high_water or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most if sys.platform == "darwin" else most * 1024


def available_memory() -> int | None:
    """Return the bytes of main memory that new processes could take, within the container's limit; None if unknown."""
    free = _found(r"^MemAvailable:\s*(\d+) kB$", "/proc/meminfo")
    limit = _found(r"^(\d+)$", "/sys/fs/cgroup/memory.max")  # "max" where there is none
    return min(int(free) * 1024, int(limit or sys.maxsize)) if free else None


def available_cores() -> int:
    """Return the cores this process, or the job of this rank, may run on: its affinity, and the container's quota."""
    affinity = len(job_processors()) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_found(pattern, "/sys/fs/cgroup/cpu.max") for pattern in (r"^(\d+) \d+$", r"^\d+ (\d+)$"))
    return min(affinity, max(1, math.ceil(int(quota) / int(period)))) if quota else affinity


def cpu_model() -> str:
    """Return the processor's name."""
    return _found(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the names of the processor's instruction sets as Linux spells them; empty where it does not tell."""
    return frozenset(_found(r"^(?:flags|Features)\s*:\s*(.+)$", "/proc/cpuinfo").split())


def _found(pattern: str, path: str) -> str:
    """Return the group of a pattern in one of the kernel's files; "" where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""
