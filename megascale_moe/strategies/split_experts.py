"""The expert-parallel FFN cut by source rank, in both dispatch forms (paper, section 4.2, from the host).

What comes from one peer is worked on while what comes from the next travels, and goes back while the next is worked
on: a piece is dispatch, scatter, experts, gather and combine for the tokens of some ranks. The own tokens, which need
no message, come first. Pieces share nothing but the gradients they add to, so their results are those of the whole.

The backward of all pieces hangs on the last operator: there, too, everything leaves at once and the own piece is first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.collectives import sum_in_order, tag_of
from megascale_moe.comm.traffic import Traffic, as_rows
from megascale_moe.config import ModelConfig
from megascale_moe.engine.op import Cost, Op, Phase, grad
from megascale_moe.kernels.rows import RowMap, row_map, sum_rows, take_rows
from megascale_moe.strategies.collective import communication, with_backward
from megascale_moe.strategies.expert_ops import expert_ops, gather, moved, routing_names, rows_within_capacity, scatter
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.pieces import distances

Parts = Callable[..., Sequence[Tensor]]
Sizes = Callable[..., Sequence[int]]


@dataclass(frozen=True)
class PieceRows:
    """The rows of a piece on this rank's experts.

    Attributes:
        experts: rows out of the tokens of the sources one behind the other; slots count in the routing of all ranks.
        sent: rows of this rank's own tokens for the rank at each distance of the piece. received: from the rank at
            each distance on the other side.
        arrange: received rows, ordered by source, into expert order; arrange_back its inverse.
    """

    experts: RowMap
    sent: list[int]
    received: list[int]
    arrange: Tensor
    arrange_back: Tensor


@dataclass(frozen=True)
class Piece:
    """A piece of a layer: names end in `mark`, `share` of the group's ranks belong to it."""

    mark: str
    distances: tuple[int, ...]
    share: float

    @property
    def own(self) -> bool:
        """Whether it is this rank itself."""
        return self.distances == (0,)


def pieces_of(layout: Layout) -> list[Piece]:
    """The own piece, then the peers'."""
    size = layout.group.size
    return [
        Piece(f"@{index}", tuple(group), len(group) / size)
        for index, group in enumerate(distances(size, layout.pieces))
    ]


def split_plan(p: str, c: ModelConfig, layout: Layout) -> Op:
    """Row maps of all pieces, and of the own tokens on all experts, from the routing."""
    group, ep, pieces = layout.group, layout.ep, pieces_of(layout)
    T, local = layout.tokens, c.experts // ep.size

    def run(gate: Tensor, choice: Tensor) -> tuple[Any, ...]:
        kept = rows_within_capacity(choice, gate, c, layout) if c.capacity_factor else None

        def tokens(x: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
            return None if x is None else torch.cat([x[rank * T : (rank + 1) * T] for rank in ranks])

        mine = tokens(choice, [group.index])
        assert mine is not None
        own = row_map(mine, 0, c.experts, tokens(kept, [group.index]), c.experts)
        per_rank = [sum(own.counts[rank * local : (rank + 1) * local]) for rank in range(ep.size)]
        found = []
        for piece in pieces:
            sources = [(group.index - distance) % group.size for distance in piece.distances]
            chosen = tokens(choice, sources)
            assert chosen is not None
            rows = row_map(chosen, ep.index * local, local, tokens(kept, sources), c.experts)
            sent = [per_rank[(ep.index + distance) % ep.size] for distance in piece.distances] if ep.size > 1 else []
            found.append(_piece_rows(rows, chosen, sources, sent, c, layout))
        return (own, *found)

    writes = (f"{p}rows", *(f"{p}rows{piece.mark}" for piece in pieces))
    return Op(name=f"{p}plan", reads=routing_names(p, layout), writes=writes, run=run)


def _piece_rows(
    rows: RowMap, choice: Tensor, sources: Sequence[int], sent: list[int], c: ModelConfig, layout: Layout
) -> PieceRows:
    T, k, local = layout.tokens, c.top_k, c.experts // layout.ep.size
    place = rows.source // T  # which of the sources
    expert = choice.flatten()[rows.slot] - layout.ep.index * local
    arrange_back = (place * local + expert).argsort(stable=True)
    arrange = torch.empty_like(arrange_back)
    arrange[arrange_back] = torch.arange(len(arrange), device=arrange.device)
    ranks = torch.tensor(sources, device=place.device)[place]
    everywhere = replace(rows, slot=(ranks * T + rows.source % T) * k + rows.slot % k)
    return PieceRows(everywhere, sent, rows.rows_of(place, len(sources)), arrange, arrange_back)


def _of_piece(rows: Any) -> RowMap:
    return rows.experts  # type: ignore[no-any-return]


# --- messages --------------------------------------------------------------------------------------------------------


def _travel(
    name: str, phase: Phase, reads: tuple[str, ...], write: str, piece: Piece, parts: Parts, sizes: Sizes,
    elements: float, c: ModelConfig, layout: Layout, *, home: bool, plan: tuple[int, ...] = (),
) -> Op:
    """Rows to the ranks at a piece's distances, or home.

    Args:
        parts: what goes to each of them, from the values of `reads`. sizes: how many rows come from each, from the
            values of those that `plan` names.
        elements: sent when routing is balanced.
    """
    axis, h, count = layout.group, c.hidden, len(piece.distances)
    traffic = Traffic(
        axis=axis, tag=tag_of(f"{name} {phase}"), pack=lambda *values: [part.contiguous() for part in parts(*values)],
        shapes=lambda *rows: [(size, h) for size in sizes(*rows)], plan=plan, finish=as_rows, dtype=layout.dtype,
        typical=(elements / count / h, h),
        distances=tuple(axis.size - distance if home else distance for distance in piece.distances),
    )  # fmt: skip
    return communication(name, phase, reads, (write,), traffic, elements, layout)


# --- all-to-all ------------------------------------------------------------------------------------------------------


def split_all_to_all(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """From `p`ln2_out to `p`ffn_out; each routed row travels to its expert's rank and back."""
    pieces = pieces_of(layout)
    ops = [scatter(f"{p}scatter", f"{p}rows", f"{p}ln2_out", f"{p}dispatch_in", lambda rows: rows, c, layout)]
    sends = [_dispatch_rows(p, piece, c, layout) for piece in pieces]
    work = [_work_on_rows(p, piece, c, layout) for piece in pieces]
    returns = [_combine_rows(p, piece, c, layout) for piece in pieces if not piece.own]
    ops += sends
    for index, chain in enumerate(work):
        ops += chain
        ops += returns[index - 1 : index] if index else []
    join = _join_dispatch(p, pieces, c, layout)
    backward = [*_backwards(returns)]
    for piece, chain, send in zip(pieces, work, sends, strict=True):
        backward += _backwards(reversed(chain))
        backward += [] if piece.own else send.backward
    last = _gather_pieces(p, pieces, c, layout)
    last = replace(last, backward=(*last.backward, *backward, join))
    return [ops[0], *_bare(ops[1:]), last]


def _backwards(ops: Any) -> list[Op]:
    return [b for op in ops for b in op.backward]


def _bare(ops: Sequence[Op]) -> list[Op]:
    """Without their backward, which hangs elsewhere."""
    return [replace(op, backward=()) for op in ops]


def _dispatch_rows(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> Op:
    """Own rows to the piece's ranks; what comes from there."""
    name, x, y = f"{p}dispatch_all_to_all{piece.mark}", f"{p}dispatch_in", _arrived(p, piece)
    ep, local = layout.ep, c.experts // layout.ep.size

    def parts(x: Tensor, rows: RowMap, piece_rows: PieceRows) -> list[Tensor]:
        per_rank = [sum(rows.counts[rank * local : (rank + 1) * local]) for rank in range(ep.size)]
        by_rank = x.split(per_rank)
        return [by_rank[(ep.index + distance) % ep.size] for distance in piece.distances]

    reads, rows = (x, f"{p}rows", f"{p}rows{piece.mark}"), f"{p}rows{piece.mark}"
    if piece.own:  # nothing travels; its gradient is read where the pieces are joined
        return Op(name=name, reads=reads, writes=(y,), run=lambda *values: parts(*values)[0])
    elements = layout.tokens * c.top_k * c.hidden * piece.share
    back = _travel(
        name, Phase.B, (grad(y), rows), _slope(p, piece), piece, lambda d, rows: d.split(rows.received),
        lambda rows: rows.sent, elements, c, layout, home=True, plan=(1,),
    )
    forward = _travel(
        name, Phase.F, reads, y, piece, parts, lambda rows: rows.received, elements, c, layout, home=False, plan=(2,)
    )
    return with_backward(forward, back)


def _arrived(p: str, piece: Piece) -> str:
    """Rows of a piece, ordered by source."""
    return f"{p}ffn_in{piece.mark}" if len(piece.distances) == 1 else f"{p}dispatch_out{piece.mark}"


def _slope(p: str, piece: Piece) -> str:
    """The gradient of what was dispatched to a piece's ranks."""
    return grad(_arrived(p, piece)) if piece.own else f"{p}dispatch_slope{piece.mark}"


def _leaving(p: str, piece: Piece) -> str:
    """Results of a piece, ordered by source."""
    return f"{p}fc2_out{piece.mark}" if len(piece.distances) == 1 else f"{p}combine_in{piece.mark}"


def _combined(p: str, piece: Piece) -> str:
    """Results for the own tokens from a piece's ranks."""
    return _leaving(p, piece) if piece.own else f"{p}combine_out{piece.mark}"


def _work_on_rows(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> list[Op]:
    """The experts on a piece; rows of one source are in expert order already."""
    mark, rows = piece.mark, f"{p}rows{piece.mark}"
    ops = expert_ops(p, c, layout, mark, piece.share)
    if len(piece.distances) == 1:
        return ops
    into = moved(
        f"{p}arrange{mark}", rows, _arrived(p, piece), f"{p}ffn_in{mark}", lambda x, rows: take_rows(x, rows.arrange),
        lambda d, rows: take_rows(d, rows.arrange_back), c, layout, piece.share,
    )
    out = moved(
        f"{p}arrange_back{mark}", rows, f"{p}fc2_out{mark}", _leaving(p, piece),
        lambda x, rows: take_rows(x, rows.arrange_back), lambda d, rows: take_rows(d, rows.arrange), c, layout,
        piece.share,
    )
    return [into, *ops, out]


def _combine_rows(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> Op:
    name, x, y, rows = (
        f"{p}combine_all_to_all{piece.mark}", _leaving(p, piece), _combined(p, piece), f"{p}rows{piece.mark}",
    )  # fmt: skip
    elements = layout.tokens * c.top_k * c.hidden * piece.share
    forward = _travel(
        name, Phase.F, (x, rows), y, piece, lambda x, rows: x.split(rows.received), lambda rows: rows.sent,
        elements, c, layout, home=True, plan=(1,),
    )
    backward = _travel(
        name, Phase.B, (grad(y), rows), grad(x), piece, lambda d, rows: d.split(rows.sent),
        lambda rows: rows.received, elements, c, layout, home=False, plan=(1,),
    )
    return with_backward(forward, backward)


def _ranks(pieces: Sequence[Piece], layout: Layout) -> list[int]:
    """The rank on whose experts each part lies, piece by piece."""
    return [(layout.group.index + distance) % layout.group.size for piece in pieces for distance in piece.distances]


def _gather_pieces(p: str, pieces: Sequence[Piece], c: ModelConfig, layout: Layout) -> Op:
    """Sum of each own token's rows, from all pieces; its gradient is dealt out to them."""
    name, y, ranks = f"{p}gather", f"{p}ffn_out", _ranks(pieces, layout)
    count = len(pieces)
    names = tuple(_combined(p, piece) for piece in pieces)
    maps = (f"{p}rows", *(f"{p}rows{piece.mark}" for piece in pieces))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)

    def sizes(maps: Sequence[Any]) -> list[int]:
        return [size for rows in maps[1:] for size in rows.sent]

    def run(*values: Any) -> Tensor:
        parts, maps = values[:count], values[count:]
        by_piece = torch.cat(parts).split(sizes(maps))
        return sum_rows(torch.cat([by_piece[place] for place in order]), maps[0])

    def run_backward(d: Tensor, *maps: Any) -> tuple[Tensor, ...]:
        rows = take_rows(d, maps[0].source)
        per_part = sizes(maps)
        by_rank = rows.split([per_part[place] for place in order])
        by_part = [by_rank[order.index(place)] for place in range(len(ranks))]
        found, start = [], 0
        for piece in pieces:
            found.append(torch.cat(by_part[start : start + len(piece.distances)]))
            start += len(piece.distances)
        return tuple(found)

    cost = Cost(memory_bytes=layout.bytes(2 * layout.tokens * c.top_k * c.hidden))
    backward = Op(
        name=name, phase=Phase.B, reads=(grad(y), *maps), writes=tuple(map(grad, names)), run=run_backward, cost=cost
    )
    return Op(name=name, reads=(*names, *maps), writes=(y,), run=run, cost=cost, backward=(backward,))


def _join_dispatch(p: str, pieces: Sequence[Piece], c: ModelConfig, layout: Layout) -> Op:
    """The gradient of the dispatched rows from those of all pieces, in the order of ranks."""
    ranks = _ranks(pieces, layout)
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    count = len(pieces)

    def run(*values: Any) -> Tensor:
        parts, maps = values[:count], values[count:]
        by_part = torch.cat(parts).split([size for rows in maps for size in rows.sent])
        return torch.cat([by_part[place] for place in order])

    reads = (*(_slope(p, piece) for piece in pieces), *(f"{p}rows{piece.mark}" for piece in pieces))
    return Op(
        name=f"{p}join_dispatch", phase=Phase.B, reads=reads, writes=(grad(f"{p}dispatch_in"),), run=run,
        cost=Cost(memory_bytes=layout.bytes(4 * layout.tokens * c.top_k * c.hidden)),  # twice put together
    )


# --- all-gather ------------------------------------------------------------------------------------------------------


def split_all_gather(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """From `p`ln2_out to `p`ffn_out; every rank sees all tokens, and partial sums come back."""
    pieces = pieces_of(layout)
    sends = [_dispatch_tokens(p, piece, c, layout) for piece in pieces if not piece.own]
    work = [_work_on_tokens(p, piece, c, layout) for piece in pieces]
    returns = [_combine_tokens(p, piece, c, layout) for piece in pieces if not piece.own]
    ops = [*sends]
    for index, chain in enumerate(work):
        ops += chain
        ops += returns[index - 1 : index] if index else []
    backward = _backwards(returns)
    for index, chain in enumerate(work):
        backward += _backwards(reversed(chain))
        backward += sends[index - 1].backward if index else []
    last = _sum_pieces(p, pieces, c, layout)
    join = _join_tokens(p, pieces, c, layout)
    return [*_bare(ops), replace(last, backward=(*last.backward, *backward, join))]


def _tokens(p: str, piece: Piece) -> str:
    return f"{p}ln2_out" if piece.own else f"{p}ln2_out_ag{piece.mark}"


def _token_slope(p: str, piece: Piece) -> str:
    return f"{p}own_slope" if piece.own else f"{p}ln2_slope{piece.mark}"


def _to_all(x: Tensor, piece: Piece) -> list[Tensor]:
    return [x] * len(piece.distances)


def _dispatch_tokens(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> Op:
    name, y, T = f"{p}dispatch_all_gather{piece.mark}", _tokens(p, piece), layout.tokens
    sizes, elements = [T] * len(piece.distances), T * c.hidden * len(piece.distances)
    forward = _travel(
        name, Phase.F, (f"{p}ln2_out",), y, piece, lambda x: _to_all(x, piece), lambda: sizes, elements, c,
        layout, home=False,
    )
    backward = _travel(
        name, Phase.B, (grad(y),), _token_slope(p, piece), piece, lambda d: d.split(T), lambda: sizes, elements, c,
        layout, home=True,
    )
    return with_backward(forward, backward)


def _work_on_tokens(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> list[Op]:
    mark, rows, x = piece.mark, f"{p}rows{piece.mark}", _tokens(p, piece)
    into = scatter(f"{p}scatter{mark}", rows, x, f"{p}ffn_in{mark}", _of_piece, c, layout, piece.share)
    if piece.own:  # the gradient of the own tokens joins those that come back
        (b,) = into.backward
        into = replace(into, backward=(replace(b, writes=(_token_slope(p, piece),)),))
    out = gather(f"{p}gather{mark}", rows, f"{p}fc2_out{mark}", f"{p}partial{mark}", _of_piece, c, layout, piece.share)
    return [into, *expert_ops(p, c, layout, mark, piece.share), out]


def _combine_tokens(p: str, piece: Piece, c: ModelConfig, layout: Layout) -> Op:
    name, T = f"{p}combine_reduce_scatter{piece.mark}", layout.tokens
    x, y = f"{p}partial{piece.mark}", f"{p}sums{piece.mark}"
    sizes, elements = [T] * len(piece.distances), T * c.hidden * len(piece.distances)
    forward = _travel(
        name, Phase.F, (x,), y, piece, lambda x: x.split(T), lambda: sizes, elements, c, layout, home=True
    )
    backward = _travel(
        name, Phase.B, (grad(f"{p}ffn_out"),), grad(x), piece, lambda d: _to_all(d, piece), lambda: sizes, elements, c,
        layout, home=False,
    )
    return with_backward(forward, backward)


def _in_rank_order(parts: Sequence[Tensor], pieces: Sequence[Piece], layout: Layout) -> list[Tensor]:
    """[T, D] from each rank, in rank order whatever the pieces: sums keep their bits."""
    flat = [part for tensor in parts for part in tensor.split(layout.tokens)]
    by_rank = sorted(zip(_ranks(pieces, layout), flat, strict=True), key=lambda pair: pair[0])
    return [part for _, part in by_rank]


def _sum_pieces(p: str, pieces: Sequence[Piece], c: ModelConfig, layout: Layout) -> Op:
    names = [f"{p}partial@0", *(f"{p}sums{piece.mark}" for piece in pieces[1:])]

    def run(*parts: Tensor) -> Tensor:
        first, *rest = _in_rank_order(parts, pieces, layout)
        return sum_in_order([first.clone(), *rest])

    elements = layout.tokens * c.hidden * (layout.group.size + 1)
    backward = Op(
        name=f"{p}sum_pieces", phase=Phase.B, reads=(grad(f"{p}ffn_out"),), writes=(grad(names[0]),), run=lambda d: d
    )
    return Op(
        name=f"{p}sum_pieces", reads=tuple(names), writes=(f"{p}ffn_out",), run=run, backward=(backward,),
        cost=Cost(memory_bytes=layout.bytes(elements)),
    )


def _join_tokens(p: str, pieces: Sequence[Piece], c: ModelConfig, layout: Layout) -> Op:
    """The gradient of the own tokens, summed over all ranks' experts."""

    def run(*parts: Tensor) -> Tensor:
        first, *rest = _in_rank_order(parts, pieces, layout)
        return sum_in_order([first.clone(), *rest])

    reads = tuple(_token_slope(p, piece) for piece in pieces)
    elements = layout.tokens * c.hidden * (layout.group.size + 1)
    return Op(
        name=f"{p}join_tokens", phase=Phase.B, reads=reads, writes=(grad(f"{p}ln2_out"),), run=run,
        cost=Cost(memory_bytes=layout.bytes(elements)),
    )
