"""From timed operators and messages to the curves of a cluster profile.

A curve says which share of a peak is reached at a size. What is timed is scattered: operators of many sizes, each with
its noise. Samples of about one size (a factor of two) are pooled by what they did and how long that took, so a long
operator counts for more than a short one. More work at once is never done at a lower rate: where a pooled share falls,
it and those before it are pooled again until none does (isotonic regression), which leaves the total time of all
samples as it was. For messages that need not hold (a token bucket lets a small one pass at once, a switch has small
buffers), and only their time must not fall.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Points = list[tuple[float, float]]
"""Pairs (size, share of a peak)."""


@dataclass(frozen=True)
class Sample:
    """Something that was timed.

    Attributes:
        kind: a key of `[gpu.share]`. size: what its share depends on. work: FLOPs or bytes. seconds: a mean.
    """

    kind: str
    size: float
    work: float
    seconds: float

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


@dataclass
class _Pool:
    """Samples that share a point: sums over them, `sizes` weighted with their work and on a logarithm."""

    work: float = 0.0
    seconds: float = 0.0
    sizes: float = 0.0

    def add(self, work: float, seconds: float, sizes: float) -> None:
        self.work, self.seconds, self.sizes = self.work + work, self.seconds + seconds, self.sizes + sizes

    @property
    def rate(self) -> float:
        return self.work / self.seconds


def rising(samples: Iterable[Sample]) -> Points:
    """(size, rate) in the order of sizes, rates never falling."""
    pools: dict[int, _Pool] = defaultdict(_Pool)
    for sample in samples:
        size = math.log2(sample.size)
        pools[round(size)].add(sample.work, sample.seconds, size * sample.work)
    points: list[list[_Pool]] = []
    for place in sorted(pools):
        points.append([pools[place]])
        while len(points) > 1 and _rate(points[-2]) >= _rate(points[-1]):
            last = points.pop()
            points[-1] += last
    return [(2 ** (pool.sizes / pool.work), _rate(merged)) for merged in points for pool in merged]


def _rate(pools: Sequence[_Pool]) -> float:
    return sum(pool.work for pool in pools) / sum(pool.seconds for pool in pools)


def shares(points: Points, peak: float) -> Points:
    """Rates over a peak; the last of equal ones in a row stay only where they bound them."""
    found = [(size, min(rate / peak, 1.0)) for size, rate in points]
    inner = {i for i in range(1, len(found) - 1) if found[i - 1][1] == found[i][1] == found[i + 1][1]}
    return [point for i, point in enumerate(found) if i not in inner]


@dataclass(frozen=True)
class LinkFound:
    """A link as a profile has it: bytes/s, seconds, seconds, (bytes of a message, share of the rate), seconds."""

    rate: float
    latency: float
    peer: float
    share: Points
    beside: float = 0.0


def link_of(messages: Sequence[tuple[float, float]], peers: int, peer: float) -> LinkFound:
    """From (bytes of a message to each peer, seconds of the collective), sizes rising; the first is all latency.

    Args:
        peers: to whom each was sent. peer: seconds for each of them beyond the first.
    """
    seconds: list[float] = []
    for _, took in messages:
        seconds.append(max([took, *seconds[-1:]]))  # more bytes never take less time
    latency = max(seconds[0] - peer * (peers - 1), 0.0)
    rates = [
        (size, size * peers / (took - seconds[0]))
        for (size, _), took in zip(messages, seconds, strict=True)
        if took > 1.2 * seconds[0]  # below, the difference is noise
    ]
    if not rates:  # all are lost in the latency: the rate is at least this
        rates = [(messages[-1][0], messages[-1][0] * peers / seconds[-1])]
    rate = max(found for _, found in rates)
    return LinkFound(rate, latency, peer, [(size, found / rate) for size, found in rates])
