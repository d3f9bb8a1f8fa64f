"""Attention proper, on the heads that a rank has.

Queries stay where they are. Keys and values of whole sequences come to them: from the ranks with the same place in
their nodes where several nodes share a sequence, then, unless the strategy has brought them together already, from the
ranks of the node. In this order each slice passes the link between nodes once for each node that needs it. Backward is
the dual, a reduce-scatter over the node and one over nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.names import suffixed
from megascale_moe.engine.op import Cost, Op, Work
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.attention import QueryBlock, attention_backward, attention_forward
from megascale_moe.model.counts import attention_flops_per_token
from megascale_moe.model.rotary import softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.collective import gather_tokens
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.heads import Chosen, pack, spans, unpack, unpack_keys
from megascale_moe.strategies.layer import WHOLE_SEQUENCES, Layer, pieces_of
from megascale_moe.strategies.projection import Heads, shared
from megascale_moe.strategies.projection import heads as heads_of


def own_tokens_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """All heads of this rank's tokens, from the normed input x [tokens, hidden] to the result, [tokens, hidden]."""
    ops, inputs = shared(layer, x)
    made, found = heads_of(layer, inputs, Chosen.everything(layer.model), None)
    attended, y = attended_output(layer, found)
    return [*ops, *made, *attended], y


def attended_output(layer: Layer, found: Heads) -> tuple[list[Op], Value]:
    """From all heads of this rank's queries to the result, [tokens, hidden]."""
    c = layer.model
    attn = layer.tokens("attn", c.heads * c.value_dim)
    y = layer.tokens("attn_out", c.hidden, keep=Keep.NONE)
    out = linear(layer.name("out"), attn, y, layer.name("attention.out.weight"))
    return [*attend(layer, found, found.sizes, attn), out], y


def attend(
    layer: Layer, heads: Sequence[Value], sizes: tuple[int, int, int], y: Value, own: slice = slice(None)
) -> list[Op]:
    """Return `core`, preceded by the gathers that complete keys and values of a rank's or a node's tokens to those of
    whole sequences. Heads are q, k, v, or all of them side by side.
    """
    tokens = heads[-1].shape[0]
    if tokens == layer.whole_tokens:
        return [core(layer, heads, sizes, y, own)]
    c, node, first, (queries, keys, width) = layer.model, layer.layout.node, heads[0], sizes
    alone, alias = tokens == layer.layout.tokens, first if len(heads) == 1 else ""
    rows = first.shard.rows if first.shard else Rows()
    chosen = Chosen.everything(c) if alone else Chosen.of_rank(node.index, node.size, c)
    mine, theirs = chosen.queries, chosen.keys
    columns = (*spans(theirs, c.query_dim), *spans(theirs, c.value_dim, c.key_heads * c.query_dim))
    shard = Shard(("k", "v"), rows, columns, side_by_side=True, copied_columns=not alone)
    kv = layer.value("keys", (tokens, keys * (width + c.value_dim)), shard=shard, keep=Keep.NONE, alias=alias)
    if alias:
        shard = Shard(("q",), rows, spans(mine, 1))
        q = layer.value("own_q", (tokens, queries, width), shard=shard, keep=Keep.NONE, alias=alias)
        apart = cut_apart(layer.name("split_heads"), first, (q, kv))
    else:
        q, apart = first, side_by_side(layer.name("pack_keys"), heads[1:], kv)
    gathers, everyone = whole_sequences(layer, kv, "keys")
    return [apart, *gathers, core(layer, (q, everyone), sizes, y, own)]


def whole_sequences(layer: Layer, x: Value, what: str) -> tuple[list[Op], Value]:
    """x of this rank's tokens, or of its node's in their order, as whole sequences, [tokens of the sequences, width].

    The gradient is what this rank's queries add to it, until it is home.
    """
    layout, slices, ops = layer.layout, replace(layer.slices, crossed=True), list[Op]()
    inside = x.shape[0] < layer.node_tokens
    hops = [(layout.cp, "_of_nodes"), (layout.node, "")] if inside else [(layout.cp, "")]
    for axis, which in (hop for hop in hops if hop[0].size > 1):
        order = None if which else slices if inside else slices.between  # in rank order as long as a hop follows
        rows = WHOLE_SEQUENCES if order else Rows("gathered", axis.name)
        shard = x.lying(rows=rows, partial_gradient="sequence" if inside and order else axis.name).shard
        shape, (piece,) = (x.shape[0] * axis.size, x.shape[1]), pieces_of(axis, 1)
        y = layer.value(f"{what}{which or '_ag'}", shape, shard=shard, keep=Keep.NONE)
        ops.append(gather_tokens(layout, layer.name(f"gather_{what}{which}"), x, y, piece, slices=order))
        x = y
    return ops, x


def side_by_side(name: str, parts: Sequence[Value], y: Value) -> Op:
    """Matrices or heads of the same tokens side by side, so that one message has all."""
    op = Op(name, tuple(parts), (y,), pack, cost=Cost(memory_bytes=2 * y.nbytes))
    return op.input_gradient(
        parts, (y.gradient,), lambda d: tuple(part.contiguous() for part in _cut(d, parts))
    )


def cut_apart(name: str, x: Value, parts: Sequence[Value]) -> Op:
    """Views of what lies side by side."""
    op = Op(name, (x,), tuple(parts), lambda x: _cut(x, parts))
    return op.input_gradient(
        (x,), tuple(part.gradient for part in parts), pack, cost=Cost(memory_bytes=2 * x.nbytes)
    )


def _cut(x: Tensor, parts: Sequence[Value]) -> tuple[Tensor, ...]:
    """The columns of each part, in its shape."""
    shapes = [tuple(map(int, part.shape[1:])) for part in parts]
    columns = x.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(each.unflatten(1, shape) for each, shape in zip(columns, shapes, strict=True))


def core(layer: Layer, heads: Sequence[Value], sizes: tuple[int, int, int], y: Value, own: slice = slice(None)) -> Op:
    """Return causal attention inside each document; y [T, H * u] for the T tokens of the queries.

    Queries are those of whole sequences, or of a rank's or a node's share; keys and values always of whole sequences.

    Args:
        heads: q [T, H, w], k [S, G, w] and v [S, G, u]; or q, and keys and values side by side; or one value with all
            of them side by side.
        sizes: H, G and w.
        own: which of the heads whose sinks this rank has are those.
    """
    c, layout = layer.model, layer.layout
    scale, window, rows = softmax_scale(c), layer.spec.window, layout.rows
    queries, keys, width = sizes
    tokens, name = heads[0].shape[0], layer.name("attention")
    sinks = (layer.name("attention.sinks"),) if layer.spec.sinks else ()
    statistics = 0.0 if sinks else 4.0 * tokens * queries
    graph = Value(suffixed(name, "graph"), (statistics,), torch.uint8, keep=Keep.PAPER)

    def by_row(values: Sequence[Tensor]) -> list[Tensor]:
        split: Sequence[Tensor] = values
        if len(values) == 1:
            split = unpack(values[0], queries, keys, width)
        elif len(values) == 2:
            split = (values[0], *unpack_keys(values[1], keys, width))
        return [x.reshape(rows, -1, *x.shape[1:]) for x in split]

    def blocks(segments: Segments) -> list[QueryBlock]:
        if tokens == layer.node_tokens:
            return layer.slices.between.blocks(layout.cp.index, segments, window)
        return layer.slices.blocks(layout.sequence.index, segments, window)

    def run(*args: Any) -> tuple[Tensor, object]:
        values, (segments, *sinks) = args[: len(heads)], args[len(heads) :]
        q, k, v = by_row(values)
        out, graphs = attention_forward(q, k, v, blocks(segments), scale, window, *(w[own] for w in sinks))
        return out.flatten(0, 1).flatten(1), graphs

    def run_backward(*args: Any) -> tuple[Tensor, ...] | Tensor:
        values, (segments, graphs, out, d, *sinks) = args[: len(heads)], args[len(heads) :]
        gradient, result = (x.view(rows, len(x) // rows, -1, c.value_dim) for x in (d, out))
        dq, dk, dv, *slopes = attention_backward(
            gradient, by_row(values), result, graphs, blocks(segments), scale, window, *(w[own] for w in sinks[:1])
        )
        for sink, slope in zip(sinks[1:], slopes, strict=True):
            sink.value()[own] += slope
        dq, dk, dv = (part.flatten(0, 1) for part in (dq, dk, dv))
        if len(values) == 1:
            return pack(dq, dk, dv)
        return (dq, pack(dk, dv)) if len(values) == 2 else (dq, dk, dv)

    # Whatever a rank's share of the queries, it is a fair one: shares are in zig-zag order, or sequences are whole.
    flops = tokens * attention_flops_per_token(c, layer.spec) * queries / c.heads
    cost = Cost(flops, sum(x.nbytes for x in heads) + y.nbytes, work=Work.ATTENTION, size=layout.length)
    op = Op(name, (*heads, "segments"), (y, graph), run, weights=sinks, cost=cost)
    reads = (*heads, "segments", graph, y, y.gradient)
    return op.input_gradient(heads, reads, run_backward, weights=sinks, gradients=sinks, cost=cost.times(2.5, 2))
