"""A training step with its synchronisation inside, where the computation hides it.

Gradients of a group of weights leave as soon as the last addition to them is done, while the backward of earlier layers
goes on; updated weights come at the beginning of the next step, two groups ahead of the one that is about to be used.
A group is a layer's weights that have the same replicas. Where a message takes two hops (inside the node, between
nodes), the second starts when the next group's first does: by then the first has arrived.

The update of a step is in its own list, the gathering of what it wrote in the next: until then a rank's weights are
stale where other ranks own them, and whoever reads them in between gathers first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megascale_moe.engine.op import Op, Stream
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.sync import Job, arrived, gather_job, pipelined, reduce_job

AHEAD = 2
"""Groups between the one whose weights are asked for and the one that is used."""


def hide(step: Sequence[Op], groups: Sequence[FlatWeights], rest: Sequence[Op]) -> list[Op]:
    """The step's list with reductions and gathers of `groups` among its operators, and `rest` (norm, update) behind.

    Reads what `sync.given` and `updated` name.
    """
    uses = _positions(step, groups, lambda op: (*op.weights, *op.gradients), last=False)
    additions = _positions(step, groups, lambda op: op.gradients, last=True)
    inserted: dict[int, list[Op]] = {}
    _insert_gathers(inserted, uses)
    _insert_reductions(inserted, additions, len(step))
    out: list[Op] = []
    for place in range(len(step) + 1):
        out += inserted.get(place, [])
        out += step[place : place + 1]
    return [*out, *rest]


def _positions(
    step: Sequence[Op], groups: Sequence[FlatWeights], names: Callable[[Op], Sequence[str]], *, last: bool
) -> list[tuple[int, FlatWeights]]:
    """(place of the first or last operator that names a weight of the group, group), in the order of places."""
    group_of = {slot.name: group for group in groups for slot in group.slots}
    found: dict[str, tuple[int, FlatWeights]] = {group.name: (0, group) for group in groups}
    seen: set[str] = set()
    for place, op in enumerate(step):
        for group in {id(g): g for g in (group_of[name] for name in names(op) if name in group_of)}.values():
            if last or group.name not in seen:
                found[group.name] = (place, group)
                seen.add(group.name)
    return sorted(found.values(), key=lambda pair: pair[0])


def _insert_gathers(inserted: dict[int, list[Op]], uses: Sequence[tuple[int, FlatWeights]]) -> None:
    """Hop h of a group's weights before the first use of the group AHEAD - h places before it."""
    jobs = [gather_job(group) for _, group in uses]
    for hop in range(max(map(len, jobs), default=0)):  # first hops first: they start at once, later ones wait
        for index, ops in enumerate(job[hop] if hop < len(job) else [] for job in jobs):
            # The first and the last stage share tied weights. The last uses them after it has heard from the first, the
            # first before it sends anything: both must start to exchange them at once.
            at = 0 if uses[index][1].inter.name == "tied" else index - max(AHEAD - hop, 0)
            inserted.setdefault(uses[at][0] if at > 0 else 0, []).extend(ops)
    for (place, group), job in zip(uses, jobs, strict=True):
        inserted.setdefault(place, []).extend([arrived(group)] if job else [])


def _insert_reductions(
    inserted: dict[int, list[Op]], additions: Sequence[tuple[int, FlatWeights]], end: int
) -> None:
    """Hop h of a group's gradients behind the last addition to the group h places after it."""
    jobs: list[Job] = [reduce_job(group) for _, group in additions]
    for hop in range(max(map(len, jobs), default=0)):  # first hops first: they start at once, later ones wait
        for index, ops in enumerate(job[hop] if hop < len(job) else [] for job in jobs):
            at = min(additions[index + hop][0] + 1, end) if index + hop < len(additions) else end
            if additions[index][1].inter.name == "tied" and all(op.stream == Stream.COMPUTE for op in ops):
                at = end  # the sum waits for another stage, which may wait for what this one is yet to send
            inserted.setdefault(at, []).extend(ops)


def without_gathering(updates: Mapping[str, Job]) -> list[Op]:
    """The operators that update, for a list that reads what the last ones wrote only in the next step."""
    jobs = [[*hops, [*last[:-1], replace(last[-1], writes=())]] for *hops, last in updates.values()]
    return pipelined(jobs)
