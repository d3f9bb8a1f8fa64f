"""Sequence-parallel attention (DeepSpeed-Ulysses; paper, section 3.1).

Projections, norms and rotary embedding run on this rank's slice of the sequence with all heads; an all-to-all turns
that into all tokens of its share of the heads, attention runs there, and a second all-to-all turns back:
(2 + 2/m) bsh (n-1)/n^2 elements travel per rank. Cut by peer (paper, section 4.2, from the host):

    QKV projection + all-to-all      the heads of one peer after the other are projected and sent, the own ones last:
                                     while a piece travels the next is computed
    all-to-all + output projection   the own heads' part of the sum is computed while the others' heads arrive

Backward is the mirror image: the gradients of the own piece first while the others' arrive, the others' first where
they leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.comm.mesh import Mesh
from megascale_moe.comm.traffic import as_rows
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.config.refusals import divides
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, hang_backward, product
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.strategies.attention_core import attend, own_tokens_attention
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.exchange import Exchange, communication, in_pieces, in_rank_order
from megascale_moe.strategies.heads import Chosen, pack, select, width_of, within
from megascale_moe.strategies.layer import SEQUENCES, Layer, Piece, pieces_of
from megascale_moe.strategies.projection import Heads, deal, fused_columns, heads, shared
from megascale_moe.strategies.strategy import AttentionStrategy


class SequenceParallel(AttentionStrategy):
    """Each rank its slice of the sequence, and inside of attention its share of the heads."""

    name = "sp"
    title = "sequence-parallel attention"

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        divides("model.heads", model.heads, "parallel.node", mesh.node)

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        return sequence_parallel_attention(layer, x)


SEQUENCE_PARALLEL = SequenceParallel()


def sequence_parallel_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """Return the operators from the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]."""
    c, node = layer.model, layer.layout.node
    if node.size == 1:
        return own_tokens_attention(layer, x)
    ops, inputs = shared(layer, x)
    pieces = pieces_of(node, layer.layout.pieces)
    made, gathered, sizes = _scattered_heads(layer, inputs, pieces)
    width = c.heads * c.value_dim // node.size
    shard = Shard(("attn",), SEQUENCES, columns=(range(node.index * width, (node.index + 1) * width),))
    attn = layer.value("attn", (layer.node_tokens, width), shard=shard)
    outputs, y = _gathered_output(layer, attn, pieces)
    own = slice(node.index * sizes[0], (node.index + 1) * sizes[0])
    return [*ops, *made, *attend(layer, (gathered,), sizes, attn, own), *outputs], y


# --- projections and all-to-all --------------------------------------------------------------------------------------


def _scattered_heads(
    layer: Layer, inputs: Sequence[Value], pieces: Sequence[Piece]
) -> tuple[list[Op], Value, tuple[int, int, int]]:
    """Bring this rank's heads of all tokens of the node together, side by side; sizes: queries, keys, their width."""
    c, node = layer.model, layer.layout.node
    mine = Chosen.of_rank(node.index, node.size, c)
    sizes = (len(mine.queries), len(mine.keys), c.query_dim)
    y = _arrived(layer, pieces_of(node, 1)[0], SEQUENCES)
    if pieces[0].uncut:
        ops, found = heads(layer, inputs, Chosen.of_piece(pieces[0], c), pieces[0])
        return [*ops, _scatter(layer, found, y, pieces[0])], y, sizes
    dealt = [tuple(inputs)] * len(pieces)
    first: list[Op] = []
    if layer.spec.attention == "gqa" and layer.spec.qk_norm == "full":
        op, parts = deal(layer, inputs[0], pieces)
        first, dealt = [op], [(part,) for part in parts]
    made, sends, arrived = [], [], []
    for piece, values in zip(pieces, dealt, strict=True):
        ops, found = heads(layer, values, Chosen.of_piece(piece, c), piece)
        part = _arrived(layer, piece, Rows("gathered", "node", piece.sources))
        made.append(ops)
        arrived.append(part)
        sends.append((_own_heads if piece.own else _scatter)(layer, found, part, piece))
    join = _assemble(layer, arrived, y, pieces)
    others = [op for ops, send in zip(made[1:], sends[1:], strict=True) for op in (*ops, send)]
    back = [join, *reversed(sends[1:]), sends[0]]
    back += [op for ops in (made[0], *reversed(made[1:])) for op in reversed(ops)]
    return hang_backward([*first, *others, *made[0], sends[0], join], [*back, *first]), y, sizes


def _arrived(layer: Layer, piece: Piece, rows: Rows) -> Value:
    """Declare this rank's heads of the tokens of a piece's sources, side by side."""
    keep = Keep.PAPER if layer.spec.attention == "gqa" and layer.spec.qk_norm == "none" else Keep.NONE
    c, node = layer.model, layer.layout.node
    columns = fused_columns(c, Chosen.of_rank(node.index, node.size, c))
    shape = (len(piece.sources) * layer.layout.tokens, sum(map(len, columns)))
    shard = Shard(("q", "k", "v"), rows, columns, side_by_side=True, copied_columns=True)
    return layer.value("heads_a2a", shape, shard, keep, piece=piece)


def _scatter(layer: Layer, found: Heads, y: Value, piece: Piece) -> Op:
    """Send the heads of a piece's peers to them; receive this rank's heads of the sources' tokens."""
    layout, slices, ordered = layer.layout, layer.slices.within, piece.uncut
    T, mine, places = layout.tokens, int(y.shape[1]), within(piece, layer.model)
    widths = [width_of(peer, piece.axis.size, layer.model) for peer in piece.peers]

    def finish(whole: Tensor, _: object) -> Tensor:
        return slices.sequences(whole.view(-1, mine)) if ordered else whole.view(-1, mine)

    sent = [width for peer, width in zip(piece.peers, widths, strict=True) if peer != layout.node.index]
    slopes, typical = tuple(value.gradient for value in found), (T, max(mine, *widths))
    there = Exchange(
        found, (y,), typical, elements=T * sum(sent), shapes=lambda: [(T, mine)] * len(piece.sources), finish=finish,
        pack=lambda q, k, v: [torch.cat((select(q, qs), select(k, ks), select(v, ks)), dim=1) for qs, ks in places],
    )  # fmt: skip
    back = Exchange(
        (y.gradient,), slopes, typical, elements=T * mine * piece.sent, shapes=lambda: [(T, width) for width in widths],
        pack=lambda d: _by_rank(d, layer) if ordered else d.split(T),
        finish=lambda _, parts: _sum_heads(parts, places, found),
    )  # fmt: skip
    return communication(layout, layer.name("scatter_heads", piece), piece, there, back)


def _own_heads(layer: Layer, found: Heads, y: Value, piece: Piece) -> Op:
    """Pack the own heads of the own tokens, as if they had come from another rank."""
    (place,) = within(piece, layer.model)
    op = Op(layer.name("own_heads"), found, (y,), pack, cost=Cost(memory_bytes=2 * y.nbytes))
    return op.input_gradient(found, (y.gradient,), lambda d: _sum_heads([d], [place], found))


def _sum_heads(
    parts: Sequence[Tensor], places: Sequence[tuple[Sequence[int], Sequence[int]]], found: Heads
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v from every peer's share; key heads that went to several ranks sum up."""
    T = parts[0].shape[0]
    (heads, groups, width), value_width = found.sizes, int(found.v.shape[2])
    dq = parts[0].new_empty(T, heads, width)
    dk, dv = parts[0].new_zeros(T, groups, width), parts[0].new_zeros(T, groups, value_width)
    for part, (mine, keys) in zip(parts, places, strict=True):
        q, k, v = part.split([len(mine) * width, len(keys) * width, len(keys) * value_width], dim=1)
        dq[:, mine[0] : mine[-1] + 1] = q.unflatten(1, (len(mine), -1))
        index = torch.tensor(list(keys), device=part.device)
        dk.index_add_(1, index, k.unflatten(1, (len(keys), -1)))
        dv.index_add_(1, index, v.unflatten(1, (len(keys), -1)))
    return dq, dk, dv


def _assemble(layer: Layer, arrived: Sequence[Value], y: Value, pieces: Sequence[Piece]) -> Op:
    """Put all tokens of this rank's heads, which lie in pieces, in the order of the sequences."""
    ranks = [piece.sources for piece in pieces]

    def run(*parts: Tensor) -> Tensor:
        return layer.slices.within.sequences(torch.cat(in_rank_order(parts, ranks, layer.layout.tokens)))

    op = Op(layer.name("assemble_heads"), tuple(arrived), (y,), run, cost=Cost(memory_bytes=2 * y.nbytes))
    return op.input_gradient(arrived, (y.gradient,), lambda d: in_pieces(_by_rank(d, layer), ranks))


# --- all-to-all and output projection --------------------------------------------------------------------------------


def _gathered_output(layer: Layer, attn: Value, pieces: Sequence[Piece]) -> tuple[list[Op], Value]:
    """Return the operators from attn [all tokens, this rank's heads] to the result, [tokens, hidden]."""
    c = layer.model
    y, weight = layer.tokens("attn_out", c.hidden, Keep.NONE), layer.name("attention.out.weight")
    if pieces[0].uncut:
        arrived = layer.tokens("attn_a2a", c.heads * c.value_dim, Keep.NONE, whole="attn")
        return [_gather(layer, attn, arrived, pieces[0]), linear(layer.name("out"), arrived, y, weight)], y
    deal_op, parts = _deal_rows(layer, attn, pieces)
    width = int(attn.shape[1])
    sends: list[Op] = []
    sums: list[Op] = []
    total: Value | None = None
    for piece, part in zip(pieces, parts, strict=True):
        columns = tuple(range(rank * width, (rank + 1) * width) for rank in piece.sources)
        x = part
        if not piece.own:
            shape, shard = (layer.layout.tokens, width * len(columns)), Shard(("attn",), columns=columns)
            x = layer.value("attn_a2a", shape, shard, Keep.NONE, piece=piece)
            sends.append(_gather(layer, part, x, piece))
        result = y if piece is pieces[-1] else layer.value("out_sum", y.shape, keep=Keep.NONE, piece=piece)
        sums.append(_add_product(layer.name("out", piece), x, total, result, (weight, columns), y))
        total = result
    back = [op for pair in zip(reversed(sums[1:]), reversed(sends), strict=True) for op in pair]
    return hang_backward([deal_op, *sends, *sums], [*back, sums[0], deal_op]), y


def _gather(layer: Layer, x: Value, y: Value, piece: Piece) -> Op:
    """Send this rank's heads of the peers' tokens to them; receive the sources' heads of the own, side by side."""
    layout, name = layer.layout, layer.name("gather_heads", piece)
    T, count = layout.tokens, len(piece.distances)
    width = int(y.shape[1]) // count
    shape, ordered, slices = (T, width), piece.uncut, layer.slices.within
    there = Exchange(
        (x,), (y,), shape, shapes=lambda: [shape] * count, finish=lambda _, parts: torch.cat(parts, dim=1),
        pack=lambda x: _by_rank(x, layer) if ordered else [part.contiguous() for part in x.split(T)],
    )  # fmt: skip
    back = Exchange(
        (y.gradient,), (x.gradient,), shape, shapes=lambda: [shape] * count,
        pack=lambda d: [part.contiguous() for part in d.chunk(count, dim=1)],
        finish=lambda whole, parts: slices.sequences(as_rows(whole, parts)) if ordered else as_rows(whole, parts),
    )  # fmt: skip
    return communication(layout, name, piece, there, back)


def _deal_rows(layer: Layer, attn: Value, pieces: Sequence[Piece]) -> tuple[Op, list[Value]]:
    """Divide attn [all tokens, width] into the pieces whose peers have the tokens."""
    ranks, tokens = [piece.peers for piece in pieces], layer.layout.tokens
    columns = attn.shard.columns if attn.shard else None
    parts = [
        layer.value(
            "attn", (len(peers) * tokens, attn.shape[1]), Shard(("attn",), Rows("gathered", "node", peers), columns),
            Keep.NONE, piece=piece,
        )
        for piece, peers in zip(pieces, ranks, strict=True)
    ]  # fmt: skip

    def run_backward(*parts: Tensor) -> Tensor:
        return layer.slices.within.sequences(torch.cat(in_rank_order(parts, ranks, tokens)))

    op = Op(
        layer.name("deal_tokens"), (attn,), tuple(parts), lambda x: in_pieces(_by_rank(x, layer), ranks),
        cost=Cost(memory_bytes=2 * attn.nbytes),
    )  # fmt: skip
    return op.input_gradient((attn,), tuple(map(grad, parts)), run_backward), parts


def _add_product(
    name: str, x: Value, total: Value | None, y: Value, weight: tuple[str, Sequence[range]], final: Value
) -> Op:
    """Compute y = total + x @ weight[:, columns].T; the gradient is that of the `final` sum."""
    matrix, columns = weight
    cuts = [(slice(None), slice(part.start, part.stop)) for part in columns]
    (T, inputs), outputs = x.shape, y.shape[1]
    cost = product(T, outputs, inputs, x.nbytes + 2 * y.nbytes + inputs * outputs * x.dtype.itemsize)

    def run(*args: Tensor) -> Tensor:
        *totals, x, w = args
        for cut, part in zip(cuts, x.chunk(len(cuts), dim=1), strict=True):
            totals = [torch.addmm(totals[0], part, w[cut].t()) if totals else part @ w[cut].t()]
        return totals[0]

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient) -> None:
        for cut, part in zip(cuts, x.chunk(len(cuts), dim=1), strict=True):
            sink.add_mm_at(cut, d.t(), part)

    reads, weights, slope = (x,) if total is None else (total, x), (matrix,), grad(final)
    op = Op(name, reads, (y,), run, weights=weights, cost=cost).input_gradient(
        (x,), (slope,), lambda d, w: torch.cat([d @ w[cut] for cut in cuts], dim=1), weights=weights
    )
    return op.weight_gradient((x, slope), weight_gradient)


# --- the order of tokens ---------------------------------------------------------------------------------------------


def _by_rank(x: Tensor, layer: Layer) -> Sequence[Tensor]:
    """Return each rank's slice of every sequence, [tokens, width], of whole sequences x [tokens of the node, width]."""
    slices: Sequence[Tensor] = layer.slices.within.by_rank(x).split(layer.layout.tokens)
    return slices
