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
from typing import NamedTuple

from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase, Stream

ROUNDING = 1e-9
"""Relative rounding of sums of thousands of seconds in float64."""


def dependencies(ops: Sequence[Op]) -> list[set[int]]:
    """Return, for each operator, the positions of those that must come before it."""
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


class Span(NamedTuple):
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
    """Return when each operator of a list runs, by the executor's rules.

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
                span = spans[source]
                spans[source] = span._replace(exposed=span.exposed + span.end - clock)
                clock = span.end
        computes = op.stream == Stream.COMPUTE
        start = clock if computes else max(clock, free.get(op.stream, 0.0))
        end = start + seconds(op)
        if computes:
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
    """Return the seconds until the last operator has ended."""
    return max((span.end for span in spans), default=0.0)


def paper_order(ops: Sequence[Op]) -> list[Op]:
    """Return the paper's hand-written order, as rules on a serial list (its section 4.1)."""
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
    """Put each communication right behind the last operator that it needs."""
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
    """Schedule a list (Graham 1966) on one computing stream and the links, priority the longest way to the end."""
    before = dependencies(ops)
    _bound(ops, before)
    after: list[list[int]] = [[] for _ in ops]
    for place, needed in enumerate(before):
        for source in needed:
            after[source].append(place)
    took = list(map(seconds, ops))
    way = [0.0] * len(ops)  # from the start of each to the end of the list
    for place in reversed(range(len(ops))):
        way[place] = took[place] + max((way[follower] for follower in after[place]), default=0.0)
    missing = [len(needed) for needed in before]
    coming = [(0.0, -way[place], place) for place, count in enumerate(missing) if not count]  # (from when on, -way, it)
    heapq.heapify(coming)
    startable: list[tuple[bool, float, int]] = []  # inputs are there: (computes, -way, place)
    clock, free, ends = 0.0, dict.fromkeys(Stream, 0.0), [0.0] * len(ops)
    done: list[Op] = []
    while coming or startable:
        if not startable:  # nothing to do but wait
            clock = max(clock, coming[0][0])
        while coming and coming[0][0] <= clock:
            _, priority, place = heapq.heappop(coming)
            computes = ops[place].stream == Stream.COMPUTE  # after communications: starting one takes no time
            heapq.heappush(startable, (computes, priority, place))
        computes, _, place = heapq.heappop(startable)
        stream = ops[place].stream
        ends[place] = (clock if computes else max(clock, free[stream])) + took[place]
        if computes:
            clock = ends[place]
        else:
            free[stream] = ends[place]
        done.append(ops[place])
        for follower in after[place]:
            missing[follower] -= 1
            if not missing[follower]:
                ready = max(ends[source] for source in before[follower])
                heapq.heappush(coming, (ready, -way[follower], follower))
    return done


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
    """Return the fastest of the scheduler's order, the hand-written one and the list as it is, by simulation.

    Of equal ones the first: without communication in a list all take the same, up to roundings of sums, but what is
    hidden behind it later finds gradients complete at other times.
    """
    known = {id(op): seconds(op) for op in ops}  # asked for some ten times each

    def once(op: Op) -> float:
        return known[id(op)]

    candidates = [scheduled_order(ops, once), paper_order(ops), list(ops)]
    times = [makespan(simulate(order, once)) for order in candidates]
    return next(order for order, took in zip(candidates, times, strict=True) if took <= min(times) * (1 + ROUNDING))
