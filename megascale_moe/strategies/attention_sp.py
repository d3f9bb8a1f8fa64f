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
from megascale_moe.comm.traffic import Traffic, as_rows
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, hang_backward, product
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.strategies.attention_core import core
from megascale_moe.strategies.collective import communication, tag, with_backward
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.heads import Chosen, heads_of_rank, pack, select, spans, within
from megascale_moe.strategies.layer import SEQUENCES, Layer, Piece, pieces_of
from megascale_moe.strategies.projection import Heads, deal, heads, shared
from megascale_moe.strategies.refusals import divides
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
    """From the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]."""
    c, node = layer.model, layer.layout.node
    ops, inputs = shared(layer, x)
    if node.size == 1:
        made, found = heads(layer, inputs, Chosen.everything(c), None)
        attn = layer.tokens("attn", c.heads * c.value_dim)
        y = layer.tokens("attn_out", c.hidden, keep=Keep.NONE)
        out = linear(layer.name("out"), attn, y, layer.name("attention.out.weight"))
        return [*ops, *made, core(layer, found, found.sizes, attn), out], y
    pieces = pieces_of(node, layer.layout.pieces)
    made, gathered, sizes = _scattered_heads(layer, inputs, pieces)
    width = c.heads * c.value_dim // node.size
    shard = Shard(("attn",), SEQUENCES, columns=(range(node.index * width, (node.index + 1) * width),))
    attn = layer.value("attn", (layer.node_tokens, width), shard=shard)
    outputs, y = _gathered_output(layer, attn, pieces)
    own = slice(node.index * sizes[0], (node.index + 1) * sizes[0])
    return [*ops, *made, core(layer, (gathered,), sizes, attn, own), *outputs], y


# --- projections and all-to-all --------------------------------------------------------------------------------------


def _scattered_heads(
    layer: Layer, inputs: Sequence[Value], pieces: Sequence[Piece]
) -> tuple[list[Op], Value, tuple[int, int, int]]:
    """All tokens of the node, this rank's heads side by side, and how many there are: queries, keys, their width."""
    c, node = layer.model, layer.layout.node
    mine, keys = heads_of_rank(node.index, node.size, c)
    sizes = (len(mine), len(keys), c.query_dim)
    dealt = [tuple(inputs)] * len(pieces)
    first: list[Op] = []
    if layer.spec.attention == "gqa" and layer.spec.qk_norm == "full" and not pieces[0].uncut:
        op, parts = deal(layer, inputs[0], pieces)
        first, dealt = [op], [(part,) for part in parts]
    made = [
        heads(layer, values, Chosen.of_piece(piece, c), piece) for values, piece in zip(dealt, pieces, strict=True)
    ]
    if pieces[0].uncut:
        y = _arrived(layer, pieces[0], c_width(layer), SEQUENCES)
        return [*made[0][0], _scatter(layer, made[0][1], y, pieces[0])], y, sizes
    rows = [Rows("gathered", "node", piece.sources) for piece in pieces]
    arrived = [_arrived(layer, piece, c_width(layer), r) for piece, r in zip(pieces, rows, strict=True)]
    sends = [
        _own_heads(layer, found, y, piece) if piece.own else _scatter(layer, found, y, piece)
        for (_, found), y, piece in zip(made, arrived, pieces, strict=True)
    ]
    own, others = [*made[0][0], sends[0]], [[*ops, send] for (ops, _), send in zip(made[1:], sends[1:], strict=True)]
    join, y = _assemble(layer, arrived, pieces)
    ops = [*first, *(op for group in others for op in group), *own, join]
    back = [join, *reversed(sends[1:]), *reversed(own)]
    back += [op for group in reversed(others) for op in reversed(group[:-1])]
    return hang_backward(ops, [*back, *first]), y, sizes


def c_width(layer: Layer) -> int:
    """Return the width of this rank's heads side by side."""
    return _width(layer, layer.layout.node.index)


def _width(layer: Layer, rank: int) -> int:
    c = layer.model
    queries, keys = heads_of_rank(rank, layer.layout.node.size, c)
    return len(queries) * c.query_dim + len(keys) * (c.query_dim + c.value_dim)


def _arrived(layer: Layer, piece: Piece, width: int, rows: Rows) -> Value:
    """Declare this rank's heads of the tokens of a piece's sources, side by side."""
    c = layer.model
    keep = Keep.PAPER if layer.spec.attention == "gqa" and layer.spec.qk_norm == "none" else Keep.NONE
    shape = (len(piece.sources) * layer.layout.tokens, width)
    mine, keys = heads_of_rank(layer.layout.node.index, layer.layout.node.size, c)
    columns = (
        *spans(tuple(mine), c.query_dim),
        *spans(tuple(keys), c.query_dim, c.heads * c.query_dim),
        *spans(tuple(keys), c.value_dim, (c.heads + c.key_heads) * c.query_dim),
    )
    shard = Shard(("q", "k", "v"), rows, columns=columns, side_by_side=True, copied_columns=True)
    return layer.value("heads_a2a", shape, piece=piece, shard=shard, keep=keep)


def _scatter(layer: Layer, found: Heads, y: Value, piece: Piece) -> Op:
    """The heads of a piece's peers to them; this rank's heads of the sources' tokens from those."""
    layout, name = layer.layout, layer.name("scatter_heads", piece)
    T, mine, places = layout.tokens, c_width(layer), within(piece, layer.model)
    widths = [_width(layer, peer) for peer in piece.peers]
    ordered, slices = piece.uncut, layer.slices

    def finish(whole: Tensor, _: object) -> Tensor:
        return slices.sequences(whole.view(-1, mine)) if ordered else whole.view(-1, mine)

    def pack_back(d: Tensor) -> Sequence[Tensor]:
        return _by_rank(d, layer) if ordered else d.split(T)

    there = Traffic(
        axis=layout.node, tag=tag(name, Phase.F), dtype=layout.dtype, finish=finish, typical=(T, max(mine, *widths)),
        pack=lambda q, k, v: [torch.cat((select(q, qs), select(k, ks), select(v, ks)), dim=1) for qs, ks in places],
        shapes=lambda: [(T, mine)] * len(piece.sources), distances=piece.way(home=False),
    )  # fmt: skip
    back = Traffic(
        axis=layout.node, tag=tag(name, Phase.B), dtype=layout.dtype, pack=pack_back, typical=there.typical,
        shapes=lambda: [(T, width) for width in widths], distances=piece.way(home=True),
        finish=lambda _, parts: _sum_heads(parts, places, found),
    )  # fmt: skip
    sent = [width for peer, width in zip(piece.peers, widths, strict=True) if peer != layout.node.index]
    slopes = tuple(value.gradient for value in found)
    return with_backward(
        communication(name, Phase.F, found, (y,), there, T * sum(sent), layout),
        communication(name, Phase.B, (y.gradient,), slopes, back, T * mine * piece.sent, layout),
    )


def _own_heads(layer: Layer, found: Heads, y: Value, piece: Piece) -> Op:
    """The own heads of the own tokens, as if they had come from another rank."""
    (place,) = within(piece, layer.model)
    name, cost = layer.name("own_heads"), Cost(memory_bytes=2 * y.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(y.gradient,), writes=tuple(value.gradient for value in found),
        run=lambda d: _sum_heads([d], [place], found), cost=cost,
    )
    return Op(name=name, reads=found, writes=(y,), run=pack, cost=cost, backward=(backward,))


def _sum_heads(
    parts: Sequence[Tensor], places: Sequence[tuple[Sequence[int], Sequence[int]]], found: Heads
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v from every peer's share; key heads that went to several ranks sum up."""
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


def _assemble(layer: Layer, arrived: Sequence[Value], pieces: Sequence[Piece]) -> tuple[Op, Value]:
    """All tokens of this rank's heads from the pieces, put in the order of the sequences."""
    width, tokens = c_width(layer), layer.layout.tokens
    whole = Piece(layer.layout.node, tuple(range(layer.layout.node.size)))
    y = _arrived(layer, whole, width, SEQUENCES)
    ranks = [rank for piece in pieces for rank in piece.sources]
    sizes = [len(piece.sources) for piece in pieces]

    def run(*parts: Tensor) -> Tensor:
        return layer.slices.sequences(torch.cat(_sorted(parts, ranks, tokens)))

    def run_backward(d: Tensor) -> tuple[Tensor, ...]:
        return _stacked(_by_rank(d, layer), ranks, sizes)

    name, cost = layer.name("assemble_heads"), Cost(memory_bytes=2 * y.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(y.gradient,), writes=tuple(part.gradient for part in arrived),
        run=run_backward, cost=cost,
    )
    return Op(name=name, reads=tuple(arrived), writes=(y,), run=run, cost=cost, backward=(backward,)), y


# --- all-to-all and output projection --------------------------------------------------------------------------------


def _gathered_output(layer: Layer, attn: Value, pieces: Sequence[Piece]) -> tuple[list[Op], Value]:
    """From attn [all tokens, this rank's heads] to the result, [tokens, hidden]."""
    c = layer.model
    y, weight = layer.tokens("attn_out", c.hidden, keep=Keep.NONE), layer.name("attention.out.weight")
    if pieces[0].uncut:
        arrived = layer.tokens("attn_a2a", c.heads * c.value_dim, keep=Keep.NONE, whole="attn")
        return [
            _gather(layer, attn, arrived, pieces[0]),
            linear(layer.name("out"), arrived, y, weight),
        ], y
    deal_op, parts = _deal_rows(layer, attn, pieces)
    width = int(attn.shape[1])
    arrived_parts = [parts[0]]
    for piece in pieces[1:]:
        columns = tuple(range(rank * width, (rank + 1) * width) for rank in piece.sources)
        shape = (layer.layout.tokens, width * len(columns))
        shard = Shard(("attn",), columns=columns)
        arrived_parts.append(layer.value("attn_a2a", shape, piece=piece, shard=shard, keep=Keep.NONE))
    sends = [_gather(layer, x, y, p) for x, y, p in zip(parts[1:], arrived_parts[1:], pieces[1:], strict=True)]
    sums: list[Op] = []
    total: Value | None = None
    for piece, x in zip(pieces, arrived_parts, strict=True):
        last = piece is pieces[-1]
        part = y if last else layer.value("out_sum", y.shape, piece=piece, keep=Keep.NONE)
        columns = tuple(range(rank * width, (rank + 1) * width) for rank in piece.sources)
        sums.append(_add_product(layer.name("out", piece), x, total, part, (weight, columns), y))
        total = part
    back = [op for pair in zip(reversed(sums[1:]), reversed(sends), strict=True) for op in pair]
    return hang_backward([deal_op, *sends, *sums], [*back, sums[0], deal_op]), y


def _gather(layer: Layer, x: Value, y: Value, piece: Piece) -> Op:
    """This rank's heads of the peers' tokens to them; the sources' heads of the own tokens, side by side."""
    layout, name = layer.layout, layer.name("gather_heads", piece)
    T, count = layout.tokens, len(piece.distances)
    width = int(y.shape[1]) // count
    shape, ordered, slices = (T, width), piece.uncut, layer.slices
    there = Traffic(
        axis=layout.node, tag=tag(name, Phase.F), dtype=layout.dtype, typical=shape, shapes=lambda: [shape] * count,
        pack=lambda x: _by_rank(x, layer) if ordered else [part.contiguous() for part in x.split(T)],
        finish=lambda _, parts: torch.cat(parts, dim=1), distances=piece.way(home=False),
    )  # fmt: skip
    back = Traffic(
        axis=layout.node, tag=tag(name, Phase.B), dtype=layout.dtype, typical=shape, shapes=lambda: [shape] * count,
        pack=lambda d: [part.contiguous() for part in d.chunk(count, dim=1)], distances=piece.way(home=True),
        finish=lambda whole, parts: slices.sequences(as_rows(whole, parts)) if ordered else as_rows(whole, parts),
    )  # fmt: skip
    elements = T * width * piece.sent
    return with_backward(
        communication(name, Phase.F, (x,), (y,), there, elements, layout),
        communication(name, Phase.B, (y.gradient,), (x.gradient,), back, elements, layout),
    )


def _deal_rows(layer: Layer, attn: Value, pieces: Sequence[Piece]) -> tuple[Op, list[Value]]:
    """attn [all tokens, width] to the pieces whose peers have the tokens."""
    ranks, tokens = [rank for piece in pieces for rank in piece.peers], layer.layout.tokens
    sizes = [len(piece.peers) for piece in pieces]
    columns = attn.shard.columns if attn.shard else None
    parts = [
        layer.value(
            "attn", (size * tokens, attn.shape[1]), piece=piece, keep=Keep.NONE,
            shard=Shard(("attn",), Rows("gathered", "node", piece.peers), columns=columns),
        )
        for piece, size in zip(pieces, sizes, strict=True)
    ]  # fmt: skip
    name, cost = layer.name("deal_tokens"), Cost(memory_bytes=2 * attn.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=tuple(map(grad, parts)), writes=(attn.gradient,), cost=cost,
        run=lambda *parts: layer.slices.sequences(torch.cat(_sorted(parts, ranks, tokens))),
    )
    deal_op = Op(
        name=name, reads=(attn,), writes=tuple(parts), cost=cost, backward=(backward,),
        run=lambda x: _stacked(_by_rank(x, layer), ranks, sizes),
    )
    return deal_op, parts


def _add_product(
    name: str, x: Value, total: Value | None, y: Value, weight: tuple[str, Sequence[range]], final: Value
) -> Op:
    """y = total + x @ weight[:, columns].T; the gradient is that of the `final` sum."""
    matrix, columns = weight
    width = len(columns[0])
    (T, inputs), outputs = x.shape, y.shape[1]
    cost = product(T, outputs, inputs, x.nbytes + 2 * y.nbytes + inputs * outputs * x.dtype.itemsize)

    def cut(w: Tensor) -> list[Tensor]:
        return [w[:, part.start : part.stop] for part in columns]

    def run(*args: Tensor) -> Tensor:
        *totals, x, w = args
        parts = list(zip(x.split(width, dim=1), cut(w), strict=True))
        out = totals[0] if totals else None
        for part, piece in parts:
            out = part @ piece.t() if out is None else torch.addmm(out, part, piece.t())
        assert out is not None
        return out

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient) -> None:
        for part, rows in zip(columns, x.split(width, dim=1), strict=True):
            sink.add_mm_at((slice(None), slice(part.start, part.stop)), d.t(), rows)

    d = grad(final)
    b = Op(
        name=name, phase=Phase.B, reads=(d,), writes=(x.gradient,), weights=(matrix,), cost=cost,
        run=lambda d, w: torch.cat([d @ piece for piece in cut(w)], dim=1),
    )
    w = Op(
        name=name, phase=Phase.W, reads=(x, d), writes=(), gradients=(matrix,), run=weight_gradient, cost=cost
    )
    reads = (x,) if total is None else (total, x)
    return Op(name=name, reads=reads, writes=(y,), weights=(matrix,), run=run, cost=cost, backward=(b, w))


# --- the order of tokens ---------------------------------------------------------------------------------------------


def _by_rank(x: Tensor, layer: Layer) -> Sequence[Tensor]:
    """Whole sequences x [tokens of the node, width] -> for each rank its slice of every one, [tokens, width]."""
    slices: Sequence[Tensor] = layer.slices.by_rank(x).split(layer.layout.tokens)
    return slices


def _sorted(parts: Sequence[Tensor], ranks: Sequence[int], tokens: int) -> list[Tensor]:
    """The slices of `ranks`, stacked in pieces, in rank order."""
    each = [part for stack in parts for part in stack.split(tokens)]
    return [part for _, part in sorted(zip(ranks, each, strict=True), key=lambda pair: pair[0])]


def _stacked(slices: Sequence[Tensor], ranks: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The slices of all ranks in the order of `ranks`, stacked in pieces of so many."""
    found, start = [], 0
    for size in sizes:
        chosen = [slices[rank] for rank in ranks[start : start + size]]
        found.append(chosen[0] if size == 1 else torch.cat(chosen))
        start += size
    return tuple(found)
