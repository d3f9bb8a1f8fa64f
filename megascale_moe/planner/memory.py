"""Bytes that a step takes on a rank, from one micro-batch of each kind of stage on tensors without storage.

A dry run executes the whole list, every micro-batch. They are alike, so here the forward and the backward of a stage
are executed once and weighed (`stages`): what a forward keeps for its backward, and how far each rises above that while
it runs. The schedule says how many are alive, and the peak follows. The end of a step, where gradients are summed and
few micro-batches are left, is executed as it is, with few layers. What is left out are messages of a pipeline that have
arrived early or are not yet acknowledged; a test holds the result against dry runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megascale_moe.config import TrainConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import grad
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.schedule import Action
from megascale_moe.pipeline.storageless import META, inputs_without_storage, message_without_storage
from megascale_moe.planner.lists import optimizer_of
from megascale_moe.planner.stages import StageBytes, StageKind, Stages, along
from megascale_moe.strategies.model import buffers_of
from megascale_moe.strategies.stages import Part, parts_of_rank, together


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank holds.

    Attributes:
        activations: the most that micro-batches take at once. update: the most at the end of a step, when gradients
            are summed and weights are updated. peak: of everything together.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    peak: int


def rank_bytes(
    stages: Stages, plan: StepPlan, train: TrainConfig, place: int, actions: Sequence[Action], *, update: bool = True
) -> RankBytes:  # fmt: skip
    """Return what the ranks at a place of a plan's pipeline hold while they go through these actions.

    Args:
        update: look at the end of the step, too, which takes longest; else it counts as nothing.
    """
    parts = parts_of_rank(plan.parts, plan.parallel.pp, place)
    of_stage = {number: stages.bytes(StageKind.of(part, plan.model)) for number, part in parts.items()}
    whole = together(parts)
    optimizer = optimizer_of(plan, train, whole)
    stays = optimizer.held_bytes()
    stays["parameters"] += sum(buffer.nbytes for buffer in buffers_of(plan.model, whole, META).values())
    activations = round(_peak(actions, of_stage))
    hidden = plan.overlap.hides_synchronisation
    end = 0
    if update:
        end = _last_micro(stages, plan, train, whole) if hidden else _update(optimizer)
    peak = sum(stays.values()) + max(activations, end)
    return RankBytes(**stays, activations=activations, update=end, peak=peak)


def _peak(actions: Sequence[Action], of_stage: Mapping[int, StageBytes]) -> float:
    """The most that is alive while a rank goes through its actions."""
    alive = peak = 0.0
    for action in actions:
        stage = of_stage[action.stage]
        if action.phase == "F":
            peak = max(peak, alive + stage.forward)
            alive += stage.kept
        else:
            peak = max(peak, alive + stage.backward)
            alive -= stage.kept if "W" in action.phase else 0
    return peak


def _last_micro(stages: Stages, plan: StepPlan, train: TrainConfig, whole: Part) -> int:
    """The most that the last micro-batch takes with synchronisation among its operators."""

    def measure(few: StageKind) -> StageBytes:
        return StageBytes(0.0, 0.0, _hidden(stages, plan, train, few))

    return round(along(StageKind.of(whole, plan.model), measure).backward)


def _hidden(stages: Stages, plan: StepPlan, train: TrainConfig, kind: StageKind) -> float:
    """Return the peak bytes of a forward, its backward, synchronisation and update, in one list."""
    stage, part = stages.lists(kind), kind.part(plan.model)
    optimizer = optimizer_of(plan, train, part)
    weights = optimizer.weights | buffers_of(plan.model, part, META)
    coming = [name for name in (stage.reads, grad(stage.writes) if stage.writes else "") if name]
    inputs, more = inputs_without_storage(plan), optimizer.given(0.0) | optimizer.updated()
    ops = optimizer.hidden([*stage.forward, *stage.backward])
    program = Program(ops, [*inputs, *more, *coming], ["norm"], coming)
    meter = Meter()
    with meter:
        values = inputs | more | {name: message_without_storage(plan) for name in coming}
        program.run(values, weights, optimizer.gradients)
    return float(meter.peak)


def _update(optimizer: ShardedOptimizer) -> int:
    """The most that synchronisation and update have at once."""
    meter = Meter()
    with meter:
        optimizer.step(0.0)
    return meter.peak
