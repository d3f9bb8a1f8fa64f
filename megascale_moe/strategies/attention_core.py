"""Attention proper, on the heads that a rank has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.engine.names import suffixed
from megascale_moe.engine.op import Cost, Op, Phase, Work
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.attention import Graph, Spans, causal_attention_backward, causal_attention_forward
from megascale_moe.model.counts import attention_flops_per_token
from megascale_moe.model.rotary import softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.heads import pack, unpack
from megascale_moe.strategies.layer import Layer


def core(
    layer: Layer, heads: Sequence[Value], sizes: tuple[int, int, int], y: Value, own: slice = slice(None)
) -> Op:
    """Causal attention inside each document; y [T, H * u] for whole sequences of T tokens.

    Args:
        heads: q [T, H, w], k [T, G, w] and v [T, G, u], or one value with all of them side by side.
        sizes: H, G and w.
        own: which of the heads whose sinks this rank has are those.
    """
    c, layout = layer.model, layer.layout
    scale, window, rows, length = softmax_scale(c), layer.spec.window, layout.rows, layout.length
    queries, keys, width = sizes
    name, packed = layer.name("attention"), len(heads) == 1
    sinks = (layer.name("attention.sinks"),) if layer.spec.sinks else ()
    statistics = 0.0 if sinks else 4.0 * layer.node_tokens * queries
    graph = Value(suffixed(name, "graph"), (statistics,), torch.uint8, keep=Keep.PAPER)

    def by_row(values: Sequence[Tensor]) -> list[Tensor]:
        split = unpack(values[0], queries, keys, width) if packed else values
        return [x.reshape(rows, length, -1, x.shape[-1]) for x in split]

    def spans(segments: Segments) -> Spans:
        return () if segments.is_whole_rows else segments.spans

    def run(*args: object) -> tuple[Tensor, Graph | None]:
        values, (segments, *more) = args[: len(heads)], args[len(heads) :]
        where, mine = spans(segments), [w[own] for w in more]  # type: ignore
        out, graph = causal_attention_forward(*by_row(values), where, scale, window, *mine)  # type: ignore
        return out.reshape(rows * length, -1), graph

    def run_backward(*args: object) -> tuple[Tensor, ...] | Tensor:
        values, (segments, graph, out, d, *more) = args[: len(heads)], args[len(heads) :]
        gradient, result = (x.view(rows, length, -1, c.value_dim) for x in (d, out))  # type: ignore
        parts = causal_attention_backward(
            gradient, *by_row(values), result, graph, spans(segments), scale, window,  # type: ignore
            *(w[own] for w in more[:1]),  # type: ignore
        )  # fmt: skip
        for sink, slope in zip(more[1:], parts[3:], strict=True):
            sink.value()[own] += slope  # type: ignore
        flat = tuple(part.flatten(0, 1) for part in parts[:3])
        return pack(*flat) if packed else flat

    flops = layer.node_tokens * attention_flops_per_token(c, layer.spec) * queries / c.heads
    cost = Cost(flops, sum(x.nbytes for x in heads) + y.nbytes, work=Work.ATTENTION, size=length)
    backward = Op(
        name=name, phase=Phase.B, reads=(*heads, "segments", graph, y, y.gradient),
        writes=tuple(x.gradient for x in heads), weights=sinks, gradients=sinks, run=run_backward,
        cost=Cost(2.5 * flops, 2 * cost.memory_bytes, work=Work.ATTENTION, size=length),
    )
    return Op(
        name=name, reads=(*heads, "segments"), writes=(y, graph), weights=sinks, run=run, cost=cost,
        backward=(backward,),
    )
