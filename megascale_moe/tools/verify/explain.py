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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from megascale_moe.comm.collectives import all_reduce_sum
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
        place: of the operator in the list of the whole model, or in that of the optimizer.
        op: the operator as its list names it. tensor: what it wrote. parameters: the group of weights concerned, where
            it is a weight gradient or its synchronisation. micro_batch: -1 if it belongs to none.
    """

    place: float
    op: str
    phase: str
    rank: int
    tensor: str
    error: float
    parameters: str = ""
    micro_batch: int = -1

    @property
    def layer(self) -> int:
        """The layer of the operator, -1 if it belongs to none."""
        layer = parse(self.op).layer
        return -1 if layer is None else layer

    @property
    def text(self) -> str:
        """One line for people."""
        micro = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        parameters = f" of {self.parameters}" if self.parameters else ""
        size = "has another shape" if math.isinf(self.error) else f"differs by {self.error:.1e}"
        return f"{self.op} (phase {self.phase}, rank {self.rank}{micro}): {self.tensor}{parameters} {size}"


SINGLE = 10 * TOLERANCE
"""For one tensor of one rank: a sum of a few tokens may cancel all but the last digits (1.2e-5 was seen). Smaller
differences are named only where nothing else is found."""


def first_difference(run: RankOfLayout, errors: Errors) -> Difference | None:
    """Return the same on every rank; None if the layout passes now. All ranks call it together."""
    if errors.step <= TOLERANCE:
        recorder = Recorder()
        run.step()
        run.synchronise(recorder)
        return _first(run, _synchronisation(run, recorder.values))
    recorder = Recorder()
    run.step(recorder)
    different = list(Comparison(run, recorder.values).differences())
    clear = [difference for difference in different if difference.error > SINGLE]
    return _first(run, clear) or _first(run, _weight_gradients(run)) or _first(run, different)


def _first(run: RankOfLayout, differences: Iterable[Difference]) -> Difference | None:
    """Return the first difference of all ranks, from those of this one."""
    order = attrgetter("place", "rank", "micro_batch")
    everyone = run.everyone(min(differences, key=order, default=None))
    return min(filter(None, everyone), key=order, default=None)


# --- tensors ---------------------------------------------------------------------------------------------------------


class Comparison:
    """A rank's recorded tensors against those of the one-rank list. All ranks of a stage go through it in step."""

    def __init__(self, run: RankOfLayout, values: dict[str, Tensor]) -> None:
        self.run, self.values = run, values
        self.skipped: set[str] = set()  # names nothing compares with
        declared = {
            str(value): value
            for stage in run.plan.stages.values() for op in (*stage.forward, *stage.backward)
            for value in (*op.reads, *op.writes) if isinstance(value, Value)
        }  # fmt: skip
        self.expected = [Expected(run, micro, declared) for micro in range(run.case.micros)]
        forward = part_ops(run.case.model, run.plan.layout, Part.whole(run.case.model))
        self.order: dict[tuple[str, str], float] = {}
        self.readers: dict[str, float] = {}  # tensor -> the place of its first reader
        for place, op in enumerate([*forward, *backward(forward)]):
            self.order.setdefault((op.phase, op.name), place)
            for name in op.reads:
                self.readers.setdefault(name, place)
        self.writers: dict[str, list[Op]] = {}
        for op in run.program.ops:
            for name in op.writes:
                if parse(name).micro == 0 and not is_sum(op):
                    self.writers.setdefault(_summed(without_micro(name)), []).append(op)

    def differences(self) -> Iterator[Difference]:
        """Yield every tensor that differs, in the order of this rank's list."""
        for op in self.run.program.ops:
            for written in op.writes:
                name = parse(written)
                if written not in self.values or name.micro is None:
                    continue
                tensor = without_micro(written)
                error = self.error(op, name.micro, tensor)
                if error > TOLERANCE:
                    place, shown = self.place(op, tensor), Name(name.tensor, piece=name.piece, gradient=name.gradient)
                    yield Difference(place, op.name, op.phase, self.run.rank, str(shown), error, "", name.micro)

    def place(self, op: Op, tensor: str) -> float:
        """Return where an operator stands in the list of the whole model.

        Messages between stages are not in it: they come before their first reader. What is recomputed is looked at
        last: where it differs, what it is computed from did in the forward.
        """
        if op.phase == Phase.R:
            return len(self.order)
        return self.order.get((op.phase, op.name), self.readers.get(_summed(tensor), -1) - 0.5)

    def error(self, op: Op, micro: int, tensor: str) -> float:
        """Return the relative error of one tensor; 0.0 if nothing compares with it."""
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
        if gradient and part.shard.copied_columns:  # [T, h, ...] at their places among all columns, [T, H, ...]
            assert part.columns is not None
            value = torch.zeros(len(value), *whole.shape[1:]).index_add_(1, part.columns, value)
            value = all_reduce_sum(value, self.run.axes["node"])
            wanted = whole.index_select(0, part.rows)
        if axis:
            value = all_reduce_sum(value.clone(), self.run.axes[axis])
        least = 1e-3 * float(whole.float().norm()) * math.sqrt(wanted.numel() / max(whole.numel(), 1))
        return relative(value, wanted, max(least, 1e-12))

    def gradient(self, op: Op, tensor: str, part: ExpectedPart) -> Tensor:
        """Return what the one-rank list has from the same readers."""
        ops = [op] if parse(tensor).term else self.writers[_summed(tensor)]
        gradients = []
        for name in part.names if part.shard.side_by_side else part.names[:1]:  # terms of a sum have the same gradient
            sources = sorted({source for each in ops for source in self.sources(each, name)})
            parts = [self.run.reference.parts[name, source] for source in sources]
            gradients.append(sum(parts[1:], start=parts[0]) if parts else self.run.reference.values[grad(name)])
        return torch.cat([each.flatten(1) for each in gradients], dim=1) if len(gradients) > 1 else gradients[0]

    def sources(self, op: Op, name: str) -> set[str]:
        """Return the operators of the one-rank list whose parts of the gradient of `name` come through `op`."""
        if (name, op.name) in self.run.reference.parts:
            return {op.name}
        sources: set[str] = set()
        for read in map(without_micro, op.reads):
            part = self.expected[0].part(_forward(read)) if is_grad(read) else None
            if part is not None and name in part.names:
                for writer in self.writers.get(_summed(read), []):
                    sources |= self.sources(writer, name)
        return sources

    def by_expert(
        self, value: Tensor, wanted: Tensor, micro: int, tensor: str, part: ExpectedPart
    ) -> tuple[Tensor, Tensor]:
        """Spread what is by choice over the experts, [T, k] -> [T, E], on both sides by the choices made there."""
        name = parse(tensor)
        choice = name._replace(tensor=name.tensor.replace("gate", "choice"), gradient=False, term=0, micro=micro)
        mine = self.values[str(choice)].cpu()
        theirs = part.of(self.run.reference.values[str(Name("choice", layer=name.layer))])
        if name.tensor.startswith("choice"):
            value, wanted = torch.ones_like(value), torch.ones_like(wanted)
        zeros = torch.zeros(len(wanted), self.run.case.model.experts)
        if mine.shape != theirs.shape:
            mine = theirs
        return zeros.scatter(1, mine, value), zeros.scatter(1, theirs, wanted)


def _summed(tensor: str) -> str:
    """Return the name of the sum that a term of a gradient belongs to."""
    return str(parse(tensor)._replace(term=0))


def _forward(tensor: str) -> str:
    """Return the name of the tensor whose gradient it may be."""
    return str(parse(tensor)._replace(term=0, gradient=False, recomputed=False))


# --- weights ---------------------------------------------------------------------------------------------------------


def _weight_gradients(run: RankOfLayout) -> Iterator[Difference]:
    """Yield operators that add to a gradient whose sum differs; by then all that they read was found right."""
    run.step()
    whole = run.summed_gradients()
    for place, op in enumerate(run.program.ops):
        for name in op.gradients:
            placement = run.trainer.placements[name]
            wanted = placement.take(run.reference.gradients[name])
            error = relative(placement.take(whole[name]), wanted, float(wanted.norm()) + 1e-9)
            if error > TOLERANCE:
                tensor = f"gradient of {parse(name).tensor}"
                yield Difference(place, op.name, op.phase, run.rank, tensor, error, parameter_group(name))


def _synchronisation(run: RankOfLayout, values: dict[str, Tensor]) -> Iterator[Difference]:
    """Yield steps of the optimizer whose result is not the sum of what they read, or not what belongs on this rank."""
    for group in run.optimizer.groups:
        yield from _reductions(run, group, values)
    place = len(run.optimizer.ops)
    for group in run.optimizer.groups:
        yield from _updates(run, group, place)
        place += 3


def _reductions(run: RankOfLayout, group: FlatWeights, values: dict[str, Tensor]) -> Iterator[Difference]:
    """Compare all chunks: sums over the node, then over nodes."""
    shape = (group.intra.size, group.inter.size, -1)
    node = all_reduce_sum(group.gradients.cpu().clone(), group.intra)
    everywhere = all_reduce_sum(node.clone(), group.inter)
    wanted = {
        "node_sums": node.view(shape)[group.intra.index],
        "shard": everywhere.view(shape)[group.intra.index, group.inter.index][None],
    }
    for kind, sums in wanted.items():
        chunks = [
            (place, op, values[name].cpu().view(len(sums), -1))
            for place, op in enumerate(run.optimizer.ops) if not op.name.endswith("assemble")
            for name in op.writes if name.startswith(f"{group.name}.{kind}") and name in values
        ]  # fmt: skip
        if chunks:
            place, op, _ = chunks[0]
            value = torch.cat([chunk for _, _, chunk in chunks], dim=1)
            error = relative(value, sums, float(sums.norm()) * 1e-3 + 1e-12)
            if error > TOLERANCE:
                yield Difference(place, op.name, op.phase, run.rank, "sum of gradients", error, f"group {group.name}")


def _updates(run: RankOfLayout, group: FlatWeights, place: int) -> Iterator[Difference]:
    """Compare weights after the step: wrong in this rank's own shard (update), or in what others sent (gather)."""
    wanted = torch.zeros_like(group.weights)
    for slot in group.slots:
        wanted[slot.start : slot.stop] = slot.placement.take(run.updated(slot.name, group.decay)).flatten()
    rows, theirs = (weights.view(group.intra.size, -1) for weights in (group.weights, wanted))
    steps = (
        (f"update.{group.name}", Phase.W, group.weights[group.shard], wanted[group.shard]),
        (f"parameters.{group.name}.inter_all_gather", Phase.F, rows[group.intra.index], theirs[group.intra.index]),
        (f"parameters.{group.name}.intra_all_gather", Phase.F, rows, theirs),
    )
    for step, (name, phase, value, right) in enumerate(steps):
        error = relative(value, right, float(wanted.norm()) * 1e-3)
        if error > TOLERANCE:
            yield Difference(place + step, name, phase, run.rank, "weights", error, f"group {group.name}")
            return
