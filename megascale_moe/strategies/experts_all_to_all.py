"""Experts by all-to-all (paper, section 3.2): each token's hidden state goes to the ranks of its k experts and comes
back: 2k/n bsh (n-1)/n elements. Where etp ranks share an expert's width they pass on to each other what they received.

Cut by source rank, what comes from one peer is worked on while what comes from the next travels. Pieces share nothing
but the gradients they add to, so their results are those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.traffic import as_rows, sum_to
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.rows import RowMap, sum_rows, take_rows
from megascale_moe.strategies.exchange import Exchange, communication, cut_by_peer, in_pieces, in_rank_order
from megascale_moe.strategies.grouped import expert_input, expert_ops, moved, scatter
from megascale_moe.strategies.layer import Layer, Piece, pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.row_maps import PieceRows, Routing
from megascale_moe.strategies.strategy import DispatchForm


class AllToAll(DispatchForm):
    """Each routed row to the ranks of its expert and back."""

    name = "all_to_all"
    title = "dispatch by all-to-all"
    travels = True

    def axis(self, layout: Layout) -> Axis:
        return layout.ep

    def rows(self, top_k: int, ep: int, etp: int, relative_cost: float) -> float:
        return top_k * ((ep - 1) / ep * relative_cost + etp - 1)  # to experts' ranks, then on to those that share them

    def ops(self, layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], Value]:
        c, layout, pieces = layer.model, layer.layout, routing.pieces
        assert routing.own is not None
        shape, shard = (layout.tokens * c.top_k, c.hidden), Shard(("ffn_in",), Rows("own", "ffn"))
        leaving = layer.value("dispatch_in", shape, shard, Keep.NONE)
        first = [scatter(layer.name("scatter"), routing.own, x, leaving, lambda own: own)]
        parts = [leaving]
        if not pieces[0].uncut:
            parts = [_own_rows(layer, "dispatch_in", "ffn_in", piece) for piece in pieces]
            first.append(_deal(layer, leaving, parts, routing))
        own: list[Op] = []
        chains, results = [], []
        for piece, rows, part in zip(pieces, routing.rows, parts, strict=True):
            if piece.own:
                own, result = _work(layer, routing, piece, rows, part)
            else:
                arrived = _arrived(layer, piece)
                work, leaving = _work(layer, routing, piece, rows, arrived)
                result = _own_rows(layer, "combine_out", "fc2_out", piece)
                come = _travel(layer, "dispatch_all_to_all", piece, rows, part, arrived)
                chains.append((come, work, _travel(layer, "combine_all_to_all", piece, rows, leaving, result)))
            results.append(result)
        y = layer.tokens("ffn_out", c.hidden, Keep.NONE)
        return cut_by_peer(first, own, chains, [_sum_up(layer, results, y, routing)]), y


ALL_TO_ALL = AllToAll()


# --- the own tokens --------------------------------------------------------------------------------------------------


def _own_rows(layer: Layer, tensor: str, whole: str, piece: Piece) -> Value:
    """Declare the rows of the own tokens that a piece's peers work on, peer by peer, in expert order."""
    etp = layer.layout.etp.size
    return _declare(layer, tensor, whole, piece, Rows("own", "ffn", tuple(peer * etp for peer in piece.peers)))


def _declare(layer: Layer, tensor: str, whole: str, piece: Piece, rows: Rows, copies: int = 1) -> Value:
    """Declare so many times the rows that each rank sends or receives of a piece."""
    shape = (piece.share * layer.layout.tokens * layer.model.top_k * copies, layer.model.hidden)
    return layer.value(tensor, shape, Shard((whole,), rows), Keep.NONE, piece=piece)


def _deal(layer: Layer, x: Value, parts: Sequence[Value], routing: Routing) -> Op:
    """Divide the own rows into the pieces whose peers work on them."""
    rows, count = tuple(routing.rows), len(parts)
    op = Op(
        layer.name("deal_rows"), (x, *rows), tuple(parts), lambda x, *maps: _dealt(x, routing.pieces, maps),
        cost=Cost(memory_bytes=2 * x.nbytes),
    )  # fmt: skip
    reads = (*map(grad, parts), *rows)
    return op.input_gradient((x,), reads, lambda *args: _joined(args[:count], routing.pieces, args[count:]))


def _sum_up(layer: Layer, parts: Sequence[Value], y: Value, routing: Routing) -> Op:
    """Sum each own token's rows, from all pieces; the gradient is divided among them."""
    assert routing.own is not None
    pieces, count = routing.pieces, len(parts)
    uncut = pieces[0].uncut

    def run(*args: Any) -> Tensor:
        rows, own, maps = args[:count], args[count], args[count + 1 :]
        return sum_rows(rows[0] if uncut else _joined(rows, pieces, maps), own)

    def run_backward(d: Tensor, own: RowMap, *maps: PieceRows) -> Tensor | tuple[Tensor, ...]:
        rows = take_rows(d, own.source)
        return rows if uncut else _dealt(rows, pieces, maps)

    maps = (routing.own, *(() if uncut else routing.rows))
    cost = Cost(memory_bytes=2 * sum(part.nbytes for part in parts))
    return Op(layer.name("gather"), (*parts, *maps), (y,), run, cost=cost).input_gradient(
        parts, (grad(y), *maps), run_backward
    )


def _dealt(x: Tensor, pieces: Sequence[Piece], maps: Sequence[PieceRows]) -> tuple[Tensor, ...]:
    """Return the rows of each piece, out of rows in the order of ranks."""
    ranks, sizes = [piece.peers for piece in pieces], [size for rows in maps for size in rows.sent]
    by_rank = sorted(zip((peer for peers in ranks for peer in peers), sizes, strict=True))
    return in_pieces(x.split([size for _, size in by_rank]), ranks)


def _joined(parts: Sequence[Tensor], pieces: Sequence[Piece], maps: Sequence[PieceRows]) -> Tensor:
    """Return the rows of all pieces in the order of ranks."""
    sizes = [size for rows in maps for size in rows.sent]
    return torch.cat(in_rank_order(parts, [piece.peers for piece in pieces], sizes))


# --- messages --------------------------------------------------------------------------------------------------------


def _arrived(layer: Layer, piece: Piece) -> Value:
    """Declare the rows that come from a piece's sources, one source behind the other; from one, in expert order."""
    if _in_expert_order(layer, piece):
        return expert_input(layer, piece)
    etp = layer.layout.etp
    ranks = tuple(source * etp.size + etp.index for source in piece.sources)
    return _declare(layer, "dispatch_out", "ffn_in", piece, Rows("arrived", "ffn", ranks))


def _in_expert_order(layer: Layer, piece: Piece) -> bool:
    """Return whether rows arrive in the order in which the experts work on them."""
    return len(piece.sources) == 1 and layer.layout.etp.size == 1


def _travel(layer: Layer, word: str, piece: Piece, rows: Value, x: Value, y: Value, *, shared: bool = False) -> Op:
    """Send routed rows x, y where they arrive: from tokens to experts ("dispatch ..."), or home.

    Args:
        shared: whether they go on, from the rank that received them to all that share its experts; each makes a part of
            the result of them, which are summed on the way home.
    """
    layout, h = layer.layout, layer.model.hidden
    each, over = layout.tokens * layer.model.top_k / layout.ep.size, piece
    if shared:
        each, (over,) = piece.share * layout.tokens * layer.model.top_k, pieces_of(layout.etp, 1)
    axis = over.axis

    def one_way(x: str, y: str, home: bool) -> Exchange:
        def sizes(rows: PieceRows) -> tuple[Sequence[int], Sequence[int]]:
            there, back = ([rows.share[axis.index]] * axis.size, rows.share) if shared else (rows.sent, rows.received)
            return (back, there) if home else (there, back)

        def pack(x: Tensor, rows: PieceRows) -> Sequence[Tensor]:
            return [x.contiguous()] * axis.size if shared and not home else x.contiguous().split(list(sizes(rows)[0]))

        sums = shared and home
        return Exchange(
            (x, rows), (y,), (each, h), pack, shapes=lambda rows: [(count, h) for count in sizes(rows)[1]],
            finish=sum_to(layout.dtype) if sums else as_rows, plan=(1,), sums=sums,
        )  # fmt: skip

    home = not word.startswith("dispatch")
    there, back = one_way(x, y, home), one_way(y.gradient, x.gradient, not home)
    return communication(layout, layer.name(word, piece), over, there, back, home)


# --- the experts' side -----------------------------------------------------------------------------------------------


def _work(layer: Layer, routing: Routing, piece: Piece, rows: Value, arrived: Value) -> tuple[list[Op], Value]:
    """Return the operators of the experts on the rows that arrived, and their results in the order of arrival."""
    if _in_expert_order(layer, piece):
        return expert_ops(layer, arrived, rows, routing.gate, piece)
    shares = layer.layout.etp.size > 1
    home = _declare(layer, "combine_in", "fc2_out", piece, arrived.rows)
    everything, leaving = arrived, home
    ops: list[Op] = []
    if shares:
        everything = _of_all(layer, "dispatch_all", "ffn_in", piece).lying(partial_gradient="etp")
        leaving = _of_all(layer, "combine_all", "fc2_out", piece).lying(partial="etp")
        ops.append(_travel(layer, "dispatch_etp_all_gather", piece, rows, arrived, everything, shared=True))
    x = expert_input(layer, piece)
    experts, result = expert_ops(layer, x, rows, routing.gate, piece)

    def arrange(x: Tensor, rows: Any) -> Tensor:
        return take_rows(x, rows.arrange)

    def arrange_back(x: Tensor, rows: Any) -> Tensor:
        return take_rows(x, rows.arrange_back)

    ops += [
        moved(layer.name("arrange", piece), rows, everything, x, arrange, arrange_back),
        *experts,
        moved(layer.name("arrange_back", piece), rows, result, leaving, arrange_back, arrange),
    ]
    if shares:
        ops.append(_travel(layer, "combine_etp_reduce_scatter", piece, rows, leaving, home, shared=True))
    return ops, home


def _of_all(layer: Layer, tensor: str, whole: str, piece: Piece) -> Value:
    """Declare the rows that all ranks with the same experts received, one rank behind the other."""
    etp = layer.layout.etp.size
    ranks = tuple(source * etp + rank for rank in range(etp) for source in piece.sources)
    return _declare(layer, tensor, whole, piece, Rows("arrived", "ffn", ranks), etp)
