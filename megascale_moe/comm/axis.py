"""A mesh axis at run time: this rank's peers and the process group that reaches them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megascale_moe.comm.mesh import AXES, Mesh

LINKS = 4


@dataclass(frozen=True)
class Axis:
    """Peers of this rank. An axis of size 1 needs no group, and no operator is built for it.

    Attributes:
        links: groups for messages from one stage of a pipeline to the next, see `link`.
        backend: what the group answers, "" without one.
    """

    name: str
    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    links: tuple[dist.ProcessGroup | None, ...] = ()
    backend: str = ""

    @property
    def native(self) -> bool:
        """True where the backend's own collectives are the fastest form (NCCL); gloo's are not.

        A group made for both kinds of tensors answers "cpu:gloo,cuda:nccl"; its CPU tensors still go through gloo.
        """
        return self.size > 1 and "nccl" in self.backend

    @property
    def deserted(self) -> bool:
        """True where the axis has no process group (`axes_of`): what would be sent is counted and goes nowhere."""
        return self.size > 1 and self.group is None

    def link(self, sender: int, backward: bool) -> dist.ProcessGroup | None:
        """The group for messages along a pipeline, forward or backward.

        NCCL runs the messages between two ranks of one group one after the other, so that two that wait for each
        other's first message never come to the second. Each direction, from even and from odd senders, has a group of
        its own there; gloo matches messages by tag and needs one.
        """
        if not self.links:
            return self.group
        return self.links[2 * backward + sender % 2]


Axes = dict[str, Axis]


def single(names: Iterable[str] = AXES) -> Axes:
    """Axes of a lone rank: no process group anywhere."""
    return {name: Axis(name) for name in names}


def connect(mesh: Mesh, *, made: dict[tuple[int, ...], dist.ProcessGroup | None] | None = None) -> Axes:
    """Create the process groups of every axis; all ranks call this together, after init_process_group.

    Axes with the same groups share one process group: each costs connections and threads.

    Args:
        made: groups by their ranks, used again and added to; for many meshes of the same ranks.
    """
    rank = dist.get_rank()
    made = {} if made is None else made
    timeout = _timeout()
    axes: Axes = {}
    for name in AXES:
        mine = mesh.ranks(name, rank)
        for ranks in mesh.groups(name):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=timeout)
        links = _links(name, mesh, mine, timeout)
        axes[name] = Axis(name, len(mine), mine.index(rank), made.get(mine), links, dist.get_backend())
    return axes


def _timeout() -> timedelta | None:
    """Return the timeout of the group of all ranks: torch gives every further group a default, 10 or 30 minutes."""
    world = dist.distributed_c10d._get_default_group()
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


def _links(
    name: str, mesh: Mesh, mine: tuple[int, ...], timeout: timedelta | None
) -> tuple[dist.ProcessGroup | None, ...]:
    """Groups for the messages of a pipeline, where one does not do."""
    if name != "pp" or len(mine) == 1 or "nccl" not in dist.get_backend():
        return ()
    made = {
        ranks: tuple(dist.new_group(list(ranks), timeout=timeout) for _ in range(LINKS)) for ranks in mesh.groups(name)
    }
    return made[mine]


def axes_of(mesh: Mesh, rank: int, backend: str = "") -> Axes:
    """The sizes and places of a rank's axes without any process group: for lists that run without storage only.

    Args:
        backend: for which library of collectives the lists are; "" is gloo.
    """
    return {name: Axis(name, *mesh.place(name, rank), backend=backend) for name in AXES}
