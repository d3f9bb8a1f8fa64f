"""Routing: which expert works on which token, known on every rank before anything else is sent.

One small all-gather of choices and gating weights (8 bytes per assignment) tells every rank all row maps, all message
sizes and what capacity drops, with no further exchange, in both dispatch forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending, all_gather, reduce_scatter
from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Rows, Shard, Value
from megascale_moe.kernels.rows import RowMap, count, row_map
from megascale_moe.model.router import balance_weights, route, within_capacity, z_sum
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.collective import tag
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
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    share: list[int] = field(default_factory=list)
    arrange: Tensor | None = None
    arrange_back: Tensor | None = None


class Routing(NamedTuple):
    """What the routing of a layer leaves for its experts.

    Attributes:
        gate, choice: [T, k] of every token that this rank's experts may see. pieces: into which the FFN is cut.
        rows: a `PieceRows` for each piece. own: the row map of the own tokens on all experts, where rows travel.
    """

    gate: Value
    choice: Value
    pieces: Sequence[Piece]
    rows: Sequence[Value]
    own: Value | None


def routing_ops(layer: Layer, x: Value, pieces: Sequence[Piece], *, travels: bool) -> tuple[list[Op], Routing]:
    """From x [tokens, hidden] to the routing; also writes the layer's load and auxiliary losses.

    Args:
        travels: whether rows travel to their experts, rather than tokens to all ranks.
    """
    c, layout = layer.model, layer.layout
    linear, logits = _router(layer, x)
    routed, (gate, choice, probabilities, z) = _route(layer, logits)
    ops = [linear, routed]
    mine = (gate, choice)
    if layout.group.size > 1:
        gather = _gather_routing(layer, gate, choice)
        ops.append(gather)
        mine = gather.writes  # type: ignore[assignment]
    if c.balance_loss or c.z_loss:
        ops.append(_balance(layer, probabilities, z, mine[1]))
    rows = [_declared_rows(layer, piece, 5 if travels else 3) for piece in pieces]
    own = layer.own("own_rows", 8.0 * layout.tokens * (3 * c.top_k + 1) + 4.0 * c.experts) if travels else None
    routing = Routing(*mine, pieces, rows, own)
    return [*ops, _plan(layer, routing)], routing


# --- the router ------------------------------------------------------------------------------------------------------


def _router(layer: Layer, x: Value) -> tuple[Op, Value]:
    """Logits, always in float32, with an explicit backward: autograd would keep the tokens in float32 as well."""
    c, dtype = layer.model, layer.layout.dtype
    name, weight = layer.name("router"), layer.name("ffn.router.weight")
    trained = (weight, layer.name("ffn.router.logits_bias")) if layer.spec.router_bias else (weight,)
    T = layer.layout.tokens
    y = layer.value("logits", (T, c.experts), dtype=torch.float32, shard=Shard())
    cost = product(T, c.experts, c.hidden, x.nbytes + y.nbytes)

    def forward(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = x.float() @ w.float().t()
        return logits if bias is None else logits.add_(bias.float())

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient, of_bias: Gradient | None = None) -> None:
        sink.add(d.t() @ x.float())
        if of_bias is not None:
            of_bias.add(d.sum(0))

    backward = (
        Op(
            name=name, phase=Phase.B, reads=(grad(y),), writes=(x.gradient,), weights=(weight,), cost=cost,
            run=lambda d, w: (d @ w.float()).to(dtype),
        ),
        Op(
            name=name, phase=Phase.W, reads=(x, grad(y)), writes=(), gradients=trained, cost=cost,
            run=weight_gradient,
        ),
    )  # fmt: skip
    return Op(name=name, reads=(x,), writes=(y,), weights=trained, cost=cost, backward=backward, run=forward), y


def _route(layer: Layer, logits: Value) -> tuple[Op, tuple[Value, Value, Value, Value]]:
    """Choices and gating weights, and what the auxiliary losses need of each token and of all."""
    c, T = layer.model, layer.layout.tokens
    routing = Shard(routing=True)
    gate = layer.value("gate", (T, c.top_k), dtype=torch.float32, shard=routing)
    choice = layer.value("choice", (T, c.top_k), dtype=torch.int64, shard=routing)
    probabilities = layer.value("probabilities", (T, c.experts), dtype=torch.float32, shard=Shard())
    z = layer.value("z", (), dtype=torch.float32)
    load = layer.value("load", (c.experts,), dtype=torch.int64)

    def run(logits: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        gate, choice, probabilities = route(logits, bias[0] if bias else None, c)
        load = count(choice.flatten(), c.experts)
        return gate, choice, probabilities, z_sum(logits) if c.z_loss else logits.new_zeros(()), load

    op = autograd_op(
        layer.name("route"), run, reads=(logits,), differentiable=(logits,),
        writes=(gate, choice, probabilities, z, load),
        constants=(layer.name("ffn.router.bias"),) if c.correction_bias else (),
        cost=Cost(memory_bytes=16.0 * T * c.experts),
    )  # fmt: skip
    return op, (gate, choice, probabilities, z)


def _gather_routing(layer: Layer, gate: Value, choice: Value) -> Op:
    """All ranks' choices and gating weights in one message: int32 and float32 side by side."""
    layout, k = layer.layout, layer.model.top_k
    name, axis = layer.name("gather_routing"), layout.group
    rows = Rows("gathered", axis.name)
    shape = (axis.size * layout.tokens, k)
    gates = layer.value(
        "gate_all", shape, dtype=torch.float32,
        shard=Shard(("gate",), rows, partial_gradient=axis.name, routing=True),
    )  # fmt: skip
    choices = layer.value("choice_all", shape, dtype=torch.int64, shard=Shard(("choice",), rows, routing=True))

    def run(gate: Tensor, choice: Tensor) -> Pending:
        packed = torch.cat((gate.view(torch.int32), choice.int()), dim=1)
        return all_gather(packed, axis, tag(name, Phase.F)).then(unpack)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :k].contiguous().view(torch.float32), x[:, k:].long()

    cost = Cost(wire_bytes=8.0 * layout.tokens * k * (axis.size - 1), axis=axis.name)
    stream = layout.stream(axis)
    backward = Op(
        name=name, phase=Phase.B, reads=(grad(gates),), writes=(gate.gradient,), stream=stream,
        run=lambda d: reduce_scatter(d, axis, tag(name, Phase.B)),
        cost=Cost(wire_bytes=cost.wire_bytes / 2, axis=axis.name),
    )
    return Op(
        name=name, reads=(gate, choice), writes=(gates, choices), run=run, stream=stream, cost=cost,
        backward=(backward,),
    )


def _balance(layer: Layer, probabilities: Value, z: Value, choice: Value) -> Op:
    """The auxiliary losses: value for the metrics, gradient straight into probabilities and z.

    How crowded an expert is needs the choices of whole documents, which the gathered routing holds; the rest is linear
    in this rank's probabilities, so no further sum over ranks is needed.
    """
    c, layout, node = layer.model, layer.layout, layer.layout.node
    auxiliary = layer.value("auxiliary", (), dtype=torch.float32)
    per_token = layer.value("balance_weights", (layout.tokens, c.experts), dtype=torch.float32, shard=Shard())

    def run(probabilities: Tensor, z: Tensor, choice: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        device, documents = choice.device, segments.documents()
        whole = layer.slices.sequences(choice).split(len(documents))[layout.group.index // node.size]
        weights = balance_weights(whole, documents.to(device), segments.lengths.to(device), c)
        per_token = weights[layer.slices.take(documents, node.index).to(device)] * c.balance_loss
        return (per_token * probabilities).sum() + c.z_loss * z, per_token

    def run_backward(per_token: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return per_token * scale, scale * c.z_loss

    backward = Op(
        name=layer.name("balance"), phase=Phase.B, reads=(per_token, "auxiliary_scale"),
        writes=(probabilities.gradient, z.gradient), run=run_backward,
    )
    return Op(
        name=layer.name("balance"), reads=(probabilities, z, choice, "segments"), writes=(auxiliary, per_token),
        run=run, backward=(backward,),
    )


# --- row maps --------------------------------------------------------------------------------------------------------


def group_places(layout: Layout, piece: Piece) -> tuple[int, ...]:
    """Return the ranks of the group whose tokens a piece brings, in order; with etp all ranks of each source."""
    if piece.axis.name != "ep":
        return piece.sources
    return tuple(source * layout.etp.size + place for source in piece.sources for place in range(layout.etp.size))


def routed_rows(layer: Layer, piece: Piece) -> float:
    """Return the rows of a piece that this rank's experts work on when routing is balanced."""
    layout = layer.layout
    return piece.share * layout.tokens * layer.model.top_k * layout.etp.size


def _declared_rows(layer: Layer, piece: Piece, vectors: int) -> Value:
    """Declare the row maps of a piece: int64 vectors, so many over its rows and one over its tokens; int32 offsets."""
    layout = layer.layout
    tokens, experts = layout.tokens * len(group_places(layout, piece)), layer.model.experts // layout.ep.size
    return layer.own("rows", 8.0 * (vectors * routed_rows(layer, piece) + tokens) + 4.0 * experts, piece)


def rows_within_capacity(choice: Tensor, gate: Tensor, layer: Layer) -> Tensor:
    """Return which assignments of all ranks' tokens survive dropping, bool [group * tokens, k]."""
    slices, rows = layer.slices, len(choice) // layer.layout.length
    return slices.by_rank(within_capacity(slices.sequences(choice), slices.sequences(gate), rows, layer.model))


def _plan(layer: Layer, routing: Routing) -> Op:
    """Row maps from the routing; the only operator whose result the host waits for, where rows travel."""
    c, layout = layer.model, layer.layout
    travels = routing.own is not None

    def run(gate: Tensor, choice: Tensor) -> tuple[object, ...] | PieceRows:
        kept = rows_within_capacity(choice, gate, layer) if c.capacity_factor else None
        per_rank: list[int] = []
        own = None
        if travels:
            own, per_rank = _own_map(choice, kept, c, layout)
        found = [_piece_map(piece, choice, kept, per_rank, layer) for piece in routing.pieces]
        return (own, *found) if travels else tuple(found)

    writes = (*((routing.own,) if routing.own is not None else ()), *routing.rows)
    return Op(name=layer.name("plan"), reads=(routing.gate, routing.choice), writes=writes, run=run)


def _own_map(
    choice: Tensor, kept: Tensor | None, c: ModelConfig, layout: Layout
) -> tuple[RowMap, list[int]]:
    """Rows of the own tokens grouped by expert, and how many are for each expert-parallel rank."""
    T, local = layout.tokens, c.experts // layout.ep.size
    mine = slice(layout.group.index * T, (layout.group.index + 1) * T)
    taken = None if kept is None else kept[mine]
    own = row_map(choice[mine], 0, c.experts, taken, c.experts, [layout.group.index])
    return own, [sum(own.counts[rank * local : (rank + 1) * local]) for rank in range(layout.ep.size)]


def _piece_map(
    piece: Piece, choice: Tensor, kept: Tensor | None, per_rank: Sequence[int], layer: Layer
) -> PieceRows:
    """The rows that a piece brings.

    Args:
        per_rank: rows of the own tokens for each expert-parallel rank; empty where rows do not travel.
    """
    c, layout = layer.model, layer.layout
    T, local = layout.tokens, c.experts // layout.ep.size
    places = group_places(layout, piece)
    taken, chosen = kept, choice
    if not piece.uncut:
        chosen = torch.cat([choice[place * T : (place + 1) * T] for place in places])
        if kept is not None:
            taken = torch.cat([kept[place * T : (place + 1) * T] for place in places])
    rows = row_map(chosen, layout.ep.index * local, local, taken, c.experts, places)
    if not per_rank:
        return PieceRows(rows if piece.uncut else _everywhere(rows, places, c, layout))
    etp, sources = layout.etp, len(piece.sources)
    # Rows arrive ordered by (etp place of the sender, its ep place, expert); `rows` has them by (expert, sender,
    # token), where senders count ep x etp, etp fastest.
    sender = rows.source // T
    expert = chosen.flatten()[rows.slot] - layout.ep.index * local
    arrival = (sender % etp.size) * sources + sender // etp.size
    arrange_back = (arrival * local + expert).argsort(stable=True)
    arrange = torch.empty_like(arrange_back)
    arrange[arrange_back] = torch.arange(len(arrange), device=arrange.device)
    received = rows.rows_from(sender, len(places))
    share = [sum(received[place :: etp.size]) for place in range(etp.size)]
    return PieceRows(
        rows if piece.uncut else _everywhere(rows, places, c, layout), [per_rank[peer] for peer in piece.peers],
        received[etp.index :: etp.size], share, arrange, arrange_back,
    )  # fmt: skip


def _everywhere(rows: RowMap, places: Sequence[int], c: ModelConfig, layout: Layout) -> RowMap:
    """The row map of some ranks' tokens with slots that count in the routing of all ranks."""
    T, k = layout.tokens, c.top_k
    ranks = torch.tensor(places, device=rows.source.device)[rows.source // T]
    return replace(rows, slot=(ranks * T + rows.source % T) * k + rows.slot % k)
