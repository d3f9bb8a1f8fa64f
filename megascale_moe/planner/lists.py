"""The lists of a rank of a cluster that you do not have: no process groups, tensors without storage.

They are those that a trainer builds for the same config and rank, so what is priced, compared or drawn is what runs.
"""

from __future__ import annotations

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, TrainConfig
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.pipeline.batches import DTYPES, micro_batch
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.storageless import META
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements


def plan_of(config: Config, mesh: Mesh, rank: int, profile: Profile | None = None) -> StepPlan:
    """Return the plan of a rank's step.

    Args:
        profile: how long its operators take, for what is derived from times.
    """
    rows = micro_batch(config, mesh)
    return StepPlan(
        config.model, config.parallel, axes_of(mesh, rank, "nccl"), DTYPES[config.train.dtype], rows,
        config.train.global_batch // mesh.dp // rows, device=META, overlap=config.overlap, wire=config.wire,
        profile=profile or Profile(),
    )  # fmt: skip


def optimizer_of(
    plan: StepPlan, train: TrainConfig, part: Part | None = None, *, by_layer: bool | None = None
) -> ShardedOptimizer:
    """Return the optimizer of the weights of the rank that a plan is for, or of some of its layers.

    Args:
        by_layer: whether a layer's gradients travel on their own; None: as the plan's order says.
    """
    hides = plan.overlap.hides_synchronisation if by_layer is None else by_layer
    groups = flat_groups(
        placements(plan.model, plan.layout, part or plan.part), plan.axes, plan.dtype, META,
        by_layer=hides, wire=plan.wire, rule=rule_of(train),
    )  # fmt: skip
    return ShardedOptimizer(groups, plan.axes, train)
