"""How long the operators of a finished run took, also where no profile was made.

A run whose order follows from times has measured them in its first steps, on the plain list (train/profiling.py). What
it has not, the optimizer's operators or everything, is read off the last steps: a computation took as long as its
event. A communication did if somebody stood waiting for its end; if nobody ever did, its shortest event is the best
that is known, because an event lasts until the result was read; a shorter estimate from rates is taken instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from megascale_moe.engine.cost import OVERHEAD, Kind, Measured, Priced, Rates, kind_of, work_of
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.trace import Event

WAITED = 0.1
"""Share of its time for which a communication must have been waited for, so that its end is known."""


class ObservedSeconds(Measured):
    """Seconds per kind of operator, and the work that one such operator declared: others take in proportion.

    Unlike a profile, which knows whole operators and is asked for pieces of them, this one knows what ran, also pieces
    and messages of single layers, and is asked for the whole.
    """

    def seconds(self, op: Op) -> float:
        """Return the seconds of one operator."""
        kind = kind_of(op)
        if kind not in self.seconds_of:
            return self.rates.seconds(op)
        whole = self.work[kind]
        return OVERHEAD + self.seconds_of[kind] * (work_of(op) / whole if whole and work_of(op) else 1.0)


def timed(ops: Sequence[Op], runs: Iterable[Sequence[Event]]) -> ObservedSeconds:
    """From traces of any list."""
    waited: dict[Kind, list[float]] = defaultdict(list)
    others: dict[Kind, list[float]] = defaultdict(list)
    work: dict[Kind, list[float]] = defaultdict(list)
    for events in runs:
        for op, event in zip(ops, events, strict=True):
            took, kind = event.end - event.start, kind_of(op)
            known = op.stream == Stream.COMPUTE or event.exposed >= WAITED * took
            if known:
                waited[kind].append(took)
            else:
                others[kind].append(min(took, Rates().seconds(op)))
            work[kind].append(work_of(op))
    found = {kind: min(values) for kind, values in others.items()}
    found |= {kind: median(values) for kind, values in waited.items()}
    return ObservedSeconds(found, {kind: median(values) for kind, values in work.items()})


def first_of(profile: Priced, rest: ObservedSeconds) -> ObservedSeconds:
    """Return profiled seconds, completed by those of the last steps."""
    if not isinstance(profile, Measured):
        return rest
    return ObservedSeconds({**rest.seconds_of, **profile.seconds_of}, {**rest.work, **profile.work})
