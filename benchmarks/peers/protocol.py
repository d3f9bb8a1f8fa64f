"""What a side of the benchmark is to the driver: a process group that trains on command.

A side script ends in `serve(build)`, where `build(job)` returns a function that runs one training step
on this rank's sequences and returns their mean loss. Rank 0 reads commands from standard input and
answers on standard output, one JSON object per line:

    (start)   {"ready": true, "versions": {...}, "parameters": N}
    go 3      {"wall": seconds, "cpu": seconds summed over ranks, "losses": [...], "memory": bytes}

Between commands every rank sleeps. Rank 0 starts the others, each with a pipe as standard input that
only rank 0 holds: when the driver or rank 0 goes away, however it ends, the rest see end-of-file and
leave. Nothing else may write to the answers: file descriptor 1 is redirected to standard error.
"""

import argparse
import json
import os
import platform
import queue
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from case import Case, read_case, read_tokens

GRACE_SECONDS = 20.0
REPORTED = ("torch", "transformers", "torchtitan", "deepspeed", "megatron-core", "megascale-moe")


@dataclass(frozen=True)
class Job:
    """What the driver asked this rank to be.

    `together` consecutive ranks get the same sequences of a step, because they share the work of each.
    """

    folder: Path
    case: Case
    dtype: torch.dtype
    rank: int
    ranks: int
    threads: int
    device: torch.device
    together: int
    options: tuple[str, ...]

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    @property
    def sequences(self) -> range:
        """Those of a step that this rank gets."""
        share = self.case.sequences * self.together // self.ranks
        first = self.rank // self.together * share
        return range(first, first + share)


Step = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[Job], Step]


def read_job() -> Job:
    """Parse the command line; what is left over belongs to the side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--together", type=int, default=1)
    known, rest = parser.parse_known_args()
    dtype = torch.bfloat16 if known.dtype == "bf16" else torch.float32
    rank = int(os.environ.get("RANK", "0"))
    case = read_case(known.folder)
    device = torch.device(known.device)
    return Job(known.folder, case, dtype, rank, known.ranks, known.threads, device, known.together, tuple(rest))


def serve(build: Build) -> None:
    """Run this rank until standard input ends, and leave without the interpreter's clean-up: it can hang on gloo."""
    status = 1
    try:
        work(build)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def work(build: Build) -> None:
    """Answer commands until there are no more."""
    answers = take_standard_output()
    job = read_job()
    torch.set_num_threads(job.threads)
    commands = watch_standard_input()
    with_peers(job)
    worker = Worker(job, build(job))
    if job.rank == 0:
        answer(answers, {"ready": True, "versions": versions(job.device)})
    while (count := next_count(job, commands)) > 0:
        result = worker.run(count)
        if job.rank == 0:
            answer(answers, result)


def take_standard_output() -> TextIO:
    """Keep standard output for answers and send everybody else's prints to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def watch_standard_input() -> "queue.Queue[str | None]":
    """Lines of standard input as a queue; at its end the process leaves even if a collective hangs."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lines


def with_peers(job: Job) -> None:
    """Start the other ranks from rank 0 and join the gloo group through a file."""
    meeting = job.folder / f"meeting-{os.getpid() if job.rank == 0 else os.environ['MEETING']}"
    if job.rank == 0:
        for rank in range(1, job.ranks):
            start_rank(rank, job.ranks)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(job.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=job.rank, world_size=job.ranks, timeout=timedelta(hours=6)
    )


PIPES: list[subprocess.Popen[bytes]] = []


def start_rank(rank: int, ranks: int) -> None:
    """One more process of this script, on its own host if there are several; its input is open as long as we live."""
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MEETING": str(os.getpid())}
    command = [*enter_host(rank), sys.executable, *sys.argv]
    PIPES.append(subprocess.Popen(command, env=os.environ | places, stdin=subprocess.PIPE, stdout=2))


def enter_host(rank: int) -> list[str]:
    """What to put before a command to run it on the host of a rank: network namespaces that HOSTS names, if any."""
    hosts = os.environ.get("HOSTS", "").split(",")
    return ["ip", "netns", "exec", hosts[rank]] if hosts[0] else []


def next_count(job: Job, commands: "queue.Queue[str | None]") -> int:
    """Number of steps to run now, the same on all ranks; 0 to stop."""
    count = torch.zeros(1, dtype=torch.int64)
    if job.rank == 0:
        line = commands.get()
        count[0] = int(line.split()[1]) if line and line.startswith("go ") else 0
    dist.broadcast(count, 0)
    return int(count)


class Worker:
    """Runs numbered steps of one rank and measures them."""

    def __init__(self, job: Job, step: Step) -> None:
        self.step, self.device = step, job.device
        mine = job.sequences
        self.tokens = read_tokens(job.folder)[:, mine.start : mine.stop].contiguous()
        self.done = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[self.done % len(self.tokens)].to(self.device)
        self.done += 1
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run(self, count: int) -> dict[str, object]:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [self.step(*self.batch()) for _ in range(count)]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall} | sum_over_ranks(cpu, losses, self.device)


def sum_over_ranks(cpu: float, losses: list[Tensor], device: torch.device) -> dict[str, object]:
    """CPU seconds and memory (of a GPU what its allocator gave out at most) summed, losses averaged over the ranks."""
    gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    numbers = torch.tensor([cpu, memory, *(loss.item() for loss in losses)], dtype=torch.float64)
    dist.all_reduce(numbers)
    cpu, memory, *sums = numbers.tolist()
    return {"cpu": cpu, "memory": memory, "losses": [loss / dist.get_world_size() for loss in sums]}


def versions(device: torch.device) -> dict[str, str]:
    """Versions of Python and of the packages under test that this environment has, and what GPU it computes on."""
    found = {"python": platform.python_version()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for name in REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
