"""A training step with its synchronisation inside, where the computation hides it.

Gradients of a group of weights leave as soon as the last addition to them is done, while the backward of earlier layers
goes on; updated weights come at the beginning of the next step, two groups ahead of the one that is about to be used.
A group is a layer's weights that have the same replicas. Where a message takes two hops (inside the node, between
nodes), the second starts when the next group's first does: by then the first has arrived.

The update of a step is in its own list, the gathering of what it wrote in the next: until then a rank's weights are
stale where other ranks own them, and whoever reads them in between gathers first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megascale_moe.engine.op import Op, Stream
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.sync import Job, arrived, gather_job, reduce_job

AHEAD = 2
"""Groups between the one whose weights are asked for and the one that is used."""


def hide(step: Sequence[Op], groups: Sequence[FlatWeights], rest: Sequence[Op]) -> list[Op]:
    """Return the step's list with reductions and gathers of `groups` among its operators, and `rest` (norm, update)
    behind.

    Reads what `sync.given` and `updated` name.
    """
    group_of = {slot.name: group.name for group in groups for slot in group.slots}
    first_use: dict[str, int] = {}
    last_addition: dict[str, int] = {}
    for index, op in enumerate(step):
        for name in (*op.weights, *op.gradients):
            if name in group_of:
                first_use.setdefault(group_of[name], index)
        last_addition |= {group_of[name]: index for name in op.gradients if name in group_of}
    before: defaultdict[int, list[Op]] = defaultdict(list)
    _insert_gathers(before, groups, first_use)
    _insert_reductions(before, groups, last_addition, len(step))
    hidden: list[Op] = []
    for index, op in enumerate(step):
        hidden += [*before[index], op]
    return [*hidden, *before[len(step)], *rest]


def _insert_gathers(
    before: defaultdict[int, list[Op]], groups: Sequence[FlatWeights], first_use: dict[str, int]
) -> None:
    """Put hop h of a group's weights before the first use of the group AHEAD - h places before it."""
    groups = sorted(groups, key=lambda group: first_use.get(group.name, 0))
    uses = [first_use.get(group.name, 0) for group in groups]
    jobs = [gather_job(group) for group in groups]
    for hop, index, ops in _by_hop(jobs):
        # The first and the last stage share tied weights. The last uses them after it has heard from the first, the
        # first before it sends anything: both must start to exchange them at once.
        at = 0 if groups[index].inter.name == "tied" else index - max(AHEAD - hop, 0)
        before[uses[at] if at > 0 else 0] += ops
    for group, use, job in zip(groups, uses, jobs, strict=True):
        before[use] += [arrived(group)] if job else []


def _insert_reductions(
    before: defaultdict[int, list[Op]], groups: Sequence[FlatWeights], last_addition: dict[str, int], end: int
) -> None:
    """Put hop h of a group's gradients behind the last addition to the group h places after it."""
    groups = sorted(groups, key=lambda group: last_addition.get(group.name, 0))
    ends = [min(last_addition.get(group.name, 0) + 1, end) for group in groups]
    for hop, index, ops in _by_hop([reduce_job(group) for group in groups]):
        at = ends[index + hop] if index + hop < len(groups) else end
        if groups[index].inter.name == "tied" and all(op.stream == Stream.COMPUTE for op in ops):
            at = end  # the sum waits for another stage, which may wait for what this one is yet to send
        before[at] += ops


def _by_hop(jobs: Sequence[Job]) -> list[tuple[int, int, list[Op]]]:
    """Return (hop, index of the job, operators), first hops first: they start at once, later ones wait."""
    steps = [(hop, index, ops) for index, job in enumerate(jobs) for hop, ops in enumerate(job)]
    return sorted(steps, key=lambda step: step[:2])
