"""What a schedule does before it runs: proof that it is right, its picture, its time and its memory.

A wrong schedule hangs or, worse, sums gradients that are not there; on ranks neither tells where the mistake is. As
data it can be executed here in microseconds. The model is that of the runner: each rank executes its list in order, an
action waits for the message of the neighbouring stage, sends never block. Within it a schedule either completes for
every timing or deadlocks for every timing, so one execution is a proof, and the simulation of time follows the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megascale_moe.pipeline.schedule import Action

Lists = Sequence[Sequence[Action]]  # [pipeline rank][position]


class ScheduleError(RuntimeError):
    """A schedule that cannot run: the first line says which action, rank and why, the rest is a picture of it."""


def check(lists: Lists, pp: int, virtual_stages: int, micros: int, limit: int | None = None) -> None:
    """Raise `ScheduleError` unless `lists` is one training step of `pp` ranks with `virtual_stages` stages each.

    Refused are missing, doubled and misplaced actions, deadlocks, a B or W before what it reads or after that was
    freed, and more than `limit` activations on one rank, counted in (stage, micro-batch) whose F is done and whose W
    is not.
    """
    if len(lists) != pp:
        raise ScheduleError(f"{len(lists)} lists of actions for parallel.pp = {pp}: one per rank is needed")
    last = pp * virtual_stages - 1
    for rank, actions in enumerate(lists):
        _check_places(lists, rank, last, micros)
        _check_complete(lists, rank, range(rank, last + 1, pp), micros, whole=any(a.phase == "BW" for a in actions))
    _check_execution(lists, last, limit)


def awaited(action: Action, last: int) -> Action | None:
    """The action whose message `action` needs, None if it needs none; `last` is the last virtual stage.

    B stands for a BW too: the message is the input gradient. Whether it crosses ranks is not asked.
    """
    if action.phase == "F" and action.stage > 0:
        return Action(action.stage - 1, "F", action.micro)
    if action.phase in ("B", "BW") and action.stage < last:
        return Action(action.stage + 1, "B", action.micro)
    return None


def message_of(action: Action) -> Action:
    """The name under which `awaited` asks for what this action sends: a BW sends what a B sends."""
    return Action(action.stage, action.phase[0], action.micro)


# ---------------------------------------------------------------------------------------------- execution


def execute(lists: Lists, last: int, position: list[int]) -> Iterator[tuple[int, Action]]:
    """(rank, action) in an order that can happen, until all is done or nobody can go on; counts up `position`.

    In rounds, one action per rank that had its message when the round began: what is met first is what would be met
    first if all actions took the same time.
    """
    sent: set[Action | None] = {None}
    while True:
        ready = [
            rank
            for rank, actions in enumerate(lists)
            if position[rank] < len(actions) and awaited(actions[position[rank]], last) in sent
        ]
        if not ready:
            return
        for rank in ready:
            action = lists[rank][position[rank]]
            yield rank, action
            sent.add(message_of(action))
            position[rank] += 1


def _check_execution(lists: Lists, last: int, limit: int | None) -> None:
    """Order, lifetimes and deadlocks, in the order in which they are met."""
    position = [0] * len(lists)
    alive = [_Alive(rank, limit) for rank in range(len(lists))]
    for rank, action in execute(lists, last, position):
        reason = alive[rank].refuses(action)
        if reason:
            raise _refusal(reason, lists, position, rank)
        alive[rank].add(action)
    heads = _heads(lists, position)
    # An action in the wrong place of its own list may also wait forever; the first is the better explanation.
    for rank, action in heads.items():
        reason = alive[rank].refuses(action)
        if reason:
            raise _refusal(reason, lists, position, rank)
    if heads:
        raise _deadlock(lists, last, position)


@dataclass
class _Alive:
    """The activations that one rank holds, and which phases are done."""

    rank: int
    limit: int | None
    done: set[Action] = field(default_factory=set)
    held: int = 0  # (stage, micro-batch) with F done and W not

    def add(self, action: Action) -> None:
        self.done.add(action)
        self.held += _growth(action)

    def refuses(self, action: Action) -> str:
        """Why `action` cannot be next on this rank; empty if it can."""
        f, b, w, bw = (Action(action.stage, phase, action.micro) for phase in ("F", "B", "W", "BW"))
        who = f"rank {self.rank} runs {action}"
        for freeing in (w, bw):
            if freeing in self.done:
                return f"{who} after {freeing}, which freed the activations of this micro-batch"
        if action.phase == "F":
            if self.limit is not None and self.held >= self.limit:
                return f"{who} with the activations of {self.held} micro-batches alive: the limit is {self.limit}"
        elif f not in self.done:
            return f"{who} before {f}, whose activations it reads"
        elif action.phase == "W" and b not in self.done:
            return f"{who} before {b}, whose gradients it reads"
        elif action.phase == "BW" and b in self.done:
            return f"{who} after {b}, which computed the input gradient already"
        return ""


def _growth(action: Action) -> int:
    """By how many micro-batches the activations alive on the rank grow: F keeps what W, the last reader, frees."""
    return {"F": 1, "B": 0}.get(action.phase, -1)


def peak_in_flight(lists: Lists) -> list[int]:
    """Per rank, the largest number of (stage, micro-batch) whose activations are alive: F done, W or BW not."""
    peaks = []
    for actions in lists:
        held = peak = 0
        for action in actions:
            held += _growth(action)
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


# ---------------------------------------------------------------------------------------------- refusals


def _check_places(lists: Lists, rank: int, last: int, micros: int) -> None:
    """Every action of the rank exists, belongs here and is there once."""
    seen: set[Action] = set()
    for index, action in enumerate(lists[rank]):
        who = f"rank {rank} runs {action}"
        reason = ""
        if not (0 <= action.stage <= last and 0 <= action.micro < micros and action.phase in ("F", "B", "W", "BW")):
            reason = f"{who}, which is no action of stages 0 to {last} and micro-batches 0 to {micros - 1}"
        elif action.stage % len(lists) != rank:
            reason = f"{who}, but stage {action.stage} lives on rank {action.stage % len(lists)}"
        elif action in seen:
            reason = f"{who} a second time"
        if reason:
            raise ScheduleError(f"{reason}\n{_grid(lists, [0] * len(lists), rank, index)}")
        seen.add(action)


def _check_complete(lists: Lists, rank: int, stages: range, micros: int, whole: bool) -> None:
    """Every stage of the rank has an F, and a BW or both halves, of each micro-batch; `whole`: it is BW that lacks."""
    present = set(lists[rank])
    for stage in stages:
        for micro in range(micros):
            f, b, w, bw = (Action(stage, phase, micro) for phase in ("F", "B", "W", "BW"))
            halves = [bw] if whole and present.isdisjoint((b, w)) else [b, w]
            needed = [f] if bw in present else [f, *halves]
            for action in needed:
                if action not in present:
                    grown = [[*actions, action] if r == rank else actions for r, actions in enumerate(lists)]
                    picture = _grid(grown, [0] * len(lists), rank, len(lists[rank]))
                    raise ScheduleError(f"rank {rank} never runs {action}\n{picture}")


def _refusal(reason: str, lists: Lists, position: list[int], rank: int) -> ScheduleError:
    """The error for the next action of `rank`, when each rank has executed the first `position` of its list."""
    return ScheduleError(f"{reason}\n{_grid(lists, position, rank, position[rank])}")


def _heads(lists: Lists, position: list[int]) -> dict[int, Action]:
    """Rank -> the action it stands at, of the ranks that are not finished."""
    return {
        rank: actions[done]
        for rank, (actions, done) in enumerate(zip(lists, position, strict=True))
        if done < len(actions)
    }


def _deadlock(lists: Lists, last: int, position: list[int]) -> ScheduleError:
    """The error for ranks that wait for each other: follow who waits for whom until the circle closes.

    Which action of a circle is the wrong one is a matter of view. A forward is blamed before a backward: it is usually
    one too many, where a backward was due.
    """
    heads = _heads(lists, position)
    circle = _circle(heads, last, len(lists))
    first = next((i for i, rank in enumerate(circle) if heads[rank].phase == "F"), 0)
    circle = circle[first:] + circle[:first]
    links = "; that ".join(_wait(lists, heads, last, rank) for rank in circle)
    return _refusal(f"rank {circle[0]} at {heads[circle[0]]} {links}", lists, position, circle[0])


def _circle(heads: dict[int, Action], last: int, pp: int) -> list[int]:
    """Ranks of which each waits for the next and the last for the first; one rank if it waits for a finished one."""
    chain = [min(heads)]
    while True:
        message = awaited(heads[chain[-1]], last)
        assert message is not None  # what needs no message is never stuck
        owner = message.stage % pp
        if owner not in heads:
            return chain[-1:]
        if owner in chain:
            return chain[chain.index(owner) :]
        chain.append(owner)


def _wait(lists: Lists, heads: dict[int, Action], last: int, rank: int) -> str:
    """Return what `rank` waits for, and which action its sender is at instead."""
    message = awaited(heads[rank], last)
    assert message is not None
    owner = message.stage % len(lists)
    sender = next((action for action in lists[owner] if message_of(action) == message), None)
    if sender is None or owner not in heads:
        return f"waits for {message}, which rank {owner} never runs"
    later = "" if sender == heads[owner] else f", which rank {owner} only runs after {heads[owner]}"
    return f"waits for {sender}{later}"


def _grid(lists: Lists, position: list[int], rank: int, index: int) -> str:
    """One line per rank, one cell per action: what was executed bare, the wrong one in !!, the rest in ()."""
    rows = []
    for r, (actions, done) in enumerate(zip(lists, position, strict=True)):
        cells = [f" {action} " if i < done else f"({action})" for i, action in enumerate(actions)]
        if r == rank:
            cells[index] = f"!{actions[index]}!"
        rows.append(cells)
    return _table(rows) + "\nexecuted, !wrong!, (not executed)"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under each other, all cells of one width, each row after the name of its rank."""
    width = max((len(cell) for row in rows for cell in row), default=0)
    names = [f"rank {rank}" for rank in range(len(rows))]
    lines = [
        f"{name:<{len(names[-1])}}  " + " ".join(f"{cell:<{width}}" for cell in row)
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------- time


Span = tuple[Action, float, float]  # action, start, end in seconds


@dataclass(frozen=True)
class Timeline:
    """When each action runs. Times in the unit of the cost function, seconds unless said otherwise."""

    spans: list[list[Span]]  # [pipeline rank][position]
    makespan: float  # from the first start to the last end of any rank
    busy: list[float]  # per rank, the sum of its actions

    @property
    def bubble(self) -> float:
        """Fraction of all ranks' time without work."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def timeline(lists: Lists, pp: int, cost: Callable[[Action], float], transfer: float = 0.0) -> Timeline:
    """Simulate `lists` on `pp` ranks: `cost` is the duration of an action, `transfer` that of a message between ranks.

    A message leaves when its action ends and occupies nobody: transfers delay, but cost no time of computation and do
    not queue. Same rules as `check`; `ScheduleError` for a deadlock.
    """
    last = max((action.stage for actions in lists for action in actions), default=0)
    position, spans, clock = [0] * pp, [list[Span]() for _ in range(pp)], [0.0] * pp
    ends: dict[tuple[int, bool, int], float] = {}  # (stage, forward, micro-batch) -> when its message leaves
    moved = True
    while moved:  # each rank as far as its messages are there; what is met first makes no difference to times
        moved = False
        for rank, actions in enumerate(lists):
            place, time, row, first = position[rank], clock[rank], spans[rank], position[rank]
            while place < len(actions):
                action = actions[place]
                stage, phase, micro = action.stage, action.phase, action.micro
                forward, start = phase == "F", time
                if phase != "W":
                    source = stage - 1 if forward else stage + 1
                    if 0 <= source <= last:
                        end = ends.get((source, forward, micro))
                        if end is None:
                            break
                        start = max(time, end + transfer if source % pp != rank else end)
                time = start + cost(action)
                if phase != "W":
                    ends[stage, forward, micro] = time
                row.append((action, start, time))
                place += 1
            position[rank], clock[rank], moved = place, time, moved or place > first
    if _heads(lists, position):
        raise _deadlock(lists, last, position)
    makespan = max((end for row in spans for _, _, end in row), default=0.0)
    return Timeline(spans, makespan, [sum(end - start for _, start, end in row) for row in spans])


def unit_cost(action: Action) -> float:
    """F = B = W = 1, so BW = 2: a linear layer does one product of equal size in each phase."""
    return 2.0 if action.phase == "BW" else 1.0


def bubble(name: str, pp: int, micros: int, virtual_stages: int, f: float, b: float, w: float) -> float:
    """Fraction of a step's time without work, by formula; f, b, w in seconds per micro-batch of a rank's whole share.

    Idle time per rank over (work + idle time), p = pp, m = micros, for equal ranks and transfers that take no time:

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


# ---------------------------------------------------------------------------------------------- picture


def draw(lists: Lists, times: Timeline | None = None) -> str:
    """Text picture: a row per rank, time to the right, dots where the rank is idle, dashes where an action goes on.

    Without `times` an F, B or W takes one column and a BW two. With them a column is the shortest action and starts
    are rounded to it. Cells read "F0", with several stages per rank "2F0".
    """
    times = times or timeline(lists, len(lists), unit_cost)
    durations = [end - start for row in times.spans for _, start, end in row]
    unit = min((duration for duration in durations if duration > 0), default=1.0)
    virtual = any(action.stage >= len(lists) for actions in lists for action in actions)
    columns = _column(times.makespan, unit)
    return _table([_row(row, unit, columns, virtual) for row in times.spans])


def _column(time: float, unit: float) -> int:
    """Rounded half up: an action of at least one unit then never rounds to no column. 1e-9 is for sums of floats."""
    return int(time / unit + 0.5 + 1e-9)


def _row(spans: Sequence[Span], unit: float, columns: int, virtual: bool) -> list[str]:
    cells = ["."] * columns
    for action, start, end in spans:
        text = str(action) if virtual else f"{action.phase}{action.micro}"
        begin, after = _column(start, unit), _column(end, unit)
        cells[begin:after] = [text, *["-" * len(text)] * (after - begin - 1)][: after - begin]
    return cells
