"""Whole matrices for a rule that needs them: collect, transform, give back, as operators.

A group's update is then a job of several hops (`sync.pipelined`): the rule's element-by-element beginning, one exchange
for each axis over which a matrix of the group is cut, the transformation on the matrices' owners, the exchanges back,
and the end of the update. The fragments of the next groups travel while the matrices of one are transformed. Which
fragments those are is `division.py`'s answer; ranks without any take part with empty messages.

Matrices travel in the dtype in which they are transformed. The owner's own fragments stay where they are until a matrix
is put together, and receive the result there. Ranks send unequal amounts: an operator declares that of the rank which
sends most, alike on all ranks as the planner and the comparison of all ranks' messages need it, and the trace counts
what each one sends.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes, Axis
from megascale_moe.comm.collectives import Pending, exchange, tag_of
from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.optim.division import HOPS, Load, Place, divide
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.norm import clipped, clipping_bytes, with_bytes
from megascale_moe.optim.rule import MatrixRule, WeightShard
from megascale_moe.optim.sync import Job, shard_of, updated_of
from megascale_moe.strategies.placement import MatrixPart

TOGETHER = 1 << 24
"""Elements of matrices of one shape that are transformed at once: enough to fill a GPU, little beside a shard."""
TOGETHER_ON_CPU = 1 << 18
"""The same where products are computed in a core's cache: four matrices of 256 x 256 at a time took Muon's steps 10 %
less time than 96, in FP32 as in BF16."""

WORDS = ("inter", "intra", "tensor")
"""What the hops are called in the names of operators."""

Loads = dict[tuple[str, ...], Load]
"""Work so far, by the names of the axes over whose places it is spread."""

Fragments = dict[int, Tensor]
"""Fragments that a rank has, by number, ascending."""


class WholeMatrices:
    """The matrices of a group of weights as this rank sees them.

    Args:
        shard: what the rule updates. axes: those of the rank.
        loads: work of the groups before, to which that of this group is added.
    """

    def __init__(
        self, group: FlatWeights, rule: MatrixRule, shard: WeightShard, axes: Axes, config: TrainConfig, loads: Loads
    ) -> None:
        self.group, self.rule, self.shard, self.config = group, rule, shard, config
        self.dtype = rule.dtype(group.master.device, config)
        cuts = {slot.placement.cut for slot in group.slots}
        assert len(cuts) == 1, f"matrices of {group.name} are cut over several axes: {sorted(cuts)}"
        cut = cuts.pop()
        inter, intra, tensor = self.axes = group.inter, group.intra, axes[cut] if cut else Axis(cut)
        inside = tensor.size <= axes["node"].size
        self.streams = (Stream.INTER, Stream.INTRA, Stream.INTRA if inside else Stream.INTER)
        self.place: Place = inter.index, intra.index, tensor.index
        parts = [(slot.start, part) for slot in group.slots for part in slot.placement.matrix_parts]
        self.matrices = [part for _, part in parts]
        for part in self.matrices:
            assert tuple(side.start for side in _box(part, tensor.index)) == part.offset
        self.costs = [rule.transform_cost(*part.shape) for part in self.matrices]
        extents = tuple(
            (start + part.start, start + part.stop, cost.flops)
            for (start, part), cost in zip(parts, self.costs, strict=True)
        )
        sizes, key = (inter.size, intra.size, tensor.size), (inter.name, intra.name, tensor.name)
        self.division = divide(extents, group.master.numel(), sizes, loads.get(key) or Load.none(sizes))
        loads[key] = self.division.load

    # --- the list ----------------------------------------------------------------------------------------------------

    def job(self) -> Job:
        """Return the hops of the group's update; the last operator writes `updated_of` it."""
        hops = [hop for hop in range(HOPS) if self.division.most(hop)]
        collect, give_back = [(hop, False) for hop in hops], [(hop, True) for hop in reversed(hops)]
        job, reads = [[self._prepare_op()]], self._name("fragments")
        for step in (*collect, None, *give_back):
            op = self._exchange_op(*step, reads) if step else self._transform_op(reads)
            job[-1].append(op)
            reads = op.writes[0]
            if step:
                job.append([])
        job[-1].append(self._finish_op(reads))
        return job

    def _name(self, what: str) -> str:
        return f"{self.group.name}.{what}"

    def _prepare_op(self) -> Op:
        """Return the operator that clips and begins the update.

        The direction may lie where the sums were; the fragments are views of it.
        """
        group, config = self.group, self.config

        def run(gradient: Tensor, norm: float) -> tuple[Tensor, Fragments]:
            direction = self.rule.prepare(self.shard, clipped(gradient, norm, config.clip_norm), config)
            held = self.division.held(self.place, 0)
            return direction, {number: self._in_shard(direction, number) for number in held}

        return Op(
            name=f"update.{group.name}.prepare", reads=(shard_of(group), "norm"),
            writes=(self._name("direction"), self._name("fragments")), run=run, phase=Phase.W,
            cost=with_bytes(self.rule.prepare_cost(group.master.numel()), clipping_bytes(group, config)),
        )  # fmt: skip

    def _finish_op(self, returned: str) -> Op:
        """Return the operator that ends the update and rounds the master to the compute dtype."""
        group = self.group

        def run(direction: Tensor, transformed: Fragments, learning_rate: float) -> Tensor:
            for number, values in transformed.items():
                if self.division.place(number, HOPS) != self.place:
                    self._in_shard(direction, number).copy_(values)
            self.rule.update(self.shard, direction, learning_rate, self.config)
            return group.round()

        return Op(
            name=f"update.{group.name}", reads=(self._name("direction"), returned, "learning_rate"),
            writes=(updated_of(group),), run=run, phase=Phase.W,
            cost=with_bytes(self.rule.cost(group.master.numel()), group.rounding_bytes),
        )  # fmt: skip

    def _exchange_op(self, hop: int, back: bool, reads: str) -> Op:
        word = "return" if back else "collect"
        name = f"update.{self.group.name}.{WORDS[hop]}_{word}"
        tag, sent = tag_of(name), self.division.most(hop, back=back) * self.dtype.itemsize
        return Op(
            name=name, reads=(reads,), writes=(self._name(f"{WORDS[hop]}_{word}ed"),),
            run=lambda held: self._exchange(held, hop, back, tag), phase=Phase.W, stream=self.streams[hop],
            cost=Cost(wire_bytes=sent, axis=self.axes[hop].name),
        )  # fmt: skip

    def _transform_op(self, reads: str) -> Op:
        """Return the operator that transforms this rank's matrices.

        Its cost is that of the rank with most work; sizes as those of all matrices, weighted by their FLOPs.
        """
        cost = Cost()
        costs = [cost for cost in self.costs if cost.flops]
        if costs:
            flops, work = sum(cost.flops for cost in costs), self.division.work
            memory = work / flops * sum(cost.memory_bytes for cost in costs)
            size = flops / sum(cost.flops / cost.size for cost in costs) if all(cost.size for cost in costs) else 0.0
            cost = Cost(work, memory, work=costs[0].work, size=size)
        return Op(
            name=f"update.{self.group.name}.transform", reads=(reads,), writes=(self._name("transformed"),),
            run=self._transform, phase=Phase.W, cost=cost,
        )  # fmt: skip

    # --- fragments ---------------------------------------------------------------------------------------------------

    def _in_shard(self, direction: Tensor, number: int) -> Tensor:
        fragment, first = self.division.fragments[number], self.group.shard.start
        return direction[fragment.start - first : fragment.stop - first]

    def _exchange(self, held: Fragments, hop: int, back: bool, tag: int) -> Pending:
        """Start a hop; finishes with the fragments that this rank has behind it."""
        division = self.division
        before, after = (hop + 1, hop) if back else (hop, hop + 1)
        wanted = division.held(self.place, after)
        leaving, coming = self._by_peer(held, hop, after), self._by_peer(wanted, hop, before)
        nothing = torch.empty(0, dtype=self.dtype, device=self.group.master.device)
        send = [torch.cat([nothing, *(held[number].to(self.dtype) for number in numbers)]) for numbers in leaving]
        sizes = [[division.fragments[number].size for number in numbers] for numbers in coming]

        def finish(messages: Sequence[Tensor]) -> Fragments:
            received = dict(held)
            for numbers, size, message in zip(coming, sizes, messages, strict=True):
                received |= zip(numbers, message.split(size), strict=True)
            return {number: received[number] for number in wanted}

        receive = [nothing.new_empty(sum(size)) for size in sizes]
        return exchange(send, receive, self.axes[hop], tag).then(finish)

    def _by_peer(self, numbers: Iterable[int], hop: int, hops: int) -> list[list[int]]:
        """Return fragments that travel in a hop by the rank of its axis that has them after so many hops."""
        by_peer: list[list[int]] = [[] for _ in range(self.axes[hop].size)]
        for number in numbers:
            by_peer[self.division.place(number, hops)[hop]].append(number)
        by_peer[self.place[hop]] = []  # these stay as they are
        return by_peer

    def _transform(self, fragments: Fragments) -> Fragments:
        """Return the fragments of what becomes of this rank's matrices, those of its own shard in place."""
        held = dict(fragments)
        for (rows, columns), indices in self._batches:
            stack = torch.empty(len(indices), rows, columns, dtype=self.dtype, device=self.group.master.device)
            for index, matrix in zip(indices, stack, strict=True):
                for box, numbers, _ in self._owned[index]:
                    parts = [held[number].to(self.dtype) for number in numbers]
                    place = matrix[box]
                    place.copy_((parts[0] if len(parts) == 1 else torch.cat(parts)).view(place.shape))
            for index, matrix in zip(indices, self.rule.transform(stack, self.config), strict=True):
                for box, numbers, sizes in self._owned[index]:
                    values = matrix[box].reshape(-1).split_with_sizes(sizes)
                    for number, changed in zip(numbers, values, strict=True):
                        if self.division.fragments[number].holder == self.place:
                            held[number].copy_(changed)
                        else:
                            held[number] = changed
        return held

    @cached_property
    def _owned(self) -> Mapping[int, Sequence[tuple[tuple[slice, slice], list[int], list[int]]]]:
        """The parts of each of this rank's matrices: box, and numbers and sizes of the fragments that make it up."""
        parts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number in self.division.held(self.place, HOPS):
            fragment = self.division.fragments[number]
            parts[fragment.matrix, fragment.holder[2]].append(number)
        owned = defaultdict(list)
        for (index, cut), numbers in parts.items():
            sizes = [self.division.fragments[number].size for number in numbers]
            owned[index].append((_box(self.matrices[index], cut), numbers, sizes))
        return owned

    @cached_property
    def _batches(self) -> list[tuple[tuple[int, int], list[int]]]:
        """This rank's matrices by shape, as many at once as `TOGETHER` allows."""
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in self._owned:
            by_shape[self.matrices[index].shape].append(index)
        elements = TOGETHER_ON_CPU if self.group.master.is_cpu else TOGETHER
        batches = []
        for shape, indices in by_shape.items():
            most = max(elements // math.prod(shape), 1)
            batches += [(shape, indices[first : first + most]) for first in range(0, len(indices), most)]
        return batches


def _box(part: MatrixPart, index: int) -> tuple[slice, slice]:
    """Return where the part of the `index`-th rank of the cut lies in the matrix."""
    rows, columns = (
        slice(index * size, (index + 1) * size) if size < whole else slice(0, size)
        for whole, size in zip(part.shape, part.size, strict=True)
    )
    return rows, columns
