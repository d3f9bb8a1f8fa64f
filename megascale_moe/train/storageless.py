"""A rank's trainer and inputs without a tensor's storage: on the meta device, with fake process groups.

What `dryrun` counts and what a report rehearses is then the list that a rank of a job of any size would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.model.segments import Segments
from megascale_moe.parallel.model import local_inputs
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.train.trainer import Trainer

META = torch.device("meta")


@contextmanager
def trainer_without_storage(config: Config, mesh: Mesh, rank: int, backend: str = "") -> Iterator[Trainer]:
    """The trainer of a rank; kernels stay as they are written, there is nothing to compile for.

    Args:
        backend: for which library of collectives its lists are; "": as for a cluster of GPUs.
    """
    config = replace(config, train=replace(config.train, compile="off"))
    try:
        axes = single()
        if mesh.world > 1:
            dist.init_process_group("fake", rank=rank, world_size=mesh.world, store=FakeStore())
            axes = connect(mesh, own_groups=True)
            if backend:
                axes = {name: replace(axis, backend=backend) for name, axis in axes.items()}
        yield Trainer(config, mesh, axes, META)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def inputs_without_storage(plan: StepPlan) -> dict[str, Any]:
    """A micro-batch's inputs, every row one document, and what all micro-batches share."""
    shape = (plan.rows, plan.model.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    inputs = local_inputs(tokens, tokens, plan.layout, Segments.whole_rows(*shape), plan.model)
    return inputs | {"loss_scale": 1.0, "auxiliary_scale": torch.empty((), device=META)}
