"""A training step of one rank as one list: its stages' lists strung together by a schedule.

An action such as 2F5 becomes the forward list of stage 2 with every name prefixed "5/", and messages to neighbouring
stages become operators like all others. So whatever reads lists (executor, dry run, passes, planner) sees the whole
step and knows nothing of pipelines, and without a pipeline the list is the same with the messages gone.

Receives stand one action before the one that needs them: they travel while it computes. A send is over when the
schedule shows that its receiver has gone on (this rank has heard from it since, directly or through others); there,
its buffer is let go. Waiting earlier could block a schedule that the checker, for which sends never block, calls good.

Two actions can be woven into one: the forward of a micro-batch and the backward of another, whose operators need
nothing of each other, so that each computes while the other communicates. What the two receive travels before both,
what they send is among their operators.

Considered and rejected: a runner that executes actions one by one on a dictionary per micro-batch (less to build, but
then nothing could move across the border of an action), and a list per micro-batch with real loops (the same).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import receive, send, tag_of
from megascale_moe.engine.names import grad, in_micro
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.pipeline.checker import awaited, execute, message_of
from megascale_moe.pipeline.schedule import Action, Schedule, in_pairs

SHARED = frozenset({"loss_scale", "auxiliary_scale"})
"""Names that all micro-batches read; every other name belongs to one."""


@dataclass(frozen=True)
class Stage:
    """The lists of one of a rank's stages.

    Attributes:
        reads, writes: the hidden states that come in and go out, "" where the model begins and ends.
    """

    forward: Sequence[Op]
    backward: Sequence[Op]
    reads: str
    writes: str


@dataclass(frozen=True)
class Message:
    """A hidden state, or its gradient, between stages; shape and dtype of both."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def of_micro(name: str, micro: int) -> str:
    """The name of a tensor of one micro-batch in the list of a step."""
    return name if not name or name in SHARED else in_micro(name, micro)


def in_micro_batch(ops: Sequence[Op], micro: int) -> list[Op]:
    """Return a stage's operators with the names that they have in the list of a step."""
    names: dict[str, str] = {"": "", **{name: name for name in SHARED}}

    def named(name: str) -> str:
        if name not in names:
            names[name] = in_micro(name, micro)
        return names[name]

    return [op.renamed(tuple(map(named, op.reads)), tuple(map(named, op.writes))) for op in ops]


def step_ops(
    schedule: Schedule,
    stages: Mapping[int, Stage],
    last: int,
    pp: Axis,
    message: Message,
    weave: Callable[[Sequence[Op]], Sequence[int]] | None = None,
) -> list[Op]:
    """The list of this rank, whose index on the axis `pp` says which actions of the schedule are its own.

    Args:
        last: the last stage of the model.
        weave: given the operators of a forward and those of the backward of another micro-batch behind them, the
            order of all, by their places. Without it every action is on its own.
    """
    builder = _Builder(stages, last, pp, message)
    actions = schedule[pp.index]
    groups = in_pairs(actions) if weave else [[action] for action in actions]
    over = _acknowledged(schedule, last, pp.index)
    ops: list[Op] = builder.receives(groups[0])
    orders: dict[tuple[int, ...], Sequence[int]] = {}  # stages of a pair -> order: all its micro-batches are alike
    done = 0
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        ops += builder.receives(following)
        work = [op for action in group for op in (*builder.work(action), *builder.sends(action))]
        if weave and len(group) > 1:
            pair = tuple(action.stage for action in group)
            orders[pair] = orders.get(pair) or weave(work)
            work = [work[place] for place in orders[pair]]
        ops += work
        ops += [builder.sent(sent) for place in range(done, done + len(group)) for sent in over.get(place, [])]
        done += len(group)
    return ops


@dataclass(frozen=True)
class _Builder:
    stages: Mapping[int, Stage]
    last: int
    pp: Axis
    message: Message

    def work(self, action: Action) -> list[Op]:
        """The operators of an action."""
        return in_micro_batch(action_ops(self.stages[action.stage], action.phase), action.micro)

    def receives(self, actions: Sequence[Action]) -> list[Op]:
        """Return the receives of what actions need from other ranks."""
        return [op for action in actions for op in self._receive(action)]

    def _receive(self, action: Action) -> list[Op]:
        transfer = incoming(action, self.last, self.pp.size)
        if transfer is None:
            return []
        stage, backward, message, pp = self.stages[action.stage], transfer.backward, self.message, self.pp
        name = of_micro(grad(stage.writes) if backward else stage.reads, action.micro)

        def run() -> object:
            out = torch.empty(message.shape, dtype=message.dtype, device=message.device)
            return receive(out, transfer.sender, pp, transfer.tag, backward=backward)

        return [Op(name=f"receive_{transfer.what}", reads=(), writes=(name,), run=run, stream=Stream.INTER,
                   phase=Phase.B if backward else Phase.F, cost=Cost(axis="pp"))]  # fmt: skip

    def sends(self, action: Action) -> list[Op]:
        """Return the send of what another rank needs from an action."""
        transfer = outgoing(action, self.last, self.pp.size)
        if transfer is None:
            return []
        stage, backward, pp = self.stages[action.stage], transfer.backward, self.pp
        name = of_micro(grad(stage.reads) if backward else stage.writes, action.micro)
        return [Op(name=f"send_{transfer.what}", reads=(name,), writes=(_token(action),), stream=Stream.INTER,
                   phase=Phase.B if backward else Phase.F, cost=Cost(wire_bytes=self.message.nbytes, axis="pp"),
                   run=lambda x: send(x, transfer.receiver, pp, transfer.tag, backward=backward))]  # fmt: skip

    def sent(self, action: Action) -> Op:
        """The end of what an action sent."""
        return Op(name="sent", reads=(_token(action),), writes=(), run=lambda _: None)


@dataclass(frozen=True)
class Transfer:
    """A message between two pipeline ranks, by their indices on the axis."""

    sender: int
    receiver: int
    backward: bool
    tag: int

    @property
    def what(self) -> str:
        """The kind of message, as operators are named."""
        return "gradient" if self.backward else "hidden"


def incoming(action: Action, last: int, pp: int) -> Transfer | None:
    """The message from another rank that an action needs."""
    source = awaited(action, last)
    return None if source is None else outgoing(source, last, pp)


def outgoing(action: Action, last: int, pp: int) -> Transfer | None:
    """The message that an action sends to another rank."""
    target = _receiver(action, last)
    if target is None or target % pp == action.stage % pp:
        return None
    backward = action.phase != "F"
    tag = tag_of(f"{'B' if backward else 'F'} {action.stage} {action.micro}")
    return Transfer(action.stage % pp, target % pp, backward, tag)


def action_ops(stage: Stage, phase: str) -> Sequence[Op]:
    """The operators of an action of a stage, without their micro-batch."""
    if phase == "F":
        return stage.forward
    if phase == "BW":
        return stage.backward
    return [op for op in stage.backward if (op.phase == Phase.W) == (phase == "W")]


def _receiver(action: Action, last: int) -> int | None:
    """The stage that an action's result goes to."""
    if action.phase == "F":
        return action.stage + 1 if action.stage < last else None
    return action.stage - 1 if "B" in action.phase and action.stage else None


def _token(action: Action) -> str:
    return f"sent:{action}"


def _acknowledged(schedule: Schedule, last: int, rank: int) -> dict[int, list[Action]]:
    """Place in this rank's list -> its sends that are certainly received when the action there is done.

    Every action knows how far each rank had come when it ran: its own rank's knowledge and that of the action it
    waited for (a vector clock). At the end of the list all sends are waited for.
    """
    known = _knowledge(schedule, last)
    place = {
        message_of(action): (where, index)
        for where, actions in enumerate(schedule)
        for index, action in enumerate(actions)
        if action.phase != "W"
    }
    mine = schedule[rank]
    found: dict[int, list[Action]] = {}
    for action in mine:
        target = _receiver(action, last)
        if target is None or target % len(schedule) == rank:
            continue
        where, index = place[Action(target, action.phase[0], action.micro)]
        heard = (at for at, mark in enumerate(known[rank]) if mark[where] > index)
        found.setdefault(next(heard, len(mine) - 1), []).append(action)
    return found


def _knowledge(schedule: Schedule, last: int) -> list[list[list[int]]]:
    """Per rank and action: how many actions of each rank are certainly done when it is."""
    known: list[list[list[int]]] = [[] for _ in schedule]
    sent: dict[Action, list[int]] = {}
    for rank, action in execute(schedule, last, [0] * len(schedule)):
        source = awaited(action, last)
        heard = [known[rank][-1]] if known[rank] else [[0] * len(schedule)]
        if source is not None:
            heard.append(sent[source])
        clock = [max(marks) for marks in zip(*heard, strict=True)]
        clock[rank] += 1
        known[rank].append(clock)
        sent[message_of(action)] = clock
    return known
