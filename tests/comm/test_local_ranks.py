"""Forked ranks end together: a failing one takes the others down, a killed parent leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megascale_moe.comm import local_ranks
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.testing import run_ranks
from megascale_moe.train.hardware import available_cores

PATIENCE = 30.0  # seconds until a test gives up; nothing is measured


def wait_for(condition: Callable[[], bool]) -> bool:
    """Poll until it holds."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    """A process that is not a zombie; an orphan in a container may stay one until its new parent looks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def pids(folder: Path) -> list[int]:
    """Processes that left their number in the folder."""
    return [int(path.name) for path in folder.glob("*")]


def test_ranks_know_their_place_and_run_on_one_thread() -> None:
    assert run_ranks(3, place) == [("0", "3", 0, 3, 1), ("1", "3", 1, 3, 1), ("2", "3", 2, 3, 1)]


def place() -> tuple[str, str, int, int, int]:
    env = os.environ
    return env["LOCAL_RANK"], env["WORLD_SIZE"], dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


@pytest.fixture
def two_processors() -> Iterator[list[int]]:
    """This process and its forks may run on two at most."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield sorted(before)[:2]
    os.sched_setaffinity(0, before)


def where() -> tuple[set[int], set[int], set[int], int, set[str]]:
    """Processors of this rank, of a thread of its while others wait, of it again, and of the job; its threads'."""
    alone = os.sched_getaffinity(0)
    with local_ranks.on_all_processors(), ThreadPoolExecutor(1) as pool:
        thread = pool.submit(os.sched_getaffinity, 0).result()
    status = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
    threads = {line.split()[1] for text in status for line in text.splitlines() if line.startswith("Cpus_allowed_list")}
    return alone, thread, os.sched_getaffinity(0), available_cores(), threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose")
def test_ranks_beyond_the_processors_keep_to_one_each(two_processors: list[int]) -> None:
    """Threads of gloo spun for a rank that had been interrupted: more than half of the time of four ranks on two."""
    for rank, (alone, thread, again, cores, threads) in enumerate(run_ranks(4, where)):
        own = two_processors[rank % len(two_processors)]
        assert alone == again == {own}
        assert threads == {str(own)}
        assert thread == set(two_processors)
        assert cores == available_cores()  # of the job, not the one that the rank keeps to
    if len(two_processors) == 2:
        (only,) = run_ranks(1, where)
        assert only[0] == set(two_processors)


@pytest.mark.parametrize("failing", [0, 2])
def test_failing_rank_ends_all_and_gives_the_status(failing: int, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        dist.barrier()
        if rank == failing:
            raise SystemExit(3)
        time.sleep(10 * PATIENCE)

    assert fork_ranks(3, run) == 3
    assert len(pids(tmp_path)) == 3
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize(
    ("codes", "first", "status"),
    [
        ([1, 7], [1], 7),  # rank 0 failed as a consequence, a moment later, and only comes first in the list
        ([1, 7], [0, 1], 1),
        ([1, None, 2], [0], 2),  # the user's mistake is often noticed while peers already lost the connection
        ([1, -9, 0], [0], 137),  # others fail because it is gone
        ([2, -9], [1], 2),
        ([None, 3, None], [1], 3),
    ],
)
def test_status_is_that_of_the_cause(codes: list[int | None], first: list[int], status: int) -> None:
    """What `fork_ranks` decides from the ranks that have ended; as a function, since who ends first is up to luck."""
    assert local_ranks._cause(codes, first) == status


def test_killed_rank_is_named_and_gives_the_status_of_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    def run(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10 * PATIENCE)

    assert fork_ranks(2, run) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_poll_runs_in_the_parent_and_its_error_ends_the_ranks(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(10 * PATIENCE)

    def poll() -> None:
        if len(pids(tmp_path)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fork_ranks(2, run, poll=poll)
    assert not any(alive(pid) for pid in pids(tmp_path))


PARENT = """
import os, sys, time
from pathlib import Path
from megascale_moe.comm.local_ranks import fork_ranks

def run(rank):
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)

fork_ranks(3, run)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_killed_parent_leaves_no_children(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    try:
        assert wait_for(lambda: len(pids(tmp_path)) == 3)
        ranks = pids(tmp_path)
        assert all(alive(pid) for pid in ranks)
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in ranks))


def test_run_ranks_carries_the_traceback_of_the_rank_that_raised() -> None:
    with pytest.raises(AssertionError, match=r"(?s)error-1.*in raise_on_one.*ValueError: no such expert"):
        run_ranks(2, raise_on_one)


def raise_on_one() -> bytes:
    """Rank 0 has megabytes to return: a pipe nobody reads would block it, and its half message the parent."""
    if dist.get_rank() == 1:
        raise ValueError("no such expert")
    return bytes(1 << 22)


def test_run_ranks_names_the_status_of_a_rank_that_vanished() -> None:
    with pytest.raises(AssertionError, match="a rank ended with status 137"):
        run_ranks(2, vanish)


def vanish() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10 * PATIENCE)
