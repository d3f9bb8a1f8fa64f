"""What messages of the package reach on a cluster's links: point to point against gloo's own all-to-all.

    python benchmarks/cluster/messages.py [--rate 200] [--megabytes 12]

2 and 4 ranks, congestion control reno and bbr; payload in Mbit/s that a rank sends while it receives as much: median
and best of `--rounds` rounds. And, on the same links, the time of an empty exchange and the cores that a rank uses
while its links are full: its own, and the kernel's outside of any process (other work on the machine adds to that).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from benchmarks.cluster.cluster import Shape, cluster
from benchmarks.cluster.ranks import run_on_cluster
from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import exchange
from megascale_moe.config import ConfigError


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of CPU, from when all ranks are ready to when all are done."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    dist.barrier()
    return time.perf_counter() - start, time.process_time() - cpu


def softirq_seconds() -> float:
    """CPU seconds the kernel has spent on packets and timers, on behalf of nobody."""
    return int(Path("/proc/stat").read_text(encoding="ascii").split()[7]) / os.sysconf("SC_CLK_TCK")


def rank_figures(size: int, rounds: int) -> dict[str, float]:
    """On a rank: the figures of this module's text; `size` bytes to all together."""
    world = dist.get_world_size()
    axis = Axis("ep", world, dist.get_rank(), dist.group.WORLD, (), "gloo")
    out = [torch.zeros(size // world, dtype=torch.uint8) for _ in range(world)]
    into = [torch.empty_like(part) for part in out]
    joined = torch.cat(out)
    one, other = ([torch.zeros(1, dtype=torch.uint8) for _ in range(world)] for _ in range(2))
    megabits = size // world * (world - 1) * 8e-6
    softirq, began = softirq_seconds(), time.perf_counter()
    ours = [timed(lambda: exchange(out, into, axis, 1).wait()) for _ in range(rounds)]
    softirq = (softirq_seconds() - softirq) / (time.perf_counter() - began)
    gloo = [timed(lambda: dist.all_to_all_single(torch.empty_like(joined), joined)) for _ in range(rounds)]
    empty = [timed(lambda: exchange(one, other, axis, 2).wait()) for _ in range(20)]
    return {
        "exchange Mbit/s": megabits / median(seconds for seconds, _ in ours),
        "best": megabits / min(ours)[0],
        "all_to_all_single Mbit/s": megabits / median(seconds for seconds, _ in gloo),
        "best of it": megabits / min(gloo)[0],
        "empty exchange and barrier ms": median(seconds for seconds, _ in empty) * 1e3,
        "rank's cores": sum(cpu for _, cpu in ours) / sum(seconds for seconds, _ in ours),
        "softirq cores": softirq,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="of the links, Mbit/s")
    parser.add_argument("--megabytes", type=float, default=12.0, help="of a message to all ranks together")
    parser.add_argument("--rounds", type=int, default=9)
    o = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in (2, 4):
        for congestion in ("reno", "bbr"):
            try:
                with cluster(Shape(ranks, ranks, o.rate * 1e6, congestion=congestion)) as made:
                    found = run_on_cluster(made, rank_figures, int(o.megabytes * 1e6), o.rounds)[0]
            except ConfigError as error:
                print(f"cluster: {error}", file=sys.stderr)
                return 2
            figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{ranks} ranks, {congestion}: {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
