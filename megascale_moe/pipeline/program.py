"""From a config to the list that one rank runs in a step: the one place where layers, stages and schedule meet.

Trainer, `verify` and `dryrun` call it with the same arguments, so what is checked and counted is what is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from megascale_moe.comm.axis import Axes
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.engine.cost import Priced, Rates
from megascale_moe.engine.executor import Program
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op, backward
from megascale_moe.engine.order import best_order, paper_order
from megascale_moe.engine.remat import keeps_within, policy, rematerialize
from megascale_moe.engine.wire import chooser, compress
from megascale_moe.pipeline.schedule import Schedule, forward_only, schedule
from megascale_moe.pipeline.step import SHARED, Message, Stage, of_micro, step_ops
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import INPUTS, Head, auxiliary_names, load_names, part_ops
from megascale_moe.strategies.stages import Part, parts_of_rank, stage_parts, together


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector; also a decorator.

    A list is tens of thousands of objects, all of which stay. On the way there a full collection looks at every object
    of torch, too, a tenth of a second for nothing, several times.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Profile:
    """Measurements of a rank's operators that a plan is made with.

    Attributes:
        cost: how long they take. pieces: what `split = "auto"` is.
    """

    cost: Priced = field(default_factory=Rates)
    pieces: int = 1


@dataclass(frozen=True)
class StepPlan:
    """A rank's work on `micros` micro-batches of `rows` sequences each.

    Attributes:
        head: "train" for forward and backward; "loss" and "logits" for a forward of one micro-batch.
    """

    model: ModelConfig
    parallel: ParallelConfig
    axes: Axes
    dtype: torch.dtype
    rows: int
    micros: int = 1
    head: Head = "train"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    profile: Profile = field(default_factory=Profile)

    @cached_property
    def layout(self) -> Layout:
        """Return how a micro-batch lies on the mesh."""
        length = self.model.sequence_length
        layout = Layout.of(self.parallel, self.rows, length, self.axes, self.dtype, self.pieces)
        return replace(layout, gates_last=self.wire.gates_last)

    @property
    def pieces(self) -> int:
        """Return the pieces of a communication: one in evaluation, and for "auto" until times are measured."""
        split = self.overlap.split
        if split == "auto":
            return self.profile.pieces
        return 1 if split == "none" else int(split)

    @cached_property
    def parts(self) -> list[Part]:
        """The layers of each stage of the pipeline."""
        return stage_parts(self.parallel, self.model)

    @cached_property
    def part(self) -> Part:
        """The layers of all of this rank's stages together."""
        return together(parts_of_rank(self.parts, self.parallel.pp, self.axes["pp"].index))

    @cached_property
    def schedule(self) -> Schedule:
        """The actions of every pipeline rank."""
        p = self.parallel
        if self.head != "train":
            return forward_only(p.pp, p.virtual_stages)
        return schedule(p.schedule, p.pp, self.micros, p.virtual_stages, pairs=self.overlap.in_pairs)

    @cached_property
    def stages(self) -> dict[int, Stage]:
        """The lists of this rank's stages."""
        mine = parts_of_rank(self.parts, self.parallel.pp, self.axes["pp"].index)
        return {stage: self.stage(part) for stage, part in mine.items()}

    @collector_paused()
    def stage(self, part: Part) -> Stage:
        """Return the lists of some layers, where this rank stands in its stage."""
        forward = part_ops(self.model, self.layout, part, self.head)
        reads = "" if part.first else f"hidden_{part.layers[0]}"
        writes = "" if part.last else f"hidden_{part.layers[-1] + 1}"
        choose = chooser(self.wire.activations, self.profile.cost.seconds)
        back = compress(backward(forward, [grad(writes)] if writes else []), choose)
        forward = compress(forward, choose)
        if self.head != "train":
            return Stage(forward, (), reads, writes)
        given = [*INPUTS, reads]
        if self.overlap.remat == "budget":
            keeps = keeps_within(self.overlap.activation_bytes, forward, back, given, self.profile.cost.seconds)
        else:
            keeps = policy(self.overlap.remat)
        back = rematerialize(forward, back, keeps, given)
        return Stage(self._ordered(forward), self._ordered(back), reads, writes)

    def _ordered(self, ops: list[Op]) -> list[Op]:
        if self.overlap.order == "paper":
            return paper_order(ops)
        if self.overlap.order == "scheduled":
            return best_order(ops, self.profile.cost.seconds)
        return ops

    @property
    def message(self) -> Message:
        """The message between two stages."""
        return Message((self.layout.tokens, self.model.hidden), self.dtype, self.device)

    @cached_property
    @collector_paused()
    def ops(self) -> list[Op]:
        """The list of a step."""
        weave = self._woven if self.overlap.in_pairs and self.head == "train" else None
        return step_ops(self.schedule, self.stages, len(self.parts) - 1, self.axes["pp"], self.message, weave)

    def _woven(self, ops: Sequence[Op]) -> list[int]:
        place = {id(op): place for place, op in enumerate(ops)}
        return [place[id(op)] for op in best_order(ops, self.profile.cost.seconds)]

    @property
    def results(self) -> list[str]:
        """The names of one micro-batch that the caller wants."""
        if self.head != "train":
            return [self.head] if self.part.last else []
        names = [*auxiliary_names(self.model, self.part), *load_names(self.model, self.part)]
        return [*names, "loss"] if self.part.last else names

    def program(self, ops: Sequence[Op] | None = None, given: Sequence[str] = (), keep: Sequence[str] = ()) -> Program:
        """Return the list, checked; it reads the inputs of all micro-batches and what they share.

        Args:
            ops: a list made of `ops`, that also reads `given` and of which `keep` is wanted, too.
        """
        micros = range(self.micros)
        inputs = [of_micro(name, micro) for micro in micros for name in INPUTS if name not in SHARED]
        kept = [of_micro(name, micro) for micro in micros for name in self.results]
        return Program(self.ops if ops is None else ops, [*inputs, *SHARED, *given], [*kept, *keep])
