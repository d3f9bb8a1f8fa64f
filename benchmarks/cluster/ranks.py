"""Ranks on a cluster of namespaces: a function in forked ranks, or any command once per rank.

Forking takes 0.2 s where a fresh interpreter per rank takes 5 to 10 on two cores. Either way a rank is a child of this
process that moves into the network namespace of its host before it does anything else. Ranks end together: with their
parent (a death signal), when one of them fails or is killed, and with everything they have started themselves, which
is found by its namespace.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster.cluster import NAMESPACES, Cluster
from megascale_moe.comm.local_ranks import stopped
from megascale_moe.config import require

CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
GATHER = 0.3
"""Seconds to look which other ranks fail after a first one: the one that knows the cause is often not the first."""
STOPPED = 128 + signal.SIGSTOP
PATIENCE = 5.0
"""Seconds a rank has to end once it was asked to."""


@dataclass(frozen=True)
class Failure:
    """The rank to blame for the end of all. `status` is that of a shell: 128 + N if signal N killed or stopped it."""

    rank: int
    host: str
    status: int

    def __str__(self) -> str:
        how = f"failed with exit status {self.status}"
        if self.status > 128 and self.status - 128 in {s.value for s in signal.Signals}:
            verb = "stopped" if self.status == STOPPED else "killed"
            how = f"was {verb} by {signal.Signals(self.status - 128).name}"
        return f"rank {self.rank} on {self.host} {how}; all ranks are ended"


class RankFailed(RuntimeError):
    """A rank failed; the text names it and has the tracebacks of those that could tell."""

    def __init__(self, failure: Failure, tracebacks: Sequence[str] = ()) -> None:
        super().__init__("\n".join([str(failure), *tracebacks]))
        self.failure = failure


def run_on_cluster(cluster: Cluster, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group over the cluster; returns the results in rank order.

    As `megascale_moe.testing.run_ranks`, but on hosts of their own. The rendezvous is a TCP store at rank 0's address.

    Args:
        timeout: seconds after which a collective whose peer does not answer fails.

    Raises:
        RankFailed: a rank raised or died.
    """
    port = cluster.next_port()
    with tempfile.TemporaryDirectory(prefix="megascale-") as name:
        folder = Path(name)

        def call(rank: int) -> None:
            os.environ |= cluster.environment(rank, port)
            torch.set_num_threads(1)  # first of all: a forked child must not touch its parent's thread pool
            try:
                _join_and_call(rank, function, args, timeout, folder)
            except BaseException:
                (folder / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
                raise SystemExit(1) from None

        failure = _run(cluster, call)
        if failure:
            errors = [f"{path.name}:\n{path.read_text(encoding='utf-8')}" for path in sorted(folder.glob("error-*"))]
            raise RankFailed(failure, errors)
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(cluster.shape.ranks)]


def run_command(cluster: Cluster, command: Sequence[str]) -> int:
    """Run a command once per rank with the environment torchrun would give it; returns the exit status to report.

    Output goes where this process's goes. If a rank fails, the others are ended and a line says which it was.

    Raises:
        ConfigError: there is no such command.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command[0], path=path)
    require(program is not None, f"command {command[0]!r} not found")
    port = cluster.next_port()

    def call(rank: int) -> None:
        environment = os.environ | cluster.environment(rank, port) | {"PATH": path}
        os.execve(str(program), list(command), environment)

    failure = _run(cluster, call)
    if failure is None:
        return 0
    print(f"cluster: {failure}", file=sys.stderr, flush=True)
    return failure.status


def _join_and_call(
    rank: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, folder: Path
) -> None:
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), rank=rank, world_size=world)
    result = pickle.dumps(function(*args))
    (folder / f"result-{rank}").write_bytes(result)
    dist.barrier()  # nobody leaves while a peer still talks to it
    dist.destroy_process_group()


def _run(cluster: Cluster, call: Callable[[int], None]) -> Failure | None:
    """`call(rank)` in a process per rank, each on its host; None if all went well."""
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    ranks = [
        context.Process(target=_rank, args=(cluster, parent, call, rank), daemon=False)
        for rank in range(cluster.shape.ranks)
    ]
    started: list[BaseProcess] = []
    try:
        for process in ranks:
            process.start()
            started.append(process)
        rank, status = _wait(ranks)
    finally:
        _end(started)
        cluster.end_processes()
    return Failure(rank, cluster.host(rank).name, status) if status else None


def _rank(cluster: Cluster, parent: int, call: Callable[[int], None], rank: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was armed
        os._exit(1)
    # Ctrl-C reaches every process of a terminal: ranks leave it to their parent, which ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _enter(libc, cluster.host(rank).name)
    _name_hosts(libc, cluster)
    call(rank)


def _enter(libc: ctypes.CDLL, namespace: str) -> None:
    """Move this process, which has one thread as it was just forked, into a network namespace."""
    handle = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(handle, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns into {namespace}")
    finally:
        os.close(handle)


def _name_hosts(libc: ctypes.CDLL, cluster: Cluster) -> None:
    """Give this process an /etc/hosts of its own: torch asks for the names of addresses and warns if there is none.

    It is no loss where this cannot be done.
    """
    if libc.unshare(CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return
    forms = ("", "::ffff:")  # as such, and as sockets for both versions of IP see it
    lines = [f"{form}{host.address} host{host.index}" for host in cluster.hosts for form in forms]
    with tempfile.NamedTemporaryFile("w", prefix="megascale-", encoding="ascii") as file:
        file.write("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        file.flush()
        libc.mount(os.fsencode(file.name), b"/etc/hosts", None, MS_BIND, None)  # the mount outlives the name


def _wait(ranks: Sequence[BaseProcess]) -> tuple[int, int]:
    """Until all ranks are done, or one has failed: (the rank to blame, its exit status), (0, 0) if all went well."""
    while True:
        first = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if first:
            time.sleep(GATHER)
            return _blame([-signal.SIGSTOP if stopped(p) else p.exitcode for p in ranks], first)
        if all(process.exitcode == 0 for process in ranks):
            return 0, 0
        time.sleep(0.02)


def _blame(codes: Sequence[int | None], first: Sequence[int]) -> tuple[int, int]:
    """(rank, exit status): one that was killed or stopped comes before others, which fail because it is gone."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    rank = min(failed, key=lambda rank: (failed[rank] > 0, rank not in first))
    return rank, failed[rank] if failed[rank] > 0 else 128 - failed[rank]


def _end(ranks: Sequence[BaseProcess]) -> None:
    """Ask, wait, kill; one that is stopped cannot hear."""
    for process in ranks:
        if process.is_alive():
            (process.kill if stopped(process) else process.terminate)()
    limit = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.0, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
        process.join()
