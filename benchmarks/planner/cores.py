"""A processor of its own for each rank, so that ranks are as independent as GPUs are.

Ranks that share a core are not: while one waits, the other computes faster, and how they take turns (4 ms at a time)
is more than a message takes. So there should be no more ranks than cores, each is bound to one, and they come before
whatever else the machine does. Not by a real-time class: a rank's network threads have to take turns with its
computation, and neither a higher nor a lower class lets them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megascale_moe.config import require
from megascale_moe.train.hardware import available_cores

FIRST = -20
"""The nice value of what comes first."""


def check(ranks: int) -> None:
    """Refuse what would load cores unequally.

    Raises:
        ConfigError: there are too few cores, and their number does not divide the ranks.
    """
    cores = available_cores()
    require(
        ranks <= cores or ranks % cores == 0,
        f"{ranks} ranks cannot share {cores} cores equally; use --ranks {cores} or a multiple",
    )


def take(rank: int) -> None:
    """Bind this process, with the threads that it has, to the core of a rank; needs root."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[rank % len(cores)]
    if os.getsid(0) != os.getpid():
        os.setsid()  # a share of its own among sessions, which ends with it
    with contextlib.suppress(OSError):  # where the kernel shares cores between sessions, theirs counts
        Path("/proc/self/autogroup").write_text(str(FIRST), encoding="ascii")
    for name in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(name), {core})
        os.setpriority(os.PRIO_PROCESS, int(name), FIRST)
