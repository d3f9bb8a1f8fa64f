"""A cluster of network namespaces on one Linux machine: hosts with their own addresses, joined by links of given rate.

Loopback hides what communication costs: it moves gigabytes per second and both directions share a core. Here every rank
is a host of its own, and each of its bytes crosses a cable (a veth pair) that the kernel limits at both ends:

    rank 0          rank 1            rank 2          rank 3       one namespace each, 10.77.NODE.PLACE
    intra  inter    intra  inter      intra  inter    intra  inter      tbf on what leaves the rank
      |      |        |      |          |      |        |      |
      a0     b0       a1     b1         a2     b2       a3     b3       tbf on what goes to the rank
      +------|--------+      |          +------|--------+      |
     node0   |               |         node1   |               |   bridges, all in one more namespace, the hub
             +---------------+----- spine -----+---------------+

As a GPU has NVLink and a network card, a rank has two cables and one address: the route chooses `intra` for the ranks
of its node and `inter` for all others. The two carry traffic at the same time and each is full duplex. That needs a
token bucket (tbf) and nothing else of the kernel's traffic control; each cable counts one class of traffic.
A cable that would reach nobody (one node, or nodes of one rank) is left out.

Names carry the process id and start time of their owner, so that two clusters never collide and `clean` can tell what
nobody owns any more. Nothing leaves the namespaces: no address, interface or route of the machine itself changes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType

from megascale_moe.config import ConfigError, require

PREFIX = "mscluster"
NAMESPACES = Path("/var/run/netns")  # where `ip netns` keeps them, on every system
NETWORK = "10.77"
MOST = 250  # ranks of a node, and nodes: one byte of the address each

BURST = 125_000
"""Bytes that tbf lets pass at full speed after a pause, at most. It must hold a packet as TCP makes them, 64 KiB."""
BURST_SECONDS = 0.01
"""Below 100 Mbit/s that burst would be more than 10 ms for nothing: it is this much there, with smaller packets."""
LEAST_BURST = 16_000
LATENCY = "10ms"
"""Longest time in the queue of a cable; beyond it packets are dropped and TCP slows down."""
SECONDS = 30.0
"""Patience with one call of `ip` or `tc`."""

INTRA, INTER, LOOPBACK = "intra", "inter", "lo"
SENT = re.compile(r"^qdisc tbf \S+ dev (\S+) root.*\n Sent (\d+) bytes \d+ pkt \(dropped (\d+)", re.MULTILINE)
OWNED = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\d+-\w+")
_serial = itertools.count()


@dataclass(frozen=True)
class Shape:
    """What to build.

    Attributes:
        ranks: in all.
        node: ranks of one node, consecutive; divides `ranks`.
        intra: bits/s per rank and direction to the ranks of its node.
        inter: bits/s per rank and direction to all others.
        per_node: one host per node: its ranks share one address and its loopback, which is not limited, and one
            `inter` cable of the rate of them all.
        congestion: TCP congestion control in the hosts.
    """

    ranks: int = 4
    node: int = 4
    intra: float = 200e6
    inter: float = 50e6
    per_node: bool = False
    congestion: str = "reno"

    def __post_init__(self) -> None:
        require(self.ranks > 0 and self.node > 0, f"{self.ranks} ranks in nodes of {self.node}: give 1 or more")
        fitting = [str(size) for size in range(1, self.ranks + 1) if self.ranks % size == 0]
        require(
            self.ranks % self.node == 0,
            f"nodes of {self.node} ranks do not divide the {self.ranks} ranks; use one of {', '.join(fitting)}",
        )
        most = max(self.node, self.ranks // self.node)
        require(most <= MOST, f"{most} nodes, or ranks in one, are too many for the addresses; use up to {MOST}")
        for name, rate in ((INTRA, self.intra), (INTER, self.inter)):
            require(1e5 <= rate <= 1e11, f"{name} = {rate:g} bits/s: must be between 100kbit and 100gbit")


@dataclass(frozen=True)
class Host:
    """One namespace in which ranks run.

    Attributes:
        name: of the namespace.
        rates: bits/s of its cables by their names, INTRA and INTER.
    """

    name: str
    index: int
    node: int
    address: str
    ranks: tuple[int, ...]
    rates: dict[str, float]

    @property
    def interface(self) -> str:
        """The interface that has the address; the loopback of a host that is alone."""
        return next(iter(self.rates), LOOPBACK)

    def far_end(self, cable: str) -> str:
        """The name of a cable's other end, in the hub."""
        return f"{'a' if cable == INTRA else 'b'}{self.index}"


@dataclass(frozen=True)
class Traffic:
    """Bytes of a host as its cables counted them, with all headers and whatever was sent again; 0 without the cable.

    Counted by the tbf at either end, which sees single packets of the wire. `dropped` is a number of packets.
    """

    sent_intra: int = 0
    sent_inter: int = 0
    received_intra: int = 0
    received_inter: int = 0
    dropped: int = 0

    @property
    def sent(self) -> int:
        """Over both cables."""
        return self.sent_intra + self.sent_inter

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) - getattr(earlier, name) for name in self.__dataclass_fields__))


@dataclass
class Cluster:
    """Hosts that exist from `build` to `close`; `cluster` does both."""

    shape: Shape
    owner: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.name = f"{PREFIX}-{self.owner}-{_start_ticks(self.owner)}-{next(_serial)}"
        self._ports = itertools.count(29_500)  # nobody else is in the namespaces

    @property
    def hub(self) -> str:
        """The namespace of the bridges."""
        return f"{self.name}-hub"

    @cached_property
    def hosts(self) -> tuple[Host, ...]:
        """All hosts; with one per rank, in the order of the ranks."""
        shape = self.shape
        together = shape.node if shape.per_node else 1
        rates = {}
        if shape.node > together:
            rates[INTRA] = shape.intra
        if shape.ranks > shape.node:
            rates[INTER] = shape.inter * together
        return tuple(
            Host(
                f"{self.name}-h{index}", index, first // shape.node,
                f"{NETWORK}.{first // shape.node}.{first % shape.node + 1}" if rates else "127.0.0.1",
                tuple(range(first, first + together)), rates,
            )
            for index, first in enumerate(range(0, shape.ranks, together))
        )  # fmt: skip

    def host(self, rank: int) -> Host:
        """Where a rank runs."""
        return next(host for host in self.hosts if rank in host.ranks)

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun would set for a rank, and one thread for each."""
        local = rank % self.shape.node
        numbers = {
            "RANK": rank, "WORLD_SIZE": self.shape.ranks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": self.shape.node,
            "GROUP_RANK": rank // self.shape.node, "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        return {name: str(number) for name, number in numbers.items()} | {
            "MASTER_ADDR": self.hosts[0].address,
            "GLOO_SOCKET_IFNAME": self.host(rank).interface,
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def next_port(self) -> int:
        """A port for a rendezvous that none before it has used."""
        return next(self._ports)

    def traffic(self) -> list[Traffic]:
        """Bytes of each host so far; also callable from a rank."""
        hub = _sent(self.hub)
        found = []
        for host in self.hosts:
            own = _sent(host.name)
            back = {cable: hub.get(host.far_end(cable), (0, 0)) for cable in (INTRA, INTER)}
            (sent_intra, a), (sent_inter, b) = own.get(INTRA, (0, 0)), own.get(INTER, (0, 0))
            dropped = a + b + back[INTRA][1] + back[INTER][1]
            found.append(Traffic(sent_intra, sent_inter, back[INTRA][0], back[INTER][0], dropped))
        return found

    def end_processes(self) -> None:
        """Kill whatever still runs in the hosts, also what a rank has started and forgotten."""
        for host in self.hosts:
            _kill_inside(host.name)

    def build(self) -> None:
        """Make the namespaces, cables, limits and routes.

        Raises:
            ConfigError: one of the calls was refused.
        """
        self._add_namespaces()
        bridges = {self._bridge(host, cable): None for host in self.hosts for cable in host.rates}
        cables = [(host, cable) for host in self.hosts for cable in host.rates]
        lines = [f"link add name {bridge} up type bridge" for bridge in bridges]
        for host, cable in cables:
            far = host.far_end(cable)
            lines += [
                f"link add name {far} type veth peer name {cable} netns {host.name}",
                f"link set {far} gso_max_size {_packet(host.rates[cable])} master {self._bridge(host, cable)} up",
            ]
        _batch("ip", self.hub, lines)
        _batch("tc", self.hub, [_limit(host.far_end(cable), host.rates[cable]) for host, cable in cables])
        for host in self.hosts:
            _batch("ip", host.name, _host_lines(host))
            _batch("tc", host.name, [_limit(cable, rate) for cable, rate in host.rates.items()])

    def close(self) -> None:
        """End all processes in the hosts and remove everything. Does nothing in a forked child."""
        if os.getpid() != self.owner:
            return
        with _deaf():
            for name in (self.hub, *(host.name for host in self.hosts)):
                _remove(name)

    def _add_namespaces(self) -> None:
        # Without IPv6 nothing is sent that nobody asked for. Loopback is one more interface with it.
        settings = f"echo {self.shape.congestion} >/proc/sys/net/ipv4/tcp_congestion_control || exit 1; "
        settings += "test ! -e /proc/sys/net/ipv6 || echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
        for name in (self.hub, *(host.name for host in self.hosts)):
            _call("ip", "netns", "add", name)
            _call("ip", "netns", "exec", name, "sh", "-c", settings)
            _call("ip", "-n", name, "link", "set", "lo", "up")

    @staticmethod
    def _bridge(host: Host, cable: str) -> str:
        return f"node{host.node}" if cable == INTRA else "spine"


@contextlib.contextmanager
def cluster(shape: Shape) -> Iterator[Cluster]:
    """A cluster for the length of a `with` block; removed however the block ends, also by SIGINT, SIGTERM or SIGHUP.

    Raises:
        ConfigError: this machine cannot have one, see `missing`.
    """
    reason = missing(shape.congestion)
    require(not reason, reason)
    made = Cluster(shape)
    with _signals_raise():
        try:
            made.build()
            yield made
        finally:
            made.close()


def missing(congestion: str = "reno") -> str:
    """Why this machine cannot have a cluster, in one line; "" if it can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "a cluster of network namespaces needs Linux"
    if os.geteuid() != 0:
        return "a cluster of network namespaces needs root; run this as root (or with sudo)"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"{' and '.join(absent)} not found; install iproute2"
    known = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text(encoding="ascii").split()
    if congestion not in known:
        names = ", ".join(known)
        return f"TCP congestion control {congestion!r} is not for namespaces of this kernel; use one of {names}"
    return _kernel_lacks()


def _kernel_lacks() -> str:
    """Try each feature in a namespace of its own."""
    name = f"{PREFIX}-{os.getpid()}-{_start_ticks(os.getpid())}-{next(_serial)}-probe"
    steps = (
        ("network namespaces", ("ip", "netns", "add", name)),
        ("veth", ("ip", "-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")),
        ("bridge", ("ip", "-n", name, "link", "add", "name", "c", "type", "bridge")),
        ("tbf", ("tc", "-n", name, *_limit("a", 1e8).split())),
    )
    try:
        for feature, command in steps:
            try:
                _call(*command)
            except ConfigError as error:
                return f"this kernel, or this container, has no {feature} for us ({error})"
    finally:
        with _deaf():
            _remove(name)
    return ""


def clean() -> list[str]:
    """Remove what clusters whose owner is dead have left; returns the names of those namespaces."""
    names = [path.name for path in sorted(NAMESPACES.glob(f"{PREFIX}-*"))]
    left = [name for name in names if (match := OWNED.fullmatch(name)) and not _lives(int(match[1]), int(match[2]))]
    for name in left:
        _remove(name)
    return left


def _lives(pid: int, start: int) -> bool:
    """True if that very process is there, and not only another one with its number, or its corpse."""
    return _start_ticks(pid) == start


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _host_lines(host: Host) -> list[str]:
    """`ip` commands inside a host: the address on each cable, since a peer asks for it there, and a route for each."""
    lines = []
    for cable, rate in host.rates.items():
        reach = f"{NETWORK}.{host.node}.0/24" if cable == INTRA else f"{NETWORK}.0.0/16"
        lines += [
            f"link set {cable} gso_max_size {_packet(rate)} up",
            f"address add {host.address}/32 dev {cable}",
            f"route add {reach} dev {cable} src {host.address}",
        ]
    return lines


def _burst(rate: float) -> int:
    return int(min(BURST, max(LEAST_BURST, rate * BURST_SECONDS / 8)))


def _packet(rate: float) -> int:
    """The largest packet TCP may hand over: one that the bucket can hold, or tbf would cut it up."""
    return min(65_536, _burst(rate) * 3 // 4)


def _limit(interface: str, rate: float) -> str:
    return f"qdisc add dev {interface} root tbf rate {rate:.0f}bit burst {_burst(rate)} latency {LATENCY}"


def _call(*command: str, text: str | None = None) -> str:
    """The output of `ip` or `tc`.

    Raises:
        ConfigError: it failed; with its first line.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}") from error
    said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
    require(done.returncode == 0, f"{' '.join(command)}: {said}")
    return done.stdout


def _batch(tool: str, namespace: str, lines: Sequence[str]) -> None:
    if lines:
        _call(tool, "-n", namespace, "-batch", "-", text="\n".join(lines) + "\n")


def _sent(namespace: str) -> dict[str, tuple[int, int]]:
    """(bytes, packets dropped) of each limited interface of a namespace."""
    text = _call("tc", "-n", namespace, "-s", "qdisc", "show")
    return {name: (int(count), int(dropped)) for name, count, dropped in SENT.findall(text)}


def _kill_inside(namespace: str) -> None:
    """Kill what runs in a namespace and wait until it is gone; what is started meanwhile as well."""
    limit = time.monotonic() + SECONDS
    while (NAMESPACES / namespace).exists() and time.monotonic() < limit:
        pids = set(map(int, _call("ip", "netns", "pids", namespace).split())) - {os.getpid()}
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _remove(namespace: str) -> None:
    """A namespace with all that runs in it; its ends of cables go with it, and with an end the cable."""
    if (NAMESPACES / namespace).exists():
        _kill_inside(namespace)
        _call("ip", "netns", "delete", namespace)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that would end this process unwind it. Only the main thread can; others rely on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Finish what is being done: a second Ctrl-C must not leave half of it, and must not reach `ip` either."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
