"""A mesh axis at run time: this rank's peers and the process group that reaches them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from megascale_moe.comm.mesh import AXES, Mesh


@dataclass(frozen=True)
class Axis:
    """Peers of this rank. An axis of size 1 needs no group, and no operator is built for it."""

    name: str
    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def native(self) -> bool:
        """True where the backend's own collectives are the fastest form (NCCL); gloo's are not.

        A group made for both kinds of tensors answers "cpu:gloo,cuda:nccl"; its CPU tensors still go through gloo.
        """
        return self.group is not None and "nccl" in dist.get_backend(self.group)


Axes = dict[str, Axis]


def single(names: Iterable[str] = AXES) -> Axes:
    """Axes of a lone rank: no process group anywhere."""
    return {name: Axis(name) for name in names}


def connect(mesh: Mesh) -> Axes:
    """Create the process groups of every axis; all ranks call this together, after init_process_group.

    Axes with the same groups share one process group: each costs connections and threads.
    """
    rank = dist.get_rank()
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    axes: Axes = {}
    for name in AXES:
        for ranks in mesh.groups(name):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks))
        mine = mesh.ranks(name, rank)
        axes[name] = Axis(name, len(mine), mine.index(rank), made.get(mine))
    return axes
