"""Measuring a rank's operators in the first steps of a run, for orders and policies that are derived from times.

The first steps run the plain list, in which each communication is waited for at once, so that its time can be seen.
The ranks of a stage run the same list and must go on doing so: they average what they measured, and what follows from
it is then the same on all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import all_reduce_sum
from megascale_moe.config import OverlapConfig, WireConfig
from megascale_moe.engine.cost import Measured, measured
from megascale_moe.engine.executor import resolve
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.order import makespan, simulate
from megascale_moe.engine.trace import Event
from megascale_moe.pipeline.program import Profile, StepPlan

STEPS = 3
"""Steps of the plain list; the first, which warms up, is not counted."""


def needs_profile(overlap: OverlapConfig, wire: WireConfig) -> bool:
    """Return whether anything is derived from measured times."""
    derived = overlap.order == "scheduled" or overlap.split == "auto" or overlap.remat == "budget"
    return derived or wire.activations == "auto"


def plain(overlap: OverlapConfig, wire: WireConfig) -> tuple[OverlapConfig, WireConfig]:
    """Return the settings while measuring: no overlap, no more memory than asked for, no format yet to be chosen."""
    remat = "full" if overlap.remat == "budget" else overlap.remat
    activations = "fp32" if wire.activations == "auto" else wire.activations
    return OverlapConfig(remat=remat), replace(wire, activations=activations)


class Profiler:
    """Collects what the first steps show."""

    def __init__(self) -> None:
        self.runs: list[list[Event]] = []

    def observe(self, op: Op, values: dict[str, Any]) -> None:
        """Wait for what a forward operator has started, so that its end is seen.

        What another stage sends is not waited for: its receive stands an action ahead of its use.
        """
        if op.phase == Phase.F and op.cost.axis != "pp":
            for name in op.writes:
                resolve(values, name)

    def profile(self, plan: StepPlan, overlap: OverlapConfig, stage: Axis) -> Profile:
        """Return the mean of what all ranks of the stage have measured, with the pieces that follow from it."""
        cost = measured(plan.ops, self.runs[1:])
        kinds = sorted(cost.seconds_of)
        total = all_reduce_sum(torch.tensor([cost.seconds_of[kind] for kind in kinds], dtype=torch.float64), stage)
        seconds = dict(zip(kinds, (total / stage.size).tolist(), strict=True))
        profile = Profile(Measured(seconds, cost.work, cost.rates))
        return replace(profile, pieces=best_pieces(plan, overlap, profile)) if overlap.split == "auto" else profile


def best_pieces(plan: StepPlan, overlap: OverlapConfig, profile: Profile) -> int:
    """Return the number of pieces with which a step is fastest by simulation."""
    ranks = max(plan.layout.node.size, plan.layout.group.size)

    def seconds(pieces: int) -> float:
        cut = replace(plan, overlap=replace(overlap, split=str(pieces)), profile=profile)
        return makespan(simulate(cut.ops, profile.cost.seconds))

    return min(sorted({1, 2, ranks}), key=seconds)
