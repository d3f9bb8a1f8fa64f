"""Orders of a list: which operators may change places, and two ways to use it.

An executor walks a list from front to back; a communication starts where it stands and is waited for where its result
is first read. So hiding a communication means putting operators between the two that need neither. What may move is
said by names (readers after writers) and by gradients (additions to one buffer keep their order, so that sums keep
their bits).

    serial      as strategies write it: each module's operators one after the other
    paper       by hand, as the paper does: in backward a weight gradient goes behind the next communication, what is
                recomputed goes behind the communication before it, and communications start as soon as they can
    scheduled   by a list scheduler from the operators' times: at each point the operator that can run at once, the one
                with the longest way to the end first; weight gradients have the shortest way and so fill the waits, but
                those of a layer are done before the next layer computes: what they read could otherwise not die, nor
                could their sums leave, until the end of the list
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase, Stream

ROUNDING = 1e-9
"""Relative rounding of sums of thousands of seconds in float64."""


def dependencies(ops: Sequence[Op]) -> list[set[int]]:
    """For each operator the positions of those that must come before it."""
    writer: dict[str, int] = {}
    added: dict[str, int] = {}
    before: list[set[int]] = []
    for place, op in enumerate(ops):
        needed = {writer[name] for name in op.reads if name in writer}
        needed |= {added[name] for name in op.gradients if name in added}
        before.append(needed)
        writer.update(dict.fromkeys(op.writes, place))
        added.update(dict.fromkeys(op.gradients, place))
    return before


@dataclass(frozen=True)
class Span:
    """When an operator runs, in seconds; `exposed`: how long the computation stood still for it."""

    start: float
    end: float
    exposed: float = 0.0


@dataclass(frozen=True)
class Interference:
    """How computation and communication slow each other down while both are under way.

    Attributes:
        slower: how many times as long computation takes. late: by stream, how many seconds later a communication ends
            for which computation does not wait: whatever completes it has to get its turn.
    """

    slower: float = 1.0
    late: Mapping[Stream, float] = field(default_factory=dict)


UNDISTURBED = Interference()


def simulate(ops: Sequence[Op], seconds: Seconds, interference: Interference = UNDISTURBED) -> list[Span]:
    """When each operator of a list runs, by the executor's rules.

    Computation and the launch of communications follow the list; each link does one communication at a time.
    """
    clock, slower = 0.0, interference.slower
    free: dict[Stream, float] = {}
    source_of: dict[str, int] = {}
    spans: list[Span] = []
    flying: list[int] = []  # communications that no computation ran beside yet, in the order of their launch
    for place, op in enumerate(ops):
        for name in op.reads:
            source = source_of.get(name, -1)
            if source >= 0 and spans[source].end > clock:
                at = spans[source].end
                spans[source] = Span(spans[source].start, at, spans[source].exposed + at - clock)
                clock = at
        start = clock
        if op.stream != Stream.COMPUTE:
            start = max(clock, free.get(op.stream, 0.0))
        end = start + seconds(op)
        if op.stream == Stream.COMPUTE:
            busy = max(free.values(), default=0.0) - start  # what was launched runs without a gap until then
            clock = end = end + (1 - 1 / slower) * min(max(busy, 0.0), slower * (end - start))
            if flying:
                flying = _delayed(ops, spans, flying, start, end, interference.late, free)
        else:
            free[op.stream] = end
            if interference.late:
                flying.append(place)
        spans.append(Span(start, end))
        source_of.update(dict.fromkeys(op.writes, place))
    return spans


def _delayed(
    ops: Sequence[Op], spans: list[Span], flying: Sequence[int], start: float, end: float,
    late: Mapping[Stream, float], free: dict[Stream, float],
) -> list[int]:  # fmt: skip
    """Let those that are under way while a computation runs end late, and start late what waits for their link.

    Returns:
        Those that are yet to be under way.
    """
    left, behind = list[int](), dict.fromkeys(Stream, 0.0)
    for place in flying:
        stream, span = ops[place].stream, spans[place]
        begins, ends = span.start + behind[stream], span.end + behind[stream]
        if begins >= end:
            left.append(place)
        elif ends > start and end > start:
            behind[stream] += late.get(stream, 0.0)
        spans[place] = Span(begins, span.end + behind[stream], span.exposed)
    for stream in free:
        free[stream] += behind[stream]
    return left


def makespan(spans: Sequence[Span]) -> float:
    """Until the last operator has ended."""
    return max((span.end for span in spans), default=0.0)


def paper_order(ops: Sequence[Op]) -> list[Op]:
    """The paper's hand-written order, as rules on a serial list (its section 4.1)."""
    out: list[Op] = []
    waiting: list[Op] = []  # weight gradients, until there is a communication to stand behind
    for op in _early_communication(ops):
        if op.phase == Phase.W and op.stream == Stream.COMPUTE:
            waiting.append(op)
            continue
        out.append(op)
        if op.stream != Stream.COMPUTE and op.writes:
            out += waiting
            waiting = []
    return out + waiting


def _early_communication(ops: Sequence[Op]) -> list[Op]:
    """Each communication right behind the last operator that it needs."""
    before = dependencies(ops)
    followers: dict[int, list[int]] = {}
    out: list[Op] = []
    for place, op in enumerate(ops):
        if op.stream != Stream.COMPUTE:
            followers.setdefault(max(before[place], default=-1), []).append(place)
    for first in (-1, *(place for place, op in enumerate(ops) if op.stream == Stream.COMPUTE)):
        waiting = [first]  # a stack: communications may need each other in chains of any length
        while waiting:
            place = waiting.pop()
            if place >= 0:
                out.append(ops[place])
            waiting += reversed(followers.get(place, []))
    return out


def scheduled_order(ops: Sequence[Op], seconds: Seconds) -> list[Op]:
    """List scheduling (Graham 1966) on one computing stream and the links, priority the longest way to the end."""
    before = dependencies(ops)
    _bound(ops, before)
    after: list[list[int]] = [[] for _ in ops]
    for place, needed in enumerate(before):
        for source in needed:
            after[source].append(place)
    way = _longest_ways(ops, after, seconds)
    missing = [len(needed) for needed in before]
    state = _State(ops, seconds, way)
    for place, count in enumerate(missing):
        if not count:
            state.add(place, 0.0)
    done: list[int] = []
    ends = [0.0] * len(ops)
    while state:
        place, ends[place] = state.next()
        done.append(place)
        for follower in after[place]:
            missing[follower] -= 1
            if not missing[follower]:
                state.add(follower, max(ends[source] for source in before[follower]))
    return [ops[place] for place in done]


def _bound(ops: Sequence[Op], before: list[set[int]]) -> None:
    """Let what a layer's backward computes wait for the weight gradients of the layer above it."""
    weights: set[int] = set()
    above: dict[int, set[int]] = {}
    for place, op in enumerate(ops):
        layer = parse(op.name).layer
        if layer is not None and op.phase == Phase.W:
            weights.add(place)
        elif layer is not None and op.phase == Phase.B and op.stream == Stream.COMPUTE:
            if layer not in above:
                above[layer], weights = weights, set()
            before[place] |= above[layer]


def best_order(ops: Sequence[Op], seconds: Seconds) -> list[Op]:
    """The fastest of the scheduler's order, the hand-written one and the list as it is, by simulation.

    Of equal ones the first: without communication in a list all take the same, up to roundings of sums, but what is
    hidden behind it later finds gradients complete at other times.
    """
    known = {id(op): seconds(op) for op in ops}  # asked for some ten times each

    def once(op: Op) -> float:
        return known[id(op)]

    candidates = [scheduled_order(ops, once), paper_order(ops), list(ops)]
    times = [makespan(simulate(order, once)) for order in candidates]
    return next(order for order, took in zip(candidates, times, strict=True) if took <= min(times) * (1 + ROUNDING))


def _longest_ways(ops: Sequence[Op], after: Sequence[Sequence[int]], seconds: Seconds) -> list[float]:
    """From the start of each operator to the end of the list, seconds, over its successors."""
    way = [0.0] * len(ops)
    for place in reversed(range(len(ops))):
        way[place] = seconds(ops[place]) + max((way[follower] for follower in after[place]), default=0.0)
    return way


class _State:
    """Operators whose predecessors have been placed, and the clocks of computation and links."""

    def __init__(self, ops: Sequence[Op], seconds: Seconds, way: Sequence[float]) -> None:
        self.ops, self.seconds, self.way = ops, seconds, way
        self.clock = 0.0
        self.free: dict[Stream, float] = {}
        self.startable: list[tuple[int, float, int]] = []  # inputs are there: (kind, -way, place)
        self.coming: list[tuple[float, float, int]] = []  # inputs arrive later: (when, -way, place)

    def __bool__(self) -> bool:
        return bool(self.startable or self.coming)

    def add(self, place: int, ready: float) -> None:
        """An operator all of whose inputs have been placed, the last arrives at `ready`."""
        heapq.heappush(self.coming, (ready, -self.way[place], place))

    def next(self) -> tuple[int, float]:
        """The operator to place now, and when it ends."""
        if not self._arrived() and not self.startable:
            self.clock = self.coming[0][0]  # nothing to do but wait
            self._arrived()
        _, _, place = heapq.heappop(self.startable)
        op = self.ops[place]
        took = self.seconds(op)
        if op.stream == Stream.COMPUTE:
            self.clock += took
            return place, self.clock
        end = max(self.clock, self.free.get(op.stream, 0.0)) + took
        self.free[op.stream] = end
        return place, end

    def _arrived(self) -> bool:
        """Move what has arrived by now; communications go before computation: starting one takes no time."""
        moved = False
        while self.coming and self.coming[0][0] <= self.clock:
            _, priority, place = heapq.heappop(self.coming)
            kind = 0 if self.ops[place].stream != Stream.COMPUTE else 1
            heapq.heappush(self.startable, (kind, priority, place))
            moved = True
        return moved
