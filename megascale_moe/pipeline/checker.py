"""What a schedule does before it runs: proof that it is right, its time and its memory.

A wrong schedule hangs or, worse, sums gradients that are not there; on ranks neither tells where the mistake is. As
data it can be executed here in microseconds. The model is that of the executor: each rank executes its list in order,
an action waits for the message of the neighbouring stage, sends never block. Within it a schedule either completes for
every timing or deadlocks for every timing, so one execution is a proof, and the simulation of time follows the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

from megascale_moe.comm.collectives import tag_of
from megascale_moe.pipeline.schedule import Action, Schedule


class ScheduleError(RuntimeError):
    """A schedule that cannot run: the first line says which action, rank and why, the rest is a picture of it."""


def check(schedule: Schedule, pp: int, virtual_stages: int, micros: int, limit: int | None = None) -> None:
    """Raise `ScheduleError` unless `schedule` is one training step of `pp` ranks with `virtual_stages` stages each.

    Refused are missing, doubled and misplaced actions, deadlocks, a B or W before what it reads or after that was
    freed, and more than `limit` activations on one rank, counted in (stage, micro-batch) whose F is done and whose W
    is not.
    """
    if len(schedule) != pp:
        raise ScheduleError(f"{len(schedule)} lists of actions for parallel.pp = {pp}: one per rank is needed")
    last = pp * virtual_stages - 1
    for rank in range(pp):
        _check_places(schedule, rank, last, micros)
        _check_complete(schedule, rank, range(rank, last + 1, pp), micros)
    position, held, done = [0] * pp, [0] * pp, [set[Action]() for _ in range(pp)]

    def check_next(rank: int, action: Action) -> None:
        reason = _too_early(action, done[rank], held[rank], limit)
        if reason:
            raise _refusal(f"rank {rank} runs {action} {reason}", schedule, rank, position)

    for rank, action in execute(schedule, last, position):
        check_next(rank, action)
        done[rank].add(action)
        held[rank] += _growth(action)
    heads = _heads(schedule, position)
    # An action in the wrong place of its own list may also wait forever; the first is the better explanation.
    for rank, action in heads.items():
        check_next(rank, action)
    if heads:
        raise _deadlock(schedule, last, position)


class Transfer(NamedTuple):
    """What one stage sends to another: a micro-batch's hidden state to the next, or its gradient to the one before."""

    source: int
    target: int
    backward: bool
    micro: int

    def __str__(self) -> str:
        return f"{self.source}{'B' if self.backward else 'F'}{self.micro}"

    @property
    def tag(self) -> int:
        """The tag of its message."""
        return tag_of(f"{'B' if self.backward else 'F'} {self.source} {self.micro}")

    @property
    def what(self) -> str:
        """Return the word for the tensor that it carries, as in names of operators."""
        return "gradient" if self.backward else "hidden"

    def crosses(self, pp: int) -> bool:
        """Return whether it goes from one of `pp` ranks to another."""
        return self.source % pp != self.target % pp


def awaited(action: Action, last: int) -> Transfer | None:
    """Return the transfer that an action needs, if any; `last` is the last virtual stage."""
    backward = action.phase != "F"
    source = action.stage + 1 if backward else action.stage - 1
    needed = action.phase != "W" and 0 <= source <= last
    return Transfer(source, action.stage, backward, action.micro) if needed else None


def sent(action: Action, last: int) -> Transfer | None:
    """Return the transfer that an action makes, if any."""
    backward = action.phase != "F"
    target = action.stage - 1 if backward else action.stage + 1
    made = action.phase != "W" and 0 <= target <= last
    return Transfer(action.stage, target, backward, action.micro) if made else None


def execute(schedule: Schedule, last: int, position: list[int]) -> Iterator[tuple[int, Action]]:
    """Yield (rank, action) in an order that can happen, until all is done or no rank can go on; counts up `position`.

    In rounds, one action per rank that had its message when the round began: what is met first is what would be met
    first if all actions took the same time.
    """
    done: set[Transfer | None] = {None}
    while True:
        ready = {rank: action for rank, action in _heads(schedule, position).items() if awaited(action, last) in done}
        if not ready:
            return
        for rank, action in ready.items():
            yield rank, action
            done.add(sent(action, last))
            position[rank] += 1


def _heads(schedule: Schedule, position: list[int]) -> dict[int, Action]:
    """Return the action that each rank stands at, of the ranks that are not finished."""
    return {
        rank: actions[done]
        for rank, (actions, done) in enumerate(zip(schedule, position, strict=True))
        if done < len(actions)
    }


def peak_in_flight(schedule: Schedule) -> list[int]:
    """Return per rank the largest number of (stage, micro-batch) whose activations are alive: F done, W or BW not."""
    return [max(accumulate(map(_growth, actions)), default=0) for actions in schedule]


def _growth(action: Action) -> int:
    """Return by how many micro-batches activations grow: F keeps what W, the last reader, frees."""
    return {"F": 1, "B": 0}.get(action.phase, -1)


# ---------------------------------------------------------------------------------------------- refusals


def _check_places(schedule: Schedule, rank: int, last: int, micros: int) -> None:
    """Refuse actions of a rank that do not exist, belong to another rank or are there twice."""
    seen, pp = set[Action](), len(schedule)
    for index, action in enumerate(schedule[rank]):
        reason = ""
        if not (0 <= action.stage <= last and 0 <= action.micro < micros and action.phase in ("F", "B", "W", "BW")):
            reason = f", which is no action of stages 0 to {last} and micro-batches 0 to {micros - 1}"
        elif action.stage % pp != rank:
            reason = f", but stage {action.stage} lives on rank {action.stage % pp}"
        elif action in seen:
            reason = " a second time"
        if reason:
            raise _refusal(f"rank {rank} runs {action}{reason}", schedule, rank, wrong=index)
        seen.add(action)


def _check_complete(schedule: Schedule, rank: int, stages: range, micros: int) -> None:
    """Refuse a rank one of whose stages lacks, of some micro-batch, the F, or both the BW and one of its halves.

    What is missing is called BW where the rank has other BW and neither half of this one.
    """
    actions = schedule[rank]
    present, whole = set(actions), any(action.phase == "BW" for action in actions)
    for stage, micro in product(stages, range(micros)):
        f, b, w, bw = _phases(stage, micro)
        halves = [bw] if whole and present.isdisjoint((b, w)) else [b, w]
        for action in [f] if bw in present else [f, *halves]:
            if action not in present:
                longer = [*schedule[:rank], [*actions, action], *schedule[rank + 1 :]]
                raise _refusal(f"rank {rank} never runs {action}", longer, rank, wrong=len(actions))


def _too_early(action: Action, done: Container[Action], held: int, limit: int | None) -> str:
    """Return why a rank that has `done` so much cannot run `action` next; empty if it can."""
    f, b, w, bw = _phases(action.stage, action.micro)
    for freeing in (w, bw):
        if freeing in done:
            return f"after {freeing}, which freed the activations of this micro-batch"
    if action.phase == "F":
        full = limit is not None and held >= limit
        return f"with the activations of {held} micro-batches alive: the limit is {limit}" if full else ""
    if f not in done:
        return f"before {f}, whose activations it reads"
    if action.phase == "W" and b not in done:
        return f"before {b}, whose gradients it reads"
    if action.phase == "BW" and b in done:
        return f"after {b}, which computed the input gradient already"
    return ""


def _phases(stage: int, micro: int) -> list[Action]:
    return [Action(stage, phase, micro) for phase in ("F", "B", "W", "BW")]


def _deadlock(schedule: Schedule, last: int, position: list[int]) -> ScheduleError:
    """Return the error for ranks that wait for each other: follow who waits for whom until the circle closes.

    Which action of a circle is the wrong one is a matter of view. A forward is blamed before a backward: it is usually
    one too many, where a backward was due.
    """
    heads, rank = _heads(schedule, position), min(_heads(schedule, position))
    waits: dict[int, str] = {}  # rank -> what it waits for, along the chain
    while rank not in waits:
        transfer = awaited(heads[rank], last)
        assert transfer is not None  # what needs nothing is never stuck
        owner = transfer.source % len(schedule)
        sender = next((action for action in schedule[owner] if sent(action, last) == transfer), None)
        if sender is None or owner not in heads:
            waits = {rank: f"waits for {transfer}, which rank {owner} never runs"}
            break
        later = "" if sender == heads[owner] else f", which rank {owner} only runs after {heads[owner]}"
        waits[rank] = f"waits for {sender}{later}"
        rank = owner
    circle = list(waits)
    circle = circle[circle.index(rank) :]  # the chain may lead to it from outside
    first = next((place for place, rank in enumerate(circle) if heads[rank].phase == "F"), 0)
    circle = circle[first:] + circle[:first]
    chain = "; that ".join(waits[rank] for rank in circle)
    return _refusal(f"rank {circle[0]} at {heads[circle[0]]} {chain}", schedule, circle[0], position)


def _refusal(
    reason: str, schedule: Schedule, rank: int, position: list[int] | None = None, wrong: int | None = None
) -> ScheduleError:
    """Return the error for an action of `rank`, with a picture: one line per rank, one cell per action.

    Args:
        position: how many actions each rank has executed; None: none. wrong: the place of the action in its list;
            None: the one that the rank stands at.
    """
    position = position or [0] * len(schedule)
    rows = [
        [f" {action} " if place < position[each] else f"({action})" for place, action in enumerate(actions)]
        for each, actions in enumerate(schedule)
    ]
    wrong = position[rank] if wrong is None else wrong
    rows[rank][wrong] = f"!{schedule[rank][wrong]}!"
    width = max(len(cell) for row in rows for cell in row)
    indent = len(f"rank {len(rows) - 1}")
    lines = [
        f"{f'rank {each}':<{indent}}  {' '.join(f'{cell:<{width}}' for cell in row)}".rstrip()
        for each, row in enumerate(rows)
    ]
    return ScheduleError("\n".join([reason, *lines, "executed, !wrong!, (not executed)"]))


# ---------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timeline:
    """When each action runs. Times in the unit of the cost function, seconds unless said otherwise."""

    spans: list[list[tuple[Action, float, float]]]  # [pipeline rank][position]: action, start, end
    makespan: float  # from the first start to the last end of any rank
    busy: list[float]  # per rank, the sum of its actions

    @property
    def bubble(self) -> float:
        """The fraction of all ranks' time without work."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def timeline(schedule: Schedule, pp: int, cost: Callable[[Action], float], transfer: float = 0.0) -> Timeline:
    """Simulate a schedule on `pp` ranks: an action lasts `cost`, a message between ranks `transfer`.

    A message leaves when its action ends and occupies nobody: transfers delay, but cost no time of computation and do
    not queue. Same rules as `check`; `ScheduleError` for a deadlock.
    """
    last = max((action.stage for actions in schedule for action in actions), default=0)
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule]
    clock, moved = [0.0] * pp, True
    ends: dict[tuple[int, bool, int], float] = {}  # (stage, forward, micro-batch) -> when its message leaves
    while moved:  # each rank as far as its messages are there; what is met first makes no difference to times
        moved = False
        for rank, actions in enumerate(schedule):
            time, row = clock[rank], spans[rank]
            for action in actions[len(row) :]:
                stage, phase, micro = action.stage, action.phase, action.micro
                forward, start = phase == "F", time
                source = stage - 1 if forward else stage + 1
                if phase != "W" and 0 <= source <= last:
                    end = ends.get((source, forward, micro))
                    if end is None:
                        break
                    start = max(time, end + transfer if source % pp != rank else end)
                time = start + cost(action)
                if phase != "W":
                    ends[stage, forward, micro] = time
                row.append((action, start, time))
                moved = True
            clock[rank] = time
    position = list(map(len, spans))
    if _heads(schedule, position):
        raise _deadlock(schedule, last, position)
    return Timeline(spans, max(clock), [sum(end - start for _, start, end in row) for row in spans])


def bubble(name: str, pp: int, micros: int, virtual_stages: int, f: float, b: float, w: float) -> float:
    """Return the fraction of a step's time without work, by formula.

    f, b, w are seconds of F, B and W, per micro-batch of a rank's whole share. Idle time per rank over (work + idle
    time), p = pp, m = micros, for equal ranks and transfers that take no time:

    - 1f1b: (p - 1)(f + b + w). Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1.
    - interleaved: that divided by the stages per rank; same paper, section 2.2.2.
    - zero_bubble: (p - 1)(f + b - w), ZB-H1 in Qi et al. 2023 (arXiv 2401.10241), section 2. Exact where w <= f and
      w <= b, as for f = b = w; a bound from below elsewhere. With m < p there are only m weight gradients to fill in
      at the end, and the term is (p - 1)(f + b) - (m - 1) w (ours).
    """
    idle = (pp - 1) * (f + b + w) / virtual_stages
    if name == "zero_bubble":
        idle = (pp - 1) * (f + b) - (min(micros, pp) - 1) * w
    return idle / (micros * (f + b + w) + idle)
