"""Attention proper, on the heads that a rank has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.engine.names import suffixed
from megascale_moe.engine.op import Cost, Op, Phase, Work
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.attention import QueryBlock, attention_backward, attention_forward
from megascale_moe.model.counts import attention_flops_per_token
from megascale_moe.model.rotary import softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.heads import pack, unpack, unpack_keys
from megascale_moe.strategies.layer import Layer
from megascale_moe.strategies.slices import Slices


def core(
    layer: Layer, heads: Sequence[Value], sizes: tuple[int, int, int], y: Value, own: slice = slice(None)
) -> Op:
    """Causal attention inside each document; y [T, H * u] for the T tokens of the queries.

    Queries are those of whole sequences, or of this rank's slices; keys and values always of whole sequences.

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
    sliced = tokens < layer.node_tokens
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
        if not sliced:
            return Slices(rows, layout.length, 1).blocks(0, segments, window)
        return layer.slices.blocks(layout.node.index, segments, window)

    def run(*args: object) -> tuple[Tensor, object]:
        values, (segments, *more) = args[: len(heads)], args[len(heads) :]
        mine = [w[own] for w in more]  # type: ignore
        out, graphs = attention_forward(*by_row(values), blocks(segments), scale, window, *mine)  # type: ignore
        return out.flatten(0, 1).flatten(1), graphs

    def run_backward(*args: object) -> tuple[Tensor, ...] | Tensor:
        values, (segments, graphs, out, d, *more) = args[: len(heads)], args[len(heads) :]
        mine = [w[own] for w in more[:1]]  # type: ignore
        gradient, result = (x.view(rows, len(x) // rows, -1, c.value_dim) for x in (d, out))  # type: ignore
        given = (gradient, by_row(values), result, graphs)  # type: ignore
        parts = attention_backward(*given, blocks(segments), scale, window, *mine)  # type: ignore
        for sink, slope in zip(more[1:], parts[3:], strict=True):
            sink.value()[own] += slope  # type: ignore
        dq, dk, dv = (part.flatten(0, 1) for part in parts[:3])
        if len(values) == 1:
            return pack(dq, dk, dv)
        return (dq, pack(dk, dv)) if len(values) == 2 else (dq, dk, dv)

    # Whatever a rank's share of the queries, it is a fair one: slices are in zig-zag order, or sequences are whole.
    flops = tokens * attention_flops_per_token(c, layer.spec) * queries / c.heads
    cost = Cost(flops, sum(x.nbytes for x in heads) + y.nbytes, work=Work.ATTENTION, size=layout.length)
    backward = Op(
        name=name, phase=Phase.B, reads=(*heads, "segments", graph, y, y.gradient),
        writes=tuple(x.gradient for x in heads), weights=sinks, gradients=sinks, run=run_backward,
        cost=Cost(2.5 * flops, 2 * cost.memory_bytes, work=Work.ATTENTION, size=layout.length),
    )
    return Op(
        name=name, reads=(*heads, "segments"), writes=(y, graph), weights=sinks, run=run, cost=cost,
        backward=(backward,),
    )
