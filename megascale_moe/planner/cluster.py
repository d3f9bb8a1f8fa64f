"""What a cluster can do: peaks of its processors and links, and the shares of them that real work reaches.

A profile is a TOML file that says what was measured or published and where it is from. Shares are curves over sizes
rather than factors: a product of 128 rows and one of 8,192 differ by more than two generations of GPUs do. A profile
belongs to one software stack as well as to one kind of hardware, since one mapping has run 1.8 times as fast a release
later. It may name another as its `base` and say only what differs.

    base = "h100"                    # optional
    stack = "..."                    # software whose shares these are
    [gpu]                            # memory_gb, reserved_gb, memory_tb_per_s, overhead_us
    peak_tflops = { bf16 = 989 }     # by dtype, dense
    [gpu.share]                      # of the peak, by what the size is of (`engine.op.Cost.size`); rows: of memory
    product = [[256, 0.3], ...]      #   bandwidth, by bytes; formulas: optional, as rows, of what also computes
    contention = 1.1                 # optional: computation takes so many times as long while a rank communicates
    narrow = 0.7                     # optional: products in FP8 reach so much of the share that those in BF16 do
    fragmentation = 0.05             # optional: what the allocator cannot use, as a part of what is in use
    [node]
    ranks = 8                        # that share the fast link
    rings = true                     # optional: whether gathers and reductions of weights go from node to node, as
                                     #   NCCL's do (default), or from each rank to each, as on gloo
    [links.intra]                    # inside a node; [links.inter] between nodes; per rank and direction
    gb_per_s = 450
    latency_us = 20                  # of a collective; and peer_us for each further rank it talks to
    share = [[65536, 0.1], ...]      # of gb_per_s, by the bytes of one message
    beside_us = 5                    # optional: a collective ends so much later if its ranks compute meanwhile
    [run]                            # optional, and each of it
    jitter = 0.01                    # standard deviation of a rank's step, as a part of it
    imbalance = 1.0                  # rows of the busiest rank's experts, as a multiple of the mean
    dispatch = 1.0                   # bytes between nodes on the way to experts, as a part of one copy for each expert
                                     #   of a token: less where a token travels once to a node with several of its own
    step_ms = 0                      # of the host in every step, behind which nothing hides
"""

from __future__ import annotations

import math
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from megascale_moe.config import ConfigError, require
from megascale_moe.engine.op import Stream, Work
from megascale_moe.engine.order import Interference

NAMES = ("a100", "b200", "gb200", "h100", "h20", "h200", "h800")
"""Profiles of hardware that come with the package; those in `stacks` are of hardware with one software stack."""
GPU = ("memory_gb", "reserved_gb", "memory_tb_per_s", "overhead_us")
LINK = ("gb_per_s", "latency_us", "peer_us")
RUN = {"jitter": 0.0, "imbalance": 1.0, "dispatch": 1.0, "step_ms": 0.0}
LEAST = {
    "reserved_gb": 0, "overhead_us": 0, "latency_us": 0, "peer_us": 0, "jitter": 0, "step_ms": 0, "imbalance": 1,
    "contention": 1, "fragmentation": 0, "beside_us": 0,
}  # fmt: skip
"""Of numbers that need not be positive, or must be more."""


@dataclass(frozen=True)
class Curve:
    """A share by size: straight between its points over the logarithm of the size, constant beyond its ends."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The share at a size."""
        sizes = [point[0] for point in self.points]
        after = bisect_right(sizes, size)
        if after == 0 or after == len(sizes):
            return self.points[max(after - 1, 0)][1]
        (low, left), (high, right) = self.points[after - 1], self.points[after]
        return left + (right - left) * math.log(size / low) / math.log(high / low)


@dataclass(frozen=True)
class Link:
    """The link that a rank sends over.

    Attributes:
        rate: bytes per second. latency: seconds of a collective, whatever it sends. peer: seconds more for each rank
            beyond the first that it talks to. share: of the rate, by the bytes of one message.
            beside: seconds by which a collective ends later if its ranks compute meanwhile.
    """

    rate: float
    latency: float
    peer: float
    share: Curve
    beside: float = 0.0

    def seconds(self, sent: float, peers: int) -> float:
        """For a rank that sends so many bytes to all its peers together."""
        if not sent or not peers:
            return 0.0
        return self.latency + self.peer * (peers - 1) + sent / (self.rate * self.share.at(sent / peers))


@dataclass(frozen=True)
class Cluster:
    """A kind of GPU, its node and its network, with one software stack.

    Attributes:
        peaks: FLOP/s by dtype. memory: bytes of a GPU. reserved: bytes of it that training cannot have.
        bandwidth: of memory, bytes per second. overhead: seconds to start an operator.
        shares: of the peak by kind of work, for `Work.ROWS` of the bandwidth. contention: how many times as long
            computation takes while a communication is under way.
        fragmentation: what the allocator cannot use, as a part of what is in use.
        node: ranks that share the fast link. rings: whether gathers and reductions of weights go from node to node.
        narrow: share that products in FP8 reach, over that in BF16.
        jitter: standard deviation of a rank's step, relative. imbalance: rows of the busiest rank's experts over the
            mean. dispatch: bytes between nodes to and from experts, over one copy for each expert of a token.
            host: seconds of every step behind which nothing hides.
        formulas: as `Work.ROWS` in `shares`, of operators that compute something element by element rather than move
            rows; None: the same.
    """

    name: str
    stack: str
    peaks: Mapping[str, float]
    memory: float
    reserved: float
    bandwidth: float
    overhead: float
    shares: Mapping[Work, Curve]
    node: int
    links: Mapping[Stream, Link]
    contention: float = 1.0
    fragmentation: float = 0.0
    rings: bool = True
    jitter: float = 0.0
    imbalance: float = 1.0
    dispatch: float = 1.0
    narrow: float = 1.0
    host: float = 0.0
    formulas: Curve | None = None

    @cached_property
    def interference(self) -> Interference:
        """How computation and communication slow each other down on this cluster."""
        late = {stream: link.beside for stream, link in self.links.items() if link.beside}
        return Interference(self.contention, late)


def load(name: str) -> Cluster:
    """A profile by its name, or from a file.

    Raises:
        ConfigError: there is none, or it is not a profile.
    """
    return _cluster(name, _raw(name, ()))


def _raw(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    require(name not in seen, f"cluster profile {name}: is its own base ({' -> '.join((*seen, name))})")
    raw = _parsed(name)
    base = raw.pop("base", None)
    if base is None:
        return raw
    require(isinstance(base, str), f"cluster profile {name}: base = {base!r}: must be the name of a profile")
    return _merged(_raw(base, (*seen, name)), raw)


def _parsed(name: str) -> dict[str, Any]:
    """A profile that comes with the package, of hardware or of a software stack on it, or a file."""
    found = {path.name.removesuffix(".toml"): path for path in _shipped()}
    known = f"known: {', '.join([*NAMES, *sorted(set(found) - set(NAMES))])}, or the path of a TOML file"
    try:
        if name not in found:
            require(name.endswith(".toml"), f"cluster profile {name!r} is unknown; {known}")
        return tomllib.loads(found.get(name, Path(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster profile {name}: cannot be read ({error.strerror}); {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster profile {name}: not valid TOML ({error})") from error


def _shipped() -> Iterator[Traversable]:
    for folder in ("clusters", "stacks"):
        yield from (resources.files(__package__) / folder).iterdir()


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Section by section; what is no section is replaced."""
    both = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        both[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


def _cluster(name: str, raw: dict[str, Any]) -> Cluster:
    reader = _Reader(f"cluster profile {name}", raw)
    gpu = {key: reader.number("gpu", key) for key in GPU}
    peaks = reader.section("gpu", "peak_tflops")
    tera = {dtype: 1e12 * reader.number("gpu", "peak_tflops", dtype) for dtype in peaks}
    require("bf16" in tera, f"{reader.where}: gpu.peak_tflops: bf16 is missing")
    run = {key: reader.number("run", key, default=value) for key, value in RUN.items()}
    ranks, rings = reader.number("node", "ranks"), reader.section("node").get("rings", True)
    require(isinstance(rings, bool), f"{reader.where}: node.rings = {rings!r}: must be true or false")
    require(ranks == int(ranks), f"{reader.where}: node.ranks = {ranks}: must be a whole number")
    cluster = Cluster(
        name=Path(name).stem, stack=str(reader.value("stack")), peaks=tera, memory=1e9 * gpu["memory_gb"],
        reserved=1e9 * gpu["reserved_gb"], bandwidth=1e12 * gpu["memory_tb_per_s"], overhead=1e-6 * gpu["overhead_us"],
        shares={work: reader.curve("gpu", "share", str(work)) for work in Work}, node=int(ranks),
        links={stream: reader.link(str(stream)) for stream in (Stream.INTRA, Stream.INTER)},
        contention=reader.number("gpu", "contention", default=1.0),
        fragmentation=reader.number("gpu", "fragmentation", default=0.0), rings=rings, jitter=run["jitter"],
        imbalance=run["imbalance"], dispatch=run["dispatch"], narrow=reader.number("gpu", "narrow", default=1.0),
        host=1e-3 * run["step_ms"],
        formulas=reader.curve("gpu", "share", "formulas") if "formulas" in reader.section("gpu", "share") else None,
    )  # fmt: skip
    require(
        cluster.memory > cluster.reserved,
        f"{reader.where}: gpu.reserved_gb = {gpu['reserved_gb']}: must be below gpu.memory_gb = {gpu['memory_gb']}",
    )
    return cluster


@dataclass(frozen=True)
class _Reader:
    """Values of a profile by their path, or a refusal that names it."""

    where: str
    raw: dict[str, Any]

    def value(self, *path: str) -> Any:
        found: Any = self.raw
        for place, key in enumerate(path):
            dotted = ".".join(path[: place + 1])
            require(isinstance(found, dict) and key in found, f"{self.where}: {dotted} is missing")
            found = found[key]
        return found

    def section(self, *path: str) -> dict[str, Any]:
        found = self.value(*path)
        require(isinstance(found, dict), f"{self.where}: {'.'.join(path)} = {found!r}: must be a table")
        return found  # type: ignore[no-any-return]

    def number(self, *path: str, default: float | None = None) -> float:
        if default is not None and path[-1] not in (self.section(*path[:-1]) if path[0] in self.raw else {}):
            return default
        found = self.value(*path)
        fits = type(found) in (int, float) and math.isfinite(found)
        least = LEAST.get(path[-1])
        wanted = "positive number" if least is None else f"number of at least {least}"
        good = fits and (found > 0 if least is None else found >= least)
        require(good, f"{self.where}: {'.'.join(path)} = {found!r}: must be a {wanted}")
        return float(found)

    def curve(self, *path: str) -> Curve:
        found = self.value(*path)
        pairs = found if isinstance(found, list) else []
        fits = bool(pairs) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(x) in (int, float) for x in pair) for pair in pairs
        )
        sizes = [pair[0] for pair in pairs] if fits else []
        fits = fits and sizes == sorted(set(sizes)) and sizes[0] > 0 and all(0 < share <= 1 for _, share in pairs)
        require(
            fits,
            f"{self.where}: {'.'.join(path)}: must be pairs [size, share], sizes positive and rising, shares in (0, 1]",
        )
        return Curve(tuple((float(size), float(share)) for size, share in pairs))

    def link(self, name: str) -> Link:
        rate, latency, peer = (self.number("links", name, key) for key in LINK)
        beside = self.number("links", name, "beside_us", default=0.0)
        return Link(1e9 * rate, 1e-6 * latency, 1e-6 * peer, self.curve("links", name, "share"), 1e-6 * beside)
