"""A rank's trainer without a tensor's storage: on the meta device, without process groups.

What `dryrun` counts and what a report rehearses is then the list that a rank of a job of any size would run.
"""

from __future__ import annotations

from dataclasses import replace

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.pipeline.storageless import META
from megascale_moe.train.trainer import Trainer


def trainer_without_storage(config: Config, mesh: Mesh, rank: int, backend: str = "nccl") -> Trainer:
    """The trainer of a rank; kernels stay as they are written, there is nothing to compile for.

    Args:
        backend: for which library of collectives its lists are.
    """
    config = replace(config, train=replace(config.train, compile="off"))
    return Trainer(config, mesh, axes_of(mesh, rank, backend), META)
