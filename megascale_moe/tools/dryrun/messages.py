"""Do all ranks of a job agree on every message? Answered for thousands of ranks without starting one.

A collective that one rank enters with another size, or two in another order, hangs a job after hours of queueing, or
adds wrong tensors silently. Here the lists of every rank are built, none is run, and compared: the members of a group
must name the same collectives of the same size in the same order, and every send must meet a receive of the same
bytes, in the same order on each link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.engine.op import Stream
from megascale_moe.pipeline.step import incoming, outgoing
from megascale_moe.planner.lists import optimizer_of, plan_of

Collective = tuple[str, str, float]  # operator, phase, bytes that the rank sends
Link = tuple[int, int, bool]  # sender, receiver, backward
Messages = tuple[tuple[int, int], ...]  # (tag, bytes)


@dataclass(frozen=True)
class RankMessages:
    """The messages that one rank sends and expects in a step.

    Attributes:
        collectives: axis -> what happens on it, in order; layers of one action count once, the actions are alike.
        sends, receives: link -> (tag, bytes) in order; ranks of the whole job.
    """

    collectives: dict[str, tuple[Collective, ...]]
    sends: dict[Link, Messages]
    receives: dict[Link, Messages]


@dataclass(frozen=True)
class Agreement:
    """The outcome: how much was compared, and the first disagreement, "" if there is none."""

    ranks: int
    messages: int
    disagreement: str


def check_messages(config: Config, mesh: Mesh, progress: Callable[[int], None] = lambda done: None) -> Agreement:
    """Build and compare the messages of all ranks of a mesh.

    Args:
        progress: called with the number of ranks done.
    """
    job: list[RankMessages] = []
    known: dict[object, Any] = {}
    for rank in range(mesh.world):
        job.append(rank_messages(config, mesh, rank, known))
        progress(rank + 1)
    count = sum(len(sequence) for rank in job for kind in (rank.collectives, rank.sends) for sequence in kind.values())
    return Agreement(mesh.world, count, next(_disagreements(job, mesh), ""))


def rank_messages(config: Config, mesh: Mesh, rank: int, known: dict[object, Any]) -> RankMessages:
    """Return the messages of one rank.

    Args:
        known: sequences of other ranks, added to: thousands of ranks have equal ones, each of which is held once.
    """
    plan = plan_of(config, mesh, rank)
    optimizer = optimizer_of(plan, config.train)
    collectives: dict[str, list[Collective]] = defaultdict(list)
    for op in (
        *(op for stage in plan.stages.values() for op in (*stage.forward, *stage.backward)),
        *(optimizer.hidden([]) if config.overlap.hides_synchronisation else optimizer.ops),
    ):
        if op.stream != Stream.COMPUTE:
            collectives[op.cost.axis].append((op.name, op.phase, op.cost.wire_bytes))
    sends: dict[Link, list[tuple[int, int]]] = defaultdict(list)
    receives: dict[Link, list[tuple[int, int]]] = defaultdict(list)
    ranks, last = mesh.ranks("pp", rank), len(plan.parts) - 1
    for action in plan.schedule[plan.axes["pp"].index]:
        for transfer, messages in (
            (incoming(action, last, mesh.pp), receives), (outgoing(action, last, mesh.pp), sends),
        ):  # fmt: skip
            if transfer is not None:
                link = ranks[transfer.sender], ranks[transfer.receiver], transfer.backward
                messages[link].append((transfer.tag, plan.message.nbytes))

    def once(lists: Mapping[Any, list[Any]]) -> dict[Any, Any]:
        sequences = {key: tuple(values) for key, values in lists.items()}
        return {key: known.setdefault(sequence, sequence) for key, sequence in sequences.items()}

    return RankMessages(once(collectives), once(sends), once(receives))


def _disagreements(job: Sequence[RankMessages], mesh: Mesh) -> Iterator[str]:
    axes = sorted({axis for messages in job for axis in messages.collectives} - {"", "pp"})
    for axis in axes:
        for leader, *others in mesh.groups(axis):
            first = job[leader].collectives.get(axis, ())
            for rank in others:
                other = job[rank].collectives.get(axis, ())
                if first != other:
                    yield _mismatch(f"axis {axis}", f"rank {leader} has", first, f"rank {rank}", other)
    for rank, messages in enumerate(job):
        for link, sent in messages.sends.items():
            expected = job[link[1]].receives.get(link, ())
            if sent != expected:
                yield _mismatch(f"rank {link[0]} to rank {link[1]}", "sends", sent, "expects", expected)
        for link in messages.receives:
            if link not in job[link[0]].sends:
                yield f"rank {rank} waits for rank {link[0]}, which sends it nothing"


def _mismatch(where: str, one: str, first: Sequence[object], two: str, second: Sequence[object]) -> str:
    place, (a, b) = next((i, pair) for i, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1])
    return f"{where}: message {place}: {one} {a}, {two} {b}"
