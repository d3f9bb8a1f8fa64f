"""Passes as factors of tables of pairs; a rank's step run whatever passes its lists went through, or in an order that
chance has drawn.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megascale_moe.comm.axis import connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.engine.executor import resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.order import dependencies
from megascale_moe.engine.remat import kept_bytes
from megascale_moe.engine.trace import Trace
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import of_micro
from megascale_moe.strategies.model import local_inputs
from megascale_moe.strategies.weights import placements
from megascale_moe.tools.verify import reference
from tests.pairs import Case, Rule
from tests.strategies import layouts
from tests.strategies.layouts import EXPERTS, LAYOUT, SCALE, SIZES, Result, random_rows
from tests.strategies.test_layouts import VARIANTS

MICROS = 2  # micro-batches of a data-parallel rank
ROWS = 2  # sequences of a micro-batch

# --- factors of tables of pairs (tests/pairs.py) ---------------------------------------------------------------------

FACTORS = {
    "variant": tuple(name for name in VARIANTS if name != "gqa"),  # which is each of the others with less
    **LAYOUT, "sizes": ("node4", "dp2-node2", "dp4", "cp2-node2", "pp2-node2", "pp2-dp2", "pp2-cp2"),
    "experts": tuple(name for name in EXPERTS if name != "whole"), "schedule": ("1f1b", "interleaved", "zero_bubble"),
    "split": ("none", "2", "3", "4", "9"), "order": ("serial", "paper", "scheduled"),
    "remat": ("none", "paper", "full", "budget"), "micro_batches": ("1", "2"),
}  # fmt: skip


def attention_is_cut_in_pieces(sizes: str, attention: str, split: str) -> bool:
    """Into as many as the case says, 9 being one for each rank; only Ulysses has pieces.

    Else a pair of two factors could be in the table and nowhere in what runs.
    """
    return split == "none" or attention != "sp" or (2 if split == "9" else int(split)) <= SIZES[sizes][3]


def experts_are_cut_in_pieces(sizes: str, experts: str, split: str) -> bool:
    """As for attention. Rows that go to experts which ranks share are cut by the ranks that they go to first."""
    if split == "none":
        return True
    (_, dp, cp, node), pieces = SIZES[sizes], 2 if split == "9" else int(split)
    ranks = node if EXPERTS[experts][1] == "node" else dp * cp * node
    return pieces <= (ranks // 2 if experts == "ep+tp-all_to_all" else ranks)


def stages_are_interleaved(sizes: str, schedule: str) -> bool:
    """In pipelines only."""
    return schedule != "interleaved" or SIZES[sizes][0] > 1


def two_at_once_are_scheduled(micro_batches: str, order: str) -> bool:
    """They need an order of their own."""
    return micro_batches == "1" or order == "scheduled"


def two_at_once_are_neighbours(micro_batches: str, schedule: str) -> bool:
    """They need a forward next to a whole backward."""
    return micro_batches == "1" or schedule != "zero_bubble"


RULES: tuple[Rule, ...] = (
    *layouts.RULES, attention_is_cut_in_pieces, experts_are_cut_in_pieces, stages_are_interleaved,
    two_at_once_are_scheduled, two_at_once_are_neighbours,
)  # fmt: skip


def overlap_of(case: Case) -> OverlapConfig:
    """The passes of a case; what a budget is, is known when the sizes are."""
    overlap = OverlapConfig(
        order=case["order"], remat=case["remat"], split=case["split"], micro_batches=int(case["micro_batches"]),  # type: ignore[arg-type]
        activation_bytes=int(case["remat"] == "budget"),
    )  # fmt: skip
    overlap.check()
    return overlap


# --- running a plan --------------------------------------------------------------------------------------------------


def run_plan(
    config: ModelConfig, parallel: ParallelConfig, overlap: OverlapConfig, mesh: Mesh, wire: WireConfig = WireConfig()  # noqa: B008
) -> Result:
    """This rank's step of random rows; gradients summed over replicas. A budget is less than what would be kept."""
    axes = connect(mesh)
    plan = StepPlan(config, parallel, axes, torch.float32, ROWS, MICROS, overlap=overlap, wire=wire)
    if overlap.remat == "budget":
        plan = with_budget(plan)
        assert any(op.phase == Phase.R for op in plan.ops)
    result = Run(plan, mesh).result()
    for name, value in result.gradients.items():
        for axis in result.placements[name].replicas:
            if axis and axes[axis].size > 1:
                dist.all_reduce(value, group=axes[axis].group)
    return result


class Run:
    """A plan with everything that it needs to run: random rows, initial weights, buffers for the gradients."""

    def __init__(self, plan: StepPlan, mesh: Mesh) -> None:
        self.plan, config = plan, plan.model
        model = reference.drawn(config, 0)
        self.placed = placements(config, plan.layout, plan.part)
        named = dict(model.named_parameters())
        self.weights = {name: place.take(named[name].detach()) for name, place in self.placed.items()}
        self.sinks = {name: Gradient(torch.empty_like(value)) for name, value in self.weights.items()}
        self.weights |= dict(model.named_buffers())
        self.values: dict[str, Any] = {"loss_scale": SCALE, "auxiliary_scale": torch.tensor(SCALE)}
        batch = random_rows(config, rows=ROWS * MICROS * mesh.dp)
        first = mesh.replica(dist.get_rank()) * ROWS * MICROS
        for micro in range(MICROS):
            tokens, targets, segments = batch.part(slice(first + ROWS * micro, first + ROWS * (micro + 1)))
            inputs = local_inputs(tokens, targets, plan.layout, segments, config)
            self.values |= {of_micro(name, micro): value for name, value in inputs.items()}

    def result(self) -> Result:
        """Loss sums, and gradients of this rank's own rows."""
        for sink in self.sinks.values():
            sink.reset()
        trace = Trace()
        out = self.plan.program().run(dict(self.values), self.weights, self.sinks, trace)
        result = Result(0.0, 0.0, {}, placements=self.placed, wire=trace.wire_bytes())
        for micro in range(MICROS):
            for name in self.plan.results:
                value = resolve(out, of_micro(name, micro))
                if name == "loss":
                    result.loss += float(value)
                elif name.endswith("auxiliary"):
                    result.auxiliary += float(value)
        result.gradients = {name: sink.value() for name, sink in self.sinks.items()}
        return result


def with_budget(plan: StepPlan) -> StepPlan:
    """The plan with a budget that a quarter of what can be freed goes beyond, of the rank's largest stage."""

    def held(remat: str) -> float:
        overlap = replace(plan.overlap, remat=remat, activation_bytes=0)  # type: ignore[arg-type]
        stages = replace(plan, overlap=overlap).stages.values()
        return max(kept_bytes(stage.forward, stage.backward) for stage in stages)

    budget = int(3 * held("none") + held("full")) // 4
    return replace(plan, overlap=replace(plan.overlap, activation_bytes=budget))


# --- orders drawn by chance ------------------------------------------------------------------------------------------


def drawn(ops: Sequence[Op], chooser: random.Random) -> list[int]:
    """Places of the operators in some order that names and gradients allow, all of which can come out.

    The choice is among names, not places: what a rank makes again stands in the order of the ranks that it is for.
    """
    before = dependencies(ops)
    after: list[list[int]] = [[] for _ in ops]
    for place, needed in enumerate(before):
        for source in needed:
            after[source].append(place)
    missing = [len(needed) for needed in before]
    able = sorted((ops[place].name, ops[place].phase, place) for place, count in enumerate(missing) if not count)
    order = list[int]()
    while able:
        *_, place = able.pop(chooser.randrange(len(able)))
        order.append(place)
        for follower in after[place]:
            missing[follower] -= 1
            if not missing[follower]:
                bisect.insort(able, (ops[follower].name, ops[follower].phase, follower))
    return order


@dataclass(frozen=True)
class DrawnPlan(StepPlan):
    """A plan whose lists, and pairs of them that are woven, have drawn orders: the same on all ranks of a stage, which
    would wait for each other's messages otherwise.
    """

    draw: int = 0

    def _ordered(self, ops: list[Op]) -> list[Op]:
        return [ops[place] for place in self._woven(ops)]

    def _woven(self, ops: Sequence[Op]) -> list[int]:
        return drawn(ops, random.Random(self.draw))


def run_drawn(
    config: ModelConfig, parallel: ParallelConfig, overlap: OverlapConfig, mesh: Mesh, draws: int
) -> list[tuple[list[str], Result]]:
    """This rank's step in the plain order and in so many others: names of the operators, and results before any sum
    over ranks.
    """
    axes = connect(mesh)
    plain = Run(StepPlan(config, parallel, axes, torch.float32, ROWS, MICROS, overlap=overlap), mesh)
    found = []
    for draw in range(draws + 1):
        if draw:
            plain.plan = DrawnPlan(config, parallel, axes, torch.float32, ROWS, MICROS, overlap=overlap, draw=draw)
        result = plain.result()
        result.gradients = {name: value.clone() for name, value in result.gradients.items()}
        found.append(([f"{op.name} {op.phase}" for op in plain.plan.ops], result))
    return found
