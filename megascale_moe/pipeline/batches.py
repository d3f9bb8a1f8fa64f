"""How a step's sequences are shared out over ranks and passes, checked before anything else is done."""

from __future__ import annotations

import torch

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, require
from megascale_moe.pipeline.schedule import require_legal
from megascale_moe.strategies.stages import stage_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtypes that `train.dtype` names."""


def check_batches(config: Config, mesh: Mesh) -> None:
    """Refuse batch sizes that do not divide, and stages and schedules that do not fit the model or the batch."""
    t, p = config.train, config.parallel
    require(
        t.global_batch % mesh.dp == 0,
        f"train.global_batch = {t.global_batch} is not divisible by parallel.dp = {mesh.dp}",
    )
    share = t.global_batch // mesh.dp
    require(
        t.micro_batch == 0 or share % t.micro_batch == 0,
        f"train.micro_batch = {t.micro_batch} does not divide the {share} sequences of each data-parallel rank",
    )
    stage_parts(p, config.model)
    micros = share // micro_batch(config, mesh)
    require_legal(p.schedule, p.pp, micros, p.virtual_stages, pairs=config.overlap.in_pairs)


def micro_batch(config: Config, mesh: Mesh) -> int:
    """Return the sequences of a micro-batch: as configured, or one through a pipeline and else all that a rank has."""
    share = config.train.global_batch // mesh.dp
    return config.train.micro_batch or (share if mesh.pp == 1 else 1)
