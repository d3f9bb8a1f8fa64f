"""Tensor-parallel attention (Megatron-LM; paper, section 3.1): all tokens are gathered, each rank attends with its
share of the heads, and the partial outputs are summed where the tokens belong: 2 bsh (n-1)/n elements travel per rank.

The gathered tokens are not kept but gathered again in backward, behind the input gradient (as Megatron-LM does).
"""

from __future__ import annotations

from dataclasses import replace

from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.strategies.attention_core import core
from megascale_moe.strategies.collective import gather_tokens, scatter_sums
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.heads import Chosen, spans
from megascale_moe.strategies.layer import SEQUENCES, Layer, Piece, pieces_of
from megascale_moe.strategies.projection import heads, shared


def tensor_parallel_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """From the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]."""
    c, node = layer.model, layer.layout.node
    (piece,) = pieces_of(node, 1)
    ops, inputs = shared(layer, x)
    gathers = [_gather(layer, value, piece) for value in inputs]
    again = None
    if c.attention == "gqa":
        gather = gathers[0]
        twice = gather.writes[0].named(layer.name("ln1_out_again"))  # type: ignore[attr-defined]
        again = replace(gather, phase=Phase.R, writes=(twice,), backward=())
    chosen = Chosen.of_rank(node.index, node.size, c)
    made, found = heads(layer, [op.writes[0] for op in gathers], chosen, None, again)  # type: ignore[misc]
    columns = spans(chosen.queries, c.value_dim)
    shard = Shard(("attn",), SEQUENCES, columns=columns)
    attn = layer.value("attn", (layer.node_tokens, sum(map(len, columns))), shard=shard)
    partial = layer.value(
        "attn_partial", (layer.node_tokens, c.hidden), shard=Shard(("attn_out",), SEQUENCES, partial="node"),
        keep=Keep.NONE,
    )
    y = layer.tokens("attn_out", c.hidden, keep=Keep.NONE)
    return [
        *ops,
        *gathers,
        *made,
        core(layer, found, found.sizes, attn),
        linear(layer.name("out"), attn, partial, layer.name("attention.out.weight")),
        scatter_sums(layer, layer.name("scatter_tokens"), partial, y, piece),
    ], y


def _gather(layer: Layer, x: Value, piece: Piece) -> Op:
    """All tokens of the node, as whole sequences."""
    tensor = parse(x).tensor
    name = "gather_tokens" if layer.model.attention == "gqa" else f"gather_{tensor}"
    shard = Shard((tensor,), SEQUENCES, partial_gradient="node")
    y = layer.value(f"{tensor}_ag", (layer.node_tokens, x.shape[1]), shard=shard, keep=Keep.NONE)
    return gather_tokens(layer, layer.name(name), x, y, piece)
