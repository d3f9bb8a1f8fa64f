"""Which rank sits where. Pure arithmetic: the planner lays out 12,288 ranks with it and opens no process group.

Ranks form a mesh pp x dp x cp x node, the last fastest: the ranks of a node are consecutive and share a fast link, and
a sequence lies on cp x node consecutive ranks. Attention and FFN each fold the same ranks their own way, so an axis is
a rule from a rank to its peers:

    node          sequence- or tensor-parallel attention, vocabulary-parallel embedding and head
    sequence      ranks that share the same sequences: cp x node consecutive ranks, all with the same place on dp
    cp            context parallelism between nodes: the same place in each node of `sequence`
    ffn           ranks that share one set of all experts: ep x etp consecutive ranks, one node or several
    etp           expert tensor parallelism: consecutive ranks of `ffn`, each with a slice of every expert's width
    ep            expert parallelism: the same place in each etp group of `ffn`
    expert_data   ranks of a stage that hold the same part of the same experts
    tensor_data   the same place in every node of a stage: they hold the same tensor-parallel parts
    data          all ranks of a stage: they hold the same replicated parameters
    tied          as tensor_data, over the first and the last stage: they share a tied embedding
    pp            the same place in every stage
"""

from __future__ import annotations

from dataclasses import dataclass

AXES = ("node", "sequence", "cp", "ffn", "etp", "ep", "expert_data", "tensor_data", "data", "tied", "pp", "world")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; see the module's text for their meaning."""

    pp: int = 1
    dp: int = 1
    node: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.stage

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.sequence

    @property
    def sequence(self) -> int:
        """Ranks that share the same sequences."""
        return self.cp * self.node

    @property
    def ffn(self) -> int:
        """Ranks that share one set of all experts."""
        return self.ep * self.etp

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that share `axis` with `rank`, ascending.

        Raises:
            KeyError: no such axis.
        """
        return tuple(member for part in self.parts(axis, rank) for member in part)

    def place(self, axis: str, rank: int) -> tuple[int, int]:
        """(ranks on the axis, where among them `rank` is), without listing them: an axis may have ten thousand."""
        parts = self.parts(axis, rank)
        before = 0
        for part in parts:
            if rank in part:
                return sum(map(len, parts)), before + part.index(rank)
            before += len(part)
        raise AssertionError(f"rank {rank} is not on its own axis {axis}")

    def parts(self, axis: str, rank: int) -> list[range]:
        """The ranks of an axis as ranges, ascending."""
        first = rank // self.stage * self.stage  # of the rank's stage
        place = rank - first
        node, ffn, etp, sequence = (place // size * size for size in (self.node, self.ffn, self.etp, self.sequence))
        last = self.world - self.stage
        tied = sorted({0, last}) if first in (0, last) else []  # stages between have no embedding
        same_place = [range(start + place % self.node, start + self.stage, self.node) for start in (first, *tied)]
        return {
            "node": [range(first + node, first + node + self.node)],
            "sequence": [range(first + sequence, first + sequence + self.sequence)],
            "cp": [range(first + sequence + place % self.node, first + sequence + self.sequence, self.node)],
            "ffn": [range(first + ffn, first + ffn + self.ffn)],
            "etp": [range(first + etp, first + etp + self.etp)],
            "ep": [range(first + ffn + place % self.etp, first + ffn + self.ffn, self.etp)],
            "expert_data": [range(first + place % self.ffn, first + self.stage, self.ffn)],
            "tensor_data": same_place[:1],
            "data": [range(first, first + self.stage)],
            "tied": same_place[1:] or [range(rank, rank + 1)],
            "pp": [range(place, self.world, self.stage)],
            "world": [range(self.world)],
        }[axis]

    def stage_of(self, rank: int) -> int:
        """The pipeline rank of a rank."""
        return rank // self.stage

    def replica(self, rank: int) -> int:
        """The place of a rank on dp: which of the rows of a batch are its own."""
        return rank % self.stage // self.sequence

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of an axis; together they hold every rank once."""
        found, seen = [], set[int]()
        for rank in range(self.world):
            if rank not in seen:
                found.append(self.ranks(axis, rank))
                seen.update(found[-1])
        return found
