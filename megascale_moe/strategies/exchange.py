"""Communications as operators: any exchange of matrices with the peers of a piece, and lists that are cut by peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.collectives import tag_of
from megascale_moe.comm.traffic import Matrices, Shape, Traffic
from megascale_moe.engine.op import Cost, Op, Phase, hang_backward
from megascale_moe.strategies.layer import Piece
from megascale_moe.strategies.layout import Layout


class Exchange(NamedTuple):
    """One direction of a communication with the peers of a piece.

    Attributes:
        reads, writes: of its operator. typical, pack, shapes, finish, plan, sums: see `Traffic`.
        elements: sent when routing is balanced; None: a typical matrix to each other rank.
        native: the same by a collective of the backend.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    typical: tuple[float, float]
    pack: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., Sequence[Shape]]
    finish: Callable[[Tensor, Matrices], Any]
    plan: tuple[int, ...] = ()
    sums: bool = False
    elements: float | None = None
    native: Callable[..., Any] | None = None


def communication(layout: Layout, name: str, piece: Piece, there: Exchange, back: Exchange, home: bool = False) -> Op:
    """Return a communication with its dual as backward.

    Args:
        home: whether it takes the way back from the ranks that the piece sends to, and the dual the way there.
    """
    axis, dtype = piece.axis, layout.dtype
    ops: tuple[Op, ...] = ()
    for phase, way, homeward in ((Phase.B, back, not home), (Phase.F, there, home)):
        traffic = Traffic(
            axis=axis, tag=tag(name, phase), pack=way.pack, shapes=way.shapes, finish=way.finish, typical=way.typical,
            dtype=dtype, plan=way.plan, sums=way.sums, distances=piece.way(home=homeward),
        )  # fmt: skip
        elements = math.prod(way.typical) * piece.sent if way.elements is None else way.elements
        cost = Cost(wire_bytes=elements * dtype.itemsize, axis=axis.name)
        ops = (Op(
            name, way.reads, way.writes, way.native or traffic.start, phase=phase, stream=layout.stream(axis),
            cost=cost, backward=ops, traffic=traffic,
        ),)  # fmt: skip
    return ops[0]


def tag(name: str, phase: Phase) -> int:
    """Return the tag of an operator's messages."""
    return tag_of(name if phase == Phase.F else f"{name} {phase}")


def cut_by_peer(
    first: Sequence[Op], own: Sequence[Op], chains: Sequence[tuple[Op, Sequence[Op], Op]], last: Sequence[Op]
) -> list[Op]:
    """Return the list of work that is cut by peer (paper, section 4.2, from the host).

    What comes from one peer is worked on while what comes from the next travels, and goes back while the next is worked
    on. The own tokens, which need no message, come first. Backward is the mirror image. Uncut, all is one chain.

    Args:
        own: the work on the own tokens. chains: how the tokens of the other pieces come, the work on them, and how its
            results go. first, last: what stands before and behind all of it.
    """
    ops, back = [*first, *(come for come, _, _ in chains), *own], [*reversed(last), *(go for _, _, go in chains)]
    back += reversed(own)
    for come, work, go in chains:
        ops += [*work, go]
        back += [*reversed(work), come]
    return hang_backward([*ops, *last], [*back, *reversed(first)])


Ranks = Sequence[Sequence[int]]
"""The ranks of each piece, in the order in which their rows lie in it."""


def in_rank_order(pieces: Sequence[Tensor], ranks: Ranks, rows: int | Sequence[int]) -> list[Tensor]:
    """Return the rows of each rank, in rank order, out of those of some pieces.

    Args:
        rows: of each rank, in the order of the pieces; one number where all have equally many.
    """
    order = [rank for piece in ranks for rank in piece]
    if isinstance(rows, int):
        each = [part for piece in pieces for part in piece.split(rows)]
    else:
        each = list(torch.cat(list(pieces)).split(list(rows)))
    return [part for _, part in sorted(zip(order, each, strict=True), key=lambda pair: pair[0])]


def in_pieces(slices: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, ...]:
    """Return the rows of the ranks of each piece, out of those of every rank in rank order."""
    return tuple(
        slices[piece[0]] if len(piece) == 1 else torch.cat([slices[rank] for rank in piece]) for piece in ranks
    )
