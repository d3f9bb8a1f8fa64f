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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from megascale_moe.config import ConfigError, require
from megascale_moe.engine.op import Stream, Work
from megascale_moe.engine.order import Interference

NAMES = ("a100", "b200", "gb200", "h100", "h20", "h200", "h800")
"""Profiles of hardware that come with the package; those in `stacks` are of hardware with one software stack."""


@dataclass(frozen=True)
class Curve:
    """A share by size: straight between its points over the logarithm of the size, constant beyond its ends."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """Return the share at a size."""
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
        """Return the seconds of a rank that sends so many bytes to all its peers together."""
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
        """Return how computation and communication slow each other down on this cluster."""
        late = {stream: link.beside for stream, link in self.links.items() if link.beside}
        return Interference(self.contention, late)


class Number(NamedTuple):
    """Where a number stands in a profile, its unit, the least it may be (None: anything positive) and its default."""

    path: str
    unit: float = 1.0
    least: float | None = None
    default: float | None = None


NUMBERS = {
    "memory": Number("gpu.memory_gb", 1e9), "reserved": Number("gpu.reserved_gb", 1e9, 0),
    "bandwidth": Number("gpu.memory_tb_per_s", 1e12), "overhead": Number("gpu.overhead_us", 1e-6, 0),
    "contention": Number("gpu.contention", least=1, default=1), "narrow": Number("gpu.narrow", default=1),
    "fragmentation": Number("gpu.fragmentation", least=0, default=0),
    "jitter": Number("run.jitter", least=0, default=0), "imbalance": Number("run.imbalance", least=1, default=1),
    "dispatch": Number("run.dispatch", default=1), "host": Number("run.step_ms", 1e-3, 0, 0),
}  # fmt: skip
"""The numbers of a `Cluster`, by attribute."""
LINK_NUMBERS = {
    "rate": Number("gb_per_s", 1e9), "latency": Number("latency_us", 1e-6, 0), "peer": Number("peer_us", 1e-6, 0),
    "beside": Number("beside_us", 1e-6, 0, 0),
}  # fmt: skip
"""The numbers of a `Link`, by attribute."""


def load(name: str) -> Cluster:
    """Return a profile by its name, or from a file.

    Raises:
        ConfigError: there is none, or it is not a profile.
    """
    profile = _Profile(f"cluster profile {name}", {"run": {}, **_entries(name, ())})
    numbers: dict[str, Any] = {attribute: profile.number(number) for attribute, number in NUMBERS.items()}
    dtypes = profile.table("gpu.peak_tflops")
    peaks = {dtype: profile.number(Number(f"gpu.peak_tflops.{dtype}", 1e12)) for dtype in dtypes}
    profile.require("bf16" in peaks, "gpu.peak_tflops: bf16 is missing")
    ranks, rings = profile.number(Number("node.ranks")), profile.table("node").get("rings", True)
    profile.require(isinstance(rings, bool), f"node.rings = {rings!r}: must be true or false")
    profile.require(ranks == int(ranks), f"node.ranks = {ranks}: must be a whole number")
    shares = {work: profile.curve(f"gpu.share.{work}") for work in Work}
    links = {stream: profile.link(f"links.{stream}") for stream in (Stream.INTRA, Stream.INTER)}
    formulas = profile.curve("gpu.share.formulas") if "formulas" in profile.table("gpu.share") else None
    reserved, memory = (float(profile.value(f"gpu.{key}")) for key in ("reserved_gb", "memory_gb"))
    profile.require(reserved < memory, f"gpu.reserved_gb = {reserved}: must be below gpu.memory_gb = {memory}")
    return Cluster(
        name=Path(name).stem, stack=str(profile.value("stack")), peaks=peaks, shares=shares, node=int(ranks),
        links=links, rings=rings, formulas=formulas, **numbers,
    )  # fmt: skip


def _entries(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the entries of a profile that comes with the package, or of a file, those of its base included.

    Args:
        above: the profiles whose base it is.
    """
    require(name not in above, f"cluster profile {name}: is its own base ({' -> '.join((*above, name))})")
    folders = (resources.files(__package__) / folder for folder in ("clusters", "stacks"))
    shipped = {path.name.removesuffix(".toml"): path for folder in folders for path in folder.iterdir()}
    known = f"known: {', '.join([*NAMES, *sorted(set(shipped) - set(NAMES))])}, or the path of a TOML file"
    try:
        if name not in shipped:
            require(name.endswith(".toml"), f"cluster profile {name!r} is unknown; {known}")
        entries = tomllib.loads(shipped.get(name, Path(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster profile {name}: cannot be read ({error.strerror}); {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster profile {name}: not valid TOML ({error})") from error
    if "base" not in entries:
        return entries
    base = entries.pop("base")
    require(isinstance(base, str), f"cluster profile {name}: base = {base!r}: must be the name of a profile")
    return _merged(_entries(base, (*above, name)), entries)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` changed section by section; what is no section is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


@dataclass(frozen=True)
class _Profile:
    """Values of a profile by their dotted path, or a refusal that names it."""

    name: str
    entries: dict[str, Any]

    def require(self, condition: bool, problem: str) -> None:
        require(condition, f"{self.name}: {problem}")

    def value(self, path: str) -> Any:
        value, keys = self.entries, path.split(".")
        for place, key in enumerate(keys):
            self.require(isinstance(value, dict) and key in value, f"{'.'.join(keys[: place + 1])} is missing")
            value = value[key]
        return value

    def table(self, path: str) -> dict[str, Any]:
        value = self.value(path)
        self.require(isinstance(value, dict), f"{path} = {value!r}: must be a table")
        return value  # type: ignore[no-any-return]

    def number(self, number: Number) -> float:
        path, unit, least, default = number
        table, _, key = path.rpartition(".")
        if default is not None and key not in self.table(table):
            return float(default)
        value = self.value(path)
        fits = type(value) in (int, float) and math.isfinite(value) and (value > 0 if least is None else value >= least)
        wanted = "positive number" if least is None else f"number of at least {least}"
        self.require(fits, f"{path} = {value!r}: must be a {wanted}")
        return unit * float(value)

    def curve(self, path: str) -> Curve:
        pairs = self.value(path)
        fits = isinstance(pairs, list) and bool(pairs) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(x) in (int, float) for x in pair) for pair in pairs
        )  # fmt: skip
        sizes, shares = zip(*pairs, strict=True) if fits else ((), ())
        fits = fits and list(sizes) == sorted(set(sizes)) and sizes[0] > 0 and all(0 < share <= 1 for share in shares)
        self.require(fits, f"{path}: must be pairs [size, share], sizes positive and rising, shares in (0, 1]")
        return Curve(tuple(zip(map(float, sizes), map(float, shares), strict=True)))

    def link(self, table: str) -> Link:
        numbers = {name: number._replace(path=f"{table}.{number.path}") for name, number in LINK_NUMBERS.items()}
        return Link(
            **{name: self.number(number) for name, number in numbers.items()}, share=self.curve(f"{table}.share")
        )
