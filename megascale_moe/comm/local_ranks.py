"""Ranks as forked processes of this machine: for `megascale train` without torchrun, and for tests.

Forking takes 0.2 s where a fresh interpreter per rank takes 10. The rendezvous is a file, gloo is bound to the
loopback interface, so nothing listens to the network. Children die with their parent (Linux: a death signal), and
the first rank that fails takes the others down, and is named; a stopped one, when others have waited for it in vain.
Ctrl-C reaches every process of a terminal: ranks leave it to their parent, which ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from megascale_moe.comm.lost import LostPeer

PR_SET_PDEATHSIG = 1
GRACE = 1.0
"""Seconds until a rank tells of its failure: one that failed because a peer ended is itself ended within them, so that
the cause alone is shown."""


def fork_ranks(
    world: int,
    function: Callable[[int], object],
    *,
    threads: int = 1,
    timeout: float = 600.0,
    poll: Callable[[], None] | None = None,
) -> int:
    """Run `function(rank)` in `world` processes joined by a process group; returns the first bad exit status, or 0.

    Statuses are those of a shell: 128 + N for a rank that signal N killed.

    Args:
        threads: torch threads of each rank.
        timeout: seconds after which a collective whose peer is gone fails.
        poll: called in this process again and again while the ranks run.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="megascale-") as folder:
        arguments = (Path(folder) / "rendezvous", world, function, threads, timeout, os.getpid())
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            return _wait(ranks, poll)
        finally:
            _end(ranks)


def _rank(
    rank: int, store: Path, world: int, function: Callable[[int], object], threads: int, timeout: float, parent: int
) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was armed
        os._exit(1)
    if hasattr(os, "sched_getaffinity"):
        _job.update(os.sched_getaffinity(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)  # first of all: a forked child must not touch its parent's thread pool
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    # A parent that has used CUDA leaves it unusable to its forks; they are ranks on the CPU then.
    usable = not torch.cuda._is_in_bad_fork() and torch.cuda.is_available()
    cuda = usable and torch.cuda.device_count() >= world
    if cuda:
        torch.cuda.set_device(rank)
    elif threads == 1:
        _keep_to_a_processor(rank, world)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        function(rank)
        dist.barrier()  # nobody leaves while a peer still talks to it
    except LostPeer as lost:
        time.sleep(GRACE)
        print(f"megascale: {lost}", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception:
        time.sleep(GRACE)
        raise
    dist.destroy_process_group()


def _keep_to_a_processor(rank: int, world: int) -> None:
    """Bind this rank to one processor where ranks are as many as processors or more, so that none interrupts others.

    gloo's receiving thread spins on the lock that a rank holds while it sends. A rank that is interrupted there, by
    another or by its own receiving thread, lets that thread burn time slices on the other processor: four ranks on two
    processors polled 1.8 million times for 5 thousand events, which took more than half of all their time.
    """
    if hasattr(os, "sched_setaffinity") and world >= len(_job):  # Linux
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, {sorted(_job)[rank % len(_job)]})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


_job: set[int] = set()
"""Processors of the job that this process is a rank of; empty in one that is no rank."""


def job_processors() -> set[int]:
    """Return the processors that this process, or the job that it is a rank of, may run on (Linux)."""
    return _job or os.sched_getaffinity(0)


@contextlib.contextmanager
def on_all_processors() -> Iterator[None]:
    """Let a rank leave its processor, for work with several threads while the others wait."""
    if not _job:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _job)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _wait(ranks: Sequence[BaseProcess], poll: Callable[[], None] | None) -> int:
    """Wait until all ranks are done, or one has failed; return the exit status."""
    while True:
        if poll is not None:
            poll()
        first = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if first:
            time.sleep(0.2)  # the rank that knows the cause is often not the first to go
            return _cause([-signal.SIGSTOP if stopped(process) else process.exitcode for process in ranks], first)
        if all(process.exitcode == 0 for process in ranks):
            return 0
        time.sleep(0.02)


def _cause(codes: list[int | None], first: list[int]) -> int:
    """Return the exit status to blame, and print a line about it unless the rank explained itself (status 2).

    A killed or stopped rank comes before others: they fail because it is gone. So does a rank that was `first` to fail.
    """
    failed = {rank: code for rank, code in enumerate(codes) if code}
    rank = min(failed, key=lambda rank: (failed[rank] != 2, failed[rank] > 0, rank not in first))
    code = failed[rank]
    if code < 0:
        name = signal.Signals(-code).name
        verb = "stopped" if code == -signal.SIGSTOP else "killed"
        print(f"megascale: rank {rank} was {verb} by {name}; all ranks are ended", file=sys.stderr, flush=True)
    elif code != 2:
        print(f"megascale: rank {rank} failed with exit status {code}", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def stopped(process: BaseProcess) -> bool:
    """Return whether a process is there but does not run (Linux tells): it can end only by being killed."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"
    return False


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            (process.kill if stopped(process) else process.terminate)()
    for process in ranks:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
