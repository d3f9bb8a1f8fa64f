"""What a strategy needs to know of where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megascale_moe.comm.axis import Axes, Axis, single
from megascale_moe.config import ParallelConfig
from megascale_moe.engine.op import Stream


@dataclass(frozen=True)
class Layout:
    """A micro-batch of `rows` x `length` tokens on this rank's axes, and the strategy of each module.

    Between operators of a layer the tokens are sharded by sequence: this rank holds its slice of every row
    (`slices.Slices`), flattened to [tokens, ...].

    Attributes:
        attention, ffn, vocabulary, dispatch: names of strategies (`registry.py`); dispatch "auto": the cheapest form.
        pieces: into how many a communication and the computation next to it are cut, by peers; 1: not cut.
        gates_last: whether gating weights are applied behind FC2 rather than before it.
    """

    rows: int
    length: int
    axes: Axes
    dtype: torch.dtype = torch.float32
    dispatch: str = "auto"
    attention: str = "sp"
    ffn: str = "ep"
    vocabulary: str = "replicated"
    pieces: int = 1
    gates_last: bool = False

    @classmethod
    def alone(cls, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Layout:
        """One rank, no communication."""
        return cls(rows, length, single(), dtype)

    @classmethod
    def of(
        cls, parallel: ParallelConfig, rows: int, length: int, axes: Axes, dtype: torch.dtype, pieces: int = 1
    ) -> Layout:
        """Return the layout that a config names."""
        p = parallel
        return cls(rows, length, axes, dtype, p.dispatch, p.attention, p.ffn, p.vocabulary, pieces)

    @property
    def node(self) -> Axis:
        """The ranks of a node, which share a node's part of the sequences (or, tensor-parallel, heads)."""
        return self.axes["node"]

    @property
    def cp(self) -> Axis:
        """The ranks with the same place in the nodes that share a sequence."""
        return self.axes["cp"]

    @property
    def sequence(self) -> Axis:
        """The ranks of all nodes that share a sequence, cp x node."""
        return self.axes["sequence"]

    @property
    def ep(self) -> Axis:
        """The expert-parallel ranks."""
        return self.axes["ep"]

    @property
    def etp(self) -> Axis:
        """The ranks that share every expert's width."""
        return self.axes["etp"]

    @property
    def group(self) -> Axis:
        """The ranks that share one set of experts, ep x etp."""
        return self.axes["ffn"]

    @property
    def tokens(self) -> int:
        """Tokens this rank holds between operators."""
        return self.rows * self.length // self.sequence.size

    def stream(self, axis: Axis) -> Stream:
        """The link that messages along an axis take."""
        spans = {"node": 1, "etp": axis.size, "cp": self.sequence.size, "sequence": self.sequence.size}
        span = spans.get(axis.name, self.group.size)  # consecutive ranks that it reaches over
        return Stream.INTRA if span <= self.node.size else Stream.INTER

    def bytes(self, *elements: float) -> float:
        """Bytes of so many elements in the compute dtype."""
        return sum(elements) * self.dtype.itemsize
