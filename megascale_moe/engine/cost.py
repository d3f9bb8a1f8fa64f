"""How long operators take: from rates, or as measured.

Operators of all layers and micro-batches that do the same are one kind; a piece of one takes its share by what it
declares. Measuring is walking a trace of a serial run, where every communication is waited for at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.engine.trace import Event

Seconds = Callable[[Op], float]
Kind = tuple[str, str]  # what the operator does, whichever layer and piece; phase

OVERHEAD = 5e-6
"""Seconds to start an operator from the host, where nothing better is known."""


def kind_of(op: Op) -> Kind:
    """Return what an operator does, whichever layer and piece; recomputation takes as long as the forward."""
    phase = Phase.F if op.phase == Phase.R else op.phase
    return parse(op.name).tensor, str(phase)


class Priced(Protocol):
    """Whoever knows how long operators take: rates, measurements, a cluster's profile."""

    def seconds(self, op: Op, /) -> float:
        """Return the seconds of one operator."""


@dataclass(frozen=True)
class Rates:
    """Rates of a rank, per second; links as this rank's sending rate.

    Attributes:
        flops: of matrix products. memory: bytes read and written. links: bytes by stream. latency: seconds a message.
    """

    flops: float = 5e10
    memory: float = 5e9
    links: Mapping[Stream, float] = field(default_factory=lambda: {Stream.INTRA: 1e9, Stream.INTER: 1e9})
    latency: float = 1e-4

    def seconds(self, op: Op) -> float:
        """Return the seconds of one operator."""
        cost = op.cost
        if op.stream != Stream.COMPUTE:
            return self.latency + cost.wire_bytes / self.links[op.stream]
        return max(cost.flops / self.flops, cost.memory_bytes / self.memory) + OVERHEAD


@dataclass(frozen=True)
class Measured:
    """Seconds per kind of operator as measured, and rates for kinds that were not.

    Attributes:
        seconds_of: median seconds. work: what one such operator declared (see `work_of`): others, pieces of it among
            them, take in proportion.
    """

    seconds_of: Mapping[Kind, float]
    work: Mapping[Kind, float]
    rates: Rates = Rates()

    def seconds(self, op: Op) -> float:
        """Return the seconds of one operator."""
        kind = kind_of(op)
        if kind not in self.seconds_of:
            return self.rates.seconds(op)
        whole = self.work[kind]
        return OVERHEAD + self.seconds_of[kind] * (work_of(op) / whole if whole else 1.0)


def work_of(op: Op) -> float:
    """Return a number in proportion to an operator's time among those of its kind."""
    return op.cost.wire_bytes or op.cost.flops or op.cost.memory_bytes


def measured(ops: Sequence[Op], runs: Iterable[Sequence[Event]], rates: Rates = Rates()) -> Measured:
    """Return the times of a serial list from its traces: each event belongs to the operator at its place."""
    times: dict[Kind, list[float]] = defaultdict(list)
    work: dict[Kind, float] = {}
    for events in runs:
        for op, event in zip(ops, events, strict=True):
            times[kind_of(op)].append(event.end - event.start)
            work[kind_of(op)] = work_of(op)
    return Measured({kind: median(values) for kind, values in times.items()}, work, rates)
