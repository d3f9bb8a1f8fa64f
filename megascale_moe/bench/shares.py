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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from statistics import fmean

from megascale_moe.planner.cluster import Curve, Link

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
    def octave(self) -> int:
        """Samples with the same are of about one size."""
        return round(math.log2(self.size))


def rising(samples: Iterable[Sample]) -> Points:
    """Return (size, rate) in the order of sizes, rates never falling."""
    by_size = sorted(samples, key=lambda sample: sample.octave)
    pools: list[list[list[Sample]]] = []  # samples of about one size, of sizes with one rate
    for _, group in groupby(by_size, lambda sample: sample.octave):
        pools.append([list(group)])
        while len(pools) > 1 and _rate(pools[-2]) >= _rate(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [
        (2 ** fmean((math.log2(s.size) for s in same), (s.work for s in same)), _rate(pool))
        for pool in pools for same in pool
    ]  # fmt: skip


def _rate(pool: Sequence[Sequence[Sample]]) -> float:
    return sum(s.work for s in chain(*pool)) / sum(s.seconds for s in chain(*pool))


def shares(points: Points, peak: float) -> Points:
    """Return rates over a peak; the last of equal ones in a row stay only where they bound them."""
    curve = [(size, min(rate / peak, 1.0)) for size, rate in points]
    inner = {i for i in range(1, len(curve) - 1) if curve[i - 1][1] == curve[i][1] == curve[i + 1][1]}
    return [point for i, point in enumerate(curve) if i not in inner]


def link_of(messages: Sequence[tuple[float, float]], peers: int, peer: float) -> Link:
    """Return the link of (bytes of a message to each peer, seconds of the collective), sizes rising.

    Args:
        messages: the first is all latency. peers: to whom each was sent. peer: seconds for each beyond the first.
    """
    seconds = list(accumulate((took for _, took in messages), max))  # more bytes never take less time
    rates = [
        (size, size * peers / (took - seconds[0]))
        for (size, _), took in zip(messages, seconds, strict=True)
        if took > 1.2 * seconds[0]  # below, the difference is noise
    ]
    if not rates:  # all are lost in the latency: the rate is at least this
        rates = [(messages[-1][0], messages[-1][0] * peers / seconds[-1])]
    best = max(rate for _, rate in rates)
    share = Curve(tuple((size, rate / best) for size, rate in rates))
    return Link(best, max(seconds[0] - peer * (peers - 1), 0.0), peer, share)
