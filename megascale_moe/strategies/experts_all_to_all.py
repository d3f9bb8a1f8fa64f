"""Experts by all-to-all (paper, section 3.2): each token's hidden state goes to the ranks of its k experts and comes
back: 2k/n bsh (n-1)/n elements. Where etp ranks share an expert's width they pass on to each other what they received.

Cut by source rank (paper, section 4.2, from the host), what comes from one peer is worked on while what comes from the
next travels, and goes back while the next is worked on. The own tokens, which need no message, come first. Pieces share
nothing but the gradients they add to, so their results are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.traffic import Traffic, as_rows, sum_to
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, hang_backward
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.rows import RowMap, sum_rows, take_rows
from megascale_moe.strategies.collective import communication, tag, with_backward
from megascale_moe.strategies.grouped import expert_input, expert_ops, moved, scatter
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.routing import PieceRows, Routing, routed_rows
from megascale_moe.strategies.strategy import DispatchForm

Sizes = Callable[[PieceRows], list[int]]


class AllToAll(DispatchForm):
    """Each routed row to the ranks of its expert and back."""

    name = "all_to_all"
    title = "dispatch by all-to-all"
    travels = True

    def axis(self, layout: Layout) -> Axis:
        return layout.ep

    def ops(self, layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], Value]:
        return all_to_all_experts(layer, x, routing)

    def rows(self, top_k: int, ep: int, etp: int, relative_cost: float) -> float:
        return top_k * ((ep - 1) / ep * relative_cost + etp - 1)  # to experts' ranks, then on to those that share them


ALL_TO_ALL = AllToAll()


def all_to_all_experts(layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], Value]:
    """From x [tokens, hidden] to the sum of each token's experts, [tokens, hidden]."""
    c, layout, pieces = layer.model, layer.layout, routing.pieces
    assert routing.own is not None
    routed = layer.value(
        "dispatch_in", (layout.tokens * c.top_k, c.hidden), shard=Shard(("ffn_in",), Rows("own", "ffn")), keep=Keep.NONE
    )
    first = scatter(layer.name("scatter"), routing.own, x, routed, lambda own: own)
    deal, parts = _deal(layer, routed, routing)
    sends: list[Op] = []
    works: list[list[Op]] = []
    returns: list[Op] = []
    results: list[Value] = []
    for piece, rows, part in zip(pieces, routing.rows, parts, strict=True):
        travels = piece.uncut or not piece.own
        arrived = part
        if travels:
            arrived = _arrived(layer, piece)
            sends.append(_travel(layer, "dispatch_all_to_all", piece, rows, part, arrived))
        work, leaving = _work(layer, routing, piece, rows, arrived)
        result = leaving
        if travels:
            result = _own_rows(layer, "combine_out", "fc2_out", piece)
            returns.append(_travel(layer, "combine_all_to_all", piece, rows, leaving, result))
        works.append(work)
        results.append(result)
    y = layer.tokens("ffn_out", c.hidden, keep=Keep.NONE)
    last = _sum_up(layer, results, y, routing)
    if pieces[0].uncut:
        return [first, *sends, *works[0], *returns, last], y
    ops, back = [first, *deal, *sends, *works[0]], [last, *returns, *reversed(works[0])]
    for chain, send, result_op in zip(works[1:], sends, returns, strict=True):
        ops += [*chain, result_op]
        back += [*reversed(chain), send]
    return hang_backward([*ops, last], [*back, *deal, first]), y


# --- the own tokens --------------------------------------------------------------------------------------------------


def _own_rows(layer: Layer, tensor: str, whole: str, piece: Piece) -> Value:
    """Declare the rows of the own tokens that a piece's peers work on, peer by peer, in expert order."""
    layout, c = layer.layout, layer.model
    places = tuple(peer * layout.etp.size for peer in piece.peers)
    shape = (piece.share * layout.tokens * c.top_k, c.hidden)
    return layer.value(tensor, shape, piece=piece, shard=Shard((whole,), Rows("own", "ffn", places)), keep=Keep.NONE)


def _deal(layer: Layer, x: Value, routing: Routing) -> tuple[list[Op], list[Value]]:
    """The own rows to the pieces whose peers work on them; nothing to do where nothing is cut."""
    pieces = routing.pieces
    if pieces[0].uncut:
        return [], [x]
    parts = [_own_rows(layer, "dispatch_in", "ffn_in", piece) for piece in pieces]
    order = [peer for piece in pieces for peer in piece.peers]

    def run(x: Tensor, *maps: PieceRows) -> tuple[Tensor, ...]:
        return _dealt(x, order, maps)

    def join(*args: Any) -> Tensor:
        return _joined(args[: len(parts)], order, args[len(parts) :])

    name, cost = layer.name("deal_rows"), Cost(memory_bytes=2 * x.nbytes)
    back = Op(
        name=name, phase=Phase.B, reads=(*map(grad, parts), *routing.rows), writes=(x.gradient,), run=join, cost=cost
    )
    op = Op(name=name, reads=(x, *routing.rows), writes=tuple(parts), run=run, cost=cost, backward=(back,))
    return [op], parts


def _sum_up(layer: Layer, parts: Sequence[Value], y: Value, routing: Routing) -> Op:
    """The sum of each own token's rows, from all pieces; its gradient is dealt out to them."""
    assert routing.own is not None
    order = [peer for piece in routing.pieces for peer in piece.peers]
    count = len(parts)
    cut = not routing.pieces[0].uncut

    def run(*args: Any) -> Tensor:
        rows, own, maps = args[:count], args[count], args[count + 1 :]
        return sum_rows(_joined(rows, order, maps) if cut else rows[0], own)

    def run_backward(d: Tensor, own: RowMap, *maps: PieceRows) -> Tensor | tuple[Tensor, ...]:
        rows = take_rows(d, own.source)
        return _dealt(rows, order, maps) if cut else rows

    maps = (routing.own, *(routing.rows if cut else ()))
    name, cost = layer.name("gather"), Cost(memory_bytes=2 * sum(part.nbytes for part in parts))
    backward = Op(
        name=name, phase=Phase.B, reads=(grad(y), *maps), writes=tuple(part.gradient for part in parts),
        run=run_backward, cost=cost,
    )
    return Op(name=name, reads=(*parts, *maps), writes=(y,), run=run, cost=cost, backward=(backward,))


def _dealt(x: Tensor, order: Sequence[int], maps: Sequence[PieceRows]) -> tuple[Tensor, ...]:
    """Rows in the order of ranks -> those of each piece."""
    sizes = [size for rows in maps for size in rows.sent]
    by_rank = dict(zip(sorted(order), x.split(_in_rank_order(sizes, order)), strict=True))
    found, start = [], 0
    for rows in maps:
        peers = order[start : start + len(rows.sent)]
        found.append(by_rank[peers[0]] if len(peers) == 1 else torch.cat([by_rank[peer] for peer in peers]))
        start += len(peers)
    return tuple(found)


def _joined(parts: Sequence[Tensor], order: Sequence[int], maps: Sequence[PieceRows]) -> Tensor:
    """Rows of all pieces -> the same in the order of ranks."""
    sizes = [size for rows in maps for size in rows.sent]
    each = torch.cat(list(parts)).split(sizes)
    return torch.cat([part for _, part in sorted(zip(order, each, strict=True), key=lambda pair: pair[0])])


def _in_rank_order(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    return [size for _, size in sorted(zip(order, sizes, strict=True), key=lambda pair: pair[0])]


# --- messages --------------------------------------------------------------------------------------------------------


def _arrived(layer: Layer, piece: Piece) -> Value:
    """Declare the rows that come from a piece's sources, one source behind the other; from one, in expert order."""
    layout, c = layer.layout, layer.model
    if _sorted_already(layer, piece):
        return expert_input(layer, piece)
    places = tuple(source * layout.etp.size + layout.etp.index for source in piece.sources)
    shape = (piece.share * layout.tokens * c.top_k, c.hidden)
    shard = Shard(("ffn_in",), Rows("arrived", "ffn", places))
    return layer.value("dispatch_out", shape, piece=piece, shard=shard, keep=Keep.NONE)


def _sorted_already(layer: Layer, piece: Piece) -> bool:
    return len(piece.sources) == 1 and layer.layout.etp.size == 1


def _travel(layer: Layer, word: str, piece: Piece, rows: Value, x: Value, y: Value) -> Op:
    """Routed rows from tokens to experts ("dispatch ..."), or home."""
    layout, h, name = layer.layout, layer.model.hidden, layer.name(word, piece)
    outward = word.startswith("dispatch")
    each = layout.tokens * layer.model.top_k / layout.ep.size  # rows to each rank

    def traffic(phase: Phase, outward: bool) -> Traffic:
        def sizes(rows: PieceRows) -> tuple[list[int], list[int]]:
            return (rows.sent, rows.received) if outward else (rows.received, rows.sent)

        return Traffic(
            axis=layout.ep, tag=tag(name, phase), plan=(1,), finish=as_rows, typical=(each, h), dtype=layout.dtype,
            pack=lambda x, rows: x.contiguous().split(sizes(rows)[0]),
            shapes=lambda rows: [(count, h) for count in sizes(rows)[1]], distances=piece.way(home=not outward),
        )  # fmt: skip

    elements = each * h * piece.sent
    there, back = traffic(Phase.F, outward), traffic(Phase.B, not outward)
    return with_backward(
        communication(name, Phase.F, (x, rows), (y,), there, elements, layout),
        communication(name, Phase.B, (y.gradient, rows), (x.gradient,), back, elements, layout),
    )


def _spread(layer: Layer, word: str, piece: Piece, rows: Value, x: Value, y: Value) -> Op:
    """Received rows to all ranks that share their experts ("dispatch ..."), or the sum of what each made of them."""
    layout, axis, h, name = layer.layout, layer.layout.etp, layer.model.hidden, layer.name(word, piece)
    each = piece.share * layout.tokens * layer.model.top_k

    def traffic(phase: Phase, outward: bool) -> Traffic:
        def pack(x: Tensor, rows: PieceRows) -> Sequence[Tensor]:
            return [x.contiguous()] * axis.size if outward else x.contiguous().split(rows.share)

        def shapes(rows: PieceRows) -> list[tuple[int, int]]:
            counts = rows.share if outward else [rows.share[axis.index]] * axis.size
            return [(count, h) for count in counts]

        return Traffic(
            axis=axis, tag=tag(name, phase), pack=pack, shapes=shapes, plan=(1,), typical=(each, h),
            finish=as_rows if outward else sum_to(layout.dtype), dtype=layout.dtype, sums=not outward,
        )  # fmt: skip

    outward, elements = word.startswith("dispatch"), each * h * (axis.size - 1)
    there, back = traffic(Phase.F, outward), traffic(Phase.B, not outward)
    return with_backward(
        communication(name, Phase.F, (x, rows), (y,), there, elements, layout),
        communication(name, Phase.B, (y.gradient, rows), (x.gradient,), back, elements, layout),
    )


# --- the experts' side -----------------------------------------------------------------------------------------------


def _work(
    layer: Layer, routing: Routing, piece: Piece, rows: Value, arrived: Value
) -> tuple[list[Op], Value]:
    """The experts on what arrived: the operators, and their results in the order of arrival."""
    if _sorted_already(layer, piece):
        x = arrived
        return expert_ops(layer, x, rows, routing.gate, piece)
    layout, h = layer.layout, layer.model.hidden
    several = layout.etp.size > 1
    ops: list[Op] = []
    everything = arrived
    if several:
        everything = _of_all(layer, "dispatch_all", "ffn_in", piece, Shard(partial_gradient="etp"))
        ops.append(_spread(layer, "dispatch_etp_all_gather", piece, rows, arrived, everything))
    x = expert_input(layer, piece)
    experts, result = expert_ops(layer, x, rows, routing.gate, piece)
    assert arrived.shard is not None
    home = layer.value(
        "combine_in", (arrived.shape[0], h), piece=piece, shard=Shard(("fc2_out",), arrived.shard.rows), keep=Keep.NONE
    )
    leaving = _of_all(layer, "combine_all", "fc2_out", piece, Shard(partial="etp")) if several else home
    ops += [
        moved(
            layer.name("arrange", piece), rows, everything, x,
            lambda x, rows: take_rows(x, rows.arrange), lambda d, rows: take_rows(d, rows.arrange_back),
        ),
        *experts,
        moved(
            layer.name("arrange_back", piece), rows, result, leaving,
            lambda x, rows: take_rows(x, rows.arrange_back), lambda d, rows: take_rows(d, rows.arrange),
        ),
    ]  # fmt: skip
    if several:
        ops.append(_spread(layer, "combine_etp_reduce_scatter", piece, rows, leaving, home))
    return ops, home


def _of_all(layer: Layer, tensor: str, whole: str, piece: Piece, shard: Shard) -> Value:
    """Declare the rows that all ranks with the same experts received, one rank behind the other."""
    etp = layer.layout.etp.size
    places = tuple(source * etp + place for place in range(etp) for source in piece.sources)
    lies = Shard((whole,), Rows("arrived", "ffn", places), None, shard.partial, shard.partial_gradient)
    shape = (routed_rows(layer, piece), layer.model.hidden)
    return layer.value(tensor, shape, piece=piece, shard=lies, keep=Keep.NONE)
