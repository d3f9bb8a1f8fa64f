"""What an operator writes, declared: a name, a shape, a dtype, and how it lies over the mesh.

A `Value` is the name of a tensor (lists are made of names) that also knows what it names. So whoever reads a list can
ask it what the run will show: bytes that are kept from forward to backward, how large the terms of a sum are, whether a
recomputation policy drops a tensor, which part of a single rank's tensor a rank should find. Nothing else says so: no
table of tensors stands beside the strategies that declare them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from megascale_moe.engine.names import grad


class Keep(IntEnum):
    """The strictest recomputation policy under which a value is still kept from forward to backward."""

    NONE = 0  # only where nothing is recomputed: a norm's result, an activation, what arrived in a message
    PAPER = 1  # also by the paper's policy, which recomputes no matrix product: inputs of products and of attention
    FULL = 2  # always: what a layer begins with, and everything outside of the layers


class Rows(NamedTuple):
    """Which rows of a single rank's tensor a rank has, in order.

    Attributes:
        kind: "slice": the rank's slice of every sequence. "sequences": whole sequences of its node. "gathered": the
            slices of several ranks of `axis`, one behind the other. "routed": routed rows in expert order out of the
            tokens of several ranks, "arrived": those that came from each rank, one behind the other, "own": those of
            the own tokens that work on the experts of several ranks.
        axis: the axis whose ranks are meant, and `places` which of them, by their index on it; empty: all.
    """

    kind: str = "slice"
    axis: str = ""
    places: tuple[int, ...] = ()


class Shard(NamedTuple):
    """Which part of a single rank's tensor a rank has, and what has to be summed to get it.

    Attributes:
        whole: names of the single rank's tensors, without layer; several are summed, or lie `side_by_side`. Empty: the
            value's own name.
        rows: of its first dimension. columns: index ranges of its second; None: all of them.
        partial: the axis over whose ranks values have to be summed to get the part; "" if it is there already.
        partial_gradient: the same of the gradient.
        copied_columns: whether ranks of the node may hold the same columns, each with what its own work adds to the
            gradient.
        forward_only: whether the gradient is not comparable: copies of columns lie in other pieces, too.
        routing: whether columns are a token's choices, whose order may differ where scores are equal.
    """

    whole: tuple[str, ...] = ()
    rows: Rows = Rows()
    columns: tuple[range, ...] | None = None
    partial: str = ""
    partial_gradient: str = ""
    side_by_side: bool = False
    copied_columns: bool = False
    forward_only: bool = False
    routing: bool = False


class Value(str):
    """A declared tensor; compares and hashes as its name.

    Attributes:
        shape: of this rank's tensor; rows that are routed count as with balanced routing.
        shard: which part of a single rank's tensor it is; None: nothing of a single rank compares with it.
        keep: until which policy it is kept.
        alias: the value in whose memory it lies, "" if it has its own.
    """

    __slots__ = ("alias", "dtype", "keep", "shape", "shard")

    shape: tuple[float, ...]
    dtype: torch.dtype
    shard: Shard | None
    keep: Keep
    alias: str

    def __new__(
        cls, name: str, shape: Sequence[float], dtype: torch.dtype, *,
        shard: Shard | None = None, keep: Keep = Keep.PAPER, alias: str = "",
    ) -> Value:  # fmt: skip
        self = str.__new__(cls, name)
        self.shape, self.dtype, self.shard, self.keep, self.alias = tuple(shape), dtype, shard, keep, alias
        return self

    @property
    def elements(self) -> float:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes of the tensor, also of one that lies in another's memory."""
        return self.elements * self.dtype.itemsize

    @property
    def rows(self) -> Rows:
        """The rows of a single rank's tensor that it has."""
        return self.shard.rows if self.shard else Rows()

    @property
    def gradient(self) -> Value:
        """The gradient: of the same shape and dtype, and partial where the value's readers each add their part."""
        return self.named(grad(self))

    def named(self, name: str) -> Value:
        """Return the same tensor under another name, with memory of its own."""
        return Value(name, self.shape, self.dtype, shard=self.shard, keep=self.keep)

    def called(self, name: str) -> Value:
        """Return the very same tensor under a second name, in the same memory."""
        return Value(name, self.shape, self.dtype, shard=self.shard, keep=self.keep, alias=self.alias or str(self))

    def lying(self, **changes: Any) -> Value:
        """Return the same tensor with other attributes of its `Shard`."""
        shard = (self.shard or Shard())._replace(**changes)
        return Value(str(self), self.shape, self.dtype, shard=shard, keep=self.keep, alias=self.alias)


def bytes_of(name: str) -> float:
    """Return the bytes of a value, 0 of a name that nobody declared."""
    return name.nbytes if isinstance(name, Value) else 0.0


def gradient_of(name: str) -> str:
    """Return the gradient of a value, declared if the value is."""
    return name.gradient if isinstance(name, Value) else grad(name)
