"""What every operator of a layer is built from: the model, the rank's layout, how names begin, and how things are cut.

A `Layer` makes the names and declares the values of one layer. A `Piece` is the part of a communication, and of the
computation next to it, that concerns some peers; uncut, one piece concerns all of them, so a strategy is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megascale_moe.comm.axis import Axis
from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.engine.names import in_layer
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import stacked_shares
from megascale_moe.strategies.slices import Slices
from megascale_moe.strategies.strategy import Strategies


@dataclass(frozen=True)
class Piece:
    """The peers of a piece, by their distance on an axis: a rank sends to those `distances` on, and receives from those
    as far back, so that no two ranks send to one at a time.

    Attributes:
        axis: whose ranks are meant. number: of the piece; None where nothing is cut.
    """

    axis: Axis
    distances: tuple[int, ...]
    number: int | None = None

    @property
    def uncut(self) -> bool:
        """Return whether it is all ranks of the axis, in rank order, this rank among them."""
        return self.number is None

    @property
    def own(self) -> bool:
        """Return whether it is this rank alone, so that nothing has to be sent."""
        return self.distances == (0,)

    @property
    def peers(self) -> tuple[int, ...]:
        """Indices on the axis of the ranks that this rank sends to, in the order of messages."""
        return self._at(1)

    @property
    def sources(self) -> tuple[int, ...]:
        """Indices on the axis of the ranks that send to this rank, in the order of messages."""
        return self._at(-1)

    def _at(self, sign: int) -> tuple[int, ...]:
        if self.uncut:
            return self.distances
        return tuple((self.axis.index + sign * distance) % self.axis.size for distance in self.distances)

    @property
    def share(self) -> float:
        """Share of the axis' ranks that belongs to it."""
        return len(self.distances) / self.axis.size

    @property
    def sent(self) -> int:
        """Number of other ranks that something is sent to."""
        return len(self.distances) - (0 in self.distances)

    def way(self, *, home: bool) -> tuple[int, ...]:
        """Return the distances of its messages, there or home; empty for an exchange with all ranks."""
        if self.uncut:
            return ()
        return tuple(self.axis.size - distance if home else distance for distance in self.distances)


def pieces_of(axis: Axis, count: int) -> list[Piece]:
    """Return the pieces of an axis, in at most `count`: one with everything, or the own rank and groups of the others.

    Small groups come first: what is sent first is needed first, and the sooner it is there the better.
    """
    others = axis.size - 1
    if count <= 1 or not others:
        return [Piece(axis, tuple(range(axis.size)))]
    groups = min(count - 1, others)
    least, more = divmod(others, groups)
    found, start = [Piece(axis, (0,), 0)], 1
    for number in range(groups):
        size = least + (number >= groups - more)
        found.append(Piece(axis, tuple(range(start, start + size)), number + 1))
        start += size
    return found


@dataclass(frozen=True)
class Layer:
    """A layer of the model on a rank.

    Attributes:
        strategies: how its modules are shared out.
        spec: what it computes.
        index: among the model's layers; None: a layer on its own, whose names have no prefix.
    """

    model: ModelConfig
    layout: Layout
    strategies: Strategies
    spec: LayerSpec
    index: int | None = None

    @property
    def shares_width(self) -> bool:
        """Return whether dense and shared FFNs have their width over several ranks."""
        return self.strategies.ffn.shares_width and self.layout.etp.size > 1

    def name(self, tensor: str, piece: Piece | None = None) -> str:
        """Return the full name of a tensor, a weight or an operator of this layer."""
        return in_layer(self.index, tensor, None if piece is None else piece.number)

    def value(
        self, tensor: str, shape: Sequence[float], shard: Shard | None = None, keep: Keep = Keep.PAPER, *,
        piece: Piece | None = None, dtype: torch.dtype | None = None, alias: str = "",
    ) -> Value:  # fmt: skip
        """Declare a value of this layer, in the compute dtype unless another is given."""
        name, dtype = self.name(tensor, piece), dtype or self.layout.dtype
        return Value(name, shape, dtype, shard=shard, keep=keep, alias=str(alias))

    def tokens(self, tensor: str, width: int, keep: Keep = Keep.PAPER, *, whole: str = "") -> Value:
        """Declare a value of the tokens that this rank holds between modules, [tokens, width]."""
        return self.value(tensor, (self.layout.tokens, width), Shard((whole,) if whole else ()), keep)

    def own(self, tensor: str, nbytes: float, piece: Piece | None = None) -> Value:
        """Declare something that only means anything on this rank, such as row maps, of so many bytes."""
        return self.value(tensor, (nbytes,), piece=piece, dtype=torch.uint8)

    @property
    def node_tokens(self) -> int:
        """Tokens of all ranks of the node together: its share of the sequences."""
        return self.layout.tokens * self.layout.node.size

    @property
    def whole_tokens(self) -> int:
        """Tokens of all ranks that share a sequence together: whole sequences."""
        return self.layout.rows * self.layout.length

    @property
    def slices(self) -> Slices:
        """The tokens of every sequence that each of its ranks holds."""
        return self.strategies.attention.slices(self.layout)


SEQUENCES = Rows("sequences", "node")
"""What the ranks of a node have of the sequences together, in their order: all, unless several nodes share them."""

WHOLE_SEQUENCES = Rows("sequences", "sequence")
"""What all ranks that share the sequences have of them."""


def columns(size: int, axis: Axis, parts: int = 1) -> tuple[range, ...] | None:
    """Return a rank's equal share of each of `parts` equal parts of a dimension; None where it has all of it."""
    return tuple(stacked_shares([size // parts] * parts, axis.size, axis.index)) if axis.size > 1 else None
