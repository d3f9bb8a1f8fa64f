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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes, Axis
from megascale_moe.comm.collectives import Pending, exchange, tag_of
from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.optim.division import HOPS, Division, Load, Place, divide
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.rule import MatrixRule
from megascale_moe.optim.sync import Job
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


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the group: the local part, and where it starts in the flat buffer."""

    part: MatrixPart
    start: int

    @property
    def stop(self) -> int:
        """One past its last element in the flat buffer."""
        return self.start + self.part.stop - self.part.start

    def box(self, index: int) -> tuple[slice, slice]:
        """Where the part of the `index`-th rank of the cut lies in the matrix."""
        sides = zip(self.part.shape, self.part.size, strict=True)
        starts = [index * size if size < whole else 0 for whole, size in sides]
        rows, columns = (slice(start, start + size) for start, size in zip(starts, self.part.size, strict=True))
        return rows, columns


class WholeMatrices:
    """The matrices of a group of weights as this rank sees them.

    Args:
        axes: those of the rank. loads: work of the groups before, to which that of this group is added.
    """

    def __init__(self, group: FlatWeights, rule: MatrixRule, axes: Axes, config: TrainConfig, loads: Loads) -> None:
        self.group, self.rule, self.config = group, rule, config
        cuts = {slot.placement.cut for slot in group.slots}
        assert len(cuts) == 1, f"matrices of {group.name} are cut over several axes: {sorted(cuts)}"
        cut = cuts.pop()
        self.axes = (group.inter, group.intra, axes[cut] if cut else Axis(cut))
        inside = self.axes[2].size <= axes["node"].size
        self.streams = (Stream.INTER, Stream.INTRA, Stream.INTRA if inside else Stream.INTER)
        self.place: Place = (self.axes[0].index, self.axes[1].index, self.axes[2].index)
        self.matrices = [
            _Matrix(part, slot.start + part.start) for slot in group.slots for part in slot.placement.matrix_parts
        ]
        for matrix in self.matrices:
            assert tuple(side.start for side in matrix.box(self.place[2])) == matrix.part.offset
        self.costs = [rule.transform_cost(*matrix.part.shape) for matrix in self.matrices]
        sizes = (self.axes[0].size, self.axes[1].size, self.axes[2].size)
        key = tuple(axis.name for axis in self.axes)
        extents = tuple((m.start, m.stop, cost.flops) for m, cost in zip(self.matrices, self.costs, strict=True))
        self.division: Division = divide(extents, group.master.numel(), sizes, loads.get(key, Load.none(sizes)))
        loads[key] = self.division.load
        self.dtype = rule.dtype(group.master.device, config)

    # --- the list ----------------------------------------------------------------------------------------------------

    def name(self, what: str) -> str:
        """Return the name of a value that belongs to the group's update."""
        return f"{self.group.name}.{what}"

    def job(self, prepare: Op, finish: Callable[[str], Op]) -> Job:
        """Return the hops of an update, which begins and ends element by element.

        Args:
            prepare: writes `name("direction")`, float32 [S].
            finish: makes the last operator; its argument is the name of what `settled` takes beside the direction.
        """
        hops = [hop for hop in range(HOPS) if self.division.most(hop)]
        job: Job = [[prepare]]
        held = self.name("direction")
        for hop in hops:
            job[-1].append(self._exchange_op(hop, held, back=False))
            held = job[-1][-1].writes[0]
            job.append([])
        job[-1].append(self._transform_op(held))
        held = job[-1][-1].writes[0]
        for hop in reversed(hops):
            job[-1].append(self._exchange_op(hop, held, back=True))
            held = job[-1][-1].writes[0]
            job.append([])
        job[-1].append(finish(held))
        return job

    def settled(self, direction: Tensor, returned: Sequence[Tensor]) -> Tensor:
        """Return [S] with the transformed matrices in it, in the place of `direction`."""
        for number, values in zip(self.division.held(self.place, 0), returned, strict=True):
            if self.division.owners[self.division.fragments[number].matrix] != self.place:
                self._mine(direction, number).copy_(values)
        return direction

    def _exchange_op(self, hop: int, reads: str, *, back: bool) -> Op:
        axis, word = self.axes[hop], "return" if back else "collect"
        name = f"update.{self.group.name}.{WORDS[hop]}_{word}"
        tag, sent = tag_of(name), self.division.most(hop, back=back) * self.dtype.itemsize
        before, after = (hop + 1, hop) if back else (hop, hop + 1)

        def run(held: Tensor | Sequence[Tensor]) -> Pending:
            values = self._fragments(held) if isinstance(held, Tensor) else held
            return self._exchange(values, axis, tag, before, after)

        return Op(
            name=name, reads=(reads,), writes=(self.name(f"{WORDS[hop]}_{word}ed"),), run=run, phase=Phase.W,
            stream=self.streams[hop], cost=Cost(wire_bytes=sent, axis=axis.name),
        )  # fmt: skip

    def _transform_op(self, reads: str) -> Op:
        direct = reads == self.name("direction")

        def run(direction: Tensor, collected: Sequence[Tensor] | None) -> list[Tensor]:
            held = self._fragments(direction) if collected is None else list(collected)
            self._transform(held)
            return held

        return Op(
            name=f"update.{self.group.name}.transform", reads=(self.name("direction"), "" if direct else reads),
            writes=(self.name("transformed"),), run=run, phase=Phase.W, cost=self._cost(),
        )  # fmt: skip

    def _cost(self) -> Cost:
        """Of the rank that has most; sizes as those of the group's matrices, weighted by their FLOPs."""
        costs = [cost for cost in self.costs if cost.flops]
        flops = sum(cost.flops for cost in costs)
        if not flops:
            return Cost()
        share = self.division.work / flops
        memory = share * sum(cost.memory_bytes for cost in costs)
        size = flops / sum(cost.flops / cost.size for cost in costs) if all(cost.size for cost in costs) else 0.0
        return Cost(self.division.work, memory, work=costs[0].work, size=size)

    # --- fragments ---------------------------------------------------------------------------------------------------

    def _mine(self, direction: Tensor, number: int) -> Tensor:
        """A fragment of this rank in its shard."""
        fragment, first = self.division.fragments[number], self.group.shard.start
        return direction[fragment.start - first : fragment.stop - first]

    def _fragments(self, direction: Tensor) -> list[Tensor]:
        return [self._mine(direction, number) for number in self.division.held(self.place, 0)]

    def _exchange(self, held: Sequence[Tensor], axis: Axis, tag: int, before: int, after: int) -> Pending:
        """From what this rank has at one end of a hop to what it has at the other, both in the order of numbers."""
        d, device = self.division, self.group.master.device
        values = dict(zip(d.held(self.place, before), held, strict=True))
        wanted = d.held(self.place, after)
        leaving: list[list[Tensor]] = [[] for _ in range(axis.size)]
        coming: list[list[int]] = [[] for _ in range(axis.size)]
        along = min(before, after)
        for number, value in values.items():
            peer = d.place(d.fragments[number], after)[along]
            if peer != axis.index:
                leaving[peer].append(value.to(self.dtype))
        for number in wanted:
            peer = d.place(d.fragments[number], before)[along]
            if peer != axis.index:
                coming[peer].append(number)
        nothing = torch.empty(0, dtype=self.dtype, device=device)
        send = [torch.cat(parts) if parts else nothing for parts in leaving]
        sizes = [[d.fragments[number].size for number in numbers] for numbers in coming]
        receive = [torch.empty(sum(size), dtype=self.dtype, device=device) for size in sizes]

        def finish(_: Any) -> list[Tensor]:
            for numbers, size, message in zip(coming, sizes, receive, strict=True):
                values.update(zip(numbers, message.split(size), strict=True))
            return [values[number] for number in wanted]

        return exchange(send, receive, axis, tag).then(finish)

    def _transform(self, held: list[Tensor]) -> None:
        """Replace the fragments of this rank's matrices by those of what becomes of them; its own in place."""
        for shape, indices in self._batches:
            stack = torch.empty(len(indices), *shape, dtype=self.dtype, device=self.group.master.device)
            for index, matrix in zip(indices, stack, strict=True):
                self._put_together(index, held, matrix)
            for index, matrix in zip(indices, self.rule.transform(stack, self.config), strict=True):
                self._take_apart(index, matrix, held)

    @cached_property
    def _owned(self) -> dict[int, dict[int, list[tuple[int, int]]]]:
        """Of each of this rank's matrices, by part of the cut: the fragments as (place among those held, number)."""
        found: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for place, number in enumerate(self.division.held(self.place, HOPS)):
            fragment = self.division.fragments[number]
            found.setdefault(fragment.matrix, {}).setdefault(fragment.holder[2], []).append((place, number))
        return found

    @cached_property
    def _batches(self) -> list[tuple[tuple[int, int], list[int]]]:
        """This rank's matrices by shape, as many at once as `TOGETHER` allows."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index in self._owned:
            by_shape.setdefault(self.matrices[index].part.shape, []).append(index)
        found, together = [], TOGETHER_ON_CPU if self.group.master.is_cpu else TOGETHER
        for (rows, columns), indices in by_shape.items():
            most = max(together // (rows * columns), 1)
            found += [
                ((rows, columns), indices[first : first + most]) for first in range(0, len(indices), most)
            ]
        return found

    def _put_together(self, index: int, held: Sequence[Tensor], out: Tensor) -> None:
        """Fill a matrix [rows, columns] from all its fragments, which follow each other in each part."""
        matrix = self.matrices[index]
        for cut, fragments in self._owned[index].items():
            values = [held[place].to(self.dtype) for place, _ in fragments]
            part = values[0] if len(values) == 1 else torch.cat(values)
            out[matrix.box(cut)].copy_(part.view(matrix.part.size))

    def _take_apart(self, index: int, whole: Tensor, held: list[Tensor]) -> None:
        matrix = self.matrices[index]
        for cut, fragments in self._owned[index].items():
            part = whole[matrix.box(cut)].reshape(-1)
            for place, number in fragments:
                fragment = self.division.fragments[number]
                values = part[fragment.start - matrix.start : fragment.stop - matrix.start]
                if fragment.holder == self.place:
                    held[place].copy_(values)
                else:
                    held[place] = values
