"""A rank's trainer and inputs without a tensor's storage: on the meta device, with peers that exist on paper.

What `dryrun` counts and what a report rehearses is then the list that a rank of a job of any size would run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.model.segments import Segments
from megascale_moe.parallel.model import local_inputs
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.train.trainer import Trainer

META = torch.device("meta")


def trainer_without_storage(config: Config, mesh: Mesh, rank: int, backend: str = "nccl") -> Trainer:
    """The trainer of a rank; kernels stay as they are written, there is nothing to compile for.

    Args:
        backend: for which library of collectives its lists are.
    """
    config = replace(config, train=replace(config.train, compile="off"))
    return Trainer(config, mesh, axes_of(mesh, rank, backend), META)


def inputs_without_storage(plan: StepPlan) -> dict[str, Any]:
    """A micro-batch's inputs, every row one document, and what all micro-batches share."""
    shape = (plan.rows, plan.model.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    inputs = local_inputs(tokens, tokens, plan.layout, Segments.whole_rows(*shape), plan.model)
    return inputs | {"loss_scale": 1.0, "auxiliary_scale": torch.empty((), device=META)}
