"""Communications as operators: whatever exchanges matrices, and all-gather and reduce-scatter of tokens in particular.

Inside a tensor-parallel module every rank has all tokens of its node, between modules its own slice: an all-gather
goes in, a reduce-scatter of the partial results comes out (paper, section 3.1: 2bsh (n-1)/n). Each is the other's
backward. Cut by peer, both send to some ranks alone; sums are then taken by an operator of their own, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megascale_moe.comm.collectives import all_gather, reduce_scatter, sum_in_order, tag_of
from megascale_moe.comm.traffic import Traffic, as_rows, sum_to
from megascale_moe.engine.names import grad, parse
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.value import Rows, Shard, Value
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.slices import Slices


def communication(
    name: str, phase: Phase, reads: tuple[str, ...], writes: tuple[str, ...], traffic: Traffic, elements: float,
    layout: Layout, run: Callable[..., Any] | None = None,
) -> Op:  # fmt: skip
    """Return an operator that sends so many elements when routing is balanced.

    Args:
        run: the same by a collective of the backend.
    """
    axis = traffic.axis
    return Op(
        name=name, phase=phase, reads=reads, writes=writes, run=run or traffic.start, stream=layout.stream(axis),
        cost=Cost(wire_bytes=layout.bytes(elements), axis=axis.name), traffic=traffic,
    )  # fmt: skip


def tag(name: str, phase: Phase) -> int:
    """Return the tag of an operator's messages."""
    return tag_of(name if phase == Phase.F else f"{name} {phase}")


def with_backward(forward: Op, backward: Op) -> Op:
    """Return a communication with its dual."""
    return replace(forward, backward=(backward,))


# --- tokens ----------------------------------------------------------------------------------------------------------


def gather_tokens(
    layout: Layout, name: str, x: Value, y: Value, piece: Piece, dx: Value | None = None, slices: Slices | None = None
) -> Op:
    """x [tokens, width] to the piece's ranks; y [ranks * tokens, width]: theirs, in the order of `piece.sources`.

    Args:
        dx: where the piece is cut, what comes back of the gradient from each rank, [ranks * tokens, width].
        slices: where y is to be whole sequences, what the ranks of the node hold of them.
    """
    slope = dx or x.gradient
    return with_backward(
        _spread(layout, name, Phase.F, x, y, piece, slices),
        _collect(layout, name, Phase.B, y.gradient, slope, piece, slices),
    )


def scatter_sums(
    layout: Layout, name: str, x: Value, y: Value, piece: Piece, dy: str = "", slices: Slices | None = None
) -> Op:
    """Partial sums x [ranks * tokens, width] to where the tokens belong; y [tokens, width]: their sum over all ranks.

    Args:
        y: where the piece is cut, what came from each rank, not summed: [ranks * tokens, width].
        dy: the gradient of the sum, then.
        slices: where x is of whole sequences, what the ranks of the node hold of them.
    """
    slope = y.named(dy) if dy else y.gradient
    return with_backward(
        _collect(layout, name, Phase.F, x, y, piece, slices),
        _spread(layout, name, Phase.B, slope, x.gradient, piece, slices),
    )


def _spread(
    layout: Layout, name: str, phase: Phase, x: Value, y: Value, piece: Piece, slices: Slices | None
) -> Op:
    """The same tokens to every rank of a piece."""
    axis, width, count = piece.axis, y.shape[1], len(piece.distances)
    shape, number = (layout.tokens, int(width)), tag(name, phase)
    ordered = slices.sequences if slices else _as_is
    traffic = Traffic(
        axis=axis, tag=number, pack=lambda x: [x.contiguous()] * count, shapes=lambda: [shape] * count, typical=shape,
        finish=lambda whole, parts: ordered(as_rows(whole, parts)), dtype=layout.dtype,
        distances=piece.way(home=False),
    )  # fmt: skip
    native = (lambda x: all_gather(x, axis, number).then(ordered)) if piece.uncut else None
    return communication(name, phase, (x,), (y,), traffic, layout.tokens * width * piece.sent, layout, native)


def _collect(
    layout: Layout, name: str, phase: Phase, x: Value, y: Value, piece: Piece, slices: Slices | None
) -> Op:
    """To every rank of a piece its part; the sum of what comes, unless the piece is cut."""
    axis, width, count = piece.axis, x.shape[1], len(piece.distances)
    shape, number = (layout.tokens, int(width)), tag(name, phase)
    by_rank = slices.by_rank if slices else Tensor.contiguous
    traffic = Traffic(
        axis=axis, tag=number, pack=lambda x: by_rank(x).chunk(count), shapes=lambda: [shape] * count, typical=shape,
        finish=sum_to(layout.dtype) if piece.uncut else as_rows, dtype=layout.dtype, sums=piece.uncut,
        distances=piece.way(home=True),
    )  # fmt: skip
    native = (lambda x: reduce_scatter(by_rank(x), axis, number)) if piece.uncut else None
    return communication(name, phase, (x,), (y,), traffic, layout.tokens * width * piece.sent, layout, native)


def _as_is(x: Tensor) -> Tensor:
    return x


# --- pieces of tokens ------------------------------------------------------------------------------------------------


def gathered(layer: Layer, x: Value, piece: Piece) -> Value:
    """Declare the tokens x of a piece's ranks, one rank behind the other.

    Where pieces are cut, no other rank has the same tokens in the same piece, so gradients cannot be compared.
    """
    rows = Rows("gathered", piece.axis.name, piece.sources)
    shape = (len(piece.sources) * layer.layout.tokens, x.shape[1])
    tensor = parse(x).tensor
    shard = Shard((tensor,), rows, partial_gradient=piece.axis.name, forward_only=not piece.uncut)
    return layer.value(f"{tensor}_ag", shape, piece=piece, shard=shard, keep=x.keep)


def fan_out(layer: Layer, x: Value, pieces: Sequence[Piece]) -> tuple[list[Op], list[tuple[Value, Value]]]:
    """x under a name for each piece, so that the gradients that come back piece by piece are summed in rank order.

    Returns:
        The operator, none where nothing is cut, and for each piece the value and what its backward has to write.
    """
    if pieces[0].uncut:
        return [], [(x, x.gradient)]
    tensor = parse(x).tensor
    named = [x.called(layer.name(tensor, piece)) for piece in pieces]
    slopes = [
        Value(grad(value), (len(piece.peers) * x.shape[0], x.shape[1]), x.dtype)
        for piece, value in zip(pieces, named, strict=True)
    ]
    ranks, tokens = [rank for piece in pieces for rank in piece.peers], layer.layout.tokens
    backward = Op(
        name=layer.name(f"join_{tensor}"), phase=Phase.B, reads=tuple(slopes), writes=(x.gradient,),
        run=lambda *parts: sum_by_rank(parts, ranks, tokens),
        cost=Cost(memory_bytes=(len(ranks) + 1) * x.nbytes),
    )  # fmt: skip
    fan = Op(
        name=layer.name(f"fan_out_{tensor}"), reads=(x,), writes=tuple(named), run=lambda x: (x,) * len(named),
        backward=(backward,),
    )  # fmt: skip
    return [fan], list(zip(named, slopes, strict=True))


def sum_pieces(layer: Layer, name: str, parts: Sequence[Value], y: Value, pieces: Sequence[Piece]) -> Op:
    """y = sum of what came from the ranks of all pieces, in rank order; the own piece reads its gradient here."""
    ranks, tokens = [rank for piece in pieces for rank in piece.peers], layer.layout.tokens
    backward = Op(name=name, phase=Phase.B, reads=(grad(y),), writes=(parts[0].gradient,), run=lambda d: d)
    return Op(
        name=name, reads=tuple(parts), writes=(y,), run=lambda *parts: sum_by_rank(parts, ranks, tokens),
        cost=Cost(memory_bytes=(len(ranks) + 1) * y.nbytes), backward=(backward,),
    )  # fmt: skip


def sum_by_rank(parts: Sequence[Tensor], ranks: Sequence[int], tokens: int) -> Tensor:
    """Return the sum of [tokens, width] from each rank, which lie in `parts` in the order of `ranks`.

    It is taken in rank order, so that it keeps its bits whatever the pieces.
    """
    each = [part for stack in parts for part in stack.split(tokens)]
    first, *rest = [part for _, part in sorted(zip(ranks, each, strict=True), key=lambda pair: pair[0])]
    return sum_in_order([first.clone(), *rest])
