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
from functools import cache, partial

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import receive, send
from megascale_moe.engine.names import grad, in_micro
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.pipeline.checker import Transfer, awaited, execute, sent
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
    """Return the name of a tensor of one micro-batch in the list of a step."""
    return name if not name or name in SHARED else in_micro(name, micro)


def in_micro_batch(ops: Sequence[Op], micro: int) -> list[Op]:
    """Return a stage's operators with the names that they have in the list of a step."""
    named = cache(partial(of_micro, micro=micro))
    return [op.renamed(tuple(map(named, op.reads)), tuple(map(named, op.writes))) for op in ops]


def step_ops(
    schedule: Schedule,
    stages: Mapping[int, Stage],
    last: int,
    pp: Axis,
    message: Message,
    weave: Callable[[Sequence[Op]], Sequence[int]] | None = None,
) -> list[Op]:
    """Return the list of this rank, whose index on the axis `pp` says which actions of the schedule are its own.

    Args:
        last: the last stage of the model.
        weave: given the operators of a forward and those of the backward of another micro-batch behind them, the
            order of all, by their places. Without it every action is on its own.
    """
    actions = schedule[pp.index]
    groups = in_pairs(actions) if weave else [[action] for action in actions]
    received = _acknowledged(schedule, last, pp.index)

    def receives(group: Sequence[Action]) -> list[Op]:
        needs = [(action.stage, awaited(action, last)) for action in group]
        return [_receive(each, stages[stage], pp, message) for stage, each in needs if each and each.crosses(pp.size)]

    def work(action: Action) -> list[Op]:
        stage, transfer = stages[action.stage], sent(action, last)
        ops = in_micro_batch(action_ops(stage, action.phase), action.micro)
        return [*ops, _send(transfer, stage, pp, message)] if transfer and transfer.crosses(pp.size) else ops

    ops = receives(groups[0])
    orders: dict[tuple[int, ...], Sequence[int]] = {}  # stages of a pair -> order: all its micro-batches are alike
    done = 0
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        ops += receives(following)
        both = [op for action in group for op in work(action)]
        if weave and len(group) > 1:
            pair = tuple(action.stage for action in group)
            orders[pair] = orders.get(pair) or weave(both)
            both = [both[place] for place in orders[pair]]
        ops += both
        over = (transfer for place in range(done, done + len(group)) for transfer in received.get(place, []))
        ops += [Op(name="sent", reads=(f"sent:{transfer}",), writes=(), run=lambda _: None) for transfer in over]
        done += len(group)
    return ops


def action_ops(stage: Stage, phase: str) -> Sequence[Op]:
    """Return the operators of an action of a stage, without their micro-batch."""
    if phase == "F":
        return stage.forward
    if phase == "BW":
        return stage.backward
    return [op for op in stage.backward if (op.phase == Phase.W) == (phase == "W")]


# --- messages between stages -----------------------------------------------------------------------------------------


def _receive(transfer: Transfer, stage: Stage, pp: Axis, message: Message) -> Op:
    """Return the receive of what a stage needs."""

    def run() -> object:
        out = torch.empty(message.shape, dtype=message.dtype, device=message.device)
        return receive(out, transfer.source % pp.size, pp, transfer.tag, backward=transfer.backward)

    name = of_micro(grad(stage.writes) if transfer.backward else stage.reads, transfer.micro)
    return Op(name=f"receive_{transfer.what}", reads=(), writes=(name,), run=run, stream=Stream.INTER,
              phase=Phase.B if transfer.backward else Phase.F, cost=Cost(axis="pp"))  # fmt: skip


def _send(transfer: Transfer, stage: Stage, pp: Axis, message: Message) -> Op:
    """Return the send of what a stage has made."""

    def run(x: Tensor) -> object:
        return send(x, transfer.target % pp.size, pp, transfer.tag, backward=transfer.backward)

    name = of_micro(grad(stage.reads) if transfer.backward else stage.writes, transfer.micro)
    cost = Cost(wire_bytes=message.nbytes, axis="pp")
    return Op(name=f"send_{transfer.what}", reads=(name,), writes=(f"sent:{transfer}",), run=run, stream=Stream.INTER,
              phase=Phase.B if transfer.backward else Phase.F, cost=cost)  # fmt: skip


def _acknowledged(schedule: Schedule, last: int, rank: int) -> dict[int, list[Transfer]]:
    """Return by place in this rank's list its sends that are certainly received when the action there is done.

    Every action knows how many actions of each rank are done when it is: what its own rank knew, and what the action
    knew that it waited for (a vector clock). At the end of the list all sends are waited for.
    """
    pp = len(schedule)
    clocks = [[0] * pp for _ in schedule]
    sender: dict[Transfer | None, list[int]] = {}  # what the action knew that made a transfer
    receiver: dict[Transfer | None, int] = {}  # how many actions its rank had done with the one that needed it
    mine: list[list[int]] = []
    for where, action in execute(schedule, last, [0] * pp):
        transfer = awaited(action, last)
        clock = list(map(max, clocks[where], sender[transfer])) if transfer else [*clocks[where]]
        clock[where] += 1
        clocks[where] = sender[sent(action, last)] = clock
        receiver[transfer] = clock[where]
        if where == rank:
            mine.append(clock)
    received: dict[int, list[Transfer]] = {}
    for action in schedule[rank]:
        transfer = sent(action, last)
        if transfer and transfer.crosses(pp):
            heard = (at for at, clock in enumerate(mine) if clock[transfer.target % pp] >= receiver[transfer])
            received.setdefault(next(heard, len(mine) - 1), []).append(transfer)
    return received
