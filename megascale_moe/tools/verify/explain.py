"""Which operator is the first whose result differs: a failing layout runs again, every tensor recorded and compared.

Ranks of a pipeline run different lists at different times, so "first" is by the place of an operator in the list of
the whole model, forward and backward, which is the order in which a wrong value spreads: nothing flows from one
micro-batch into another. Ties go to the lower rank.

A gradient of several readers is compared reader by reader. Who adds what differs between the lists (a gathered tensor
collects the parts of its readers before they travel home as one), so parts are traced to the operators that all lists
have, and those of the one-rank list summed.

If every tensor is right, a weight gradient can still be wrong (operators of phase W write into buffers, not tensors),
or what the optimizer does with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.engine.names import Name, grad, in_micro, is_grad, parse, without_micro
from megascale_moe.engine.op import Op, Phase, backward, is_sum
from megascale_moe.engine.value import Value
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.strategies.model import part_ops
from megascale_moe.strategies.stages import Part
from megascale_moe.tools.verify.expected import Expected, ExpectedPart
from megascale_moe.tools.verify.rank import TOLERANCE, Errors, RankOfLayout, parameter_group
from megascale_moe.tools.verify.reference import Recorder, relative


@dataclass(frozen=True)
class Difference:
    """Where a layout's results begin to differ.

    Attributes:
        op: the operator as its list names it. layer, micro_batch: -1 if it belongs to none.
        tensor: what it wrote. parameters: the group of weights concerned, where it is a weight gradient or its
            synchronisation.
    """

    op: str
    phase: str
    rank: int
    layer: int
    micro_batch: int
    tensor: str
    error: float
    parameters: str = ""

    @property
    def text(self) -> str:
        """One line for people."""
        micro = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        what = f" of {self.parameters}" if self.parameters else ""
        size = "has another shape" if math.isinf(self.error) else f"differs by {self.error:.1e}"
        return f"{self.op} (phase {self.phase}, rank {self.rank}{micro}): {self.tensor}{what} {size}"

    def document(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else None, "text": self.text}


SINGLE = 10 * TOLERANCE
"""For one tensor of one rank: a sum of a few tokens may cancel all but the last digits (1.2e-5 was seen). Smaller
differences are named only where nothing else is found."""

Found = tuple[tuple[float, int, int], Difference]
"""(place in the list, rank, micro-batch) first: the smallest is the first difference."""


def first_difference(run: RankOfLayout, errors: Errors) -> Difference | None:
    """The same on every rank; None if the layout passes now. All ranks call it together."""
    if not errors.step <= TOLERANCE:
        recorder = Recorder()
        run.step(recorder)
        different = list(Comparison(run, recorder.values).differences())
        clear = [found for found in different if not found[1].error <= SINGLE]
        return _first(run, clear) or _first(run, _weight_gradients(run)) or _first(run, different)
    recorder = Recorder(copies=True)
    run.step()
    run.synchronise(recorder)
    return _first(run, _synchronisation(run, recorder.values))


def _first(run: RankOfLayout, mine: Sequence[Found]) -> Difference | None:
    ours = [found for each in run.everyone(min(mine, key=lambda pair: pair[0], default=None)) if (found := each)]
    return min(ours, key=lambda pair: pair[0])[1] if ours else None


# --- tensors ---------------------------------------------------------------------------------------------------------


class Comparison:
    """A rank's recorded tensors against those of the one-rank list. All ranks of a stage go through it in step."""

    def __init__(self, run: RankOfLayout, values: dict[str, Tensor]) -> None:
        self.run, self.values = run, values
        self.skipped: set[str] = set()  # names nothing compares with
        stages = run.plan.stages.values()
        declared = {
            str(value): value
            for stage in stages for op in (*stage.forward, *stage.backward) for value in (*op.reads, *op.writes)
            if isinstance(value, Value)
        }  # fmt: skip
        self.expected = [
            Expected(run.case, run.axes, run.rank, micro, run.reference, declared) for micro in range(run.case.micros)
        ]
        forward = part_ops(run.case.model, run.plan.layout, Part.whole(run.case.model))
        whole = [*forward, *backward(forward)]
        self.order = {(op.phase, op.name): float(place) for place, op in reversed(list(enumerate(whole)))}
        self.readers = {str(name): float(place) for place, op in reversed(list(enumerate(whole))) for name in op.reads}
        self.writers: dict[str, list[Op]] = {}
        for op in run.program.ops:
            for name in op.writes:
                if parse(name).micro == 0 and not is_sum(op):
                    self.writers.setdefault(_summed(without_micro(name)), []).append(op)

    def differences(self) -> Iterator[Found]:
        """Every tensor that differs, in the order of this rank's list."""
        for op in self.run.program.ops:
            for written in op.writes:
                name = parse(written)
                if written not in self.values or name.micro is None:
                    continue
                tensor = without_micro(written)
                error = self.error(op, name.micro, tensor)
                if not error <= TOLERANCE:
                    layer = -1 if name.layer is None else name.layer
                    shown = str(Name(name.tensor, piece=name.piece, gradient=name.gradient))
                    found = Difference(op.name, op.phase, self.run.rank, layer, name.micro, shown, error)
                    yield (self.place_in_list(op, tensor), self.run.rank, name.micro), found

    def place_in_list(self, op: Op, tensor: str) -> float:
        """Messages between stages are not in the list of the whole model: they come before their first reader.

        What is recomputed is looked at last: where it differs, what it is computed from did in the forward.
        """
        if op.phase == Phase.R:
            return float(len(self.order))
        return self.order.get((op.phase, op.name), self.readers.get(_summed(tensor), -1.0) - 0.5)

    def error(self, op: Op, micro: int, tensor: str) -> float:
        """Relative error of one tensor; 0.0 if nothing compares with it."""
        gradient = is_grad(tensor)
        part = self.expected[micro].part(_forward(tensor))
        if part is None or (gradient and part.shard.forward_only):
            self.skipped.add(tensor)
            return 0.0
        whole = self.gradient(op, tensor, part) if gradient else part.whole(self.run.reference.values.__getitem__)
        value, wanted = self.values[in_micro(tensor, micro)].cpu().float(), part.of(whole).float()
        if value.shape != wanted.shape:
            value = torch.full_like(wanted, math.inf)
        if part.shard.routing:
            value, wanted = self.by_expert(value, wanted, micro, tensor, part)
        axis = part.shard.partial_gradient if gradient else part.shard.partial
        if gradient and part.shard.copied_columns:
            value, wanted, axis = _all_columns(value, whole, part), whole.index_select(0, part.rows), "node"
        if axis:
            value = summed(value, self.run.axes[axis])
        least = 1e-3 * float(whole.float().norm()) * math.sqrt(wanted.numel() / max(whole.numel(), 1))
        return relative(value, wanted, max(least, 1e-12))

    def gradient(self, op: Op, tensor: str, part: ExpectedPart) -> Tensor:
        """Return what the one-rank list has from the same readers."""
        names = part.names if part.shard.side_by_side else part.names[:1]  # terms of a sum have the same gradient
        ops = [op] if parse(tensor).term else self.writers[_summed(tensor)]
        found = [self._gradient(ops, name) for name in names]
        return torch.cat([each.flatten(1) for each in found], dim=1) if len(found) > 1 else found[0]

    def _gradient(self, ops: Sequence[Op], name: str) -> Tensor:
        reference = self.run.reference
        sources = sorted({source for each in ops for source in self.sources(each, name)})
        if not sources:
            return reference.values[grad(name)]
        whole = reference.parts[name, sources[0]]
        for source in sources[1:]:
            whole = whole + reference.parts[name, source]
        return whole

    def sources(self, op: Op, name: str) -> set[str]:
        """The operators of the one-rank list whose parts of the gradient of `name` come through `op`."""
        if (name, op.name) in self.run.reference.parts:
            return {op.name}
        found: set[str] = set()
        for read in map(without_micro, op.reads):
            part = self.expected[0].part(_forward(read)) if is_grad(read) else None
            if part is not None and name in part.names:
                for writer in self.writers.get(_summed(read), []):
                    found |= self.sources(writer, name)
        return found

    def by_expert(
        self, value: Tensor, wanted: Tensor, micro: int, tensor: str, part: ExpectedPart
    ) -> tuple[Tensor, Tensor]:
        """[T, k] -> [T, E], on both sides by the choices made there."""
        name = parse(tensor)
        choice = name._replace(tensor=name.tensor.replace("gate", "choice"), gradient=False, term=0, micro=micro)
        mine = self.values[str(choice)].cpu()
        theirs = part.of(self.run.reference.values[str(Name("choice", layer=name.layer))])
        if name.tensor.startswith("choice"):
            value, wanted = torch.ones_like(value), torch.ones_like(wanted)
        shape = (len(wanted), self.run.case.model.experts)
        if mine.shape != theirs.shape:
            mine = theirs
        return torch.zeros(shape).scatter_(1, mine, value), torch.zeros(shape).scatter_(1, theirs, wanted)


def _summed(tensor: str) -> str:
    """The name of the sum that a term of a gradient belongs to."""
    return str(parse(tensor)._replace(term=0))


def _forward(tensor: str) -> str:
    """The name of the tensor whose gradient it may be."""
    return str(parse(tensor)._replace(term=0, gradient=False, recomputed=False))


def _all_columns(value: Tensor, whole: Tensor, part: ExpectedPart) -> Tensor:
    """A rank's columns [T, h, ...] at their places among all, [T, H, ...]."""
    assert part.columns is not None
    return torch.zeros(len(value), *whole.shape[1:]).index_add_(1, part.columns, value)


def summed(value: Tensor, axis: Axis) -> Tensor:
    """Sum over an axis by the backend's own all-reduce."""
    total = value.clone()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return total


# --- weights ---------------------------------------------------------------------------------------------------------


def _weight_gradients(run: RankOfLayout) -> list[Found]:
    """Operators that add to a gradient whose sum differs; by then all that they read was found right."""
    run.step()
    whole = run.summed_gradients()
    found: list[Found] = []
    for place, op in enumerate(run.program.ops):
        for name in op.gradients:
            placement = run.placements[name]
            wanted = placement.take(run.reference.gradients[name])
            error = relative(placement.take(whole[name]), wanted, float(wanted.norm()) + 1e-9)
            if not error <= TOLERANCE:
                weight = parse(name)
                layer = -1 if weight.layer is None else weight.layer
                text = f"gradient of {weight.tensor}"
                entry = Difference(op.name, op.phase, run.rank, layer, -1, text, error, parameter_group(name))
                found.append(((float(place), run.rank, 0), entry))
    return found


def _synchronisation(run: RankOfLayout, values: dict[str, Tensor]) -> list[Found]:
    """Steps of the optimizer whose result is not the sum of what they read, or not what belongs on this rank."""
    found: list[Found] = []
    for group in run.optimizer.groups:
        found += _reductions(run, group, values)
    for index, group in enumerate(run.optimizer.groups):
        found += _updates(run, group, 1000.0 + index)
    return found


def _reductions(run: RankOfLayout, group: FlatWeights, values: dict[str, Tensor]) -> list[Found]:
    """All chunks: sums over the node, then over nodes."""
    shape = (group.intra.size, group.inter.size, -1)
    node = summed(group.gradients.cpu(), group.intra)
    everywhere = summed(node, group.inter)
    wanted = {
        "node_sums": node.view(shape)[group.intra.index],
        "shard": everywhere.view(shape)[group.intra.index, group.inter.index][None],
    }
    found: list[Found] = []
    starts = dict.fromkeys(wanted, 0)
    for place, op in enumerate(run.optimizer.ops):
        for name in op.writes:
            kind = name.removeprefix(f"{group.name}.").partition(".")[0]
            if not name.startswith(f"{group.name}.") or kind not in wanted or name not in values:
                continue
            if f".{group.name}." not in op.name or op.name.endswith("assemble"):
                continue
            lanes = len(wanted[kind])
            size = values[name].numel() // lanes
            part = wanted[kind][:, starts[kind] : starts[kind] + size].flatten()
            starts[kind] += size
            error = relative(values[name].cpu().flatten(), part, float(wanted[kind].norm()) * 1e-3 + 1e-12)
            if not error <= TOLERANCE:
                what = "sum of gradients", error, f"group {group.name}"
                entry = Difference(op.name, op.phase, run.rank, -1, -1, *what)
                found.append(((float(place), run.rank, 0), entry))
    return found


def _updates(run: RankOfLayout, group: FlatWeights, place: float) -> list[Found]:
    """Weights after the step: wrong in this rank's own shard (update), or in what others sent (gather)."""
    wanted = torch.zeros_like(group.weights)
    for slot in group.slots:
        value = slot.placement.take(run.updated(slot.name, group.decay))
        wanted[slot.start : slot.stop] = value.flatten().to(wanted.device)
    lanes = (group.intra.size, -1)
    rows, theirs = group.weights.view(lanes), wanted.view(lanes)
    steps = (
        (f"update.{group.name}", Phase.W, group.weights[group.shard], wanted[group.shard]),
        (f"parameters.{group.name}.inter_all_gather", Phase.F, rows[group.intra.index], theirs[group.intra.index]),
        (f"parameters.{group.name}.intra_all_gather", Phase.F, rows, theirs),
    )
    for offset, (name, phase, value, right) in enumerate(steps):
        error = relative(value, right, float(wanted.norm()) * 1e-3)
        if not error <= TOLERANCE:
            entry = Difference(name, phase, run.rank, -1, -1, "weights", error, f"group {group.name}")
            return [((place + offset / 10, run.rank, 0), entry)]
    return []
