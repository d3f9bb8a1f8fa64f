"""Memory of a step, found on tensors without storage, and the step of a configuration that nobody has run.

The list of a trainer without storage, as in `megascale dryrun`, is run once under the eyes of a `Watch`, as a real step
is. What is drawn of a step that is too long is run alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megascale_moe.engine.cost import Priced, Rates
from megascale_moe.engine.executor import Program
from megascale_moe.engine.op import Stream
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.storageless import (
    inputs_without_storage,
    message_without_storage,
    step_inputs_without_storage,
)
from megascale_moe.strategies.model import INPUTS
from megascale_moe.train.profiling import best_pieces
from megascale_moe.train.timeline.record import PART, WHOLE, RankStep, part, part_ops, part_size
from megascale_moe.train.timeline.watch import Watch
from megascale_moe.train.trainer import Trainer

GPU = Rates(flops=5e14, memory=2.5e12, links={Stream.INTRA: 1.6e11, Stream.INTER: 4e10}, latency=2e-5)
"""About half to three quarters of an H800's nominal figures: 990 TFLOP/s, 3,350 GB/s, 200 GB/s, 50 GB/s."""


def planned(trainer: Trainer, rows: int, micros: int, cost: Priced, source: str) -> RankStep:
    """The step that a config asks for, with seconds that are known from somewhere else than a run: `source` says it."""
    overlap = trainer.config.overlap
    trainer.overlap, trainer.profile = overlap, Profile(cost)
    if overlap.split == "auto":
        trainer.profile = replace(trainer.profile, pieces=best_pieces(trainer.plan(rows), overlap, trainer.profile))
    return RankStep(trainer.plan(rows, micros), trainer.config.train, cost, source)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(trainer: Trainer, plan: StepPlan) -> dict[str, Any]:
    """Bytes of a rank: what stays, what comes and goes in a step, and what each policy keeps of a micro-batch."""
    if len(plan.ops) <= WHOLE:
        return _run(trainer, plan.rows, plan.micros).memory(trainer, plan)
    count = part_size([plan], PART)
    drawn = _watched(trainer, Program(part_ops(plan, count), _given(plan, count)), _part_inputs(plan))
    return drawn.memory(trainer, plan) | {"whole": False}


def _run(trainer: Trainer, rows: int, micros: int) -> Watch:
    """A whole step."""
    trainer.program.cache_clear()
    plan, program = trainer.program(rows, micros, "train")
    optimizer = trainer.optimizer
    more = optimizer.given(0.0) | optimizer.updated() if trainer.hides else {}
    return _watched(trainer, program, step_inputs_without_storage(plan) | more)


def _watched(trainer: Trainer, program: Program, values: dict[str, Any]) -> Watch:
    optimizer, watch = trainer.optimizer, Watch(trainer)
    program.run(values, optimizer.weights | trainer.buffers, optimizer.gradients, None, watch.observe)
    return watch


def _given(plan: StepPlan, count: int) -> list[str]:
    mine = part(plan, count)
    hidden = [] if mine.first else [f"hidden_{mine.layers[0]}"]
    gradient = [] if mine.last else [f"d:hidden_{mine.layers[-1] + 1}"]
    return [*INPUTS, *hidden, *gradient]


def _part_inputs(plan: StepPlan) -> dict[str, Any]:
    """Return all that one micro-batch through a part of the model may read."""
    layers = plan.part.layers
    names = [f"hidden_{layers[0]}", *(f"d:hidden_{layer + 1}" for layer in layers)]
    hidden = {name: message_without_storage(plan) for name in names}
    return inputs_without_storage(plan) | hidden
