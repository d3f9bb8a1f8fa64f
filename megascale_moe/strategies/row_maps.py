"""Row maps: which rows of which rank each expert works on, of routing that every rank knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megascale_moe.engine.op import Op
from megascale_moe.engine.value import Value
from megascale_moe.kernels.rows import RowMap, row_map
from megascale_moe.model.router import within_capacity
from megascale_moe.strategies.exchange import in_pieces
from megascale_moe.strategies.layer import Layer, Piece
from megascale_moe.strategies.layout import Layout


@dataclass(frozen=True)
class PieceRows:
    """The routed rows of a piece on this rank's experts.

    Attributes:
        experts: rows out of the tokens of the sources, one source behind the other; slots count in the routing of all
            ranks of the group.
        sent, received: where rows travel, to each peer and from each source of the piece.
        share: rows that each rank of the etp axis received; they all work on all of them.
        arrange: rows as they arrive, ordered by source, into expert order; `arrange_back` its inverse.
    """

    experts: RowMap
    sent: Sequence[int] = ()
    received: Sequence[int] = ()
    share: Sequence[int] = ()
    arrange: Tensor | None = None
    arrange_back: Tensor | None = None


class Routing(NamedTuple):
    """What the routing of a layer leaves for its experts.

    Attributes:
        gate: [T, k] of every token that this rank's experts may see. pieces: into which the FFN is cut.
        rows: a `PieceRows` for each piece. own: the row map of the own tokens on all experts, where rows travel.
    """

    gate: Value
    pieces: Sequence[Piece]
    rows: Sequence[Value]
    own: Value | None


def group_places(layout: Layout, piece: Piece) -> tuple[int, ...]:
    """Return the ranks of the group whose tokens a piece brings, in order; with etp all ranks of each source."""
    if piece.axis.name != "ep":
        return piece.sources
    return tuple(source * layout.etp.size + place for source in piece.sources for place in range(layout.etp.size))


def routed_rows(layer: Layer, piece: Piece) -> float:
    """Return the rows of a piece that this rank's experts work on when routing is balanced."""
    layout = layer.layout
    return piece.share * layout.tokens * layer.model.top_k * layout.etp.size


def plan_rows(
    layer: Layer, group: tuple[Value, Value], whole: Sequence[Value], pieces: Sequence[Piece], *, travels: bool
) -> tuple[Op, Routing]:
    """Make the row maps of gathered gating weights and choices; where rows travel, the only operator that the host
    waits for.

    Args:
        group: gating weights and choices of the ranks that share the experts. whole: of whole sequences.
    """
    c, layout, slices = layer.model, layer.layout, layer.slices
    T, local, me = layout.tokens, c.experts // layout.ep.size, layout.group.index
    rows = []
    for piece in pieces:  # int64 vectors over its rows and one over its tokens; int32 offsets
        elements = (5 if travels else 3) * routed_rows(layer, piece) + T * len(group_places(layout, piece))
        rows.append(layer.own("rows", 8.0 * elements + 4.0 * local, piece))
    own_rows = [layer.own("own_rows", 8.0 * T * (3 * c.top_k + 1) + 4.0 * c.experts)] if travels else []

    def run(_: Tensor, choice: Tensor, *whole: Tensor) -> tuple[object, ...]:
        survives = None
        if whole:
            gates, choices = map(slices.sequences, whole)
            survives = slices.by_rank(within_capacity(choices, gates, len(choices) // layout.length, c))
            first = layout.sequence.index // layout.group.size * len(choice)  # where groups share one, this one's
            survives = survives[first : first + len(choice)]
        if not travels:
            return tuple(_piece_map(piece, choice, survives, [], layer) for piece in pieces)
        mine = slice(me * T, (me + 1) * T)
        own = row_map(choice[mine], 0, c.experts, None if survives is None else survives[mine], c.experts, [me])
        per_rank = [sum(own.counts[rank * local : (rank + 1) * local]) for rank in range(layout.ep.size)]
        return own, *(_piece_map(piece, choice, survives, per_rank, layer) for piece in pieces)

    routing = Routing(group[0], pieces, rows, own_rows[0] if own_rows else None)
    reads = (*group, *(whole if c.capacity_factor else ()))
    return Op(layer.name("plan"), reads, (*own_rows, *rows), run), routing


def _piece_map(
    piece: Piece, choice: Tensor, survives: Tensor | None, per_rank: Sequence[int], layer: Layer
) -> PieceRows:
    """Return the rows that a piece brings.

    Args:
        choice, survives: of the tokens of all ranks, [group * tokens, k]: experts, and what is not dropped.
        per_rank: rows of the own tokens for each expert-parallel rank; empty where rows do not travel.
    """
    c, layout = layer.model, layer.layout
    T, k, local = layout.tokens, c.top_k, c.experts // layout.ep.size
    places = group_places(layout, piece)
    if not piece.uncut:
        (choice,) = in_pieces(choice.split(T), [places])
        if survives is not None:
            (survives,) = in_pieces(survives.split(T), [places])
    rows = experts = row_map(choice, layout.ep.index * local, local, survives, c.experts, places)
    if not piece.uncut:  # slots count in the routing of all ranks
        ranks = torch.tensor(places, device=rows.source.device)[rows.source // T]
        experts = replace(rows, slot=(ranks * T + rows.source % T) * k + rows.slot % k)
    if not per_rank:
        return PieceRows(experts)
    etp, sources = layout.etp, len(piece.sources)
    # Rows arrive ordered by (etp place of the sender, its ep place, expert); `rows` has them by (expert, sender,
    # token), where senders count ep x etp, etp fastest.
    sender = rows.source // T
    expert = choice.flatten()[rows.slot] - layout.ep.index * local
    arrival = (sender % etp.size) * sources + sender // etp.size
    arrange_back = (arrival * local + expert).argsort(stable=True)
    arrange = torch.empty_like(arrange_back)
    arrange[arrange_back] = torch.arange(len(arrange), device=arrange.device)
    received = rows.rows_from(sender, len(places))
    share = [sum(received[place :: etp.size]) for place in range(etp.size)]
    sent = [per_rank[peer] for peer in piece.peers]
    return PieceRows(experts, sent, received[etp.index :: etp.size], share, arrange, arrange_back)
