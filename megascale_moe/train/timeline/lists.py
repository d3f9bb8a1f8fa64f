"""A list of operators that was simulated or ran, as numbers: what is drawn, and what is summed up.

Everything is plain JSON, so that it can lie in a run folder and in the page. Operators are rows of a table rather than
objects: a step has hundreds of them, and the names of the columns would be most of the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import Span
from megascale_moe.engine.trace import Event

COLUMNS = ("name", "phase", "stream", "start", "end", "exposed", "bytes")
OPTIMIZER = "O"
"""Stands for the phase of what belongs to no micro-batch: sums over ranks, the update, weights sent back."""

OF_OPTIMIZER = ("gradients.", "update.", "parameters.")
"""How the names of its operators begin."""

DIGITS = 9  # of seconds: nanoseconds


@dataclass(frozen=True)
class TimelineRow:
    """One operator; times in seconds from the start of the step."""

    name: str
    phase: str
    stream: str
    start: float
    end: float
    exposed: float
    bytes: int

    def values(self) -> list[Any]:
        """In the order of `COLUMNS`."""
        times = (round(value, DIGITS) for value in (self.start, self.end, self.exposed))
        return [self.name, self.phase, self.stream, *times, self.bytes]

    @property
    def travels(self) -> bool:
        """Whether it is a communication."""
        return self.stream != Stream.COMPUTE


def simulated(ops: Sequence[Op], spans: Sequence[Span]) -> list[TimelineRow]:
    """Rows of a list that was simulated."""
    return [
        TimelineRow(op.name, phase_of(op), str(op.stream), span.start, span.end, span.exposed, int(op.cost.wire_bytes))
        for op, span in zip(ops, spans, strict=True)
    ]


def happened(events: Sequence[Event], origin: float) -> list[TimelineRow]:
    """Rows of what a rank did in a step that began at `origin`."""
    return [
        TimelineRow(e.name, phase_of(e), str(e.stream), e.start - origin, e.end - origin, e.exposed, e.wire_bytes)
        for e in events
    ]


def phase_of(op: Op | Event) -> str:
    """The phase, or that it belongs to the optimizer."""
    return OPTIMIZER if op.name.startswith(OF_OPTIMIZER) else str(op.phase)


def table(rows: Iterable[TimelineRow]) -> dict[str, Any]:
    """To be drawn."""
    return {"columns": list(COLUMNS), "rows": [row.values() for row in rows]}


def totals(rows: Sequence[TimelineRow]) -> dict[str, Any]:
    """Seconds of the whole list: until its end, of computation, of communication, and of waiting for it."""
    return {
        "operators": len(rows),
        "seconds": max((row.end for row in rows), default=0.0),
        "computation": sum(row.end - row.start for row in rows if not row.travels),
        "communication": sum(row.end - row.start for row in rows if row.travels),
        "exposed": sum(row.exposed for row in rows),
        "bytes": sum(row.bytes for row in rows if row.travels),
    }


def kinds(rows: Sequence[TimelineRow]) -> list[dict[str, Any]]:
    """Communications by what they are: layers, pieces and micro-batches added up, in the order of the list.

    `exposed` is how long they travelled while computation stood still, whichever of them it stood still for: of two
    that travel at a time only one is waited for, but the other is not hidden either.
    """
    waits = sorted((row.end - row.exposed, row.end) for row in rows if row.exposed > 0)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row.travels:
            key = (parse(row.name).tensor, row.phase, row.stream)
            start = {"name": key[0], "phase": key[1], "stream": key[2], "count": 0, "bytes": 0, "seconds": 0.0}
            kind = found.setdefault(key, start | {"exposed": 0.0})
            kind["count"] += 1
            kind["bytes"] += row.bytes
            kind["seconds"] += row.end - row.start
            kind["exposed"] += _common(row, waits)
    return list(found.values())


def _common(row: TimelineRow, waits: Sequence[tuple[float, float]]) -> float:
    """Seconds of a row inside of stretches that are sorted and apart from each other."""
    total, place = 0.0, max(bisect_right(waits, (row.start, row.start)) - 1, 0)
    while place < len(waits) and waits[place][0] < row.end:
        total += max(min(row.end, waits[place][1]) - max(row.start, waits[place][0]), 0.0)
        place += 1
    return total
