"""What happened when: one event per executed operator, exportable as a Chrome trace.

Compute operators have a start and an end. A communication has a start, and, when its first reader arrives, a wait:
the wait is what was exposed, the rest was hidden under computation. gloo tells no completion time, so a transfer
that nobody waited for is drawn until its reader came.

On a GPU the host only queues what is to be done, so times are taken in the queue: a mark (a CUDA event) behind each
operator, where one ends and the next begins, looked up when the step is over (`Trace.settle`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megascale_moe.engine.op import Op, Phase, Stream


@dataclass
class Event:
    """One operator's run; times in seconds of the monotonic clock.

    Attributes:
        waited: since when computation stood still for it, if it did.
    """

    name: str
    phase: Phase
    stream: Stream
    start: float
    end: float
    wire_bytes: int = 0
    waited: float | None = None

    @property
    def exposed(self) -> float:
        """Seconds that computation stood still for it."""
        return 0.0 if self.waited is None else self.end - self.waited


@dataclass
class Trace:
    """Events in the order of their start.

    Attributes:
        device: where operators run; on a GPU times are there once `settle` was called.
    """

    events: list[Event] = field(default_factory=list)
    device: torch.device | None = None
    _marks: list[tuple[torch.cuda.Event, list[tuple[Event, str]]]] = field(default_factory=list, init=False, repr=False)
    _origin: float = field(default=0.0, init=False, repr=False)

    def begin(self, op: Op) -> Event:
        """Start an event now, behind whatever was begun before."""
        event = Event(op.name, op.phase, op.stream, 0.0, 0.0)
        self.events.append(event)
        if self._marks:
            self._marks[-1][1].extend(((event, "start"), (event, "end")))
        else:
            self.mark(event, "start", "end")
        return event

    def mark(self, event: Event, *times: str) -> None:
        """Note the present as these times of an event."""
        if self.device is None or self.device.type != "cuda":
            at = now()
            for name in times:
                setattr(event, name, at)
            return
        if not self._marks:
            self._origin = now()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append((mark, [(event, name) for name in times]))

    def settle(self) -> None:
        """Wait for a GPU to be done, and look up when it was where."""
        if self._marks:
            first, last = self._marks[0][0], self._marks[-1][0]
            last.synchronize()
            for mark, times in self._marks:
                at = self._origin + first.elapsed_time(mark) / 1e3
                for event, name in times:
                    setattr(event, name, at)
            self._marks.clear()

    @property
    def exposed(self) -> float:
        """Seconds that computation waited for communication."""
        return sum(event.exposed for event in self.events)

    @property
    def communication(self) -> float:
        """Seconds with communication under way, each operator counted on its own."""
        return sum(event.end - event.start for event in self.events if event.stream != Stream.COMPUTE)

    def wire_bytes(self) -> dict[tuple[str, Phase], int]:
        """Return the bytes that this rank sent, by operator and phase."""
        totals: Counter[tuple[str, Phase]] = Counter()
        for event in self.events:
            if event.stream != Stream.COMPUTE:
                totals[event.name, event.phase] += event.wire_bytes
        return totals

    def chrome(self, process: int) -> list[dict[str, object]]:
        """Return the events of a Chrome trace: those of one process, a track per stream."""
        lanes = {stream: lane for lane, stream in enumerate(Stream)}
        named: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": lane, "args": {"name": str(stream)}}
            for stream, lane in lanes.items()
        ]
        return named + [
            {
                "ph": "X",
                "pid": process,
                "tid": lanes[event.stream],
                "name": f"{event.phase} {event.name}",
                "ts": event.start * 1e6,
                "dur": (event.end - event.start) * 1e6,
                "args": {"wire_bytes": event.wire_bytes, "exposed_us": event.exposed * 1e6},
            }
            for event in self.events
        ]

    def write_chrome(self, path: Path, rank: int) -> None:
        """Write the JSON that chrome://tracing and Perfetto open, the rank as a process."""
        write_chrome(path, self.chrome(rank))


def write_chrome(path: Path, events: Sequence[dict[str, object]]) -> None:
    """Write events as a Chrome trace."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


now = time.perf_counter
