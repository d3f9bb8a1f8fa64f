"""One layout on one rank: the step that training runs, and how far its results are from the reference.

Trainer, StepPlan and optimizer are those of `megascale train`, with a small model. Gradients are checked twice:

    summed here     every rank adds its parts to a whole gradient of zeros, and one all-reduce over all ranks sums
                    them. It knows no axis and no replicas, so it cannot be wrong in the same way as the optimizer.
    by the list     the optimizer's own operators, in small chunks: shards of the reduced gradients, their norm, and
                    the weights that an update leaves on every rank, beside the rule's plain form on whole weights.
                    The update starts from random state: state in the wrong place shows, and a rule that works on
                    matrices gets none that is singular, in which rounding would decide.

TOLERANCE is 1e-5, relative, for norms: FP32 sums of a few hundred terms in another order differ by a few 2^-24 =
6e-8, which 16 layers grow to 4e-6 (measured between the one-rank list and the plain model, all presets). A token at
the wrong place, a missing sum or a swapped slice changes a tensor by 1e-2 or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.comm.collectives import all_reduce_sum, tag_of
from megascale_moe.config import Config
from megascale_moe.engine.executor import Observer, Program, resolve
from megascale_moe.model.counts import parameter_matrices
from megascale_moe.optim.flat import FlatWeights, Owned
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.rule import Whole
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.optim.sync import shard_of
from megascale_moe.pipeline.step import SHARED, of_micro
from megascale_moe.strategies.model import auxiliary_names, local_inputs
from megascale_moe.strategies.placement import at_box
from megascale_moe.tools.verify.layouts import Case
from megascale_moe.tools.verify.reference import FLOOR, Recorder, Reference, off, or_infinite, relative
from megascale_moe.train.trainer import Trainer

TOLERANCE = 1e-5
CHUNK = 1 << 10
"""Elements of a shard that travel together: a few chunks even of a small model."""

RATE = 1.0

GROUPS = {
    "embedding.": "embedding", "head.weight": "head", "norm.weight": "norms", ".router.": "router",
    ".experts.": "experts", ".shared.": "shared", ".attention.": "attention",
}  # fmt: skip


def parameter_group(name: str) -> str:
    """Return the group that a parameter belongs to, for people."""
    return next((group for mark, group in GROUPS.items() if mark in name), "dense")


@dataclass
class Errors:
    """Relative errors of a layout, the worst of all ranks.

    Attributes:
        gradients: by parameter. shards: of the optimizer's reduced gradients, by its group of weights. norm: of the
            global gradient norm. update: of the weights after an update, by group of weights.
    """

    output: float
    loss: float
    gradients: dict[str, float]
    shards: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    update: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """The worst of forward and backward."""
        return max(self.output, self.loss, *self.gradients.values())

    @property
    def sync(self) -> float:
        """The worst of what the optimizer does."""
        return max(self.norm, *self.shards.values(), *self.update.values())

    @property
    def worst(self) -> float:
        """The worst of all."""
        return max(self.step, self.sync)

    @property
    def passed(self) -> bool:
        """Whether all are within TOLERANCE."""
        return self.worst <= TOLERANCE


def largest(errors: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the largest error under each name."""
    worst: dict[str, float] = {}
    for name, error in errors:
        worst[name] = max(worst.get(name, 0.0), error)
    return worst


class RankOfLayout:
    """A rank that runs a case; all ranks call each method together."""

    def __init__(self, case: Case, axes: Axes, rank: int, device: torch.device, reference: Reference) -> None:
        self.case, self.axes, self.rank, self.reference = case, axes, rank, reference
        # Without what makes an update hard to compare.
        train = replace(case.train, dtype="fp32", compile="off", clip_norm=0.0, weight_decay=0.1)
        self.rule = rule_of(train)
        self.train = self.rule.comparable(train)
        config = Config(model=case.model, parallel=case.parallel, train=self.train)
        self.trainer = Trainer(config, case.mesh, axes, device)
        self.optimizer = ShardedOptimizer(self.trainer.optimizer.groups, axes, self.train, chunk=CHUNK)
        self.trainer.optimizer = self.optimizer
        self.plan = replace(self.trainer.plan(case.rows, case.micros), overlap=case.overlap)
        self.matrices = parameter_matrices(case.model)

    @cached_property
    def program(self) -> Program:
        """The step, with the last hidden states kept."""
        return self.plan.program(
            keep=[of_micro("final", micro) for micro in range(self.case.micros) if self.plan.part.last]
        )

    def step(self, observe: Observer | None = None) -> dict[str, Any]:
        """Run forward and backward of all micro-batches, from the reference's weights."""
        device, case = self.trainer.device, self.case
        self.trainer.set_weights(self.reference.weights)
        for gradient in self.optimizer.gradients.values():
            gradient.reset()
        values: dict[str, Any] = dict.fromkeys(SHARED) | self.reference.scales
        values["auxiliary_scale"] = values["auxiliary_scale"].to(device)
        for micro in range(case.micros):
            tokens, targets, segments = self.reference.batch.part(case.rows_of(self.rank, micro))
            inputs = local_inputs(tokens.to(device), targets.to(device), self.plan.layout, segments, case.model)
            values |= {of_micro(name, micro): value for name, value in inputs.items()}
        weights = self.optimizer.weights | self.trainer.buffers
        return self.program.run(values, weights, self.optimizer.gradients, observe=observe)

    def synchronise(self, observe: Observer | None = None) -> dict[str, Any]:
        """Run the optimizer's list from random state: reduce, norm, update, gather."""
        for gradient in self.optimizer.gradients.values():
            gradient.value()
        given = self.optimizer.given(RATE)
        self.optimizer.restore(0)
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                whole = self.state(slot.name)
                for owned in group.owned(slot):
                    for kind, values in whole.items():
                        state[kind][owned.place].copy_(_elements(values, owned))
        return Program(self.optimizer.ops, given, ["norm"]).run(given, {}, observe=observe)

    def verify(self) -> Errors:
        """Run all of it and compare; the same errors on every rank."""
        errors = self._step_errors(self.step())
        recorder = Recorder()
        self._add_sync_errors(self.synchronise(recorder)["norm"], recorder.values, errors)
        return errors

    # --- forward and backward ------------------------------------------------------------------------------------

    def _step_errors(self, out: dict[str, Any]) -> Errors:
        reference, plan = self.reference, self.plan
        sums = torch.zeros(3, dtype=torch.float64)  # loss, auxiliary, squares of the output's errors
        for micro in range(self.case.micros):
            for name in auxiliary_names(self.case.model, plan.part):
                sums[1] += float(resolve(out, of_micro(name, micro)))
            if plan.part.last:
                sums[0] += float(resolve(out, of_micro("loss", micro)))
                final = resolve(out, of_micro("final", micro)).cpu()
                wanted = reference.output[self.case.tokens_of(self.rank, micro)]
                sums[2] += float((final - wanted).double().square().sum())
        loss, auxiliary, squares = all_reduce_sum(sums, self.axes["world"]).tolist()
        losses = [off(loss, reference.loss)]
        if reference.auxiliary:
            losses.append(off(auxiliary, reference.auxiliary))
        gradients = reference.gradient_errors(self.summed_gradients())
        output = or_infinite(math.sqrt(squares) / float(reference.output.norm()))
        return Errors(output, max(losses), gradients)

    def summed_gradients(self) -> dict[str, Tensor]:
        """Return every gradient of the whole model: the sum of all ranks' parts."""
        wanted = self.reference.gradients
        sizes = [value.numel() for value in wanted.values()]
        flat = torch.zeros(sum(sizes))
        whole = {name: part.view_as(wanted[name]) for name, part in zip(wanted, flat.split(sizes), strict=True)}
        for name, gradient in self.optimizer.gradients.items():
            part = gradient.value().cpu().flatten()
            for box, start, stop in self.trainer.placements[name].ranges:
                at_box(whole[name], box).add_(part[start:stop].view(box[1]))
        all_reduce_sum(flat, self.axes["world"])
        return whole

    # --- the optimizer -------------------------------------------------------------------------------------------

    def _add_sync_errors(self, norm: float, values: Mapping[str, Tensor], errors: Errors) -> None:
        whole_norm = math.sqrt(sum(float(value.double().square().sum()) for value in self.reference.gradients.values()))
        shards, updates = [], []
        for group in self.optimizer.groups:
            shards.append((group.name, self._shard_error(group, values[shard_of(group)].cpu())))
            for slot in group.slots:
                updated = slot.placement.take(self.updated(slot.name, group.decay))
                updates.append((group.name, relative(self.optimizer.weights[slot.name].cpu(), updated)))
        everyone = self.everyone((off(norm, whole_norm), shards, updates))
        errors.norm = max(norm for norm, _, _ in everyone)
        errors.shards = largest(pair for _, pairs, _ in everyone for pair in pairs)
        errors.update = largest(pair for _, _, pairs in everyone for pair in pairs)

    def _shard_error(self, group: FlatWeights, shard: Tensor) -> float:
        """Return the worst error of a rank's shard of the reduced gradients, weight by weight.

        A shard may hold three elements of a weight, small ones by chance: they count as large as the weight's others.
        """
        worst = 0.0
        for slot in group.slots:
            whole = self.reference.gradients[slot.name]
            for owned in group.owned(slot):
                part = _elements(whole, owned)
                floor = self.reference.floors[slot.name] + float(whole.norm()) * math.sqrt(part.numel() / whole.numel())
                worst = max(worst, relative(shard[owned.place], part, floor))
        return worst

    def updated(self, name: str, decay: bool) -> Tensor:
        """Return a whole weight after an update, by the rule's plain form."""
        weight, gradient, matrices = self.reference.weights[name], self.reference.gradients[name], self.matrices[name]
        whole = Whole(weight, gradient, self.state(name), matrices, count=0, decay=decay)
        return self.rule.of(matrices).plain(whole, RATE, self.train)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return random state of a whole weight before the update, the same on every rank: of the size of its gradient.

        A gradient far below the others may be rounding; then state of the others' size decides, which is not. State
        that is never negative is made of squares, as a second moment is.
        """
        gradient = self.reference.gradients[name]
        size = max(float(gradient.norm()), self.reference.floors[name] / FLOOR) / math.sqrt(gradient.numel())
        state = {}
        for kind in self.rule.of(self.matrices[name]).state:
            generator = torch.Generator().manual_seed(tag_of(f"{kind.name}.{name}"))
            values = torch.empty(gradient.shape).normal_(0.0, size, generator=generator)
            state[kind.name] = (values if kind.signed else values.square()).to(kind.dtype)
        return state

    def everyone(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        values = [value] * self.case.mesh.world
        if len(values) > 1:
            dist.all_gather_object(values, value)
        return values


def _elements(whole: Tensor, owned: Owned) -> Tensor:
    """Return the elements of a whole tensor that belong to a rank's shard, [elements]."""
    return at_box(whole, owned.box).flatten()[owned.first : owned.last]
