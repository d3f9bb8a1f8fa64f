"""Do all ranks of a job agree on every message? Answered for thousands of ranks without starting one.

A collective that one rank enters with another size, or two in another order, hangs a job after hours of queueing, or
adds wrong tensors silently. Here the lists of every rank are built, none is run, and compared: the members of a group
must name the same collectives of the same size in the same order, and every send must meet a receive of the same
bytes, in the same order on each link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.engine.op import Op, Stream
from megascale_moe.pipeline.checker import awaited, sent
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.planner.stages import optimizer_of, plan_of

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

    def shared(self, once: dict[object, Any]) -> RankMessages:
        """The same with every sequence that `once` knows replaced by the one there."""

        def keep(sequences: dict[Any, Any]) -> dict[Any, Any]:
            return {key: once.setdefault(sequence, sequence) for key, sequence in sequences.items()}

        return RankMessages(keep(self.collectives), keep(self.sends), keep(self.receives))


@dataclass(frozen=True)
class Agreement:
    """The outcome: how much was compared, and the first disagreement, "" if there is none."""

    ranks: int
    messages: int
    disagreement: str = ""


def check_messages(
    config: Config, mesh: Mesh, rows: int, micros: int, dtype: torch.dtype,
    progress: Callable[[int], None] = lambda done: None,
) -> Agreement:
    """Build and compare the messages of all ranks of a mesh.

    Args:
        progress: called with the number of ranks done.
    """
    found: list[RankMessages] = []
    once: dict[object, Any] = {}  # thousands of ranks have equal lists: each is kept once
    for rank in range(mesh.world):
        found.append(rank_messages(config, mesh, rank, rows, micros, dtype).shared(once))
        progress(rank + 1)
    count = sum(
        sum(map(len, messages.collectives.values())) + sum(map(len, messages.sends.values())) for messages in found
    )
    disagreement = next(_disagreements(found, mesh), "")
    return Agreement(mesh.world, count, disagreement)


def rank_messages(config: Config, mesh: Mesh, rank: int, rows: int, micros: int, dtype: torch.dtype) -> RankMessages:
    """The messages of one rank."""
    plan = replace(plan_of(config, mesh, rank), rows=rows, micros=micros, dtype=dtype)
    collectives: dict[str, list[Collective]] = defaultdict(list)
    for stage in plan.stages.values():
        _collect(collectives, [*stage.forward, *stage.backward])
    optimizer = optimizer_of(plan, config.train)
    _collect(collectives, optimizer.hidden([]) if config.overlap.hides_synchronisation else optimizer.ops)
    return RankMessages(_tuples(collectives), *_transfers(plan, mesh.ranks("pp", rank)))


def _collect(found: dict[str, list[Collective]], ops: list[Op]) -> None:
    for op in ops:
        if op.stream != Stream.COMPUTE:
            found[op.cost.axis].append((op.name, op.phase, op.cost.wire_bytes))


def _transfers(plan: StepPlan, ranks: tuple[int, ...]) -> tuple[dict[Link, Messages], dict[Link, Messages]]:
    sends: dict[Link, list[tuple[int, int]]] = defaultdict(list)
    receives: dict[Link, list[tuple[int, int]]] = defaultdict(list)
    last, pp, size = len(plan.parts) - 1, len(ranks), plan.message.nbytes
    for action in plan.schedule[plan.axes["pp"].index]:
        for transfer, into in ((awaited(action, last), receives), (sent(action, last), sends)):
            if transfer is not None and transfer.crosses(pp):
                link = (ranks[transfer.source % pp], ranks[transfer.target % pp], transfer.backward)
                into[link].append((transfer.tag, size))
    return _tuples(sends), _tuples(receives)


def _tuples(lists: Mapping[Any, list[Any]]) -> dict[Any, tuple[Any, ...]]:
    return {key: tuple(values) for key, values in lists.items()}


def _disagreements(found: list[RankMessages], mesh: Mesh) -> Iterator[str]:
    axes = sorted({axis for messages in found for axis in messages.collectives} - {"", "pp"})
    for axis in axes:
        for group in mesh.groups(axis):
            yield from _group_disagreements(axis, group, found)
    for rank, messages in enumerate(found):
        for link, given in messages.sends.items():
            expected = found[link[1]].receives.get(link, ())
            if given != expected:
                yield _mismatch(f"rank {link[0]} to rank {link[1]}", "sends", given, "expects", expected)
        for link in messages.receives:
            if link not in found[link[0]].sends:
                yield f"rank {rank} waits for rank {link[0]}, which sends it nothing"


def _group_disagreements(axis: str, group: tuple[int, ...], found: list[RankMessages]) -> Iterator[str]:
    first = found[group[0]].collectives.get(axis, ())
    for rank in group[1:]:
        other = found[rank].collectives.get(axis, ())
        if first != other:
            yield _mismatch(f"axis {axis}", f"rank {group[0]} has", first, f"rank {rank}", other)


def _mismatch(where: str, one: str, first: Sequence[object], two: str, second: Sequence[object]) -> str:
    place, (a, b) = next((i, pair) for i, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1])
    return f"{where}: message {place}: {one} {a}, {two} {b}"
