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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.comm.collectives import tag_of
from megascale_moe.config import Config, TrainConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.op import Op
from megascale_moe.model.counts import parameter_matrices
from megascale_moe.optim.flat import FlatWeights, Slot
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.rule import State, Whole
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.optim.sync import shard_of
from megascale_moe.pipeline.step import SHARED, of_micro
from megascale_moe.strategies.model import auxiliary_names, local_inputs
from megascale_moe.strategies.placement import Placement
from megascale_moe.tools.verify.layouts import Case
from megascale_moe.tools.verify.reference import FLOOR, Recorder, Reference, floors, gradient_errors, relative
from megascale_moe.train.trainer import Trainer

TOLERANCE = 1e-5
CHUNK = 1 << 10
"""Elements of a shard that travel together: a few chunks even of a small model."""

RATE = 1.0

Observe = Callable[[Op, dict[str, Any]], None]


@dataclass
class Errors:
    """Relative errors of a layout, the worst of all ranks.

    Attributes:
        gradients: by parameter. shards: of the optimizer's reduced gradients, by its group of weights. norm: of the
            global gradient norm. update: of the weights after an update, by group of weights.
    """

    output: float = 0.0
    loss: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
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
    def passed(self) -> bool:
        """Whether all are within TOLERANCE."""
        return max(self.step, self.sync) <= TOLERANCE


def parameter_group(name: str) -> str:
    """Return the group that a parameter belongs to, for people."""
    for group, marks in GROUPS.items():
        if any(mark in name for mark in marks):
            return group
    return "dense"


GROUPS = {
    "embedding": ("embedding.",), "head": ("head.weight",), "norms": ("norm.weight",), "router": (".router.",),
    "experts": (".experts.",), "shared": (".shared.",), "attention": (".attention.",),
}  # fmt: skip


class RankOfLayout:
    """A rank that runs a case; all ranks call each method together."""

    def __init__(self, case: Case, axes: Axes, rank: int, device: torch.device, reference: Reference) -> None:
        self.case, self.axes, self.rank, self.reference = case, axes, rank, reference
        self.train = _comparable(case.train)
        config = Config(model=case.model, parallel=case.parallel, train=self.train)
        self.trainer = Trainer(config, case.mesh, axes, device)
        self.optimizer = ShardedOptimizer(self.trainer.optimizer.groups, axes, self.train, chunk=CHUNK)
        self.trainer.optimizer = self.optimizer
        self.plan = replace(self.trainer.plan(case.rows, case.micros), overlap=case.overlap)

    @property
    def placements(self) -> dict[str, Placement]:
        """Where this rank's weights lie."""
        return self.trainer.placements

    def first_row(self, micro: int) -> int:
        """Return the first row of a micro-batch of this rank in the global batch."""
        replica = self.rank % self.case.mesh.stage // self.case.mesh.node
        return replica * self.case.share + micro * self.case.rows

    def tokens_of(self, micro: int) -> Tensor:
        """Numbers of this rank's tokens of a micro-batch in the global batch, [tokens]."""
        length = self.case.model.sequence_length
        numbers = self.case.slices.take(torch.arange(self.case.rows * length), self.axes["node"].index)
        return numbers + self.first_row(micro) * length

    @cached_property
    def program(self) -> Program:
        """The step, with the last hidden states kept."""
        micros = range(self.case.micros)
        whole = self.plan.program()
        kept = [of_micro(name, micro) for micro in micros for name in self.plan.results]
        if self.plan.part.last:
            kept += [of_micro("final", micro) for micro in micros]
        return Program(whole.ops, whole.given, kept)

    def step(self, observe: Observe | None = None) -> dict[str, Any]:
        """Forward and backward of all micro-batches, from the reference's weights."""
        device = self.trainer.device
        self.trainer.set_weights(self.reference.weights)
        for gradient in self.optimizer.gradients.values():
            gradient.reset()
        values: dict[str, Any] = dict.fromkeys(SHARED) | self.reference.scales
        values["auxiliary_scale"] = values["auxiliary_scale"].to(device)
        for micro in range(self.case.micros):
            first = self.first_row(micro)
            tokens, targets, segments = self.reference.batch.part(slice(first, first + self.case.rows))
            inputs = local_inputs(
                tokens.to(device), targets.to(device), self.plan.layout, segments, self.case.model
            )
            values |= {of_micro(name, micro): value for name, value in inputs.items()}
        weights = self.optimizer.weights | self.trainer.buffers
        return self.program.run(values, weights, self.optimizer.gradients, observe=observe)

    def synchronise(self, observe: Observe | None = None) -> dict[str, Any]:
        """The optimizer's list: reduce, norm, update, gather."""
        for gradient in self.optimizer.gradients.values():
            gradient.value()
        given = self.optimizer.given(RATE)
        self.optimizer.restore(0)
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                self._fill(group, slot, state)
        return Program(self.optimizer.ops, given, ["norm"]).run(given, {}, observe=observe)

    def _fill(self, group: FlatWeights, slot: Slot, state: Mapping[str, Tensor]) -> None:
        """This rank's part of a weight's random state."""
        whole = self.state(slot.name)
        for owned in group.owned(slot):
            offset, size = owned.box
            box = tuple(slice(first, first + width) for first, width in zip(offset, size, strict=True))
            for kind, values in whole.items():
                state[kind][owned.place].copy_(values[box].flatten()[owned.first : owned.last])

    def verify(self) -> Errors:
        """Run all of it and compare; the same errors on every rank."""
        errors = self._of_step(self.step())
        recorder = Recorder(copies=True)
        norm = self.synchronise(recorder)["norm"]
        self._of_sync(norm, recorder.values, errors)
        return errors

    # --- forward and backward ------------------------------------------------------------------------------------

    def _of_step(self, out: dict[str, Any]) -> Errors:
        sums = torch.zeros(4, dtype=torch.float64)  # loss, auxiliary, squares of the output's errors, of the output
        for micro in range(self.case.micros):
            for name in auxiliary_names(self.case.model, self.plan.part):
                sums[1] += float(resolve(out, of_micro(name, micro)))
            if self.plan.part.last:
                sums[0] += float(resolve(out, of_micro("loss", micro)))
                final = resolve(out, of_micro("final", micro)).cpu()
                wanted = self.reference.output[self.tokens_of(micro)]
                sums[2] += float((final - wanted).double().square().sum())
                sums[3] += float(wanted.double().square().sum())
        if self.case.mesh.world > 1:
            dist.all_reduce(sums)
        loss = _off(float(sums[0]), self.reference.loss)
        if self.reference.auxiliary:
            loss = max(loss, _off(float(sums[1]), self.reference.auxiliary))
        output = math.sqrt(float(sums[2]) / float(sums[3]))
        gradients = gradient_errors(self.summed_gradients(), self.reference.gradients)
        return Errors(_number(output), loss, gradients)

    def summed_gradients(self) -> dict[str, Tensor]:
        """Every gradient of the whole model: the sum of all ranks' parts."""
        whole = {name: torch.zeros_like(value) for name, value in self.reference.gradients.items()}
        for name, sink in self.optimizer.gradients.items():
            part = sink.value().cpu().flatten()
            for (offset, size), start, stop in self.placements[name].ranges:
                box = tuple(slice(first, first + width) for first, width in zip(offset, size, strict=True))
                whole[name][box] += part[start:stop].view(size)
        flat = torch.cat([value.flatten() for value in whole.values()])
        if self.case.mesh.world > 1:
            dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in whole.values()])
        return {name: part.view(whole[name].shape) for name, part in zip(whole, parts, strict=True)}

    # --- the optimizer -------------------------------------------------------------------------------------------

    def _of_sync(self, found_norm: float, values: Mapping[str, Tensor], errors: Errors) -> None:
        wanted = self.reference.gradients
        least = dict(zip(wanted, floors(wanted), strict=True))
        mine: dict[str, dict[str, float]] = {"shards": {}, "update": {}}
        for group in self.optimizer.groups:
            shard = values[shard_of(group)].cpu()
            mine["shards"][group.name] = self._shard_error(group, shard, least)
            mine["update"][group.name] = max(self.update_error(group, slot) for slot in group.slots)
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in wanted.values()))
        found = self.everyone({**mine, "norm": {"": _off(found_norm, norm)}})
        errors.norm = max(each["norm"][""] for each in found)
        for kind, target in (("shards", errors.shards), ("update", errors.update)):
            for each in found:
                for name, error in each[kind].items():
                    target[name] = max(target.get(name, 0.0), error)

    def _shard_error(self, group: FlatWeights, shard: Tensor, least: Mapping[str, float]) -> float:
        """Return the worst error of a rank's shard of the reduced gradients, weight by weight.

        A shard may hold three elements of a weight, small ones by chance: they count as large as the weight's others.
        """
        worst = 0.0
        for slot in group.slots:
            for owned in group.owned(slot):
                whole = self.reference.gradients[slot.name]
                offset, size = owned.box
                box = tuple(slice(first, first + width) for first, width in zip(offset, size, strict=True))
                part = whole[box].flatten()[owned.first : owned.last]
                floor = least[slot.name] + float(whole.norm()) * math.sqrt(part.numel() / whole.numel())
                worst = max(worst, relative(shard[owned.place], part, floor))
        return worst

    def update_error(self, group: FlatWeights, slot: Slot) -> float:
        """Return the error of one weight after the update, on this rank."""
        found = self.optimizer.weights[slot.name].cpu()
        return relative(found, slot.placement.take(self.updated(slot.name, group.decay)))

    def updated(self, name: str, decay: bool) -> Tensor:
        """A whole weight after an update, by the rule's plain form."""
        weight, gradient = self.reference.weights[name], self.reference.gradients[name]
        matrices = parameter_matrices(self.case.model)[name]
        whole = Whole(weight, gradient, self.state(name), matrices, count=0, decay=decay)
        return rule_of(self.train).of(matrices).plain(whole, RATE, self.train)

    def state(self, name: str) -> dict[str, Tensor]:
        """Random state of a whole weight before the update, the same on every rank: of the size of its gradient.

        A gradient far below the others may be rounding; then state of the others' size decides, which is not.
        """
        gradients = self.reference.gradients
        least = dict(zip(gradients, floors(gradients), strict=True))[name] / FLOOR
        size = max(float(gradients[name].norm()), least) / math.sqrt(gradients[name].numel())
        rule = rule_of(self.train).of(parameter_matrices(self.case.model)[name])
        return {state.name: _random(f"{state.name}.{name}", gradients[name], state, size) for state in rule.state}

    def everyone(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        if self.case.mesh.world == 1:
            return [value]
        found: list[Any] = [None] * self.case.mesh.world
        dist.all_gather_object(found, value)
        return found


def _comparable(train: TrainConfig) -> TrainConfig:
    """The optimizer of a config, with nothing that makes its update hard to compare."""
    train = replace(train, dtype="fp32", compile="off", clip_norm=0.0, weight_decay=0.1)
    return rule_of(train).comparable(train)


def _random(name: str, like: Tensor, state: State, size: float) -> Tensor:
    """Numbers of a size, by name; those that are never negative are squares, as of a second moment."""
    generator = torch.Generator().manual_seed(tag_of(name))
    values = torch.empty(like.shape).normal_(0.0, size, generator=generator)
    return values.to(state.dtype) if state.signed else values.square().to(state.dtype)


def _off(found: float, wanted: float) -> float:
    return _number(abs(found - wanted) / max(abs(wanted), 1e-12))


def _number(error: float) -> float:
    """Infinite where it is not a number: no comparison with a tolerance passes then."""
    return error if error == error else math.inf
