"""The document of a rank's step: timeline.json of a run, or the same made for a configuration.

It holds the step twice, as two lists on one clock: what the strategies wrote down, in which a communication is waited
for almost where it stands, and what the order, the splitting and the policy of the run make of it. Both come from
`engine.order.simulate` with the same seconds per operator, so that nothing but the list differs. What a step really
took is kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import OverlapConfig, TrainConfig
from megascale_moe.engine.cost import Measured, Priced, Rates, Seconds
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import simulate
from megascale_moe.engine.trace import Event
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.planner.lists import optimizer_of
from megascale_moe.strategies.stages import Part
from megascale_moe.train.timeline.lists import TimelineRow, happened, kinds, simulated, table, totals
from megascale_moe.train.timeline.seconds import first_of, timed
from megascale_moe.train.trainer import Trainer

FILE = "timeline.json"
VERSION = 1
WHOLE = 1200
"""Operators of a step that is drawn whole."""

PART = 400
"""Operators of a part that is drawn in place of a longer step."""


@dataclass(frozen=True)
class RankStep:
    """A rank's step and how long its operators take.

    Attributes:
        plan: with the overlap of the run. cost: seconds of an operator. source: how they are known, in words.
    """

    plan: StepPlan
    train: TrainConfig
    cost: Priced
    source: str

    @property
    def plain(self) -> RankStep:
        """The same work without overlap: as the strategies wrote it, uncut, with as much recomputation."""
        o = self.plan.overlap
        overlap = OverlapConfig(remat=o.remat, activation_bytes=o.activation_bytes)
        return replace(self, plan=replace(self.plan, overlap=overlap))

    @property
    def hides_nothing(self) -> bool:
        """Whether it is the plain list although there is something to hide."""
        plain = self.plan.overlap.order == "serial" and self.plan.pieces == 1
        return plain and any(op.stream != Stream.COMPUTE for op in self.ops)

    @property
    def scheduled(self) -> RankStep:
        """The same work in the order that the scheduler would make of it."""
        plan = self.plan
        profile = replace(plan.profile, cost=self.cost)
        return replace(self, plan=replace(plan, profile=profile, overlap=replace(plan.overlap, order="scheduled")))

    @cached_property
    def ops(self) -> list[Op]:
        """The list with the optimizer, behind it or inside as the order says."""
        plan, hidden = self.plan, self.plan.overlap.hides_synchronisation
        optimizer = optimizer_of(plan, self.train)
        return optimizer.hidden(plan.ops) if hidden else [*plan.ops, *optimizer.ops]


def step_of(trainer: Trainer, rows: int, micros: int, runs: Sequence[Sequence[Event]]) -> RankStep:
    """The step that a trainer has run; `runs`: traces of its last steps."""
    plan, program = trainer.program(rows, micros, "train")
    ops = [*program.ops, *(() if trainer.hides else trainer.optimizer.ops)]
    cost = trainer.profile.cost
    found = first_of(cost, timed(ops, [events for events in runs if len(events) == len(ops)]))
    how = "in the first steps of this run, which wait for every communication at once, the optimizer's in the last"
    if not isinstance(cost, Measured):
        how = "in the last steps of this run"
    config = trainer.config
    wanted = replace(plan, overlap=config.overlap, wire=config.wire)  # the run may have ended before it got there
    return RankStep(wanted, trainer.config.train, found, f"Seconds of operators were measured {how}.")


def document(step: RankStep, mesh: Mesh, rank: int) -> dict[str, Any]:
    """The two lists of a step; of one that overlaps nothing, the second is what it could be."""
    plan, shown = step.plan, step.scheduled if step.hides_nothing else step
    steps = {"plain": step.plain, "overlapped": shown}
    found: dict[str, Any] = {
        "version": VERSION, "rank": rank, "mesh": asdict(mesh), "backend": plan.axes["world"].backend,
        "source": step.source, "micro_batches": plan.micros, "pieces": plan.pieces, "layers": list(plan.part.layers),
        "drawn_layers": [], "supposed": shown is not step,
        "title": "With overlap" if shown is step else "With order “scheduled”, which was not used",
    }  # fmt: skip
    long = max(len(each.ops) for each in steps.values()) > WHOLE
    count = part_size([each.plan for each in steps.values()], PART) if long else 0
    if count:
        found["drawn_layers"] = list(part(plan, count).layers)
    for name, each in steps.items():
        rows = _rows(each.ops, step.cost.seconds)
        drawn = _rows(part_ops(each.plan, count), step.cost.seconds) if count else rows
        found[name] = {"totals": totals(rows), "kinds": kinds(rows), "table": table(drawn),
                       "drawn_seconds": totals(drawn)["seconds"]}  # fmt: skip
    return found


def _rows(ops: Sequence[Op], seconds: Seconds) -> list[TimelineRow]:
    return simulated(ops, simulate(ops, seconds))


def measured(events: Sequence[Event], origin: float) -> dict[str, Any]:
    """Return the measured step of a rank, drawn unless it is too long."""
    rows = happened(events, origin)
    drawn = rows if len(rows) <= WHOLE else []
    return {"totals": totals(rows), "kinds": kinds(rows), "table": table(drawn),
            "drawn_seconds": totals(drawn)["seconds"]}  # fmt: skip


def part(plan: StepPlan, count: int) -> Part:
    """The first `count` layers of the rank's first stage."""
    whole = plan.parts[min(plan.stages)]
    return Part(whole.layers[:count], whole.first, whole.last and count == len(whole.layers))


def part_ops(plan: StepPlan, count: int) -> list[Op]:
    """Forward and backward of one micro-batch through them."""
    stage = plan.stage(part(plan, count))
    return [*stage.forward, *stage.backward]


def part_size(plans: Sequence[StepPlan], limit: int) -> int:
    """How many layers have at most `limit` operators in each plan, at least one."""
    layers = len(plans[0].parts[min(plans[0].stages)].layers)
    fitting = (count for count in range(layers, 0, -1) if max(len(part_ops(plan, count)) for plan in plans) <= limit)
    return next(fitting, 1)


def rates_words(rates: Rates) -> str:
    """Rates as a sentence."""
    intra, inter = (rates.links[stream] / 1e9 for stream in (Stream.INTRA, Stream.INTER))
    return (
        f"Seconds of operators are estimates, nothing was measured: {rates.flops / 1e12:g} TFLOP/s, "
        f"{rates.memory / 1e9:,g} GB/s of memory, links of {intra:g} GB/s inside a node and {inter:g} GB/s between "
        f"nodes, {rates.latency * 1e6:g} µs per message."
    )
