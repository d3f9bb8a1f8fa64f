"""`megascale doctor`: what this machine has, what a run would use of it, and what is missing.

Every line is one finding with one of three verdicts: ok, optional (something useful is not there, the hint says what
it would give), problem (training cannot work until the hint is followed). Nothing is guessed where it can be tried:
two ranks are forked and exchange a tensor the way a run's ranks do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from json import dumps
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.config import RunConfig
from megascale_moe.train.hardware import available_cores, available_memory, cpu_flags, cpu_model, gpu_peak

PYTHON_MIN = (3, 11)
TORCH_MIN = (2, 11)
MEMORY_LOW = 4 * 10**9  # the interpreter and torch alone take 0.25 GB, most of it shared by forked ranks
DISK_NEEDED = 10**9  # a checkpoint of the quickstart takes 0.1 GB, and two are kept while a third is written
EXCHANGE_SECONDS = 20.0
GB = 1e9

VECTOR_UNITS = {  # as /proc/cpuinfo spells them; the last is Arm's
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16", "bf16": "BF16",
}  # fmt: skip

NEEDED = {
    "numpy": "data loading",
    "tokenizers": "tokenizers",
    "safetensors": "checkpoints",
    "rich": "tables and the progress line",
}
OPTIONAL = {
    "tensorboard": "curves of a run in TensorBoard",
    "datasets": 'corpora from the Hugging Face hub (data.path = "name")',
    "pyarrow": "corpora in Parquet files",
    "triton": "fused GPU kernels",
    "transformers": "tests against other people's models",
}


class Status(StrEnum):
    """The verdict on one finding."""

    OK = "ok"
    OPTIONAL = "optional"  # missing, and training works without it
    PROBLEM = "problem"  # missing, and training does not


COLOURS = {Status.OK: "green", Status.OPTIONAL: "yellow", Status.PROBLEM: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    value: str  # what is there
    hint: str = ""  # what would be right, or what it would give
    status: Status = Status.OK


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at everything and return the findings; `folder` is where runs would go.

    The exchange comes before any look at the GPUs: a process that has used CUDA must not be forked.
    """
    exchange = [_gloo(), *_exchange()]
    return [
        _python(),
        _torch(),
        *_cpu(),
        _memory(),
        *_gpus(),
        *exchange,
        _used(),
        _compiler(),
        *(_package(name, use, Status.PROBLEM) for name, use in NEEDED.items()),
        *(_package(name, use, Status.OPTIONAL) for name, use in OPTIONAL.items()),
        _disk(folder or Path(RunConfig().folder)),
    ]


def main(json: bool = False, folder: Path | None = None) -> int:
    """Print the findings to standard output, as a table or one JSON document; 1 if something needed is missing."""
    findings = examine(folder)
    passed = all(finding.status != Status.PROBLEM for finding in findings)
    if json:
        print(dumps({"passed": passed, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if passed else 1
    table = Table(box=None, pad_edge=False)
    for column in ("what", "verdict", "found", "hint"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = Text(finding.status, style=COLOURS[finding.status])
        table.add_row(finding.name, verdict, Text(finding.value), Text(finding.hint))
    # Through a pipe nothing tells the width: do not cut lines for a terminal that is not there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0 if passed else 1


def _judged(name: str, good: bool, value: str, hint: str, missing: Status = Status.PROBLEM) -> Finding:
    """Return a finding with a hint unless all is good."""
    return Finding(name, value) if good else Finding(name, value, hint, missing)


def _python() -> Finding:
    version, wanted = sys.version_info[:3], ".".join(map(str, PYTHON_MIN))
    value = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    return _judged("python", version >= PYTHON_MIN, value, f"install Python {wanted} or newer")


def _torch() -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    hint = f"pip install 'torch>={'.'.join(map(str, TORCH_MIN))}'"
    return _judged("torch", numbers >= TORCH_MIN, f"{torch.__version__}, {build}", hint)


def _cpu() -> list[Finding]:
    cores, total = available_cores(), os.cpu_count() or 1
    value = str(cores) if cores == total else f"{cores} of {total} (affinity or container limit)"
    model = f"{cpu_model()}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    return [Finding("cpu", model), Finding("cores", value), _vector_units(cpu_flags())]


def _vector_units(flags: frozenset[str]) -> Finding:
    """Look for a BF16 unit: without one torch computes in FP32 and converts on the way in and out."""
    units = ", ".join(name for flag, name in VECTOR_UNITS.items() if flag in flags)
    good = any("bf16" in flag for flag in flags & VECTOR_UNITS.keys())
    hint = 'no BF16 instructions seen: on this CPU train.dtype = "fp32" is the faster choice'
    return _judged("vector units", good, units or "unknown", hint, Status.OPTIONAL)


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return Finding("memory", "unknown on this system")
    hint = "start few ranks (--nproc 2) and small models"
    return _judged("memory", free >= MEMORY_LOW, f"{free / GB:.1f} GB available", hint, Status.OPTIONAL)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        hint = "an NVIDIA GPU is there, but torch cannot use it: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        if not any(Path("/dev").glob("nvidia[0-9]*")):
            hint = "training runs on the CPU"
        elif torch.version.cuda is None:
            hint = "an NVIDIA GPU is there, but this torch is a CPU build: install a CUDA build of torch"
        return [Finding("gpu", "none usable", hint, Status.OPTIONAL)]
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = f"{properties.name}, {properties.total_memory / GB:.0f} GB, sm_{properties.major}{properties.minor}"
        peak = gpu_peak(properties.name)
        yardstick = f"{peak / 1e12:.0f} TFLOP/s" if peak else "a measured matrix product"
        gpus.append(Finding(f"gpu {index}", value, f"MFU counts against {yardstick}"))
    there, version = dist.is_nccl_available(), "not in this torch"
    if there:
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    missing = Status.PROBLEM if len(gpus) > 1 else Status.OPTIONAL
    hint = "GPUs exchange through NCCL: install a build that has it"
    return [*gpus, _judged("nccl", there, version, hint, missing)]


def _gloo() -> Finding:
    there = dist.is_gloo_available()
    hint = "ranks on CPUs exchange through gloo: install an official build of torch"
    return _judged("gloo", there, "in this torch" if there else "missing", hint)


def _exchange(seconds: float = EXCHANGE_SECONDS) -> list[Finding]:
    """Try the loopback interface, and two forked ranks that talk over it.

    A rank that fails shows its own traceback on standard error.
    """
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
    loopback = _judged("loopback", bool(interface), interface or "no interface", "bring it up: ip link set lo up")
    if not interface or not dist.is_gloo_available():
        return [loopback]
    start = time.monotonic()

    def watch() -> None:
        if time.monotonic() > start + seconds:
            raise TimeoutError(f"no answer within {seconds:g} s")

    try:
        status = fork_ranks(2, _swap, timeout=seconds, poll=watch)
        failure = f"failed with exit status {status}" if status else ""
    except (OSError, RuntimeError) as error:
        failure = f"failed: {error}"
    value = failure or f"exchanged a tensor in {time.monotonic() - start:.1f} s"
    hint = "allow local processes to talk over 127.0.0.1 (firewall, sandbox), a writable temporary folder, fork"
    return [loopback, _judged("two ranks", not failure, value, hint)]


def _swap(rank: int) -> None:
    """Send this rank's number to both ranks."""
    received = torch.empty(2)
    dist.all_to_all_single(received, torch.full((2,), float(rank)))
    if received.tolist() != [0.0, 1.0]:
        raise SystemExit(3)


def _used() -> Finding:
    """Return the device that a run takes unless one is named."""
    value = f"cpu with gloo, {available_cores()} cores: ranks of one thread each"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        value = f"cuda with NCCL, up to {count} rank{'s' if count > 1 else ''}"
    return Finding("used", value)


def _compiler() -> Finding:
    wanted = os.environ.get("CXX", "").split()[:1] or ["g++", "c++", "clang++"]
    path = next(filter(None, map(shutil.which, wanted)), "")
    hint = f"torch.compile needs one of {', '.join(wanted)}"
    return _judged("c++ compiler", bool(path), path or "none", hint, Status.OPTIONAL)


def _package(name: str, use: str, missing: Status) -> Finding:
    """Look for a package without importing it: some take seconds."""
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", f"{use}: pip install {name}", missing)
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "version unknown")


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("run folder", f"{there} cannot be written", "choose another --run.folder=PATH", Status.PROBLEM)
    hint = f"checkpoints need at least {DISK_NEEDED / GB:.0f} GB: free some or choose another --run.folder=PATH"
    return _judged("run folder", free >= DISK_NEEDED, f"{free / GB:.1f} GB free in {there}", hint)
