"""All-gather and reduce-scatter of tokens as operators.

Inside a tensor-parallel module every rank has all tokens of its node, between modules its own slice: an all-gather
goes in, a reduce-scatter of the partial results comes out (paper, section 3.1: 2bsh (n-1)/n). Each is the other's
backward. Cut by peer, both send to some ranks alone; sums are then taken by an operator of their own, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megascale_moe.comm.collectives import all_gather, reduce_scatter, sum_in_order
from megascale_moe.comm.traffic import as_rows, sum_to
from megascale_moe.engine.names import grad, parse
from megascale_moe.engine.op import FREE, Cost, Op, Phase
from megascale_moe.engine.value import Value
from megascale_moe.strategies.exchange import Exchange, communication, in_rank_order, tag
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.slices import Slices


def gather_tokens(
    layout: Layout, name: str, x: Value, y: Value, piece: Piece, dx: Value | None = None, slices: Slices | None = None
) -> Op:
    """Send x [tokens, width] to the piece's ranks; y [ranks * tokens, width] is theirs, ordered by `piece.sources`.

    Args:
        dx: where the piece is cut, what comes back of the gradient from each rank, [ranks * tokens, width].
        slices: where y is to be whole sequences, what the ranks of the node hold of them.
    """
    return _duals(layout, name, piece, slices, (x, y), (y.gradient, dx or x.gradient))


def scatter_sums(
    layout: Layout, name: str, x: Value, y: Value, piece: Piece, dy: str = "", slices: Slices | None = None
) -> Op:
    """Send partial sums x [ranks * tokens, width] to where the tokens belong; y [tokens, width] is their sum.

    Args:
        y: where the piece is cut, what came from each rank, not summed: [ranks * tokens, width].
        dy: the gradient of the sum, then.
        slices: where x is of whole sequences, what the ranks of the node hold of them.
    """
    slope = y.named(dy) if dy else y.gradient
    return _duals(layout, name, piece, slices, (slope, x.gradient), (x, y), home=True)


def _duals(
    layout: Layout, name: str, piece: Piece, slices: Slices | None, spread: tuple[Value, Value],
    collect: tuple[Value, Value], home: bool = False,
) -> Op:  # fmt: skip
    """Return an exchange that sends the same tokens to every rank of a piece, with its dual, which sends every rank its
    part and, unless the piece is cut, sums what comes.

    Args:
        spread, collect: what each reads and writes. home: whether the second is forward and the first backward.
    """
    count, axis = len(piece.distances), piece.axis
    shape = (int(collect[0].shape[0]) // count, int(collect[0].shape[1]))
    spread_tag, collect_tag = (tag(name, phase) for phase in ((Phase.B, Phase.F) if home else (Phase.F, Phase.B)))
    by_rank = slices.by_rank if slices else Tensor.contiguous

    def ordered(x: Tensor) -> Tensor:
        return slices.sequences(x) if slices else x

    out = Exchange(
        spread[:1], spread[1:], shape, pack=lambda x: [x.contiguous()] * count, shapes=lambda: [shape] * count,
        finish=lambda whole, parts: ordered(as_rows(whole, parts)),
        native=(lambda x: all_gather(x, axis, spread_tag).then(ordered)) if piece.uncut else None,
    )  # fmt: skip
    back = Exchange(
        collect[:1], collect[1:], shape, pack=lambda x: by_rank(x).chunk(count), shapes=lambda: [shape] * count,
        finish=sum_to(layout.dtype) if piece.uncut else as_rows, sums=piece.uncut,
        native=(lambda x: reduce_scatter(by_rank(x), axis, collect_tag)) if piece.uncut else None,
    )  # fmt: skip
    there, back = (back, out) if home else (out, back)
    return communication(layout, name, piece, there, back, home)


# --- pieces of tokens ------------------------------------------------------------------------------------------------


def fan_out(layer: Layer, x: Value, pieces: Sequence[Piece]) -> tuple[list[Op], list[tuple[Value, Value]]]:
    """Give x a name for each piece, so that the gradients that come back piece by piece are summed in rank order.

    Returns:
        The operator, none where nothing is cut, and for each piece the value and what its backward has to write.
    """
    if pieces[0].uncut:
        return [], [(x, x.gradient)]
    tensor = parse(x).tensor
    copies = [x.called(layer.name(tensor, piece)) for piece in pieces]
    slopes = [
        Value(grad(copy), (len(piece.peers) * x.shape[0], x.shape[1]), x.dtype)
        for piece, copy in zip(pieces, copies, strict=True)
    ]
    join, cost = _sum_by_rank(layer, pieces, x)
    backward = Op(layer.name(f"join_{tensor}"), tuple(slopes), (x.gradient,), join, phase=Phase.B, cost=cost)
    fan = Op(layer.name(f"fan_out_{tensor}"), (x,), tuple(copies), lambda x: (x,) * len(copies), backward=(backward,))
    return [fan], list(zip(copies, slopes, strict=True))


def sum_pieces(layer: Layer, name: str, parts: Sequence[Value], y: Value, pieces: Sequence[Piece]) -> Op:
    """Sum what came from the ranks of all pieces, in rank order; the own piece reads its gradient here."""
    run, cost = _sum_by_rank(layer, pieces, y)
    op = Op(name, tuple(parts), (y,), run, cost=cost)
    return op.input_gradient(parts[:1], (grad(y),), lambda d: d, cost=FREE)


def _sum_by_rank(layer: Layer, pieces: Sequence[Piece], total: Value) -> tuple[Callable[..., Tensor], Cost]:
    """Return how [tokens, width] from each rank, which lie in pieces, are summed, and what it costs.

    The sum is taken in rank order, so that it keeps its bits whatever the pieces.
    """
    ranks = [piece.peers for piece in pieces]

    def run(*pieces: Tensor) -> Tensor:
        first, *rest = in_rank_order(pieces, ranks, layer.layout.tokens)
        return sum_in_order([first.clone(), *rest])

    return run, Cost(memory_bytes=(sum(map(len, ranks)) + 1) * total.nbytes)
