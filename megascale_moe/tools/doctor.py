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
    "datasets": "corpora from the Hugging Face hub (data.path = \"name\")",
    "pyarrow": "corpora in Parquet files",
    "triton": "fused GPU kernels",
    "transformers": "tests against other people's models",
}


class Status(StrEnum):
    """The verdict on one finding."""

    OK = "ok"
    OPTIONAL = "optional"  # missing, and training works without it
    PROBLEM = "problem"  # missing, and training does not


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    status: Status
    value: str  # what is there
    hint: str = ""  # what would be right, or what it would give


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at everything; `folder` is where runs would go.

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
    else:
        _print_table(findings)
    return 0 if passed else 1


def _print_table(findings: list[Finding]) -> None:
    colours = {Status.OK: "green", Status.OPTIONAL: "yellow", Status.PROBLEM: "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("what", "verdict", "found", "hint"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = Text(finding.status, style=colours[finding.status])
        table.add_row(finding.name, verdict, Text(finding.value), Text(finding.hint))
    # Through a pipe nothing tells the width: do not cut lines for a terminal that is not there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _python() -> Finding:
    found, wanted = sys.version_info[:3], ".".join(map(str, PYTHON_MIN))
    value = f"{'.'.join(map(str, found))} on {platform.system()} {platform.machine()}"
    return _needed("python", found >= PYTHON_MIN, value, f"install Python {wanted} or newer")


def _torch() -> Finding:
    wanted = ".".join(map(str, TORCH_MIN))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    return _needed("torch", numbers >= TORCH_MIN, f"{torch.__version__}, {build}", f"pip install 'torch>={wanted}'")


def _cpu() -> list[Finding]:
    cores, total = available_cores(), os.cpu_count() or 1
    value = str(cores) if cores == total else f"{cores} of {total} (affinity or container limit)"
    model = f"{cpu_model()}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    return [Finding("cpu", Status.OK, model), Finding("cores", Status.OK, value), _vector_units(cpu_flags())]


def _vector_units(flags: frozenset[str]) -> Finding:
    """Without a BF16 unit torch computes in FP32 and converts on the way in and out."""
    found = ", ".join(name for flag, name in VECTOR_UNITS.items() if flag in flags)
    if any("bf16" in flag for flag in flags & VECTOR_UNITS.keys()):
        return Finding("vector units", Status.OK, found)
    hint = 'no BF16 instructions seen: on this CPU train.dtype = "fp32" is the faster choice'
    return Finding("vector units", Status.OPTIONAL, found or "unknown", hint)


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return Finding("memory", Status.OK, "unknown on this system")
    low = free < MEMORY_LOW
    hint = "start few ranks (--nproc 2) and small models" if low else ""
    return Finding("memory", Status.OPTIONAL if low else Status.OK, f"{free / GB:.1f} GB available", hint)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("gpu", Status.OPTIONAL, "none usable", _why_no_gpu())]
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    return [*gpus, _nccl(len(gpus))]


def _why_no_gpu() -> str:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "training runs on the CPU"
    if torch.version.cuda is None:
        return "an NVIDIA GPU is there, but this torch is a CPU build: install a CUDA build of torch"
    return "an NVIDIA GPU is there, but torch cannot use it: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    value = f"{properties.name}, {properties.total_memory / GB:.0f} GB, sm_{properties.major}{properties.minor}"
    peak = gpu_peak(properties.name)
    rate = f"MFU counts against {peak / 1e12:.0f} TFLOP/s" if peak else "MFU counts against a measured matrix product"
    return Finding(f"gpu {index}", Status.OK, value, rate)


def _nccl(gpus: int) -> Finding:
    if dist.is_nccl_available():
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return Finding("nccl", Status.OK, ".".join(map(str, version)))
    status = Status.PROBLEM if gpus > 1 else Status.OPTIONAL
    return Finding("nccl", status, "not in this torch", "GPUs exchange through NCCL: install a build that has it")


def _gloo() -> Finding:
    hint = "ranks on CPUs exchange through gloo: install an official build of torch"
    return _needed("gloo", dist.is_gloo_available(), "in this torch" if dist.is_gloo_available() else "missing", hint)


def _exchange(seconds: float = EXCHANGE_SECONDS) -> list[Finding]:
    """The loopback interface, and two forked ranks that talk over it."""
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
    loopback = _needed("loopback", bool(interface), interface or "no interface", "bring it up: ip link set lo up")
    if not interface or not dist.is_gloo_available():
        return [loopback]
    start = time.monotonic()
    failure = _failed_exchange(seconds)
    value = failure or f"exchanged a tensor in {time.monotonic() - start:.1f} s"
    hint = "allow local processes to talk over 127.0.0.1 (firewall, sandbox), a writable temporary folder, fork"
    return [loopback, _needed("two ranks", not failure, value, hint)]


def _failed_exchange(seconds: float) -> str:
    """Return what went wrong, empty if nothing did. A rank that fails shows its own traceback on standard error."""
    deadline = time.monotonic() + seconds

    def watch() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:g} s")

    try:
        status = fork_ranks(2, _swap, timeout=seconds, poll=watch)
    except (OSError, RuntimeError) as error:
        return f"failed: {error}"
    return f"failed with exit status {status}" if status else ""


def _swap(rank: int) -> None:
    """Both ranks send their number to both."""
    received = torch.empty(2)
    dist.all_to_all_single(received, torch.full((2,), float(rank)))
    if received.tolist() != [0.0, 1.0]:
        raise SystemExit(3)


def _used() -> Finding:
    """Return the device that a run takes unless one is named."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Finding("used", Status.OK, f"cuda with NCCL, up to {count} rank{'s' if count > 1 else ''}")
    return Finding("used", Status.OK, f"cpu with gloo, {available_cores()} cores: ranks of one thread each")


def _compiler() -> Finding:
    wanted = os.environ.get("CXX", "").split()[:1] or ["g++", "c++", "clang++"]
    found = next((path for name in wanted if (path := shutil.which(name))), None)
    if found:
        return Finding("c++ compiler", Status.OK, found)
    return Finding("c++ compiler", Status.OPTIONAL, "none", f"torch.compile needs one of {', '.join(wanted)}")


def _package(name: str, use: str, missing: Status) -> Finding:
    """Found without importing it: some take seconds."""
    if importlib.util.find_spec(name) is None:
        return Finding(name, missing, "not installed", f"{use}: pip install {name}")
    try:
        return Finding(name, Status.OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, Status.OK, "version unknown")


def _disk(folder: Path) -> Finding:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    value = f"{free / GB:.1f} GB free in {there}"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("run folder", Status.PROBLEM, f"{there} cannot be written", "choose another --run.folder=PATH")
    hint = f"checkpoints need at least {DISK_NEEDED / GB:.0f} GB: free some or choose another --run.folder=PATH"
    return _needed("run folder", free >= DISK_NEEDED, value, hint)


def _needed(name: str, there: bool, value: str, hint: str) -> Finding:
    return Finding(name, Status.OK if there else Status.PROBLEM, value, "" if there else hint)
