"""What a cluster's links carry: payload of plain TCP, all ranks sending and receiving at once.

    python benchmarks/cluster/links.py [--seconds 2] [--rounds 3] [--write]

Every rank sends to the next one and receives from the one before (ring), or does so with all others at once (all):
with 2 ranks each link is full both ways, with 4 several senders meet at each receiver. The mixed cases have two nodes
of two ranks and fill both kinds of links at the same time. Of the rounds the one with the fastest slowest rank is kept:
other work on the machine can only slow a link down. Beside the rate stand what the links' own counters saw per byte of
payload and the cores that the whole machine used. Writes results.json beside this file with --write.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from benchmarks.cluster.cluster import INTER, INTRA, Cluster, Shape, cluster
from benchmarks.cluster.ranks import run_on_cluster
from megascale_moe.config import ConfigError
from megascale_moe.train.hardware import cpu_model

PORT = 30_000
CHUNK = bytes(1 << 18)
RATES = (100, 200, 1000)
MIXED = ((100, 25), (200, 50), (1000, 250))


@dataclass(frozen=True)
class Row:
    """One measurement; rates in Mbit/s per rank and direction, of payload where measured."""

    ranks: int
    nodes: int
    pattern: str
    link: str
    nominal: float
    slowest: float
    fastest: float
    wire_per_payload: float
    dropped: int
    cores: float


def peers_of(pattern: str, rank: int, world: int, node: int) -> dict[str, list[int]]:
    """Whom a rank sends to, by the link that carries it."""
    others = [(rank + 1) % world] if pattern == "ring" else [(rank + step) % world for step in range(1, world)]
    near = [peer for peer in others if peer // node == rank // node]
    return {INTRA: near, INTER: [peer for peer in others if peer not in near]}


def rank_rates(where: Cluster, pattern: str, seconds: float) -> tuple[dict[str, float], dict[str, int], float]:
    """On a rank: Mbit/s received and bytes sent per link, CPU seconds of the whole machine meanwhile."""
    shape, rank = where.shape, dist.get_rank()
    out = peers_of(pattern, rank, shape.ranks, shape.node)
    sources = {
        link: [other for other in range(shape.ranks) if rank in peers_of(pattern, other, shape.ranks, shape.node)[link]]
        for link in out
    }
    rate = {INTRA: shape.intra, INTER: shape.inter}
    share = {link: int(rate[link] * seconds / 8 / max(len(peers), 1)) for link, peers in out.items()}
    senders, receivers = connect_all(where, [peer for peers in out.values() for peer in peers])
    dist.barrier()
    start, busy = time.perf_counter(), busy_seconds()
    ends: dict[int, float] = {}
    work = [lambda s=senders[p], n=share[link]: send(s, n) for link, peers in out.items() for p in peers]
    work += [
        lambda p=peer, n=share[link]: receive(receivers[p], n, ends, p) for link in sources for peer in sources[link]
    ]
    in_threads(work)
    busy = busy_seconds() - busy
    rates = {
        link: len(peers) * share[link] * 8e-6 / (max(ends[p] for p in peers) - start)
        for link, peers in sources.items()
        if peers
    }
    dist.barrier()
    return rates, {link: share[link] * len(peers) for link, peers in out.items()}, busy / (max(ends.values()) - start)


def connect_all(where: Cluster, targets: Iterable[int]) -> tuple[dict[int, socket.socket], dict[int, socket.socket]]:
    """Connections to `targets` and those from ranks that have this one as a target."""
    rank, targets = dist.get_rank(), list(targets)
    lists: list[list[int]] = [[]] * where.shape.ranks
    dist.all_gather_object(lists, targets)
    server = socket.create_server((where.host(rank).address, PORT))
    dist.barrier()
    out = {}
    for peer in targets:
        out[peer] = socket.create_connection((where.host(peer).address, PORT))
        out[peer].sendall(rank.to_bytes(1, "big"))
    into = {}
    for _ in range(sum(rank in theirs for theirs in lists)):
        connection = server.accept()[0]
        into[connection.recv(1)[0]] = connection
    return out, into


def send(to: socket.socket, size: int) -> None:
    """`size` bytes of nothing."""
    while size > 0:
        size -= to.send(CHUNK[:size])


def receive(source: socket.socket, size: int, ends: dict[int, float], peer: int) -> None:
    """`size` bytes, and when the last one came."""
    buffer = bytearray(len(CHUNK))
    while size > 0:
        size -= source.recv_into(buffer)
    ends[peer] = time.perf_counter()


def in_threads(work: Iterable[Callable[[], None]]) -> None:
    """All at once."""
    threads = [threading.Thread(target=call) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine and the kernel have used so far."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(shape: Shape, pattern: str, seconds: float) -> list[Row]:
    """One cluster, one pattern: a row per kind of link."""
    with cluster(shape) as made:
        before = made.traffic()
        results = run_on_cluster(made, rank_rates, made, pattern, seconds)
        moved = [now - then for now, then in zip(made.traffic(), before, strict=True)]
    rows = []
    for link in results[0][0]:
        rates = [rates[link] for rates, _, _ in results]
        payload = sum(sent[link] for _, sent, _ in results)
        wire = sum(getattr(one, f"sent_{link}") for one in moved)
        rows.append(
            Row(
                shape.ranks, shape.ranks // shape.node, pattern, link,
                (shape.intra if link == INTRA else shape.inter) / 1e6, round(min(rates), 1), round(max(rates), 1),
                round(wire / payload, 4), sum(one.dropped for one in moved), round(results[0][2], 2),
            )
        )  # fmt: skip
    return rows


def best(shape: Shape, pattern: str, seconds: float, rounds: int) -> list[Row]:
    """The round that was disturbed least."""
    return max(
        (measure(shape, pattern, seconds) for _ in range(rounds)),
        key=lambda rows: min(row.slowest / row.nominal for row in rows),
    )


def cases() -> list[tuple[Shape, str]]:
    """What is measured."""
    found = [
        (Shape(ranks, ranks, rate * 1e6), pattern)
        for ranks in (2, 4)
        for rate in RATES
        for pattern in ("ring", "all")[: ranks - 1]
    ]
    return found + [(Shape(4, 2, intra * 1e6, inter * 1e6), "all") for intra, inter in MIXED]


def main() -> int:
    """Measure, print, and with --write keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    rows: list[Row] = []
    for shape, pattern in cases():
        try:
            new = best(shape, pattern, o.seconds, o.rounds)
        except ConfigError as error:
            print(f"cluster: {error}", file=sys.stderr)
            return 2
        for row in new:
            print("  ".join(f"{name} {value}" for name, value in asdict(row).items()), flush=True)
        rows += new
    if o.write:
        document = {
            "command": shlex.join(["python", "benchmarks/cluster/links.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "ip": ip_version()},
            "congestion": Shape().congestion,
            "load": os.getloadavg()[0],
            "rows": [asdict(row) for row in rows],
        }
        path = Path(__file__).parent / "results.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def ip_version() -> str:
    """Of iproute2."""
    return subprocess.run(["ip", "-V"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
